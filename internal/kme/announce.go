package kme

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
)

const (
	announceTime = 2 * time.Second // after which an announce is in doubt
	askAtoms     = 2048            // the most that one request may name: 128 keys of 16 atoms
	repeatMin    = 50 * time.Millisecond
	repeatMax    = 2 * time.Second
)

// ask is a request that waits for its announce.
type ask struct {
	request handover.Request
	lends   []lent
	client  context.Context // the caller's: consulted once, before its batch begins
	fate    chan fate       // buffered: the announcer never waits for an asker
	left    atomic.Bool     // set by whoever comes first: the asker that gives up, or the announcer that settles
}

// fate is how an ask ended. With an error, whoever settled it has dealt with the atoms.
type fate struct {
	batch int64
	err   error
}

// ask has the peer assign the request's keys and waits for the outcome.
func (l *link) ask(ctx, client context.Context, r handover.Request, lends []lent) fate {
	if l.doubt.Load() {
		l.pool.give(lends)
		return fate{err: l.unreachable(errors.New("an earlier announce is still unanswered"))}
	}
	a := &ask{request: r, lends: lends, client: client, fate: make(chan fate, 1)}
	select {
	case l.asks <- a:
	default:
		l.pool.give(lends)
		return fate{err: unavailable(time.Second, "too many requests are waiting", errors.New("the announce queue is full"))}
	}
	select {
	case f := <-a.fate:
		return f
	case <-ctx.Done():
		if a.left.CompareAndSwap(false, true) {
			return fate{err: l.unreachable(ctx.Err())} // the announcer deals with the atoms when it learns their fate
		}
		return <-a.fate
	}
}

func (l *link) unreachable(cause error) error {
	return unavailable(2*time.Second, "the other KME does not answer", fmt.Errorf("announcing to %s: %w", l.Peer, cause))
}

// settle tells the asker, unless it has gone.
func (a *ask) settle(f fate) bool {
	if !a.left.CompareAndSwap(false, true) {
		return false
	}
	a.fate <- f
	return true
}

// announce gathers what waits and has the peer assign it, batch after batch. It
// is the only goroutine that touches the link's Sender.
func (l *link) announce(ctx context.Context) error {
	defer l.drain()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-l.k.takenOver:
	}
	s := handover.NewSender(l.k.Node, l.k.run.Load(), 1)
	for {
		asks, err := l.gather(ctx)
		if err != nil {
			return err
		}
		if err := l.send(ctx, s, asks); err != nil {
			return err
		}
	}
}

// gather waits for the first ask and takes what else waits: it never sleeps to fill a batch.
func (l *link) gather(ctx context.Context) ([]*ask, error) {
	var asks []*ask
	atoms := 0
	for len(asks) < handover.MaxRequests && atoms <= handover.MaxAtoms-askAtoms {
		var a *ask
		if len(asks) == 0 {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case a = <-l.asks:
			}
		} else {
			select {
			case a = <-l.asks:
			default:
				return asks, nil
			}
		}
		if l.begins(a) {
			asks = append(asks, a)
			atoms += len(a.lends) + len(a.request.Keys)*max(0, len(a.request.Slaves)-1) // each further slave's copy is sealed, too
		}
	}
	return asks, nil
}

// begins says whether an ask goes into a batch: not when its client or its asker has left.
func (l *link) begins(a *ask) bool {
	if a.client.Err() == nil && !a.left.Load() {
		return true
	}
	l.pool.give(a.lends)
	a.settle(fate{err: unavailable(0, "", errors.New("the client left before its request began"))})
	return false
}

// send has one batch answered, however long that takes.
func (l *link) send(ctx context.Context, s *handover.Sender, asks []*ask) error {
	requests := make([]handover.Request, len(asks))
	for i, a := range asks {
		requests[i] = a.request
	}
	batch := s.Next(requests)
	answer, err := l.tell(ctx, batch)
	if err == nil {
		if err = l.settle(ctx, s, batch, answer, asks); err == nil {
			return nil
		}
	}
	if untold(err) && s.Unsent(batch.Batch) {
		for _, a := range asks {
			l.pool.give(a.lends)
			a.settle(fate{err: l.unreachable(err)})
		}
		return nil
	}
	return l.resolve(ctx, s, batch, asks, err)
}

