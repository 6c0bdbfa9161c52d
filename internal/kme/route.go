package kme

import (
	"cmp"
	"slices"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// way is how a key reaches its slaves: through the peer at the other end of one
// link, or here, where the others are at home. Without a link all of them are, and
// the key is made here.
type way struct {
	link        *link
	there, here []identity.SAE
	policies    []string // that allow it
}

// provenance is that of the keys that go this way.
func (w way) provenance() key.Provenance {
	if w.link == nil {
		return key.LocalRNG
	}
	return w.link.Provenance
}

// route finds the ways to all of slaves at once, the best first. They differ in the link
// alone: all lead to one peer. An SAE with several homes is served at one that is not the
// master's KME, if a link leads there: of several peers, at the one where more of them are
// served so, and then at the home named first.
func (k *KME) route(slaves ...identity.SAE) ([]way, error) {
	var links []*link
	best, ok := k.via(identity.KME{}, slaves)
	for _, slave := range slaves {
		for _, home := range k.Policies().SAEs[slave].Homes {
			to := k.linksTo(home)
			if len(to) == 0 {
				continue
			}
			if w, reaches := k.via(home, slaves); reaches && len(w.there) > len(best.there) {
				best, ok, links = w, true, to
			}
		}
	}
	switch {
	case !ok:
		return nil, problem.New(problem.Invalid, "no link leads to the KME of every slave SAE")
	case links == nil:
		return []way{best}, nil
	}
	ways := make([]way, len(links))
	for i, l := range links {
		ways[i] = best
		ways[i].link = l
	}
	return ways, nil
}

// via sorts slaves by where they are served with peer at the other end, if it is one, and
// says whether all of them are.
func (k *KME) via(peer identity.KME, slaves []identity.SAE) (w way, ok bool) {
	set := k.Policies()
	for _, slave := range slaves {
		switch {
		case set.Homed(slave, peer):
			w.there = append(w.there, slave)
		case set.Homed(slave, k.Self):
			w.here = append(w.here, slave)
		default:
			return way{}, false
		}
	}
	return w, true
}

// linksTo are the links to a KME, the best first: those that make keys before those that
// are down, whose keys are kept for when the others have none; and then by how many keys
// this end has of them.
func (k *KME) linksTo(id identity.KME) []*link {
	type rank struct {
		*link
		down int
		keys int64
	}
	var found []rank
	for _, l := range k.links {
		if l.Peer == id {
			found = append(found, rank{link: l})
		}
	}
	if len(found) > 1 { // nothing is to be chosen from most often
		for i, r := range found {
			if found[i].keys = r.balance.here.Load(); r.isDown() {
				found[i].down = 1
			}
		}
		slices.SortFunc(found, func(a, b rank) int {
			return cmp.Or(cmp.Compare(a.down, b.down), cmp.Compare(b.keys, a.keys), cmp.Compare(a.ID, b.ID))
		})
	}
	links := make([]*link, len(found))
	for i, r := range found {
		links[i] = r.link
	}
	return links
}

// isDown says whether the link gives nothing, as far as this node knows: also while it tries
// another block.
func (l *link) isDown() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.State == admin.LinkDown || l.state.State != admin.LinkStandby && !l.dry.since.IsZero()
}
