package kme

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/store"
)

// TestWatch: a node is dead when it has shown nothing for deadAfter by the clock of
// the one that looks, who has been looking; when it says that it stops; and not again
// until a run of it shows itself.
func TestWatch(t *testing.T) {
	t.Parallel()
	const s = time.Second
	beat := func(run, beat int64) store.NodeBeat {
		return store.NodeBeat{NodeRun: store.NodeRun{Node: "b", Run: run}, Beat: beat}
	}
	type look struct {
		at    time.Duration // when the look began
		seen  store.NodeBeat
		alive bool
		quiet bool
	}
	for name, looks := range map[string][]look{
		"lives": {{0, beat(1, 1), true, false}, {2 * s, beat(1, 2), true, false}, {4 * s, beat(1, 3), true, false}, {7 * s, beat(1, 4), true, false}},
		"dies": {
			{0, beat(1, 1), true, false},
			{2 * s, beat(1, 1), true, false},
			{4 * s, beat(1, 1), true, false},
			{5*s + 1, beat(1, 1), false, true},
			{7 * s, beat(1, 1), false, true},
			{8 * s, beat(1, 2), true, false},
		},
		"stops in order": {{0, beat(1, 9), true, false}, {s, beat(1, 0), false, true}, {2 * s, beat(1, 0), false, true}, {20 * s, beat(2, 0), false, false}, {21 * s, beat(2, 1), true, false}},
		"is taken over": {
			{0, beat(1, 1), true, false}, {3 * s, beat(1, 1), true, false}, {6 * s, beat(1, 1), false, true}, // then another node bumps its run
			{7 * s, beat(2, 0), false, false}, {10 * s, beat(2, 0), false, false}, {13 * s, beat(2, 0), false, true},
		},
		"starts again":      {{0, beat(1, 5), true, false}, {3 * s, beat(2, 0), true, false}, {6 * s, beat(2, 1), true, false}},
		"was never there":   {{0, beat(0, 0), true, false}, {3 * s, beat(0, 0), true, false}, {6 * s, beat(0, 0), false, true}},
		"who looks is away": {{0, beat(1, 1), true, false}, {s, beat(1, 1), true, false}, {30 * s, beat(1, 1), true, false}, {32 * s, beat(1, 1), true, false}, {35 * s, beat(1, 1), true, false}, {36 * s, beat(1, 1), false, true}},
	} {
		t.Run(name, func(t *testing.T) {
			var w watch
			began := time.Now()
			for _, l := range looks {
				at := began.Add(l.at)
				w.look(at, at.Add(1), []string{"a", "b"}, []store.NodeBeat{l.seen})
				got := w.others("a")
				if len(got) != 1 || got[0].alive != l.alive || got[0].quiet != l.quiet {
					t.Errorf("after %v, at beat %d of run %d: %+v, want alive %t, quiet %t", l.at, l.seen.Beat, l.seen.Run, got, l.alive, l.quiet)
				}
			}
		})
	}
}

// TestPausedWatcher: a watcher that was paused in the middle of a look takes nobody
// for dead for that.
func TestPausedWatcher(t *testing.T) {
	t.Parallel()
	var w watch
	began := time.Now()
	b := []store.NodeBeat{{NodeRun: store.NodeRun{Node: "b", Run: 1}, Beat: 1}}
	w.look(began, began.Add(1), nil, b)
	w.look(began.Add(2*time.Second), began.Add(time.Hour), nil, b) // paused after the read, or before it
	w.look(began.Add(time.Hour+1), began.Add(time.Hour+2), nil, b)
	if got := w.others("a"); !got[0].alive {
		t.Errorf("taken for dead: %+v", got)
	}
}

// TestSettled: what is noted of a run ends with it.
func TestSettled(t *testing.T) {
	t.Parallel()
	var w watch
	at := time.Now()
	run := store.NodeRun{Node: "b", Run: 1}
	w.look(at, at, nil, []store.NodeBeat{{NodeRun: run}})
	w.note(run, func(s *sight) { s.settled = true })
	if !w.others("a")[0].settled {
		t.Error("not settled")
	}
	run.Run++
	w.look(at, at, nil, []store.NodeBeat{{NodeRun: run}})
	if w.others("a")[0].settled {
		t.Error("the next run is settled")
	}
}

