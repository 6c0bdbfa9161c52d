package kme

import (
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// TestWaiting: an officer leaves the own word at a node, and nobody another's; it waits
// there, on record, until it ends or was used.
func TestWaiting(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	who, door := k.officers(t), k.OperatorDoor()
	const act, node = "erase alice", "km1/a"
	soon := s.now().Add(10 * time.Minute)
	left := func() (list []string) {
		all, err := door.Waiting(t.Context(), who["vera"].Caller, "r")
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range all {
			list = append(list, w.Officer+": "+string(w.Approval.Act))
		}
		return list
	}
	for why, tt := range map[string]struct {
		caller string
		a      approval.Approval
	}{
		"it is of olga, and ada":       {"ada", who["olga"].sign(t, act, node, soon)},
		"no security officer":          {"vera", who["vera"].sign(t, act, node, soon)},
		"names nobody":                 {"ada", who["mallory"].sign(t, act, node, soon)},
		"it is for the node \"km2/a\"": {"olga", who["olga"].sign(t, act, "km2/a", soon)},
		"it ended":                     {"olga", who["olga"].sign(t, act, node, s.now())},
		"an act has a name":            {"olga", who["olga"].sign(t, " ", node, soon)},
		"cannot be said with the word": {"olga", who["olga"].sign(t, "erase  alice", node, soon)}, // not as it will be compared
	} {
		err := door.LeaveApproval(t.Context(), who[tt.caller].Caller, "r", tt.a)
		if problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), why) || left() != nil {
			t.Errorf("%s: got %v; left %q", why, err, left())
		}
	}
	olga := who["olga"].sign(t, act, node, soon)
	for range 2 { // the same again changes nothing
		if err := door.LeaveApproval(t.Context(), who["olga"].Caller, "r", olga); err != nil {
			t.Fatal(err)
		}
	}
	short := who["ada"].sign(t, "cleanup", node, s.now().Add(time.Minute))
	if err := door.LeaveApproval(t.Context(), who["ada"].Caller, "r", short); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(left(), ", "); got != "olga: erase alice, ada: cleanup" {
		t.Errorf("left: %s", got)
	}
	if events := s.audit(); events[len(events)-1] != (told{string(audit.Approve), string(audit.Done), "cleanup", 0}) {
		t.Errorf("on record: %+v", events[len(events)-1])
	}
	s.step(time.Minute)
	if got := strings.Join(left(), ", "); got != "olga: erase alice" {
		t.Errorf("left after a minute: %s", got)
	}
	c := k.begin(who["ada"].Caller, "r", audit.Cleanup, identity.SAE{})
	if err := c.byTwo(t.Context(), who["ada"].Caller, []approval.Approval{olga, who["ada"].sign(t, act, node, soon)}, "erase", "alice"); err != nil {
		t.Fatal(err)
	}
	if got := left(); got != nil {
		t.Errorf("left after its use: %q", got)
	}
	for range 2 * maxWaiting {
		if err := door.LeaveApproval(t.Context(), who["olga"].Caller, "r", who["olga"].sign(t, act, node, soon)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(left()); n != maxWaiting {
		t.Errorf("%d wait, want %d at the most", n, maxWaiting)
	}
}
