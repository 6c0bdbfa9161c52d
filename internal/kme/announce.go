package kme

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
)

const (
	announceTime   = 2 * time.Second // after which an announce is in doubt
	announceWindow = 8               // batches in flight
	askAtoms       = 2048            // the most that one request may name: 128 keys of 16 atoms
	manyAtoms      = 1024            // that wait, and leave: fewer at a time cost more, more keep a site waiting
	repeatMin      = 50 * time.Millisecond
	repeatMax      = 2 * time.Second
)

// announcer has what requests wait for assigned by a peer, batch after batch, several in
// flight. Batches are numbered per peer, and so all links to a peer share one announcer: a
// batch may name keys of each of them. One goroutine (run) owns what is not said to be
// everybody's, and the Sender; each flight has a goroutine that says its batch, again if
// need be, and brings the answer home.
//
// If the process dies, the takeover of its run does for each flight what the answer
// would have asked for.
type announcer struct {
	k    *KME
	peer identity.KME

	// Everybody's.
	asks       chan *ask
	doubt      atomic.Bool   // an announce is unanswered: new requests are refused
	committing atomic.Int64  // requests that the peer has assigned and that are being committed here
	committed  chan struct{} // one of them has ended

	sender  *handover.Sender
	waiting []*ask
	atoms   int // of waiting, as ask.weight counts them
	most    int // likewise, of the next batch: see pace
	asking  int // requests in flight
	flying  map[*flight]bool
	landed  chan *flight
	flights sync.WaitGroup
	doubts  int // flights in doubt
}

// flight is a batch on its way to its answer.
type flight struct {
	batch  handover.Announce
	asks   []*ask
	atoms  int // as ask.weight counts them
	left   time.Time
	doubt  bool          // its asks have been told 503, and its keys are parked
	wait   time.Duration // until it is repeated
	answer handover.AnnounceAnswer
	err    error
}

// askQueue is how many requests may wait for an announce to a peer: what the request
// deadline allows, and no more.
const askQueue = 512

func newAnnouncer(k *KME, peer identity.KME) *announcer {
	return &announcer{
		k: k, peer: peer, asks: make(chan *ask, askQueue), committed: make(chan struct{}, 1),
		most: handover.MaxAtoms, flying: make(map[*flight]bool), landed: make(chan *flight),
	}
}

// announcerTo is the one that the links to a peer share. It is made with the first of them.
func (k *KME) announcerTo(peer identity.KME) *announcer {
	if k.announcers == nil {
		k.announcers = make(map[identity.KME]*announcer)
	}
	if k.announcers[peer] == nil {
		k.announcers[peer] = newAnnouncer(k, peer)
	}
	return k.announcers[peer]
}

// announce runs the announcer until ctx ends.
func (a *announcer) announce(ctx context.Context) error {
	defer a.drain()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-a.k.takenOver[a.peer]:
	}
	a.sender = handover.NewSender(a.k.Node, a.k.run.Load(), announceWindow)
	return a.run(ctx)
}

func (a *announcer) run(ctx context.Context) error {
	defer a.flights.Wait()
	for {
		asks := a.asks
		if a.full() {
			asks = nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case x := <-asks:
			a.add(x)
		case f := <-a.landed:
			a.land(ctx, f)
		case <-a.committed:
		}
		runtime.Gosched() // whoever is about to ask, woken together with the first, does so now
		a.gather()
		if a.doubts > 0 {
			a.refuse(a.unreachable(errors.New("an earlier announce is still unanswered")))
		}
		for a.ready() {
			a.depart(ctx)
		}
	}
}

// full says that no more may wait here; the rest waits in the queue.
func (a *announcer) full() bool {
	return len(a.waiting) >= handover.MaxRequests || a.atoms > handover.MaxAtoms-askAtoms
}

func (a *announcer) add(x *ask) {
	a.waiting = append(a.waiting, x)
	a.atoms += x.weight()
}

// gather takes what else is in the queue: it never sleeps to fill a batch.
func (a *announcer) gather() {
	for !a.full() {
		select {
		case x := <-a.asks:
			a.add(x)
		default:
			return
		}
	}
}

// ready says whether what waits leaves now: at once when nothing is under way, to the
// peer or into our own database, and otherwise when it is as much as what is. So
// batches are few and large while the peer is near, which spares both ends
// transactions, and several are under way when it is far. A batch of many atoms is worth its
// transactions whatever is under way: while one site unwraps, the other seals.
func (a *announcer) ready() bool {
	if len(a.waiting) == 0 || !a.sender.Free() {
		return false
	}
	busy := a.asking + int(a.committing.Load())
	return busy <= len(a.waiting) || a.atoms >= manyAtoms || a.full()
}

