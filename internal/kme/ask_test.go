package kme

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// newAskLink is a link with 64 atoms in its pool, and nobody who announces.
func newAskLink() *link {
	f := newFibre()
	f.grow(1, ^uint64(0))
	l := &link{LinkConfig: LinkConfig{ID: "fibre"}, asks: make(chan *ask, askQueue)}
	l.pool.lease, l.pool.stored, l.pool.fresh = f.lease, f.stored, f.fresh
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
		a := <-l.asks
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
		a := <-l.asks
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
		l.doubt.Store(true)
		wants503(t, l.asking(t, t.Context()), 2*time.Second)
		l.doubt.Store(false)
		for range askQueue {
			l.asks <- nil
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
		asks, err := l.gather(t.Context())
		if err != nil || len(asks) != 2 || l.inPool() != key.ChunkAtoms-2 {
			t.Fatalf("gathered %d, %v; %d atoms in the pool", len(asks), err, l.inPool())
		}
		wants503(t, gone, 0)
		for _, a := range asks {
			a.settle(fate{})
		}
		<-first
		<-second

		for range handover.MaxRequests + 1 {
			l.asks <- &ask{client: t.Context()}
		}
		if asks, err = l.gather(t.Context()); err != nil || len(asks) != handover.MaxRequests {
			t.Errorf("gathered %d requests, %v, want %d", len(asks), err, handover.MaxRequests)
		}
		<-l.asks
		for range 3 {
			l.asks <- &ask{client: t.Context(), lends: make([]lent, askAtoms)}
		}
		if asks, err = l.gather(t.Context()); err != nil || len(asks)*askAtoms != handover.MaxAtoms {
			t.Errorf("gathered %d requests of %d atoms, %v, want %d atoms", len(asks), askAtoms, err, handover.MaxAtoms)
		}
	})
}

// TestWhatWaitsIsAnswered while a batch is in doubt, and when the link stops.
func TestWhatWaitsIsAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newAskLink()
		over := make(chan error, 1)
		go func() { over <- l.refuseFor(t.Context(), time.Minute) }()
		wants503(t, l.asking(t, t.Context()), 2*time.Second)
		began := time.Now()
		if err := <-over; err != nil || time.Since(began) != time.Minute {
			t.Errorf("refused for %v, %v", time.Since(began), err)
		}
		waiting := l.asking(t, t.Context())
		l.drain()
		wants503(t, waiting, time.Second)
		if l.inPool() != key.ChunkAtoms {
			t.Errorf("%d atoms in the pool", l.inPool())
		}
		stopped, stop := context.WithCancel(t.Context())
		stop()
		if err := l.refuseFor(stopped, time.Minute); !errors.Is(err, context.Canceled) {
			t.Errorf("refusing goes on after the end: %v", err)
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
