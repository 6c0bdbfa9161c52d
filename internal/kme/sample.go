package kme

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// A sample is a key of the pool whose bytes both ends of a link compare, since an
// operator wants to know whether they are the same: otherwise a user's mail that does
// not open would be the first to tell. It is burned here before the peer is asked, and
// there before it answers. If a process dies on the way, or a message is lost, one end
// has a key left that the other has not: it owned it alone, and nobody is given it.

// So many keys of a link an operator may have compared by a node at once, and one more
// after each pause: each is lost to both ends.
const (
	sampleBurst = 5
	samplePause = time.Minute
)

// sampled holds what each operator may still have compared. It is the node's own, and full
// again when that starts.
type sampled struct{ sync.Map } // operator's ID -> *rate.Limiter

// spend takes one key out of the operator's bucket, or says when there is one in it.
func (s *sampled) spend(operator string, now time.Time) (wait time.Duration) {
	b, ok := s.Load(operator)
	if !ok {
		b, _ = s.LoadOrStore(operator, rate.NewLimiter(rate.Every(samplePause), sampleBurst))
	}
	r := b.(*rate.Limiter).ReserveN(now, 1)
	if wait = r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
	}
	return wait
}

// compare is sample at the word of an operator: within what an operator may have compared,
// and recorded. That it is refused is no sign of anything that is not well.
func (l *link) compare(ctx context.Context, c identity.Caller, rid string, ask func(context.Context, handover.Sample) (handover.SampleAnswer, error)) admin.Finding {
	k := l.k
	ev := k.begin(c, rid, audit.Compare, identity.SAE{}).ev
	ev.Link = l.ID
	var found admin.Finding
	if wait := l.sampled.spend(c.ID(), k.Now()); wait > 0 {
		found = admin.Good("keys of "+l.ID, "not compared: %s has had %d burned for it here of late, and may have the next one in %v", c.ID(), sampleBurst, wait.Truncate(time.Second)+time.Second)
		ev.Outcome = audit.Refused
	} else if found = l.sample(ctx, c, rid, ask); found.OK {
		ev.Outcome = audit.Done
	} else {
		ev.Outcome = audit.Failed
	}
	ev.Reason = found.Says
	k.note(ctx, ev)
	return found
}

// sample takes a key of the link out of this node's hand and has the peer, by ask, say
// what it holds under it.
func (l *link) sample(ctx context.Context, c identity.Caller, rid string, ask func(context.Context, handover.Sample) (handover.SampleAnswer, error)) admin.Finding {
	k := l.k
	if err := k.able(); err != nil {
		return judgeSample(l.ID, key.ID{}, false, false, err)
	}
	if err := k.servingPeer(l.Peer); err != nil {
		return judgeSample(l.ID, key.ID{}, false, false, err)
	}
	lends, err := l.pool.take(ctx, 1, 1)
	if err != nil {
		return judgeSample(l.ID, key.ID{}, false, false, err)
	}
	if lends == nil {
		return admin.Good("keys of "+l.ID, "none is at hand to be compared with %s", l.Peer)
	}
	atom := lends[0]
	secret, err := k.unsealAtom(ctx, atom.Atom, atom.from)
	if spoilt(err) {
		l.quarantine(ctx, rid, atom, err)
		return judgeSample(l.ID, atom.ID, false, false, err)
	}
	if err != nil {
		l.pool.give(lends)
		return judgeSample(l.ID, atom.ID, false, false, err)
	}
	defer clear(secret)
	d := debt{link: l, lends: lends, request: rid, why: fmt.Sprintf("compared with %s, at the word of %s", l.Peer, c.ID())}
	if err := k.Store.Burn(ctx, d.job(k)); err != nil {
		k.owe(d) // it may be gone already; in the pool it must not be again
		return judgeSample(l.ID, atom.ID, false, false, err)
	}
	s := handover.Sample{Link: l.ID, Key: handover.Key{Session: atom.from.Session, Block: atom.from.Block, First: atom.Index, Atoms: []key.ID{atom.ID}}}
	_, _ = rand.Read(s.Nonce[:]) // which never fails
	answer, err := ask(ctx, s)
	equal := err == nil && answer.MAC.Equal(s.MAC(secret))
	switch {
	case err != nil:
	case answer.Lacking:
		k.incident(ctx, "burned-"+l.ID, fmt.Sprintf("1 atom burned: %s does not have %s", l.Peer, atom.ID))
	case !equal:
		k.incident(ctx, "key-mismatch-"+l.ID, fmt.Sprintf("key %s of block %s has other bytes at %s", atom.ID, atom.from.BlockRef, l.Peer))
	}
	return judgeSample(l.ID, atom.ID, answer.Lacking, equal, err)
}

