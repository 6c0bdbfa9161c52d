package store

import (
	"context"
	"sync"
)

// turns has an answer that is dear found for many at once: whoever comes while one is
// being found waits for the next one, which nobody has begun before they came.
type turns[T any] struct {
	mu      sync.Mutex
	begun   *turn[T] // the last one that has begun
	waiting *turn[T] // the one that is to begin after it
}

type turn[T any] struct {
	over   chan struct{} // closed when the fields below are there
	answer T
	err    error
}

// next is the answer of a find that begins after the call. Whoever is first to wait for it
// does the finding, even if its own ctx ends meanwhile: within tripTime.
func (t *turns[T]) next(ctx context.Context, find func(context.Context) (T, error)) (T, error) {
	t.mu.Lock()
	mine, before := t.waiting, t.begun
	first := mine == nil
	if first {
		mine = &turn[T]{over: make(chan struct{})}
		t.waiting = mine
	}
	t.mu.Unlock()
	if first {
		if before != nil {
			<-before.over
		}
		t.mu.Lock()
		t.waiting, t.begun = nil, mine
		t.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tripTime)
		defer cancel()
		mine.answer, mine.err = find(ctx)
		close(mine.over)
	}
	select {
	case <-mine.over:
		return mine.answer, mine.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}
