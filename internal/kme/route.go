package kme

import (
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
}

// provenance is that of the keys that go this way.
func (w way) provenance() key.Provenance {
	if w.link == nil {
		return key.LocalRNG
	}
	return w.link.Provenance
}

// route finds the way to all of slaves at once. An SAE with several homes is served
// at one that is not the master's KME, if a link leads there: of several links, the
// one that serves more of them so, and then the one to the home named first.
func (k *KME) route(slaves ...identity.SAE) (way, error) {
	best, ok := k.via(nil, slaves)
	for _, slave := range slaves {
		for _, home := range k.Policies().SAEs[slave].Homes {
			w, reaches := k.via(k.linkTo(home), slaves)
			if reaches && len(w.there) > len(best.there) {
				best, ok = w, true
			}
		}
	}
	if !ok {
		return way{}, problem.New(problem.Invalid, "no link leads to the KME of every slave SAE")
	}
	return best, nil
}

// via sorts slaves by where they are served with l as the link, and says whether
// all of them are.
func (k *KME) via(l *link, slaves []identity.SAE) (w way, ok bool) {
	set := k.Policies()
	w.link = l
	for _, slave := range slaves {
		switch {
		case l != nil && set.Homed(slave, l.Peer):
			w.there = append(w.there, slave)
		case set.Homed(slave, k.Self):
			w.here = append(w.here, slave)
		default:
			return way{}, false
		}
	}
	return w, true
}

// linkTo is the link to a KME, nil if there is none.
func (k *KME) linkTo(id identity.KME) *link {
	for _, l := range k.links {
		if l.Peer == id {
			return l
		}
	}
	return nil
}