// untold says that the peer has certainly not acted on the one copy that was sent.
func untold(err error) bool {
	var refused *peer.Refused
	return errors.Is(err, peer.ErrNotSent) || errors.As(err, &refused) || errors.Is(err, handover.ErrDeclined)
}

// tell sends a batch and waits for its answer, up to the announce deadline.
func (l *link) tell(ctx context.Context, a handover.Announce) (handover.AnnounceAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, announceTime)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { failpoint.Hit(failpoint.EncAnnounceSent) },
	})
	origin := l.k.past.originOf(l.Peer)
	answer, err := l.client.Announce(ctx, a)
	if err == nil && len(answer.Results) > 0 {
		l.k.past.answered(l.Peer, origin, a.Run, a.Batch)
	}
	return answer, err
}

// resolve repeats a batch whose outcome is unknown, unchanged, until it is
// answered. Its callers have got their 503; its keys are parked: neither leasable
// nor burned. If the process dies here, the takeover of its run does the rest.
func (l *link) resolve(ctx context.Context, s *handover.Sender, batch handover.Announce, asks []*ask, cause error) error {
	l.doubt.Store(true)
	defer l.doubt.Store(false)
	s.Doubt(batch.Batch)
	var parked []key.ID
	for _, a := range asks {
		a.settle(fate{err: l.unreachable(fmt.Errorf("outcome unknown: %w", cause))})
		for _, x := range a.lends {
			parked = append(parked, x.ID)
		}
	}
	name := "announce-" + l.ID
	l.k.raise(ctx, name, fmt.Sprintf("batch %d to %s is unanswered, %d keys are parked: %v", batch.Batch, l.Peer, len(parked), cause))
	if err := l.k.Store.Park(ctx, parked, batch.Batch); err != nil {
		l.k.Log.Warn("parking keys", "link", l.ID, "err", err) // the rows are for operators: the lease keeps the keys from others, and the asks from us
	}
	for wait := repeatMin; ; wait = min(2*wait, repeatMax) {
		if err := l.refuseFor(ctx, wait); err != nil {
			return err
		}
		answer, err := l.tell(ctx, batch)
		if err != nil {
			continue
		}
		if err := l.settle(ctx, s, batch, answer, asks); err != nil {
			// Stale among others: if our run was really taken over, our own run row
			// says so and ends the process; a peer's word alone does not.
			l.k.Log.Warn("repeating an announce", "link", l.ID, "batch", batch.Batch, "err", err)
			continue
		}
		if err := l.k.Store.Unpark(ctx, parked); err != nil {
			l.k.Log.Warn("unparking keys", "link", l.ID, "err", err)
		}
		l.k.clear(ctx, name)
		return nil
	}
}

// refuseFor answers what comes in with 503 for a while.
func (l *link) refuseFor(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			return nil
		case a := <-l.asks:
			l.pool.give(a.lends)
			a.settle(fate{err: l.unreachable(errors.New("an earlier announce is still unanswered"))})
		}
	}
}

// settle acts on the answer to a batch.
func (l *link) settle(ctx context.Context, s *handover.Sender, batch handover.Announce, answer handover.AnnounceAnswer, asks []*ask) error {
	settled, err := s.Answered(batch.Batch, answer)
	if err != nil {
		return err
	}
	for i, d := range settled {
		a := asks[i]
		switch d.Verb {
		case handover.Commit:
			if !a.settle(fate{batch: d.Batch}) {
				l.reclaim(a, d.Batch)
			}
		case handover.Reclaim:
			l.reclaim(a, d.Batch)
		case handover.Return:
			l.returned(ctx, a, d)
		}
	}
	return nil
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

// drain answers what still waits when the link stops.
func (l *link) drain() {
	for {
		select {
		case a := <-l.asks:
			l.pool.give(a.lends)
			a.settle(fate{err: unavailable(time.Second, "the key store is stopping", errors.New("stopping"))})
		default:
			return
		}
	}
}