// TestCutOff: a dead node is cut off once it has no sessions any more, and one whose
// sessions cannot be ended is an alarm until they can. Not beside others: roles are the
// server's.
func TestCutOff(t *testing.T) {
	s := newSite(t)
	k := s.guarded()
	s.exec(s.name, "CREATE ROLE kme_node_b LOGIN IN ROLE kme_app")
	defer s.exec("postgres", "DROP ROLE kme_node_b")
	paused, err := pgx.Connect(t.Context(), s.cluster.DSN("kme_node_b", s.name)+" application_name='kmed b'")
	if err != nil {
		t.Fatal(err)
	}
	defer paused.Close(context.Background())
	if _, err := k.Store.BumpRun(t.Context(), "b", 0); err != nil {
		t.Fatal(err)
	}
	look := func() sight {
		t.Helper()
		if err := k.lookAround(t.Context()); err != nil {
			t.Fatal(err)
		}
		others := k.watch.others("a")
		i := slices.IndexFunc(others, func(s sight) bool { return s.Node == "b" })
		if i < 0 {
			t.Fatalf("b is not among %+v", others)
		}
		return others[i]
	}
	alarmed := func() bool {
		return slices.ContainsFunc(k.Alarms(), func(a Alarm) bool { return a.Name == "node-sessions-b" })
	}
	run := look().NodeRun
	k.watch.note(run, func(s *sight) { s.alive, s.quiet = false, true }) // as if it had shown nothing for a while
	if look().cut || alarmed() {
		t.Error("it has a session, and is cut off, or an alarm at once")
	}
	s.step(patience)
	if look().cut || !alarmed() {
		t.Error("it has a session that nobody may end, and is cut off, or no alarm")
	}
	s.exec(s.name, "GRANT kme_node_b TO kme_owner")
	eventually(t, "b to be cut off", func() bool { return look().cut })
	if alarmed() {
		t.Error("it is cut off, and the alarm stands")
	}
	s.exec(s.name, "REVOKE kme_node_b FROM kme_owner")
	k.watch.note(run, func(s *sight) { s.cut = false })
	look()
	s.step(patience)
	look()
	k.watch.note(run, func(s *sight) { s.alive, s.quiet, s.since = true, false, time.Now().Add(time.Hour) })
	if look(); alarmed() {
		t.Error("it is back, and the alarm stands")
	}
}

// TestNotOursToTakeOver: a survivor that leads no more, or finds that another one has taken
// over, says no more that it could not; and what a node has parked that it has not leased any
// more is forgotten with it.
func TestNotOursToTakeOver(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	km2 := kmeID(t, "km2")
	k.Peers = map[identity.KME]*peer.Client{km2: nil}
	run, err := k.Store.BumpRun(t.Context(), "b", 0)
	if err != nil {
		t.Fatal(err)
	}
	dead := store.NodeRun{Node: "b", Run: run}
	before := time.Now()
	k.watch.look(before, before, nil, []store.NodeBeat{{NodeRun: dead}})
	alarm := takeoverAlarm("b", km2)
	stood := func() {
		t.Helper()
		k.raise(t.Context(), alarm, "cannot learn what km2 assigned")
		if !k.stands(alarm) {
			t.Fatal("no alarm")
		}
	}
	stood()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.succeed(ctx); !errors.Is(err, context.Canceled) || k.stands(alarm) {
		t.Errorf("it leads no more (%v), and the alarm stands", err)
	}
	stood()
	s.exec(s.name, "INSERT INTO kme.parked VALUES (gen_random_uuid(), 'b', 1, 7, now()), (gen_random_uuid(), 'c', 1, 7, now())")
	if err := k.succeedNode(t.Context(), dead); err != nil || k.stands(alarm) {
		t.Errorf("there is nothing left to take over, %v, and the alarm stands", err)
	}
	if others := k.watch.others("a"); len(others) != 1 || !others[0].settled {
		t.Errorf("%+v, want it settled", others)
	}
	if n := s.ask("SELECT count(*) FROM kme.parked"); n != 1 || s.ask("SELECT count(*) FROM kme.parked WHERE node = 'c'") != 1 {
		t.Errorf("%d keys are parked, want the one of another node", n)
	}
	stood()
	if err := k.inherit(t.Context(), dead); err != nil || k.stands(alarm) {
		t.Errorf("another node has done it at that peer, %v, and the alarm stands", err)
	}
}
