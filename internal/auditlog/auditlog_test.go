package auditlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

func TestFoldAndVerify(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.node("a"), s.node("b")
	q, r := s.sequencer(), s.reader()
	total := 2
	for round, n := range []int{1, 3, 250, 1, 700, 5} {
		a.requests(s, n)
		b.requests(s, 2*n)
		total += 3 * n
		if round == 3 {
			q.Close() // the next step reads how the tree stands
		}
		f := s.step(q)
		if f.Size != int64(total) {
			t.Fatalf("round %d: the tree has %d leaves, want %d", round, f.Size, total)
		}
		c, _, err := audit.OpenCheckpoint(f.Note, s.logKey())
		if err != nil || c.Size != f.Size {
			t.Fatalf("round %d: checkpoint %+v, error %v", round, c, err)
		}
		a.requests(s, 2) // beyond the tree
		report, err := s.verify(r, nil)
		if err != nil || report.Leaves != int64(total) || report.Tail != 2 {
			t.Fatalf("round %d: %+v, error %v", round, report, err)
		}
		total += 2
	}
	if f := s.step(q); f.Events != 2 {
		t.Errorf("%d events folded, want the last 2", f.Events)
	}
	if f := s.step(q); f.Events != 0 || f.Note != nil {
		t.Errorf("nothing happened, and a checkpoint was made: %+v", f)
	}
}

// A second sequencer waits for the first, and takes over where it ended.
func TestOneSequencerLeads(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.node("a")
	first, second := s.sequencer(), s.sequencer()
	s.step(first)
	a.requests(s, 3)
	if f := s.step(second); f.Leads || f.Events != 0 {
		t.Fatalf("two sequencers lead: %+v", f)
	}
	first.Close()
	f := s.step(second)
	for late := time.Now().Add(time.Minute); !f.Leads && time.Now().Before(late); { // the server notices the end of a connection in a moment
		f = s.step(second)
	}
	if f.Events != 3 || f.Size != 4 {
		t.Errorf("after the first sequencer's end: %+v", f)
	}
}

// The clock is set back over midnight: the events of a day come before those of the
// day before.
func TestClockSetBackOverMidnight(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.clock.Store(time.Date(2026, 3, 1, 23, 59, 0, 0, time.UTC).UnixMilli())
	a := s.node("a")
	q, r := s.sequencer(), s.reader()
	want := 1
	for _, step := range []time.Duration{0, 2 * time.Minute, -2 * time.Minute, 2 * time.Minute, 48 * time.Hour, -48 * time.Hour} {
		s.clock.Add(step.Milliseconds())
		a.requests(s, 3)
		want += 3
		if step > 0 {
			s.step(q)
		}
	}
	if f := s.step(q); f.Size != int64(want) {
		t.Fatalf("%d leaves, want %d", f.Size, want)
	}
	if report, err := s.verify(r, nil); err != nil || report.Leaves != int64(want) {
		t.Errorf("%+v, error %v", report, err)
	}
}

// forged is one thing that a superuser can do, and what the auditor is told.
type forged struct {
	name string
	do   func(*site)
	node string
	seq  int64
}

// whole are the changes of events that are in the tree; a node has 100 there.
var whole = []forged{
	{"edit", func(s *site) {
		s.forge("UPDATE kme.audit SET body = replace(body, 'alice', 'mallory') WHERE node = 'a' AND seq = 42")
	}, "a", 42},
	{"delete", func(s *site) { s.forge("DELETE FROM kme.audit WHERE node = 'a' AND seq = 42") }, "a", 42},
	{"delete the first", func(s *site) { s.forge("DELETE FROM kme.audit WHERE node = 'b' AND seq = 1") }, "b", 1},
	{"insert", func(s *site) {
		s.forge(`INSERT INTO kme.audit SELECT day + 1, node, seq, prev, body, at, sig FROM kme.audit WHERE node = 'a' AND seq = 42`)
	}, "a", 42},
	{"reorder", func(s *site) {
		s.forge(`UPDATE kme.audit x SET body = y.body FROM kme.audit y WHERE x.node = 'a' AND y.node = 'a' AND (x.seq, y.seq) IN ((42, 43), (43, 42))`)
	}, "a", 42},
	{"edit the leaf, too", func(s *site) {
		s.forge("UPDATE kme.audit SET body = replace(body, 'alice', 'mallory') WHERE node = 'a' AND seq = 42")
		s.retile()
	}, "a", 42},
	{"edit the leaf and rewrite the chain", func(s *site) {
		s.rechain("a", 42)
		s.retile()
	}, "a", 42},
	{"edit another range", func(s *site) { s.forge("UPDATE kme.audit_range SET seq = seq + 1 WHERE first > 0 AND node = 'b'") }, "b", 2},
}