// depart sends the next batch on its way.
func (a *announcer) depart(ctx context.Context) {
	f := &flight{asks: a.next(), left: time.Now(), wait: repeatMin}
	if len(f.asks) == 0 {
		return
	}
	requests := make([]handover.Request, len(f.asks))
	for i, x := range f.asks {
		requests[i] = x.request
		f.atoms += x.weight()
	}
	f.batch = a.sender.Next(requests)
	a.flying[f] = true
	a.asking += len(f.asks)
	a.flights.Go(func() {
		f.answer, f.err = a.tellFirst(ctx, f.batch)
		a.bringHome(ctx, f)
	})
}

// next takes from what waits as much as a batch may hold now, without those whose
// client or asker has left.
func (a *announcer) next() (asks []*ask) {
	atoms, taken := 0, 0
	for _, x := range a.waiting {
		if len(asks) > 0 && atoms+x.weight() > a.most {
			break
		}
		taken++
		a.atoms -= x.weight()
		if x.begins() {
			asks = append(asks, x)
			atoms += x.weight()
		}
	}
	a.waiting = append([]*ask(nil), a.waiting[taken:]...)
	return asks
}

// begins says whether an ask goes into a batch: not when its client or its asker has left.
func (x *ask) begins() bool {
	if x.client.Err() == nil && !x.left.Load() {
		return true
	}
	x.link.pool.give(x.lends)
	x.settle(fate{err: unavailable(0, "", errors.New("the client left before its request began"))})
	return false
}

func (a *announcer) bringHome(ctx context.Context, f *flight) {
	select {
	case a.landed <- f:
	case <-ctx.Done():
	}
}

// tell says a batch until it is judged, up to the announce deadline.
func (a *announcer) tell(ctx context.Context, batch handover.Announce) (handover.AnnounceAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, announceTime)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { failpoint.Hit(failpoint.EncAnnounceSent) },
	})
	for wait := time.Millisecond; ; wait *= 2 {
		origin := a.k.past.originOf(a.peer)
		answer, err := a.k.Peers[a.peer].Announce(ctx, batch)
		if err == nil && len(answer.Results) > 0 {
			a.k.past.answered(a.peer, origin, batch.Run, batch.Batch)
		}
		if err != nil || answer.Standing != handover.Ahead {
			return answer, err
		}
		select { // this copy came before the batch that it follows
		case <-ctx.Done():
			return answer, nil
		case <-time.After(wait):
		}
	}
}

// tellFirst says a batch for the first time, and at once a second time if the answer is
// lost on the way: a node that ends closes its connections, whatever is on its way to it,
// and the second copy goes to another of the peer's. The batch is in doubt, with the first
// copy's error, if the second is not judged either: that this one was refused, declined or
// not sent says nothing of the first.
func (a *announcer) tellFirst(ctx context.Context, batch handover.Announce) (handover.AnnounceAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, announceTime)
	defer cancel()
	answer, lost := a.tell(ctx, batch)
	if lost == nil || untold(lost) || ctx.Err() != nil {
		return answer, lost
	}
	answer, err := a.tell(ctx, batch)
	if err != nil || answer.Standing == handover.Ahead || answer.Standing == handover.Declined {
		return handover.AnnounceAnswer{}, lost
	}
	return answer, nil
}

// untold says that the peer has certainly not acted on any copy that was sent.
func untold(err error) bool {
	var refused *peer.Refused
	return errors.Is(err, peer.ErrNotSent) || errors.As(err, &refused) || errors.Is(err, handover.ErrDeclined)
}

// land acts on what a flight has brought home.
func (a *announcer) land(ctx context.Context, f *flight) {
	err := f.err
	if err == nil {
		var settled []handover.Settlement
		if settled, err = a.sender.Answered(f.batch.Batch, f.answer); err == nil {
			a.pace(f)
			a.remove(ctx, f)
			for i, s := range settled {
				f.asks[i].link.settle(ctx, f.asks[i], s)
			}
			return
		}
	}
	if untold(err) && a.sender.Unsent(f.batch.Batch) {
		a.remove(ctx, f)
		for _, x := range f.asks {
			x.link.pool.give(x.lends)
			x.settle(fate{err: a.unreachable(err)})
		}
		return
	}
	a.insist(ctx, f, err)
}

