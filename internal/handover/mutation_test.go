package handover

import "testing"

// TestBrokenRulesAreNoticed leaves out one rule at a time. Some history of the
// model must go wrong then: if none does, either the rule is not needed or the
// checks are blind. One that chance does not find for long is played on purpose:
// TestTakeoversLeaveLivingRuns.
func TestBrokenRulesAreNoticed(t *testing.T) {
	for _, tc := range []struct {
		rule   string
		broken broken
		sites  int // that it takes; 0 for two
	}{
		// handover.md, section 7.
		{"a doubt is settled by the announce's answer, not by reading the last batch", broken{settleByLast: true}, 0},
		{"a repeated batch is answered from the rows, not from the last batch", broken{repeatFromLast: true}, 0},
		{"a restart is a new run", broken{restartInSameRun: true}, 0},
		{"a void is matched against the batch's run, not the current one", broken{voidByCurrentRun: true}, 0},
		{"a takeover deletes the dead run's parked rows", broken{keepParked: true}, 0},
		{"run is answered the same however often it is asked", broken{runAnsweredOnce: true}, 0},
		{"the answer to run names all atoms of a key", broken{firstAtomOnly: true}, 0},
		{"a block is held only in the link's session", broken{holdInAnySession: true}, 0},
		// The rest of design.md, section 5.
		{"batches of a taken-over run are refused", broken{staleAccepted: true}, 0},
		{"every commit is fenced by the node's row", broken{noFence: true}, 0},
		{"an unknown commit is resolved, not taken for failed", broken{unknownIsFailed: true}, 0},
		{"a takeover frees nothing before run is answered", broken{freeUnanswered: true}, 0},
		{"a takeover frees nothing of a link before run is answered by the peer at its other end", broken{freeAllLinks: true}, 3},
		{"keys in doubt are neither burned nor voided", broken{voidInDoubt: true}, 0},
		{"assigned keys that are burned are voided", broken{reclaimUnvoided: true}, 0},
		{"a peer's run is never lowered", broken{runLowered: true}, 0},
		{"only chunks of READY blocks are leased", broken{leaseHeld: true}, 0},
		{"only owned chunks are leased", broken{leaseAnyOwner: true}, 0},
		{"never is said only of a closed session", broken{neverTooEarly: true}, 0},
		{"a batch is taken back only if no other copy was sent", broken{takenBackTwice: true}, 0},
		{"a grant counts only if it is the highest so far", broken{grantUncounted: true}, 0},
		{"only unleased chunks are granted", broken{grantLeased: true}, 0},
		{"a grant is committed before it is told", broken{grantUncommitted: true}, 0},
		{"a granted chunk is used only once the grant is committed", broken{grantUsedEarly: true}, 0},
		{"the acknowledgement of a grant names its counter", broken{grantAckUnnamed: true}, 0},
		{"a chunk is given back only if no atom of it is in use", broken{sharedLent: true}, 0},
		{"a grant is told until it is acknowledged", broken{grantToldOnce: true}, 0},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			for seed := range uint64(2000) { // the hardest takes some 300
				w := newWorldOf(max(2, tc.sites), random(seed), tc.broken, [3]Tables{})
				if w.play(length(seed)); w.bad != "" {
					t.Logf("history %d: %s", seed, w.bad)
					return
				}
			}
			t.Error("left out, and no history went wrong")
		})
	}
}

// TestTakeoversLeaveLivingRuns: a takeover frees chunks only of lower runs, and only while
// its run is the node's. Without that, what a node has leased that lives again is leased to
// another one, too, when the end of a takeover comes late.
func TestTakeoversLeaveLivingRuns(t *testing.T) {
	for name, late := range map[string]func(s *site, heir *process) (begin func(), end func()){
		// The heir has made a run for the node and asked, and hears of it when the node has
		// begun one above it.
		"of a run below": func(s *site, heir *process) (func(), func()) {
			var task *takeover
			begin := func() {
				heir.takeOver("b1", s.bumpRun("b1"), link)
				task = heir.tasks[0]
			}
			return begin, func() { heir.heard(task, nil, true) }
		},
		// The heir has found the node's own takeover not ended, and ends it once more.
		"of the run itself": func(s *site, heir *process) (func(), func()) {
			return func() {}, func() {
				heir.takeOver("b1", s.node["b1"].run, link)
				heir.heard(heir.tasks[0], nil, true)
			}
		},
	} {
		for _, b := range []broken{{}, {freeAnyRun: true}} {
			w := newWorldOf(2, func(n int) int { return n - 1 }, b, [3]Tables{}) // a block of 66 atoms, all Bob's
			w.declining = false
			s := w.sites[1]
			settled := func() {
				for range 2 {
					for _, p := range w.procs(func(*process) bool { return true }) {
						for _, take := range p.intake {
							take()
						}
						p.intake = nil
						for _, task := range p.tasks {
							if !task.heard && task.Node == p.node { // the heir's is for the test to end
								p.tellRun(task)
							}
						}
						for _, held := range p.site.blocks {
							p.tellHeld(held.Held)
						}
					}
					w.drain()
				}
			}
			settled()
			w.distil()
			settled()
			first, heir := s.procs[0], s.procs[1]
			begin, end := late(s, heir)
			first.die()
			begin()
			again := s.start("b1")
			settled()
			again.lease()
			w.drain()
			if len(again.free) == 0 {
				t.Fatalf("%s: the node has leased nothing after it began again", name)
			}
			end()
			w.drain()
			heir.lease()
			w.drain()
			w.checkStep()
			if (w.bad == "") != (b == broken{}) {
				t.Errorf("%s, %+v: %q", name, b, w.bad)
			}
		}
	}
}
