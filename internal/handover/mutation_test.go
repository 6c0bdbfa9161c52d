package handover

import (
	"testing"
	"time"
)

// TestBrokenRulesAreNoticed leaves out one rule at a time. Some history of the
// model must go wrong then: if none does, either the rule is not needed or the
// checks are blind.
func TestBrokenRulesAreNoticed(t *testing.T) {
	for _, tc := range []struct {
		rule   string
		broken broken
	}{
		// handover.md, section 7.
		{"a doubt is settled by the announce's answer, not by reading the last batch", broken{settleByLast: true}},
		{"a repeated batch is answered from the rows, not from the last batch", broken{repeatFromLast: true}},
		{"a restart is a new run", broken{restartInSameRun: true}},
		{"a void is matched against the batch's run, not the current one", broken{voidByCurrentRun: true}},
		{"a takeover deletes the dead run's parked rows", broken{keepParked: true}},
		{"run is answered the same however often it is asked", broken{runAnsweredOnce: true}},
		{"the answer to run names all atoms of a key", broken{firstAtomOnly: true}},
		{"a takeover frees chunks only of lower runs, and only while its run is the node's", broken{freeAnyRun: true}},
		{"a block is held only in the link's session", broken{holdInAnySession: true}},
		// The rest of design.md, section 5.
		{"batches of a taken-over run are refused", broken{staleAccepted: true}},
		{"every commit is fenced by the node's row", broken{noFence: true}},
		{"an unknown commit is resolved, not taken for failed", broken{unknownIsFailed: true}},
		{"a takeover frees nothing before run is answered", broken{freeUnanswered: true}},
		{"keys in doubt are neither burned nor voided", broken{voidInDoubt: true}},
		{"assigned keys that are burned are voided", broken{reclaimUnvoided: true}},
		{"a peer's run is never lowered", broken{runLowered: true}},
		{"only chunks of READY blocks are leased", broken{leaseHeld: true}},
		{"only owned chunks are leased", broken{leaseAnyOwner: true}},
		{"never is said only of a closed session", broken{neverTooEarly: true}},
		{"a batch is taken back only if no other copy was sent", broken{takenBackTwice: true}},
		{"a grant counts only if it is the highest so far", broken{grantUncounted: true}},
		{"only unleased chunks are granted", broken{grantLeased: true}},
		{"a grant is committed before it is told", broken{grantUncommitted: true}},
		{"a granted chunk is used only once the grant is committed", broken{grantUsedEarly: true}},
		{"the acknowledgement of a grant names its counter", broken{grantAckUnnamed: true}},
		{"a chunk is given back only if no atom of it is in use", broken{sharedLent: true}},
		{"a grant is told until it is acknowledged", broken{grantToldOnce: true}},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			start := time.Now()
			for seed := uint64(0); time.Since(start) < effort(10*time.Second); seed++ {
				w := newWorld(random(seed), tc.broken)
				if w.play(length(seed)); w.bad != "" {
					t.Logf("history %d: %s", seed, w.bad)
					return
				}
			}
			t.Error("left out, and no history went wrong")
		})
	}
}