func TestForgedInTheTree(t *testing.T) {
	t.Parallel()
	for _, test := range whole {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			a, b := s.node("a"), s.node("b")
			q, r := s.sequencer(), s.reader()
			for range 99 {
				a.requests(s, 1)
			}
			b.requests(s, 9)
			s.step(q)
			if _, err := s.verify(r, nil); err != nil {
				t.Fatal(err)
			}
			s.exec(s.name, "SELECT kme.open_audit_day('2026-03-02')")
			test.do(s)
			wantBad(t, s, r, nil, test.node, test.seq)
		})
	}
}

// late are the changes of events that no checkpoint covers yet: the second before the
// next. Of 10 events of node a the tree has 5.
var late = []forged{
	{"edit", func(s *site) {
		s.forge("UPDATE kme.audit SET body = replace(body, 'alice', 'mallory') WHERE node = 'a' AND seq = 8")
	}, "a", 8},
	{"delete", func(s *site) { s.forge("DELETE FROM kme.audit WHERE node = 'a' AND seq = 8") }, "a", 8},
	{"insert", func(s *site) {
		s.forge(`INSERT INTO kme.audit SELECT day + 1, node, seq, prev, body, at, sig FROM kme.audit WHERE node = 'a' AND seq = 8`)
	}, "a", 8},
	{"reorder", func(s *site) {
		s.forge(`UPDATE kme.audit x SET body = y.body FROM kme.audit y WHERE x.node = 'a' AND y.node = 'a' AND (x.seq, y.seq) IN ((8, 9), (9, 8))`)
	}, "a", 8},
	{"edit and rewrite the chain", func(s *site) { s.rechain("a", 8) }, "a", 8},
	{"append", func(s *site) { s.append("a", 11) }, "a", 11},
	{"a node that never was", func(s *site) { s.append("ghost", 1) }, "ghost", 1},
	{"truncate", func(s *site) { s.truncate("a", 8) }, "a", 8},
}

func TestForgedBeforeTheCheckpoint(t *testing.T) {
	t.Parallel()
	for _, test := range late {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			a := s.node("a")
			q, r := s.sequencer(), s.reader()
			a.requests(s, 4)
			s.step(q)
			for range 5 {
				a.requests(s, 1)
			}
			known := a.witnessed(t)
			if _, err := s.verify(r, known); err != nil {
				t.Fatal(err)
			}
			s.exec(s.name, "SELECT kme.open_audit_day('2026-03-02')")
			test.do(s)
			wantBad(t, s, r, known, test.node, test.seq)
			// And the sequencer builds nothing upon it, where it can know.
			if test.name == "truncate" || test.name == "insert" || test.name == "a node that never was" {
				return
			}
			var bad *audit.BadLeaf
			_, err := q.Step(t.Context())
			if err == nil { // what leads to it was folded first
				_, err = q.Step(t.Context())
			}
			if !errors.As(err, &bad) || bad.Node != test.node || bad.Seq > test.seq+1 {
				t.Errorf("the sequencer: %v", err)
			}
			if told := s.toldForged(); bad != nil && told != bad.Error() {
				t.Errorf("the nodes are told %q, not %q", told, bad)
			}
		})
	}
}

// TestForgedPutRight: nodes are told that a log is forged until it is what it was.
func TestForgedPutRight(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.node("a")
	q := s.sequencer()
	a.requests(s, 4)
	s.step(q)
	a.requests(s, 1)
	s.exec(s.name, "CREATE TABLE kept AS SELECT * FROM kme.audit")
	s.exec(s.name, "UPDATE kme.audit SET body = replace(body, 'alice', 'carol') WHERE seq = (SELECT max(seq) FROM kme.audit)")
	for range 2 {
		if _, err := q.Step(t.Context()); err == nil || !strings.Contains(s.toldForged(), "event") {
			t.Fatalf("step: %v; told %q", err, s.toldForged())
		}
	}
	s.exec(s.name, "UPDATE kme.audit a SET body = k.body FROM kept k WHERE k.node = a.node AND k.seq = a.seq")
	s.step(q)
	if told := s.toldForged(); told != "" {
		t.Errorf("put right, and still told %q", told)
	}
}

