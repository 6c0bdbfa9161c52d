package store

import (
	"testing"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// burnedEvent is an event of atoms that were burned together.
func burnedEvent(_ string, atoms []audit.Atoms) audit.Event {
	return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: atoms}
}

// atomsIn counts the atoms of the site's events of an action.
func atomsIn(s *site, action audit.Action) int {
	return ask[int](s, `SELECT coalesce(sum((a->>'count')::int), 0)::int FROM audit, jsonb_array_elements(body::jsonb->'atoms') AS a
		WHERE body::jsonb->>'action' = $1`, string(action))
}

// A recovery leaves nothing that could be delivered, each atom with its event, in
// transactions of bounded size, and ends the suspension with its last step.
func TestRecovery(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("a")
	const atoms = (expireChunks + 10) * key.ChunkAtoms // more than one transaction burns
	s.fill(db, atoms/2, mine)
	s.fill(db, atoms/2, theirs)
	if _, err := db.Lease(t.Context(), linkName, 3); err != nil {
		t.Fatal(err)
	}
	const dues = 7
	var due []Due
	for range dues {
		due = append(due, s.due(key.NewLocalID(s.now()), "bob", "alice"))
	}
	if err := db.Serve(t.Context(), ServeJob{Due: due, Events: []audit.Event{{Action: audit.EncKeys, Outcome: audit.Done}}}); err != nil {
		t.Fatal(err)
	}
	if err := db.Suspend(t.Context(), "evidence"); err != nil {
		t.Fatal(err)
	}
	if got, err := db.Holdings(t.Context()); err != nil || got != (Holdings{Pool: atoms, Due: dues}) {
		t.Fatalf("it holds %+v, %v", got, err)
	}

	burned, steps := 0, 0
	for {
		n, chunks, err := db.BurnPool(t.Context(), burnedEvent)
		if err != nil {
			t.Fatal(err)
		}
		if chunks == 0 {
			break
		}
		burned, steps = burned+n, steps+1
	}
	if burned != atoms || steps < 2 || atomsIn(s, audit.Burn) != atoms {
		t.Errorf("%d atoms burned in %d steps, %d by the audit; want %d", burned, steps, atomsIn(s, audit.Burn), atoms)
	}
	ended := func(rows []DueRef) audit.Event { return audit.Event{Action: audit.VoidKeys, Count: len(rows)} }
	for _, want := range []int{dues - 1, 1, 0} {
		if n, err := db.VoidDue(t.Context(), dues-1, ended); err != nil || n != want {
			t.Errorf("%d waiting keys ended, %v; want %d", n, err, want)
		}
	}
	if got, err := db.Holdings(t.Context()); err != nil || got != (Holdings{}) {
		t.Errorf("it still holds %+v, %v", got, err)
	}
	if now, err := db.Standing(t.Context()); err != nil || now.Suspended != "evidence" || now.Origin != 1 {
		t.Errorf("before the end: %+v, %v", now, err)
	}
	if err := db.EndRecovery(t.Context(), 2, []identity.KME{kme("KM2")}, audit.Event{Action: audit.Recover, Count: 2}); err != nil {
		t.Fatal(err)
	}
	if now, err := db.Standing(t.Context()); err != nil || now.Suspended != "" || now.Origin != 2 {
		t.Errorf("after the end: %+v, %v", now, err)
	}
	pending, err := db.BurnedOut(t.Context())
	if err != nil || len(pending) != 1 || pending[kme("KM2")].Origin != 2 {
		t.Errorf("to be told: %v, %v", pending, err)
	}
	answer := handover.BurnedAnswer{Links: []handover.LinkSession{{Link: linkName, Session: 40}, {Link: "another's", Session: 99}}}
	if err := db.AckBurned(t.Context(), kme("KM2"), handover.Burned{Origin: 2}, answer); err != nil {
		t.Fatal(err)
	}
	if pending, err := db.BurnedOut(t.Context()); err != nil || len(pending) != 0 {
		t.Errorf("to be told after it was acknowledged: %v, %v", pending, err)
	}
	if session, err := db.Session(t.Context(), linkName); err != nil || session != 40 {
		t.Errorf("the session is %d, %v: want the peer's, 40", session, err)
	}
}

