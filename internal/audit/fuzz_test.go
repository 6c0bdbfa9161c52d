package audit

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit/audittest"
)

// memoryLog is a log of a few events in memory.
type memoryLog struct {
	key   LogKey
	c     Checkpoint
	note  []byte
	rows  []Row
	tiles map[[2]int64][]byte
}

func newMemoryLog(t testing.TB, events int) *memoryLog {
	t.Helper()
	list := make([]Event, events)
	for i := range list {
		list[i] = Event{Action: Alarm, Outcome: Done, Reason: "r"}
	}
	return newMemoryLogOf(t, 1, list...)
}

// newMemoryLogOf is the log of an origin of the site's account.
func newMemoryLogOf(t testing.TB, origin int64, events ...Event) *memoryLog {
	t.Helper()
	key := audittest.KeyOf(7)
	signer, err := NewLogSigner(LogName("qutemail.example", "km1", origin), key)
	if err != nil {
		t.Fatal(err)
	}
	l := &memoryLog{tiles: make(map[[2]int64][]byte)}
	if l.key, err = ParseLogKey(signer.VerifierKey()); err != nil {
		t.Fatal(err)
	}
	var head Head
	var tree Tree
	for i, e := range events {
		prev := head.Hash
		var body []byte
		e.Site, e.Node, e.Run, e.At = "km1", "a", 1, time.UnixMilli(int64(i))
		body, head = head.Append(nil, &e)
		l.rows = append(l.rows, Row{Leaf: int64(i), Node: "a", Seq: head.Seq, Prev: prev[:], Body: body})
		tree.Append(tlog.RecordHash(body))
	}
	for _, tile := range tree.Tiles() {
		l.tiles[[2]int64{int64(tile.Level), tile.N}] = tile.Data
	}
	l.c = Checkpoint{Origin: signer.Name(), Size: tree.Size(), Root: tree.Root()}
	if l.note, err = note.Sign(&note.Note{Text: l.c.Text()}, signer); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *memoryLog) Tile(level int, n int64, width int) ([]byte, error) {
	return l.tiles[[2]int64{int64(level), n}][:width*tlog.HashSize], nil
}

func (l *memoryLog) Rows(_ context.Context, first, end int64, do func(Row) error) error {
	for _, r := range l.rows[first:end] {
		if err := do(r); err != nil {
			return err
		}
	}
	return nil
}

func (l *memoryLog) NodeKeys(context.Context) (map[string]string, error) { return nil, nil }

func (l *memoryLog) Tail(context.Context, func(Row) error) error { return nil }

func (l *memoryLog) bundle(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := WriteBundle(t.Context(), &b, BundleSpec{Key: "k", Signed: l.note, Checkpoint: l.c, End: l.c.Size}, l); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// FuzzLeaf: a line of an event that is read is written again as it was.
func FuzzLeaf(f *testing.F) {
	for _, r := range newMemoryLog(f, 2).rows {
		f.Add(bytes.TrimSuffix(r.AppendText(nil), []byte{'\n'}))
	}
	f.Add([]byte("1\ta\t2\t\t-\t{}"))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := ParseRow(line)
		if err != nil {
			return
		}
		if again := r.AppendText(nil); !bytes.Equal(bytes.TrimSuffix(again, []byte{'\n'}), line) {
			t.Errorf("%q is written again as %q", line, again)
		}
		p, err := placeOf(r.Body)
		if e, perr := ParseEvent(r.Body); err == nil && perr == nil && (e.Node != p.node || e.Seq != p.seq) && bytes.Equal(e.AppendText(nil), r.Body) {
			t.Errorf("%q is read as event %d of %q, and as %+v", r.Body, p.seq, p.node, e)
		}
	})
}

// FuzzCheckpoint: what is read is written again as it was, and no forged one opens.
func FuzzCheckpoint(f *testing.F) {
	l := newMemoryLog(f, 3)
	f.Add(l.note)
	f.Add([]byte("a/1\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if c, err := ParseCheckpoint(string(text)); err == nil && c.Text() != string(text) {
			t.Errorf("%q is written again as %q", text, c.Text())
		}
		if c, _, err := OpenCheckpoint(text, l.key); err == nil && c != l.c {
			t.Errorf("forged: %+v", c)
		}
	})
}

// FuzzProof: no proof holds but of an event that is in the log.
func FuzzProof(f *testing.F) {
	l := newMemoryLog(f, 300)
	proof, err := ProveLeaf(l.c, 257, l)
	if err != nil {
		f.Fatal(err)
	}
	text, err := json.Marshal(Proof{Leaf: 257, Text: string(l.rows[257].Body), Proof: proof, Checkpoint: string(l.note)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParseProof(text)
		if err != nil {
			return
		}
		if _, _, _, err := p.Verify(l.key); err == nil && p.Text != string(l.rows[p.Leaf].Body) {
			t.Errorf("it proves %q", p.Text)
		}
	})
}

// FuzzBundle: whatever a bundle says, one that verifies has the log's events.
func FuzzBundle(f *testing.F) {
	l := newMemoryLog(f, 3) // few: one try has to be quick
	f.Add(l.bundle(f))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := OpenBundle(bytes.NewReader(text))
		if err != nil {
			return
		}
		if _, _, _, err := VerifyBundle(t.Context(), l.key, nil, Known{}, true, b); err != nil || len(b.tails) > 0 || b.First != 0 {
			return
		}
		i := 0
		if err := b.Rows(t.Context(), 0, l.c.Size, func(r Row) error {
			if !bytes.Equal(r.Body, l.rows[i].Body) {
				t.Errorf("leaf %d is %q", i, r.Body)
			}
			i++
			return nil
		}); err != nil || i != len(l.rows) {
			t.Errorf("%d leaves, error %v", i, err)
		}
	})
}

// The right edge that this package keeps makes the trees that x/mod's tlog makes.
func TestTree(t *testing.T) {
	t.Parallel()
	var tree Tree
	var stored []tlog.Hash
	tiles := make(map[[2]int64][]byte)
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		hashes := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			hashes[i] = stored[x]
		}
		return hashes, nil
	})
	for i := range int64(1500) {
		text := []byte{byte(i), byte(i >> 8)}
		more, err := tlog.StoredHashes(i, text, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, more...)
		tree.Append(tlog.RecordHash(text))
		want, err := tlog.TreeHash(i+1, reader)
		if err != nil || tree.Root() != want {
			t.Fatalf("a tree of %d leaves: root %v, want %v (%v)", i+1, tree.Root(), want, err)
		}
		for _, tile := range tree.Tiles() {
			tiles[[2]int64{int64(tile.Level), tile.N}] = tile.Data
		}
		if i%97 > 0 {
			continue
		}
		again, err := LoadTree(i+1, func(level int, n int64) ([]byte, error) { return tiles[[2]int64{int64(level), n}], nil })
		if err != nil || again.Root() != want {
			t.Fatalf("loaded with %d leaves: %v", i+1, err)
		}
		tree = *again
	}
}
