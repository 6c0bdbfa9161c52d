package audit

import (
	"slices"
	"strings"
	"testing"

	"github.com/qutemail/kme/internal/key"
)

// TestReconcile: what two logs that agree may say, and each way in which they do not.
func TestReconcile(t *testing.T) {
	t.Parallel()
	id := mustID("0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11")
	of := func(a Action, by string, slaves ...string) Event {
		role := "sae"
		if by == "km1" {
			role = "kme"
		}
		return Event{Action: a, Outcome: Done, Actor: Actor{Role: role, ID: by}, Slaves: slaves, Keys: []key.ID{id}}
	}
	asked := func(a Action, by, request string) Event {
		e := of(a, by)
		e.Request = request
		return e
	}
	served := of(EncKeys, "alice", "bob")
	assigned := of(Assign, "km1", "bob")
	taken := of(DecKeys, "bob")
	reread := taken
	reread.Reread = true
	gone := of(Consume, "bob")
	gone.Reason = "it is gone: taken"
	refused := of(DecKeys, "carol")
	refused.Outcome = Refused
	local := of(Assign, "alice", "anna")
	for name, tt := range map[string]struct {
		km1, km2 []Event
		found    string // part of each finding; "" if there is none
	}{
		"taken":                        {[]Event{served}, []Event{assigned, taken}, ""},
		"taken, and refused":           {[]Event{served}, []Event{assigned, refused, taken, refused}, ""},
		"read, read again and erased":  {[]Event{served}, []Event{assigned, reread, reread, of(Consume, "bob")}, ""},
		"taken, and erased afterwards": {[]Event{served}, []Event{assigned, taken, gone}, ""},
		"expired":                      {[]Event{served}, []Event{assigned, of(Expire, "km2-a")}, ""},
		"taken back":                   {nil, []Event{assigned, of(VoidKeys, "km1")}, ""},
		"compromised":                  {[]Event{served}, []Event{assigned, of(VoidKeys, "km2-a")}, ""},
		"by two":                       {[]Event{of(EncKeys, "alice", "bob", "carol")}, []Event{of(Assign, "km1", "bob", "carol"), taken, of(DecKeys, "carol")}, ""},
		"by one of two":                {[]Event{of(EncKeys, "alice", "bob", "carol")}, []Event{of(Assign, "km1", "bob", "carol"), taken, of(Expire, "km2-a")}, ""},
		"here and there":               {[]Event{of(EncKeys, "alice", "bob", "anna"), local, of(DecKeys, "anna")}, []Event{assigned, taken}, ""},
		"what a request did besides":   {[]Event{asked(EncKeys, "alice", "r1"), asked(Lost, "alice", "r1")}, []Event{assigned}, ""},
		"requests of one outcome each": {[]Event{asked(Status, "alice", "r1")}, []Event{asked(Status, "bob", "r1"), asked(Status, "bob", "r2")}, ""},

		"given and assigned nowhere":        {[]Event{served}, nil, "assigned to bob nowhere"},
		"given twice":                       {[]Event{served, served}, []Event{assigned}, "given to masters at km1 2 times"},
		"given and taken back":              {[]Event{served}, []Event{assigned, of(VoidKeys, "km1")}, "taken back at km2"},
		"taken by a stranger":               {[]Event{served}, []Event{assigned, of(DecKeys, "carol")}, "whom no assignment there names"},
		"taken by whom no master named":     {[]Event{served}, []Event{of(Assign, "km1", "bob", "carol"), of(DecKeys, "carol")}, "whom its master did not name"},
		"taken twice":                       {[]Event{served}, []Event{assigned, taken, taken}, "2 times"},
		"expired, and taken":                {[]Event{served}, []Event{assigned, of(Expire, "km2-a"), taken}, "has ended there 2 times"},
		"erased, and taken":                 {[]Event{served}, []Event{assigned, of(Consume, "bob"), taken}, "has ended there 2 times"},
		"erased twice":                      {[]Event{served}, []Event{assigned, of(Consume, "bob"), of(Consume, "bob")}, "has ended there 2 times"},
		"taken back, and taken":             {nil, []Event{assigned, of(VoidKeys, "km1"), taken}, "has ended there 2 times"},
		"by two of two, and expired":        {nil, []Event{of(Assign, "km1", "bob", "carol"), taken, of(DecKeys, "carol"), of(Expire, "km2-a")}, "has ended there 3 times"},
		"an officer who was answered twice": {[]Event{asked(Compromise, "root", "r1"), asked(Compromise, "root", "r1")}, nil, "has 2 outcomes"},
		"a request that was answered twice": {nil, []Event{asked(Status, "bob", "r1"), asked(Status, "bob", "r1")}, "has 2 outcomes"},
	} {
		accounts := [2]*Account{NewAccount(), NewAccount()}
		for i, events := range [][]Event{tt.km1, tt.km2} {
			accounts[i].Site = []string{"km1", "km2"}[i]
			for _, e := range events {
				e.Site = accounts[i].Site
				accounts[i].Add(e)
			}
		}
		found := Reconcile(accounts[0], accounts[1])
		wrong := func(f string) bool { return !strings.Contains(f, tt.found) }
		if (len(found) == 0) != (tt.found == "") || slices.ContainsFunc(found, wrong) {
			t.Errorf("%s: %q, want findings of %q", name, found, tt.found)
		}
	}
}

// TestOpened: which events say that the HSM has opened blobs, and how many.
func TestOpened(t *testing.T) {
	t.Parallel()
	ids := []key.ID{mustID("0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"), mustID("0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e12")}
	atoms := []Atoms{{Link: "l", Count: 3}, {Link: "l", First: 7, Count: 1}} // two keys of two atoms each
	for what, tt := range map[string]struct {
		event Event
		want  int
	}{
		"handed out":                     {Event{Action: EncKeys, Outcome: Done, Keys: ids, Atoms: atoms}, 4},
		"handed out, of the generator":   {Event{Action: EncKeys, Outcome: Done, Keys: ids}, 0},
		"assigned":                       {Event{Action: Assign, Outcome: Done, Keys: ids, Atoms: atoms}, 4},
		"taken":                          {Event{Action: DecKeys, Outcome: Done, Keys: ids}, 2},
		"read":                           {Event{Action: DecKeys, Outcome: Done, Keys: ids, Reread: true}, 2},
		"refused":                        {Event{Action: DecKeys, Outcome: Refused, Keys: ids}, 0},
		"erased, expired or burned":      {Event{Action: Burn, Outcome: Done, Keys: ids, Atoms: atoms}, 0},
		"held, which the HSM has sealed": {Event{Action: Hold, Outcome: Done, Atoms: atoms}, 0},
	} {
		a := NewAccount()
		a.Add(tt.event)
		if a.Opened() != tt.want {
			t.Errorf("%s: %d, want %d", what, a.Opened(), tt.want)
		}
	}
}
