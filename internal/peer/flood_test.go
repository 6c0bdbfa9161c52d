package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
)

// holding is a Backend that keeps announces until it is let go.
type holding struct {
	*site
	came, let chan struct{}
}

func (h holding) Announce(ctx context.Context, from identity.KME, a handover.Announce) (handover.AnnounceAnswer, error) {
	h.came <- struct{}{}
	<-h.let
	return h.site.Announce(ctx, from, a)
}

// TestFlood: what a peer says beyond its places is turned away, which tells it that
// nothing was done, and is recorded; another peer has places of its own; and all is
// well as soon as there is a place.
func TestFlood(t *testing.T) {
	ca := newAuthority(t)
	h := holding{&site{answer: handover.AnnounceAnswer{Standing: handover.Declined}}, make(chan struct{}, maxAtOnce), make(chan struct{})}
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(h, identifyHTTP(t), quiet()))
	c := newClient(t, addr, ca.client(ca.issue(t, "kme", "km1")))
	var all sync.WaitGroup
	for i := range maxAtOnce {
		all.Go(func() {
			if _, err := c.Announce(within(t, time.Minute), anAnnounce(int64(i+1))); err != nil {
				t.Errorf("batch %d, which had a place: %v", i+1, err)
			}
		})
	}
	for range maxAtOnce {
		<-h.came
	}
	const beyond = 3
	for range beyond {
		err := c.Void(within(t, time.Minute), handover.Void{Node: "a1", Run: 1, Batch: 1, Keys: anAnnounce(1).Requests[0].Keys[0].Atoms})
		wantFate(t, err, refused)
		if r, _ := errors.AsType[*Refused](err); r == nil || r.Status != http.StatusTooManyRequests {
			t.Errorf("beyond the places: %v, want 429", err)
		}
	}
	asked, turnedAway := h.saw()
	if asked != 0 || len(turnedAway) != beyond {
		t.Errorf("asked %d times and turned away %d, want 0 and %d", asked, len(turnedAway), beyond)
	}
	for _, r := range turnedAway {
		if !errors.Is(r.Err, ErrTooMany) {
			t.Errorf("turned away for %v", r.Err)
		}
	}
	if err := newClient(t, addr, ca.client(ca.issue(t, "kme", "km3"))).Void(within(t, time.Minute), handover.Void{Node: "c1", Run: 1, Batch: 1, Keys: anAnnounce(1).Requests[0].Keys[0].Atoms}); err != nil {
		t.Errorf("another peer: %v", err)
	}
	close(h.let)
	all.Wait()
	if err := c.Void(within(t, time.Minute), handover.Void{Node: "a1", Run: 1, Batch: 1, Keys: anAnnounce(1).Requests[0].Keys[0].Atoms}); err != nil {
		t.Errorf("when there are places again: %v", err)
	}
}

// TestStreamFlood: a peer's streams beyond its places are turned away, and recorded;
// another peer has places of its own; and one that ends makes room.
func TestStreamFlood(t *testing.T) {
	ca := newAuthority(t)
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	came, left, turnedAway := make(chan identity.KME), make(chan struct{}), make(chan Refusal)
	done := make(chan error, 1)
	go func() {
		done <- ServeClassical(ctx, ln, ClassicalConfig{
			Shake: shaking(ca.server(ca.issue(t, "kme", "km2"))), Identify: judge(t), Log: quiet(), Changed: func() <-chan struct{} { return nil },
			Handle: func(ctx context.Context, from identity.KME, s *Stream) {
				came <- from
				_, _, _ = s.Recv() // until it is closed
				select {
				case left <- struct{}{}:
				case <-ctx.Done():
				}
			},
			Refused: func(_ context.Context, _ identity.Caller, r Refusal) { turnedAway <- r },
		})
	}()
	one, other := ca.client(ca.issue(t, "kme", "km1")), ca.client(ca.issue(t, "kme", "km3"))
	dial := func(as *tls.Config) *Stream {
		s, err := DialClassical(within(t, time.Minute), []string{ln.Addr().String()}, as, letIn)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	arrives := func(want string) {
		t.Helper()
		select {
		case from := <-came:
			if from != mustKME(t, want) {
				t.Errorf("a stream of %s came, want one of %s", from, want)
			}
		case r := <-turnedAway:
			t.Fatalf("a stream of %s was turned away: %v", want, r.Err)
		}
	}
	var first *Stream
	for i := range maxStreams {
		s := dial(one)
		if i == 0 {
			first = s
		}
		arrives("km1")
	}
	dial(one)
	select {
	case <-came:
		t.Fatal("a peer has more streams than places")
	case r := <-turnedAway:
		if !errors.Is(r.Err, ErrTooMany) {
			t.Errorf("turned away for %v", r.Err)
		}
	}
	dial(other)
	arrives("km3")
	_ = first.Close()
	<-left
	for again := true; again; { // its place is free a little after its handler has returned
		dial(one)
		select {
		case <-came:
			again = false
		case <-turnedAway:
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
