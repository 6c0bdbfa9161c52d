package kme

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// ask is a request that waits for its announce.
type ask struct {
	link    *link // whose the lends are
	request handover.Request
	lends   []lent
	client  context.Context // the caller's: consulted once, before its batch begins
	fate    chan fate       // buffered: the announcer never waits for an asker
	left    atomic.Bool     // set by whoever comes first: the asker that gives up, or the announcer that settles
}

// weight is the ask's part of what a batch may hold: its atoms, and the copies that
// the peer seals for more slaves than one.
func (a *ask) weight() int {
	return len(a.lends) + len(a.request.Keys)*max(0, len(a.request.Slaves)-1)
}

// fate is how an ask ended. With an error, whoever settled it has dealt with the atoms.
type fate struct {
	batch int64
	err   error
}

// ask has the peer assign the request's keys and waits for the outcome.
func (l *link) ask(ctx, client context.Context, r handover.Request, lends []lent) fate {
	to := l.announcer
	if to.doubt.Load() {
		l.pool.give(lends)
		return fate{err: to.unreachable(errors.New("an earlier announce is still unanswered"))}
	}
	a := &ask{link: l, request: r, lends: lends, client: client, fate: make(chan fate, 1)}
	select {
	case to.asks <- a:
	default:
		l.pool.give(lends)
		return fate{err: unavailable(time.Second, "too many requests are waiting", errors.New("the announce queue is full"))}
	}
	select {
	case f := <-a.fate:
		return f
	case <-ctx.Done():
		if a.left.CompareAndSwap(false, true) {
			return fate{err: to.unreachable(ctx.Err())} // the announcer deals with the atoms when it learns their fate
		}
		return <-a.fate
	}
}

func (a *announcer) unreachable(cause error) error {
	return unavailable(2*time.Second, "the other KME does not answer", fmt.Errorf("announcing to %s: %w", a.peer, cause))
}

// settle tells the asker, unless it has gone.
func (a *ask) settle(f fate) bool {
	if !a.left.CompareAndSwap(false, true) {
		return false
	}
	a.fate <- f
	return true
}

// reclaim burns keys that the peer has assigned and nobody waits for.
func (l *link) reclaim(a *ask, batch int64) {
	d := debt{link: l, lends: a.lends, request: a.request.ID, batch: batch}
	for _, k := range a.request.Keys {
		d.void = append(d.void, k.ID())
	}
	l.k.owe(d)
}

// returned gives back the atoms of a request that the peer refused; those that it
// does not have are burned: the ends disagree about them, which is an alarm.
func (l *link) returned(ctx context.Context, a *ask, d handover.Settlement) {
	lacking := make(map[key.ID]bool, len(d.Burn))
	for _, id := range d.Burn {
		lacking[id] = true
	}
	var back, burn []lent
	for _, x := range a.lends {
		if lacking[x.ID] {
			burn = append(burn, x)
		} else {
			back = append(back, x)
		}
	}
	l.pool.give(back)
	if len(burn) > 0 {
		l.burn(ctx, a.request.ID, burn, "the peer does not have them")
	}
	why := fmt.Errorf("%s refused the announce: %s", l.Peer, d.Why)
	if d.Full {
		a.settle(fate{err: full(why)})
		return
	}
	a.settle(fate{err: problem.Because(problem.Unavailable, why)})
}

// burn deletes atoms that must never be used, which were not assigned to anybody.
func (l *link) burn(ctx context.Context, rid string, lends []lent, why string) {
	l.k.owe(debt{link: l, lends: lends, request: rid, why: why})
	l.k.incident(ctx, "burned-"+l.ID, fmt.Sprintf("%d atoms burned: %s", len(lends), why))
}

// quarantine burns an atom whose blob does not open though the HSM is well:
// somebody has changed the row, or its KEK is gone.
func (l *link) quarantine(ctx context.Context, rid string, bad lent, cause error) {
	l.burn(ctx, rid, []lent{bad}, "the blob does not open: "+cause.Error())
}