// What a recovered peer has lost is burned here once. A copy of its word that comes
// late takes nothing from the pool that was filled since.
func TestHearBurned(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("a")
	s.fill(db, 3*key.ChunkAtoms, mine)
	hear := func(origin int64) {
		t.Helper()
		for range 3 {
			done, err := db.HearBurned(t.Context(), kme("KM2"), handover.Burned{Origin: origin}, burnedEvent)
			if err != nil {
				t.Fatal(err)
			}
			if done {
				return
			}
		}
		t.Fatal("it never ends")
	}
	want := func(when string, pool, burned int) {
		t.Helper()
		got, err := db.Holdings(t.Context())
		if err != nil || got.Pool != pool || atomsIn(s, audit.Burn) != burned {
			t.Errorf("%s: %d atoms in the pool, %d burned, %v; want %d and %d", when, got.Pool, atomsIn(s, audit.Burn), err, pool, burned)
		}
	}
	if _, err := db.HearBurned(t.Context(), kme("KM3"), handover.Burned{Origin: 2}, burnedEvent); err != nil {
		t.Fatal(err)
	}
	want("at the word of a stranger", 192, 0)
	hear(2)
	want("burned", 0, 192)
	s.fill(db, 2*key.ChunkAtoms, mine)
	hear(2)
	want("told again", 128, 192)
	hear(3)
	want("recovered again", 0, 320)
}

// After a recovery the first batch of a run that goes on is taken, whatever its
// number; then they are counted as ever.
func TestBatchAfterRecovery(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("a")
	hear := func(node string, run int64) {
		t.Helper()
		if _, ok, err := db.HearRun(t.Context(), kme("KM2"), handover.RunStarted{Node: node, Run: run}); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	standing := func(node string, run, batch int64) handover.Standing {
		t.Helper()
		p, err := db.PeerRun(t.Context(), kme("KM2"), node)
		if err != nil {
			t.Fatal(err)
		}
		return p.Judge(run, batch)
	}
	announce := func(node string, run, batch int64) {
		t.Helper()
		b := s.fill(db, key.ChunkAtoms, theirs)
		r := handover.Request{ID: "r", Link: linkName, Keys: []handover.Key{{Session: b.Session, Block: b.Block, Atoms: []key.ID{b.Atoms[0].ID}}}}
		_, err := db.Assign(t.Context(), AssignJob{
			Peer: kme("KM2"), Announce: handover.Announce{Node: node, Run: run, Batch: batch, Requests: []handover.Request{r}},
			Admit: func(handover.Request) string { return "not today" },
			Event: func(handover.Request, handover.Result) audit.Event {
				return audit.Event{Action: audit.Assign, Outcome: audit.Refused}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	hear("b", 4)
	announce("b", 4, 1)
	if got := standing("b", 4, 90); got != handover.Ahead {
		t.Errorf("before: %s", got)
	}
	if err := db.EndRecovery(t.Context(), 2, nil, audit.Event{Action: audit.Recover}); err != nil {
		t.Fatal(err)
	}
	hear("b", 6) // which we had forgotten
	hear("c", 3) // of whom we had never heard
	for _, node := range []string{"b", "c"} {
		run := map[string]int64{"b": 6, "c": 3}[node]
		if got := standing(node, run, 90); got != handover.Fresh {
			t.Errorf("node %s: the first batch is %s", node, got)
		}
		announce(node, run, 90)
		for batch, want := range map[int64]handover.Standing{90: handover.Repeat, 89: handover.Repeat, 91: handover.Fresh, 92: handover.Ahead} {
			if got := standing(node, run, batch); got != want {
				t.Errorf("node %s: batch %d is %s, want %s", node, batch, got, want)
			}
		}
	}
}
