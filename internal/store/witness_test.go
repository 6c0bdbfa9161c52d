package store

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
)

func witnessAt(t testing.TB, path, node string) *Witness {
	t.Helper()
	w, err := OpenWitness(path, node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func known(origin, run, seq int64, head byte) handover.Figures {
	return handover.Figures{Origin: origin, Nodes: []handover.NodeFigures{{Node: "a", Run: run, Seq: seq, Head: handover.Digest{head}}}}
}

// Whatever becomes of one record, the other one counts; of none, the file is
// refused; and only a file that never had one is empty.
func TestWitnessFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "witness")
	w := witnessAt(t, path, "a")
	w.note(1, audit.Head{Seq: 1}, nil) // not started: nothing is written
	w.Start(3)
	if got := witnessAt(t, path, "a").Known(); got.Origin != 0 {
		t.Errorf("a file without records knows of %v", got)
	}
	for seq := range int64(5) {
		w.note(7, audit.Head{Seq: seq, Hash: [32]byte{byte(seq)}}, bytes.Repeat([]byte{byte(seq)}, 64))
	}
	w.Freeze()
	w.note(7, audit.Head{Seq: 99}, nil)
	if err := w.Sync(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		torn []int // bytes that are not what was written
		want handover.Figures
	}{
		{"whole", nil, known(3, 7, 4, 4)},
		{"the newer record torn", []int{witnessSlot + 30}, known(3, 7, 3, 3)},
		{"its checksum torn", []int{witnessSlot + witnessSize - 1}, known(3, 7, 3, 3)},
		{"the older record torn", []int{0}, known(3, 7, 4, 4)},
		{"both torn", []int{50, witnessSlot + 50}, handover.Figures{}},
	} {
		file := append([]byte(nil), whole...)
		for _, at := range test.torn {
			file[at] ^= 1
		}
		path := filepath.Join(t.TempDir(), "witness")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		w, err := OpenWitness(path, "a")
		if test.want.Origin == 0 {
			if err == nil || !strings.Contains(err.Error(), "damaged") {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if diff := cmp.Diff(test.want, w.Known()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
		if head, sig := w.Signed(); head.Seq != test.want.Nodes[0].Seq || sig[63] != byte(head.Seq) {
			t.Errorf("%s: head %d is signed %x", test.name, head.Seq, sig)
		}
		_ = w.Close()
	}
	if _, err := OpenWitness(path, "b"); err == nil {
		t.Error("the file of node a is taken for node b's")
	}
}

// The file has each commit before its caller knows of it, by whatever way the
// commit became known, and goes on where an earlier process ended.
func TestWitnessOfCommits(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	path := filepath.Join(t.TempDir(), "witness")
	for run := int64(1); run <= 2; run++ {
		cfg := s.config("a")
		cfg.Witness = witnessAt(t, path, "a")
		cfg.Witness.Start(1)
		db := s.openWith(cfg)
		for range 3 {
			if err := db.Record(t.Context(), audit.Event{Action: audit.Alarm}); err != nil {
				t.Fatal(err)
			}
			now, err := db.Standing(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(now.Figures, witnessAt(t, path, "a").Known()); diff != "" {
				t.Fatalf("run %d: database and file (-database +file):\n%s", run, diff)
			}
		}
		db.Close()
	}
}

// A committer whose database is set back under it is fenced and says why, also when
// it has nothing to commit but connects again; one whose run is taken over says that
// it was not set back. Neither commits again.
func TestSetBackInUse(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		sql     string
		setBack bool
		idle    bool
	}{
		"set back":       {"UPDATE kme.node_run SET mark = mark - 1, seq = seq - 1, head = decode(repeat('00', 32), 'hex')", true, false},
		"lost":           {"DELETE FROM kme.node_run", true, false},
		"an earlier run": {"UPDATE kme.node_run SET run = run - 1", true, false},
		"taken over":     {"UPDATE kme.node_run SET run = run + 1", false, false},
		"and connections lost": {`UPDATE kme.node_run SET mark = mark - 1;
			SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			db := s.open("a")
			if err := db.Record(t.Context(), audit.Event{Action: audit.Alarm}); err != nil {
				t.Fatal(err)
			}
			s.super(func(conn *pgx.Conn) error {
				_, err := conn.Exec(t.Context(), test.sql)
				return err
			})
			if !test.idle {
				if err := db.Record(t.Context(), audit.Event{Action: audit.Alarm}); err == nil {
					t.Error("an event was committed all the same")
				}
			}
			<-db.Fenced()
			if back := db.SetBack(); (back != "") != test.setBack {
				t.Errorf("set back: %q", back)
			}
		})
	}
}

// Of what a peer says of itself the highest is kept, field by field, and a new
// origin begins anew.
func TestFigures(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("a")
	peer := kme("KM2")
	if f, err := db.Figures(t.Context(), peer); err != nil || f.Origin != 0 {
		t.Fatalf("before anything was said: %v, %v", f, err)
	}
	for i, step := range []struct{ said, want handover.Figures }{
		{known(1, 5, 100, 1), known(1, 5, 100, 1)},
		{known(1, 5, 90, 2), known(1, 5, 100, 1)},  // came late
		{known(1, 6, 90, 2), known(1, 6, 100, 1)},  // restored, and started again
		{known(1, 6, 101, 3), known(1, 6, 101, 3)}, // more
		{known(2, 4, 50, 4), known(2, 4, 50, 4)},   // recovered
		{known(1, 9, 999, 5), known(2, 4, 50, 4)},
	} {
		if err := db.HearFigures(t.Context(), peer, step.said); err != nil {
			t.Fatal(err)
		}
		got, err := db.Figures(t.Context(), peer)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("step %d (-want +got):\n%s", i, diff)
		}
	}
}
