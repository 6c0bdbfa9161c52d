package kme

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/store"
)

// balance is what this node knows of how a link's pool is shared between its ends.
// Each end assigns from its own chunks only, so that with SAEs that ask at one end
// alone half of the pool would lie idle. New blocks go to the end that has less;
// besides, the end that has much more gives it chunks (handover.Surplus). Each end
// sees from its own tables what the other has used, and needs no question for it.
type balance struct {
	here         atomic.Int64 // atoms that this end may assign, about: those of the last look, less what this node has lent since
	calm         atomic.Int64 // atoms that the other end may use before it is worth looking again
	given, taken atomic.Int64 // chunks, since the node started

	// Of the goroutine that looks: when it last did, and how long that took.
	looked time.Time
	took   time.Duration
}

// balanceEvery is how often the ends' shares are looked at if nothing calls for it
// earlier: other nodes of the site commit what the peer uses as well.
const balanceEvery = time.Second

// restTimes is how many times as long as a look takes the next one waits at least, if
// nothing calls for it: of a pool of 10^7 atoms there are many chunks to count.
const restTimes = 10

// used notes what the peer has been assigned of its share.
func (k *KME) used(requests []handover.Request, results []handover.Result) {
	for i, res := range results {
		l := k.links[requests[i].Link]
		if res.Accepted && l != nil && l.balance.calm.Add(-int64(requests[i].AtomCount())) <= 0 {
			k.rebalance()
		}
	}
}

// rebalance has the shares looked at now.
func (k *KME) rebalance() {
	select {
	case k.uneven <- struct{}{}:
	default:
	}
}

// balance gives chunks of all links whose other ends are in want.
func (k *KME) balance(ctx context.Context) {
	if k.able() != nil {
		return // whoever cannot use its keys gives none either: what is wrong may be that it was set back
	}
	for _, l := range k.links {
		if !k.hasTakenOver(l.Peer) || k.servingPeer(l.Peer) != nil {
			continue // it does not answer yet; or its recovery would burn them
		}
		if err := l.even(ctx); err != nil {
			k.Log.Warn("giving chunks", "link", l.ID, "err", err)
		}
	}
}

// even gives the other end of the link what is superfluous here, if anything is.
// If the process dies after the commit, the chunks are the other end's, which will
// be told so by the next process or another node of this site.
func (l *link) even(ctx context.Context) error {
	k, mine := l.k, &l.balance
	if mine.calm.Load() > 0 && time.Since(mine.looked) < restTimes*mine.took {
		return nil
	}
	from, began := l.usable(), time.Now()
	b, err := k.Store.Balance(ctx, l.ID, from)
	mine.looked, mine.took = began, time.Since(began)
	if err != nil {
		return err
	}
	if handover.Surplus(b.Here, b.There) > 0 {
		b, err = k.Store.GiveChunks(ctx, store.GiveJob{Link: l.ID, From: from, Most: handover.MaxGranted, Decide: handover.Surplus, Event: l.givenEvent})
		if err != nil {
			return err
		}
	}
	mine.here.Store(int64(b.Here))
	if b.Given > 0 {
		failpoint.Hit(failpoint.GrantCommitted)
		mine.given.Add(int64(b.Given))
		k.hurry()
	}
	mine.calm.Store(int64(max(b.There-b.Here/2, b.There/2)))
	if handover.Surplus(b.Here, b.There) > 0 && (b.Given == handover.MaxGranted || l.giveBack(ctx, l.pool.empty())) {
		k.rebalance()
	}
	return nil
}

func (l *link) givenEvent(chunks []audit.Atoms) audit.Event {
	ev := l.k.own(audit.GiveChunks)
	ev.Link, ev.Peer, ev.Atoms, ev.Count = l.ID, l.Peer.String(), chunks, len(chunks)
	return ev
}

// Grant makes chunks this end's. It is answered alike however often it comes.
func (d PeerDoor) Grant(ctx context.Context, from identity.KME, g handover.Grant) (handover.GrantAnswer, error) {
	for _, c := range g.Chunks {
		if _, err := d.link(c.Link, from); err != nil {
			return handover.GrantAnswer{}, d.refuse(ctx, from, err)
		}
	}
	if err := d.k.servingPeer(from); err != nil {
		return handover.GrantAnswer{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	taken := make(map[string]int) // chunks, by link
	answer, err := d.k.Store.TakeGrant(ctx, from, g, func(link string, chunks []audit.Atoms) audit.Event {
		taken[link] = len(chunks)
		return audit.Event{
			Action: audit.TakeChunks, Outcome: audit.Done, Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()},
			Link: link, Peer: from.String(), Atoms: chunks, Count: len(chunks),
		}
	})
	if err == nil {
		for link, n := range taken {
			d.k.links[link].balance.taken.Add(int64(n))
		}
	}
	return answer, err
}

// tellGrants tells a peer of chunks that it has been given, until it acknowledges
// them.
func (k *KME) tellGrants(ctx context.Context, id identity.KME) error {
	for {
		g, err := k.Store.PendingGrants(ctx, id)
		if err != nil || len(g.Chunks) == 0 {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, announceTime)
		answer, err := k.Peers[id].Grant(ctx, g)
		acked := g.Acked(answer)
		if len(acked) > 0 {
			err = k.Store.AckGrants(ctx, acked)
		}
		cancel()
		if err != nil {
			return err
		}
		if len(acked) < handover.MaxGranted {
			return nil
		}
	}
}