// remove forgets a flight that is settled.
func (a *announcer) remove(ctx context.Context, f *flight) {
	delete(a.flying, f)
	a.asking -= len(f.asks)
	if !f.doubt {
		return
	}
	if a.doubts--; a.doubts == 0 {
		a.doubt.Store(false)
		a.flights.Go(func() {
			if !a.doubt.Load() {
				a.k.clear(ctx, a.doubtAlarm())
			}
		})
	}
}

// pace keeps batches to what the peer answers well within the deadline: it seals
// each key anew, and its HSM may be slow.
func (a *announcer) pace(f *flight) {
	switch took := time.Since(f.left); {
	case f.doubt:
	case took > announceTime/2:
		a.most = max(key.ChunkAtoms, min(a.most, f.atoms)/2)
	case took < announceTime/8 && f.atoms > a.most/2:
		a.most = min(2*a.most, handover.MaxAtoms)
	}
}

// insist repeats a batch whose outcome is unknown, unchanged, until it is answered.
// Its callers get their 503; its keys are parked: neither leasable nor burned.
func (a *announcer) insist(ctx context.Context, f *flight, cause error) {
	first := !f.doubt
	if first {
		f.doubt = true
		a.sender.Doubt(f.batch.Batch)
		a.doubts++
		a.doubt.Store(true)
		for _, x := range f.asks {
			x.settle(fate{err: a.unreachable(fmt.Errorf("outcome unknown: %w", cause))})
		}
	} else {
		// Stale among others: if our run was really taken over, our own run row says
		// so and ends the process; a peer's word alone does not.
		a.k.Log.Warn("repeating an announce", "peer", a.peer.String(), "batch", f.batch.Batch, "err", cause)
	}
	a.flights.Go(func() {
		if first {
			a.park(ctx, f, cause)
		}
		if a.repeat(ctx, f) == nil {
			a.bringHome(ctx, f)
		}
	})
}

func (a *announcer) doubtAlarm() string { return "announce-" + a.peer.String() }

// park writes down which keys are in doubt. The rows are for operators: the lease
// keeps the keys from other nodes, and the flight keeps them from us.
func (a *announcer) park(ctx context.Context, f *flight, cause error) {
	a.k.raise(ctx, a.doubtAlarm(), fmt.Sprintf("batch %d to %s is unanswered, %d keys are parked: %v", f.batch.Batch, a.peer, len(f.keys()), cause))
	if err := a.k.Store.Park(ctx, f.keys(), f.batch.Batch); err != nil {
		a.k.Log.Warn("parking keys", "peer", a.peer.String(), "err", err)
	}
}

// keys are the IDs of all atoms that the batch names.
func (f *flight) keys() []key.ID {
	var ids []key.ID
	for _, x := range f.asks {
		ids = append(ids, atomIDs(x.lends)...)
	}
	return ids
}

// repeat says a batch again until the peer has judged it. An error is that ctx ended.
func (a *announcer) repeat(ctx context.Context, f *flight) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(f.wait):
		}
		f.wait = min(2*f.wait, repeatMax)
		if f.answer, f.err = a.tell(ctx, f.batch); f.err != nil {
			continue
		}
		switch f.answer.Standing {
		case handover.Fresh, handover.Repeat:
			if err := a.k.Store.Unpark(ctx, f.keys()); err != nil {
				a.k.Log.Warn("unparking keys", "peer", a.peer.String(), "err", err)
			}
			return nil
		case handover.Ahead, handover.Declined:
		default:
			return nil
		}
	}
}

// settle acts on the peer's decision on one request.
func (l *link) settle(ctx context.Context, x *ask, s handover.Settlement) {
	switch s.Verb {
	case handover.Commit:
		l.announcer.committing.Add(1)
		if !x.settle(fate{batch: s.Batch}) {
			l.announcer.committing.Add(-1)
			l.reclaim(x, s.Batch)
		}
	case handover.Reclaim:
		l.reclaim(x, s.Batch)
	case handover.Return:
		l.returned(ctx, x, s)
	}
}

// refuse answers what waits, whose atoms go back to the pool.
func (a *announcer) refuse(err error) {
	for _, x := range a.waiting {
		x.link.pool.give(x.lends)
		x.settle(fate{err: err})
	}
	a.waiting, a.atoms = nil, 0
}

// ended says that a commit has come to its end, however it did.
func (a *announcer) ended() {
	a.committing.Add(-1)
	select {
	case a.committed <- struct{}{}:
	default: // the announcer has yet to look at the one before
	}
}

// drain answers what still waits when the node stops.
func (a *announcer) drain() {
	for {
		a.gather()
		if len(a.waiting) == 0 {
			return
		}
		a.refuse(unavailable(time.Second, "the key store is stopping", errors.New("stopping")))
	}
}
