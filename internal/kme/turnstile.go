package kme

import (
	"context"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/handover"
)

// turnstile lets the batches of one node of a peer through in the order of their
// numbers, and copies of a batch one after the other. It knows what this process has
// committed, which another node of the site may be ahead of: it spares work and
// repetitions, and the store judges.
type turnstile struct {
	mu     sync.Mutex
	known  handover.PeerRun // as far as this process knows
	inside map[int64]bool   // batches that a copy of is being worked on
	moved  chan struct{}    // closed and replaced when any of this changes
}

// holdTime is how long a batch waits for the one before it, which may have been
// lost or have gone to another node: then the peer is told to come again.
const holdTime = 200 * time.Millisecond

func newTurnstile() *turnstile {
	return &turnstile{inside: make(map[int64]bool), moved: make(chan struct{})}
}

// until waits until ready, which is asked with mu held, says so. The error is that ctx ended.
func (t *turnstile) until(ctx context.Context, ready func() bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for !ready() {
		moved := t.moved
		t.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
		}
		t.mu.Lock()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func (t *turnstile) move() {
	close(t.moved)
	t.moved = make(chan struct{})
}

// enter waits until no other copy of the batch is being worked on. The caller leaves.
func (t *turnstile) enter(ctx context.Context, batch int64) error {
	return t.until(ctx, func() bool {
		free := !t.inside[batch]
		if free {
			t.inside[batch] = true
		}
		return free
	})
}

func (t *turnstile) leave(batch int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.inside, batch)
	t.move()
}

// turn waits until the batch is the next one, as far as is known, but not for long.
func (t *turnstile) turn(ctx context.Context, run, batch int64) {
	ctx, cancel := context.WithTimeout(ctx, holdTime)
	defer cancel()
	_ = t.until(ctx, func() bool { return run != t.known.Run || batch <= t.known.Last+1 })
}

// learn notes what is durable here of the node: it never goes back.
func (t *turnstile) learn(p handover.PeerRun) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.Run > t.known.Run || p.Run == t.known.Run && p.Last > t.known.Last {
		t.known = p
		t.move()
	}
}

// knows is what is known of the node's runs.
func (t *turnstile) knows() handover.PeerRun {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.known
}
