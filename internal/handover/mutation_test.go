package handover

import "testing"

// TestBrokenRulesAreNoticed leaves out one rule at a time. Some history of the
// model must go wrong then: if none does, either the rule is not needed or the
// checks are blind.
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
		{"a takeover frees chunks only of lower runs, and only while its run is the node's", broken{freeAnyRun: true}, 0},
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