// toldForged is what the nodes of a site are told of its present log.
func (s *site) toldForged() (told string) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.dsn(store.AppRole))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(s.t.Context())
	if err := conn.QueryRow(s.t.Context(), "SELECT forged FROM kme.audit_log ORDER BY origin DESC LIMIT 1").Scan(&told); err != nil {
		s.t.Fatal(err)
	}
	return told
}

// The whole database is set back: nothing in it is wrong, and less of it is there than
// a witness has seen.
func TestSetBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.node("a")
	q := s.sequencer()
	s.step(q)
	a.requests(s, 5)
	past := newSiteAs(t, s)
	a.requests(s, 5)
	s.step(q)
	known := a.witnessed(t)
	r := past.reader()
	if _, err := past.verify(r, nil); err != nil {
		t.Fatalf("the past itself: %v", err)
	}
	wantBad(t, past, r, known, "a", 7)
}

// newSiteAs is a copy of a site's database at this moment.
func newSiteAs(t *testing.T, s *site) *site {
	t.Helper()
	past := &site{t: t, name: fmt.Sprintf("site%d", databases.Add(1)), dir: s.dir, key: s.key}
	past.clock.Store(s.clock.Load())
	past.exec("postgres", "CREATE DATABASE "+past.name+" TEMPLATE "+template)
	ctx := t.Context()
	from, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close(ctx)
	to, err := pgx.Connect(ctx, past.dsn(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close(ctx)
	past.exec(past.name, "SELECT kme.open_audit_day($1)", s.now().Truncate(24*time.Hour))
	for _, table := range []string{"audit_log", "audit_node", "audit_range", "audit_tile", "audit_checkpoint", "audit", "node_run"} {
		var rows bytes.Buffer
		if _, err := from.PgConn().CopyTo(ctx, &rows, "COPY (SELECT * FROM kme."+table+") TO STDOUT"); err != nil {
			t.Fatal(err)
		}
		if _, err := to.PgConn().CopyFrom(ctx, &rows, "COPY kme."+table+" FROM STDIN"); err != nil {
			t.Fatal(err)
		}
	}
	return past
}

func wantBad(t *testing.T, s *site, r *Reader, expect map[string]audit.Head, node string, seq int64) {
	t.Helper()
	_, err := s.verify(r, expect)
	var bad *audit.BadLeaf
	if !errors.As(err, &bad) {
		t.Fatalf("not found: %v", err)
	}
	if bad.Node != node || bad.Seq != seq {
		t.Errorf("found: %v; want event %d of node %s", bad, seq, node)
	}
	t.Log(bad)
}

// witnessed is what the node's witness file says.
func (n *node) witnessed(t *testing.T) map[string]audit.Head {
	t.Helper()
	head, sig := n.witness.Signed()
	if head.Seq == 0 || sig == [64]byte{} {
		t.Fatal("the witness file has no signed head")
	}
	return map[string]audit.Head{n.name: head}
}

// rechain edits an event and makes the chain after it, the node's row included, as if
// it had been so: all that a superuser can do who has no key.
func (s *site) rechain(node string, seq int64) {
	s.t.Helper()
	s.forge("UPDATE kme.audit SET body = replace(body, 'alice', 'mallory') WHERE node = $1 AND seq = $2", node, seq)
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(ctx)
	rows, _ := conn.Query(ctx, "SELECT seq, prev, body FROM kme.audit WHERE node = $1 AND seq >= $2 ORDER BY seq", node, seq)
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r audit.Row, err error) {
		return r, row.Scan(&r.Seq, &r.Prev, &r.Body)
	})
	if err != nil || len(events) == 0 {
		s.t.Fatal(err, len(events))
	}
	head := audit.Head{Seq: seq - 1, Hash: [32]byte(events[0].Prev)}
	for _, e := range events {
		prev := head.Hash
		if head, err = head.Next(e.Seq, prev[:], e.Body); err != nil {
			s.t.Fatal(err)
		}
		s.forge("UPDATE kme.audit SET prev = $3 WHERE node = $1 AND seq = $2", node, e.Seq, prev[:])
	}
	s.forge("UPDATE kme.node_run SET head = $2 WHERE node = $1", node, head.Hash[:])
	s.forge("UPDATE kme.audit_node SET head = $2 WHERE node = $1 AND seq = $3", node, head.Hash[:], head.Seq)
}

