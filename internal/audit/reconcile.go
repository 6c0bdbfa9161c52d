package audit

import (
	"fmt"
	"slices"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Account is what one site's log says of keys and requests, for Reconcile.
type Account struct {
	Site     string
	served   map[key.ID][]string        // the slaves that a master named
	given    map[key.ID]int             // how often to a master
	assigned map[key.ID]map[string]bool // to whom, here
	taken    map[key.ID]map[string]int  // by whom, here, and how often; reads aside that leave the key where it is
	ended    map[key.ID]int             // for how many of those it was assigned to it has ended here, at least
	voided   map[key.ID]bool            // by the other end, whose master has not been given it
	outcomes map[string]int             // of each request
	opened   int                        // blobs that the HSM opened for it
}

// NewAccount begins with nothing.
func NewAccount() *Account {
	return &Account{
		served: make(map[key.ID][]string), given: make(map[key.ID]int), assigned: make(map[key.ID]map[string]bool), taken: make(map[key.ID]map[string]int),
		ended: make(map[key.ID]int), voided: make(map[key.ID]bool), outcomes: make(map[string]int),
	}
}

// Requests is how many requests have an outcome.
func (a *Account) Requests() int { return len(a.outcomes) }

// Served is how many keys masters were given.
func (a *Account) Served() int { return len(a.served) }

// Taken is how many keys slaves were given.
func (a *Account) Taken() int { return len(a.taken) }

// Opened is how many blobs the HSM of the site has opened for what the events say: each
// atom that was handed out or assigned, and each key that was taken. It has opened some
// more, for requests that came to nothing and for the link's pads; and none less.
func (a *Account) Opened() int { return a.opened }

// Add takes in one event.
func (a *Account) Add(e Event) {
	a.Site = e.Site
	if e.IsOutcome() {
		a.outcomes[e.Request]++
	}
	if e.Outcome != Done {
		return
	}
	switch e.Action {
	case EncKeys, Assign:
		for _, atoms := range e.Atoms {
			a.opened += atoms.Count
		}
	case DecKeys:
		a.opened += len(e.Keys)
	}
	for _, id := range e.Keys {
		switch e.Action {
		case EncKeys:
			a.served[id] = e.Slaves
			a.given[id]++
		case Assign:
			if a.assigned[id] == nil {
				a.assigned[id] = make(map[string]bool)
			}
			for _, sae := range e.Slaves {
				a.assigned[id][sae] = true
			}
		case DecKeys:
			if a.taken[id] == nil {
				a.taken[id] = make(map[string]int)
			}
			if !e.Reread {
				a.taken[id][e.Actor.ID]++
				a.ended[id]++
			} else if a.taken[id][e.Actor.ID] == 0 {
				a.taken[id][e.Actor.ID] = 0
			}
		case Consume:
			if e.Reason == "" { // with one, the key had gone already
				a.ended[id]++
			}
		case Expire:
			a.ended[id]++
		case VoidKeys:
			a.ended[id]++
			if e.Actor.Role == string(identity.RoleKME) { // otherwise by officers here, or by a recovery
				a.voided[id] = true
			}
		}
	}
}

// IsOutcome says whether the event is the outcome of a request that a handler saw: each
// request that is recorded has exactly one, those of operators too. What a request has
// done besides (assigned, burned, its answer lost) has events of its own.
func (e Event) IsOutcome() bool {
	switch e.Action {
	case Status, EncKeys, DecKeys, Consume, Malformed,
		Cleanup, TrustLink, Disable, Enable, Policies, Approve, KeyShown, Compromise, AuditRead:
		return e.Request != ""
	}
	return false
}

// Reconcile compares the accounts of the sites at both ends of a link, of which b was
// read after a. It returns what does not agree: a key that a master was given and that
// was assigned to a slave nowhere, or that a master was given before; one that somebody
// took who was not named, or took it twice; one that has ended for more SAEs than it was
// assigned to; one that was given to its master and that this end took back; a request with
// other than one outcome.
//
// Whoever has the database can put back the row of a key that was taken, erased, voided or
// has expired, and the HSM opens its blob as before. Here it is found by the key's second end.
func Reconcile(a, b *Account) (findings []string) {
	find := func(format string, args ...any) { findings = append(findings, fmt.Sprintf(format, args...)) }
	for id, slaves := range a.served { // b was read later: whatever a has served, b has assigned
		for _, sae := range slaves {
			if !a.assigned[id][sae] && !b.assigned[id][sae] {
				find("key %s was given to its master at %s and assigned to %s nowhere", id, a.Site, sae)
			}
		}
	}
	for _, at := range []*Account{a, b} {
		other := a
		if at == a {
			other = b
		}
		for id, takers := range at.taken {
			for sae, times := range takers {
				named, known := other.served[id]
				if !known {
					named, known = at.served[id]
				}
				switch {
				case !at.assigned[id][sae]:
					find("key %s was taken at %s by %s, whom no assignment there names", id, at.Site, sae)
				case known && !slices.Contains(named, sae):
					find("key %s was taken at %s by %s, whom its master did not name", id, at.Site, sae)
				case times > 1:
					find("key %s was taken at %s by %s %d times", id, at.Site, sae, times)
				}
			}
		}
		for id, n := range at.given {
			if n > 1 {
				find("key %s was given to masters at %s %d times", id, at.Site, n)
			}
		}
		for id, n := range at.ended {
			if rows := len(at.assigned[id]); rows > 0 && n > rows {
				find("key %s was assigned at %s to %d, and has ended there %d times: a row was put back", id, at.Site, rows, n)
			}
		}
		for request, n := range at.outcomes {
			if n != 1 {
				find("request %s at %s has %d outcomes", request, at.Site, n)
			}
		}
	}
	for id := range b.voided {
		if _, served := a.served[id]; served {
			find("key %s was given to its master at %s and taken back at %s", id, a.Site, b.Site)
		}
	}
	slices.Sort(findings)
	return findings
}
