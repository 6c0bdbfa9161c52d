package kme

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// newAskLink is a link with 64 atoms in its pool, and nobody who announces.
func newAskLink() *link {
	f := newFibre()
	f.grow(1, ^uint64(0))
	l := &link{LinkConfig: LinkConfig{ID: "fibre"}, announcer: newAnnouncer(nil, identity.KME{})}
	l.pool.lease, l.pool.free, l.pool.fresh, l.pool.nodes = f.lease, f.free, f.fresh, one
	return l
}

// inPool is how many atoms nobody holds.
func (l *link) inPool() (atoms int) {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	for _, h := range l.pool.leases {
		atoms += len(h.left)
	}
	return atoms
}

// asking is a request that waits for its announce, in a goroutine of its own.
func (l *link) asking(t *testing.T, client context.Context) <-chan fate {
	t.Helper()
	lends, err := l.pool.take(t.Context(), 1, 1)
	if err != nil || lends == nil {
		t.Fatalf("take: %v, %v", lends, err)
	}
	answered := make(chan fate, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), requestTime)
		defer cancel()
		answered <- l.ask(ctx, client, handover.Request{}, lends)
	}()
	synctest.Wait()
	return answered
}

// wants503 says that a request was answered by now, and how.
func wants503(t *testing.T, answered <-chan fate, retry time.Duration) {
	t.Helper()
	synctest.Wait()
	select {
	case f := <-answered:
		var p *problem.Error
		if !errors.As(f.err, &p) || p.Kind != problem.Unavailable || p.RetryAfter != retry {
			t.Errorf("answered %v, want 503 and to come again after %v", f.err, retry)
		}
	default:
		t.Error("not answered")
	}
}

// TestAskGivesUp: an asker leaves after its deadline, and whoever settles its batch
// later is told that nobody waits; its atoms are not in the pool, since the peer
// may have assigned them.
func TestAskGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newAskLink()
		began := time.Now()
		answered := l.asking(t, t.Context())
		a := <-l.announcer.asks
		wait(t, requestTime)
		wants503(t, answered, 2*time.Second)
		if took := time.Since(began); took != requestTime {
			t.Errorf("answered after %v, want %v", took, requestTime)
		}
		if a.settle(fate{batch: 7}) || l.inPool() != key.ChunkAtoms-1 {
			t.Errorf("settled with nobody there, or %d atoms in the pool", l.inPool())
		}
	})
}

// TestAskIsSettledOnce, by whoever comes first.
func TestAskIsSettledOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newAskLink()
		answered := l.asking(t, t.Context())
		a := <-l.announcer.asks
		if !a.settle(fate{batch: 7}) || a.settle(fate{batch: 8}) {
			t.Error("not settled exactly once")
		}
		synctest.Wait()
		if f := <-answered; f.batch != 7 || f.err != nil {
			t.Errorf("fate %+v", f)
		}
	})
}

// TestAskWhileInDoubt and beyond what may wait is 503 at once, and the atoms are back.
func TestAskWhileInDoubt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newAskLink()
		l.announcer.doubt.Store(true)
		wants503(t, l.asking(t, t.Context()), 2*time.Second)
		l.announcer.doubt.Store(false)
		for range askQueue {
			l.announcer.asks <- nil
		}
		wants503(t, l.asking(t, t.Context()), time.Second)
		if l.inPool() != key.ChunkAtoms {
			t.Errorf("%d atoms in the pool", l.inPool())
		}
	})
}

// TestGather: a batch is what waits, without those whose client has left, and no
// more than a message may hold.
func TestGather(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newAskLink()
		left, leave := context.WithCancel(t.Context())
		leave()
		gone := l.asking(t, left)
		first, second := l.asking(t, t.Context()), l.asking(t, t.Context())
		a := l.announcer
		a.gather()
		asks := a.next()
		if len(asks) != 2 || l.inPool() != key.ChunkAtoms-2 {
			t.Fatalf("gathered %d; %d atoms in the pool", len(asks), l.inPool())
		}
		wants503(t, gone, 0)
		for _, a := range asks {
			a.settle(fate{})
		}
		<-first
		<-second

		for range handover.MaxRequests + 1 {
			a.asks <- &ask{client: t.Context()}
		}
		a.gather()
		if asks = a.next(); len(asks) != handover.MaxRequests || len(a.asks) != 1 {
			t.Errorf("gathered %d requests, want %d; %d in the queue", len(asks), handover.MaxRequests, len(a.asks))
		}
		<-a.asks
		for range 3 {
			a.asks <- &ask{client: t.Context(), lends: make([]lent, askAtoms)}
		}
		a.gather()
		if asks = a.next(); len(asks)*askAtoms != handover.MaxAtoms || a.atoms != 0 || len(a.waiting) != 0 {
			t.Errorf("gathered %d requests of %d atoms, want %d atoms; %d atoms of %d requests wait", len(asks), askAtoms, handover.MaxAtoms, a.atoms, len(a.waiting))
		}
	})
}