// retile makes the tiles of the events as they are now.
func (s *site) retile() {
	s.t.Helper()
	var tree audit.Tree
	err := s.reader().Snapshot(context.Background(), 0, func(l *Snapshot) error {
		return l.Rows(context.Background(), 0, l.Size, func(r audit.Row) error {
			tree.Append(tlog.RecordHash(r.Body))
			return nil
		})
	})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, tile := range tree.Tiles() {
		s.forge("UPDATE kme.audit_tile SET data = $3 WHERE level = $1 AND n = $2", tile.Level, tile.N, tile.Data)
	}
}

// append adds an event to the chain of a node, as if the node had.
func (s *site) append(node string, seq int64) {
	s.t.Helper()
	s.forge("INSERT INTO kme.node_run VALUES ($1, 1, 1, 0, $2) ON CONFLICT DO NOTHING", node, make([]byte, 32))
	head := audit.Head{Seq: seq - 1}
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(ctx)
	var hash []byte
	if err := conn.QueryRow(ctx, "SELECT head FROM kme.node_run WHERE node = $1", node).Scan(&hash); err != nil {
		s.t.Fatal(err)
	}
	head.Hash = [32]byte(hash)
	text, after := head.Append(nil, &audit.Event{Site: "km1", Node: node, Run: 1, At: s.now(), Action: audit.Status, Outcome: audit.Done})
	s.forge("INSERT INTO kme.audit VALUES ($1, $2, $3, $4, $5, $6, $7)", s.now(), node, seq, hash, string(text), s.now(), make([]byte, 64))
	s.forge("UPDATE kme.node_run SET seq = $2, head = $3 WHERE node = $1", node, seq, after.Hash[:])
}

// truncate takes events from the end, as if the node had stopped before.
func (s *site) truncate(node string, from int64) {
	s.t.Helper()
	s.forge(`UPDATE kme.node_run r SET seq = $2::bigint - 1, head = a.prev FROM kme.audit a WHERE r.node = $1 AND a.node = $1 AND a.seq = $2`, node, from)
	s.forge("DELETE FROM kme.audit WHERE node = $1 AND seq >= $2", node, from)
}

