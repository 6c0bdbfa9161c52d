package kme

import (
	"testing"
	"time"

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