// TestReady: what waits leaves at once when nothing is in flight, and otherwise when
// it is as much as what is, or has many atoms, and the window has room.
func TestReady(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		waiting, atoms, asking, committing, flights int
		want                                        bool
	}{
		{0, 0, 0, 0, 0, false},
		{1, 1, 0, 0, 0, true},
		{1, 1, 1, 0, 1, true},
		{1, 1, 2, 0, 1, false},
		{1, 1, 0, 2, 0, false},
		{31, 31, 16, 16, 3, false},
		{32, 32, 16, 16, 3, true},
		{32, 32, 32, 0, announceWindow, false},
		{2, 2 * askAtoms, 32, 0, 3, true},
		{15, manyAtoms - 1, 48, 0, 3, false},
		{16, manyAtoms, 48, 0, 3, true},
		{16, manyAtoms, 48, 0, announceWindow, false},
		{handover.MaxRequests, handover.MaxRequests, 9999, 0, 3, true},
	} {
		a := &announcer{sender: handover.NewSender("a1", 1, announceWindow), waiting: make([]*ask, tt.waiting), atoms: tt.atoms, asking: tt.asking}
		a.committing.Store(int64(tt.committing))
		for range tt.flights {
			a.sender.Next(nil)
		}
		if got := a.ready(); got != tt.want {
			t.Errorf("%+v: %t", tt, got)
		}
	}
}

// TestPace: batches that take too long are halved, and double again.
func TestPace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := &announcer{most: handover.MaxAtoms}
		land := func(atoms int, took time.Duration, want int) {
			t.Helper()
			f := &flight{atoms: atoms, left: time.Now()}
			wait(t, took)
			if a.pace(f); a.most != want {
				t.Errorf("%d atoms in %v: at most %d in the next batch, want %d", atoms, took, a.most, want)
			}
		}
		land(4096, announceTime/2, 4096)
		land(1000, announceTime/2+1, 500)
		land(500, announceTime, 250)
		land(100, announceTime, key.ChunkAtoms)
		land(1, announceTime, key.ChunkAtoms)
		land(key.ChunkAtoms/2, 0, key.ChunkAtoms)
		land(key.ChunkAtoms, 0, 2*key.ChunkAtoms)
		a.most = 3000
		land(2000, announceTime/9, handover.MaxAtoms)
	})
}

// TestTurnstile: batches go through in order, copies one after the other, and nobody
// waits for long for what has been lost.
func TestTurnstile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ts := newTurnstile()
		ts.learn(handover.PeerRun{Run: 7, Last: 4})
		var order []int64
		pass := func(run, batch int64) {
			if err := ts.enter(t.Context(), batch); err != nil {
				t.Error(err)
			}
			defer ts.leave(batch)
			ts.turn(t.Context(), run, batch)
			order = append(order, batch)
			ts.learn(handover.PeerRun{Run: run, Last: batch})
		}
		began := time.Now()
		for _, batch := range []int64{7, 6, 6} {
			go pass(7, batch)
			synctest.Wait()
		}
		if len(order) != 0 {
			t.Errorf("%v did not wait for 5", order)
		}
		pass(7, 5)
		synctest.Wait()
		if want := []int64{5, 6, 6, 7}; !slices.Equal(slices.Sorted(slices.Values(order)), want) || order[0] != 5 || time.Since(began) != 0 {
			t.Errorf("passed in order %v after %v", order, time.Since(began))
		}
		pass(7, 9)
		if took := time.Since(began); took != holdTime {
			t.Errorf("waited %v for a batch that was lost, want %v", took, holdTime)
		}
		pass(8, 3) // of a run that is not known here: the store judges
		ts.learn(handover.PeerRun{Run: 7, Last: 12})
		if took := time.Since(began); took != holdTime || ts.knows() != (handover.PeerRun{Run: 8, Last: 3}) {
			t.Errorf("after %v, %+v is known", took, ts.knows())
		}
	})
}

// TestWhatWaitsIsAnswered while a batch is in doubt, and when the link stops.
func TestWhatWaitsIsAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newAskLink()
		a := l.announcer
		waits := l.asking(t, t.Context())
		a.gather()
		a.refuse(a.unreachable(errors.New("in doubt")))
		wants503(t, waits, 2*time.Second)
		waiting := l.asking(t, t.Context())
		a.drain()
		wants503(t, waiting, time.Second)
		if l.inPool() != key.ChunkAtoms {
			t.Errorf("%d atoms in the pool", l.inPool())
		}
	})
}

// TestEvery: at once, then once per interval, and earlier when there is news.
func TestEvery(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := &KME{news: make(chan struct{}, 1)}
		began := time.Now()
		var at []time.Duration
		ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
		defer cancel()
		time.AfterFunc(300*time.Millisecond, k.hurry)
		err := k.every(ctx, time.Second, k.news, func(context.Context) {
			if at = append(at, time.Since(began)); len(at) == 1 { // news that comes meanwhile is not forgotten, and counts once
				k.hurry()
				k.hurry()
			}
		})
		want := []time.Duration{0, 0, 300 * time.Millisecond, time.Second, 2 * time.Second}
		if !errors.Is(err, context.DeadlineExceeded) || !slices.Equal(at, want) {
			t.Errorf("did it after %v, %v, want %v", at, err, want)
		}
	})
}

// wait lets time pass in the bubble.
func wait(t *testing.T, d time.Duration) {
	t.Helper()
	<-time.After(d)
	synctest.Wait()
}