// What each role may do, and what not.
func TestRoles(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.node("a")
	q := s.sequencer()
	a.requests(s, 3)
	s.step(q)
	s.exec(s.name, `DO $$ BEGIN CREATE ROLE kme_node_a LOGIN IN ROLE kme_app ROLE kme_owner; EXCEPTION WHEN duplicate_object THEN NULL; END $$`)
	for _, with := range []string{"name", "text"} { // operators that a node's role has made for itself, to be another node
		s.exec(s.name, `CREATE SCHEMA IF NOT EXISTS lair; GRANT USAGE ON SCHEMA lair TO PUBLIC`)
		s.exec(s.name, `CREATE FUNCTION lair.same(name, `+with+`) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true'`)
		s.exec(s.name, `CREATE OPERATOR lair.= (LEFTARG = name, RIGHTARG = `+with+`, FUNCTION = lair.same)`)
	}
	insert := `INSERT INTO audit_d20260301 (day, node, seq, prev, body, at) SELECT '2026-03-01', '%s', 1000, decode(repeat('00', 32), 'hex'), '{}', now()`
	for _, test := range []struct {
		role, sql string
		allowed   bool
	}{
		{store.AppRole, fmt.Sprintf(insert, "b"), true}, // a site that has no roles for its nodes
		{"kme_node_a", fmt.Sprintf(insert, "a"), true},
		{"kme_node_a", fmt.Sprintf(insert, "b"), false},
		{"kme_node_a", "SET LOCAL search_path = lair, pg_catalog, kme; " + fmt.Sprintf(insert, "b"), false},
		{"kme_node_a", "UPDATE node_run SET mark = mark WHERE node = 'a'", true},
		{store.AppRole, "SELECT body FROM audit", false},
		{store.AppRole, "UPDATE audit SET body = ''", false},
		{store.AppRole, "DELETE FROM audit_d20260301", false},
		{store.AppRole, "TRUNCATE audit", false},
		{store.AppRole, "DROP TABLE audit", false},
		{store.AppRole, "INSERT INTO audit_tile VALUES (1, 0, 9, decode(repeat('00', 32), 'hex'))", false},
		{store.SequencerRole, "SELECT body FROM audit", true},
		{store.SequencerRole, fmt.Sprintf(insert, "a"), false},
		{store.SequencerRole, "DELETE FROM audit", false},
		{store.SequencerRole, "DELETE FROM audit_tile", false},
		{store.SequencerRole, "UPDATE audit_checkpoint SET note = ''", false},
		{store.SequencerRole, "SELECT ct FROM key", false},
		{store.SequencerRole, "UPDATE node_run SET seq = 0", false},
		{store.AuditorRole, "SELECT body FROM audit", true},
		{store.AuditorRole, "SELECT data FROM audit_tile", true},
		{store.AuditorRole, "INSERT INTO audit_cosignature VALUES (1, 1, '', '')", false},
		{store.AuditorRole, "DELETE FROM audit", false},
		{store.AuditorRole, fmt.Sprintf(insert, "a"), false},
		{store.AuditorRole, "SELECT ct FROM due", false},
	} {
		conn, err := pgx.Connect(t.Context(), s.dsn(test.role))
		if err != nil {
			t.Fatal(err)
		}
		tx, err := conn.Begin(t.Context())
		if err == nil {
			_, err = tx.Exec(t.Context(), "SET LOCAL search_path = kme")
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err = tx.Exec(t.Context(), test.sql); (err == nil) != test.allowed {
			t.Errorf("%s: %s: %v", test.role, test.sql, err)
		}
		_ = conn.Close(t.Context())
	}
}

// A bundle says of itself what the database does, to whoever has the keys.
func TestBundle(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.node("a"), s.node("b")
	q, r := s.sequencer(), s.reader()
	a.requests(s, 300)
	b.requests(s, 500)
	s.step(q)
	a.requests(s, 3)
	whole := s.bundle(r, 0, -1, true)
	if report, err := s.openBundle(whole, true); err != nil || report.Leaves != 802 || report.Tail != 3 {
		t.Errorf("the whole log: %+v, error %v", report, err)
	}
	part := s.bundle(r, 310, 600, false)
	if report, err := s.openBundle(part, false); err != nil || report.Leaves != 290 {
		t.Errorf("a part of the log: %+v, error %v", report, err)
	}
	if _, err := s.openBundle(part, true); err == nil {
		t.Error("a part of the log is taken for the whole")
	}
	forged := bytes.Replace(bytes.Clone(whole), []byte(`"seq":77,`), []byte(`"seq":78,`), 1)
	var bad *audit.BadLeaf
	if _, err := s.openBundle(forged, true); !errors.As(err, &bad) || bad.Seq != 77 {
		t.Errorf("a forged bundle: %v", err)
	}
	other := newSite(t)
	if _, err := other.openBundle(whole, true); err == nil {
		t.Error("a bundle verifies with another log's key")
	}
}

func (s *site) bundle(r *Reader, first, end int64, tail bool) []byte {
	s.t.Helper()
	ctx := context.Background()
	var text bytes.Buffer
	err := r.Snapshot(ctx, 0, func(l *Snapshot) error {
		signed, err := l.Checkpoint(ctx, 0)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, s.logKey())
		if err != nil {
			return err
		}
		if end < 0 {
			end = c.Size
		}
		return audit.WriteBundle(ctx, &text, audit.BundleSpec{Key: l.Key, Signed: signed, Checkpoint: c, First: first, End: end, Tail: tail, At: s.now()}, l)
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return text.Bytes()
}

func (s *site) openBundle(text []byte, whole bool) (audit.Report, error) {
	s.t.Helper()
	b, err := audit.OpenBundle(bytes.NewReader(text))
	if err != nil {
		s.t.Fatal(err)
	}
	report, _, _, err := audit.VerifyBundle(context.Background(), s.logKey(), nil, audit.Known{}, whole, b)
	return report, err
}

// What a reader sees again is what was written.
func TestEventsAreReadBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.node("a")
	want := audit.Event{
		Action: audit.EncKeys, Outcome: audit.Refused, Reason: "policy \"x\" says\nno", Request: "r1", Actor: audit.Actor{Role: "sae", ID: "alice"},
		Peer: "bob", Slaves: []string{"bob", "carol"}, Policy: []string{"p"}, Atoms: []audit.Atoms{{Link: "l", Session: 1, Block: 2, First: 0, Count: 3}},
	}
	a.record(s, want)
	s.step(s.sequencer())
	want.Site, want.Node, want.Run, want.Seq, want.At = "km1", "a", 1, 2, s.now()
	err := s.reader().Snapshot(t.Context(), 0, func(l *Snapshot) error {
		return l.Rows(t.Context(), 1, 2, func(r audit.Row) error {
			got, err := audit.ParseEvent(r.Body)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if again := got.AppendText(nil); !bytes.Equal(again, r.Body) {
				t.Errorf("%s is written again as %s", r.Body, again)
			}
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSearch looks for events by each thing that they can be looked for by; that the
// columns beside an event's text say something else hides none.
func TestSearch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.node("a")
	k1, k2 := key.NewLocalID(s.now()), key.NewLocalID(s.now())
	for i, e := range []audit.Event{ // leaves 1 to 5, a minute after each other
		{Action: audit.EncKeys, Outcome: audit.Done, Request: "r1", Actor: audit.Actor{Role: "sae", ID: "alice", Serial: "11"}, Peer: "bob", Master: "alice", Slaves: []string{"bob", "carol"}, Keys: []key.ID{k1, k2}},
		{Action: audit.DecKeys, Outcome: audit.Refused, Request: "r2", Actor: audit.Actor{Role: "sae", ID: "carol", Serial: "12"}, Keys: []key.ID{k2}},
		{Action: audit.DecKeys, Outcome: audit.Done, Request: "r3", Actor: audit.Actor{Role: "sae", ID: "bob", Serial: "13"}, Peer: "alice", Keys: []key.ID{k1}},
		{Action: audit.Cleanup, Outcome: audit.Done, Request: "r4", Actor: audit.Actor{Role: "operator", ID: "alice", Serial: "14"}},
		{Action: audit.Alarm, Outcome: audit.Failed, Reason: `an "alice" in the text`},
	} {
		a.record(s, e)
		if i < 4 {
			s.clock.Add(time.Minute.Milliseconds())
		}
	}
	q := s.sequencer()
	s.step(q)
	a.record(s, audit.Event{Action: audit.Alarm, Outcome: audit.Done}) // not in the log yet
	s.forge("UPDATE kme.audit SET at = at - interval '1 hour' WHERE seq = 4")
	start := time.Date(2026, 3, 1, 12, 30, 0, 0, time.UTC)
	for _, test := range []struct {
		name string
		f    Filter
		want []int64
	}{
		{"all", Filter{}, []int64{0, 1, 2, 3, 4, 5, -1}},
		{"all that the log has", Filter{Placed: true}, []int64{0, 1, 2, 3, 4, 5}},
		{"from a leaf on", Filter{First: 4, Placed: true}, []int64{4, 5}},
		{"a limit", Filter{Limit: 2}, []int64{0, 1}},
		{"time", Filter{From: start.Add(2 * time.Minute), To: start.Add(4 * time.Minute)}, []int64{3, 4}},
		{"another day", Filter{From: start.Add(24 * time.Hour)}, nil},
		{"who asked or was named", Filter{SAE: "alice"}, []int64{1, 3}},
		{"a slave of a multicast", Filter{SAE: "carol"}, []int64{1, 2}},
		{"a key", Filter{Key: k2.String()}, []int64{1, 2}},
		{"a key and an outcome", Filter{Key: k2.String(), Outcome: "refused"}, []int64{2}},
		{"a request", Filter{Request: "r3"}, []int64{3}},
		{"an action", Filter{Action: "dec_keys"}, []int64{2, 3}},
		{"an outcome", Filter{Outcome: "failed"}, []int64{5}},
		{"a serial number", Filter{Serial: "13"}, []int64{3}},
		{"an operator", Filter{Operator: "alice"}, []int64{4}},
	} {
		if test.f.Limit == 0 {
			test.f.Limit = 100
		}
		var got []int64
		err := s.reader().Snapshot(t.Context(), 0, func(l *Snapshot) error {
			found, err := l.Search(t.Context(), test.f)
			for _, r := range found {
				got = append(got, r.Leaf)
			}
			return err
		})
		if err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%s: leaves %v, want %v, error %v", test.name, got, test.want, err)
		}
	}
}