func judgeSample(link string, id key.ID, lacking, equal bool, err error) admin.Finding {
	about := "keys of " + link
	switch {
	case err != nil:
		return admin.Bad(about, "see to what it says, then ask again", "not compared with the peer's: %v", err)
	case lacking:
		return admin.Bad(about, "ask again; if it stays so, read the burn and expire events of that link at both ends: runbooks/peer.md", "the peer does not have key %s, or cannot open it", id)
	case !equal:
		return admin.Bad(about, "burn what is stored: kmectl key compromise --link, at one end, and find out why: runbooks/tampering.md", "key %s has OTHER BYTES at the peer", id)
	}
	return admin.Good(about, "key %s had the same bytes at both ends; it is burned", id)
}

// Sample burns an atom that the peer owns, and tells it the MAC of our bytes. What is
// assigned already is not in the pool, so nobody learns a MAC of a key that is in use.
func (d PeerDoor) Sample(ctx context.Context, from identity.KME, s handover.Sample) (handover.SampleAnswer, error) {
	k := d.k
	l, err := d.link(s.Link, from)
	if err != nil {
		return handover.SampleAnswer{}, d.refuse(ctx, from, err)
	}
	if err := k.servingPeer(from); err != nil {
		return handover.SampleAnswer{}, err
	}
	if err := k.able(); err != nil {
		return handover.SampleAnswer{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	pooled, err := k.Store.PoolAtoms(ctx, []handover.Key{s.Key}, l.ID)
	if err != nil {
		return handover.SampleAnswer{}, err
	}
	id := s.Key.ID()
	atom, ok := pooled[id]
	if !ok {
		return handover.SampleAnswer{Lacking: true}, nil
	}
	if why := l.claims(s.Key, 0, atom); why != "" {
		return handover.SampleAnswer{}, d.refuse(ctx, from, fmt.Errorf("%s would compare %s: %s", from, id, why))
	}
	secret, err := k.unsealAtom(ctx, atom.Atom, lentOf(atom).from)
	if spoilt(err) {
		k.incident(ctx, "tampered-"+l.ID, fmt.Sprintf("the blob of atom %s does not open: %v", id, err))
		return handover.SampleAnswer{Lacking: true}, nil
	}
	if err != nil {
		return handover.SampleAnswer{}, err
	}
	defer clear(secret)
	burned := false
	err = k.Store.Burn(ctx, store.BurnJob{Atoms: []key.ID{id}, Event: func(gone []key.ID) audit.Event {
		burned = len(gone) == 1 // if not, an announce or a sample of the same atom came first
		ev := audit.Event{Action: audit.Burn, Outcome: audit.Done, Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()}, Link: l.ID, Reason: "compared"}
		if ev.Keys, ev.Count = gone, len(gone); burned {
			ev.Atoms = ranges([]lent{lentOf(atom)})
		}
		return ev
	}})
	if err != nil || !burned {
		return handover.SampleAnswer{Lacking: err == nil}, err
	}
	return handover.SampleAnswer{MAC: s.MAC(secret)}, nil
}
