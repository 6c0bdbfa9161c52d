package store

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestTurns: who asks gets an answer that began to be found after it had asked, many who
// ask meanwhile share one, and who goes away holds up nobody.
func TestTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ts turns[time.Time]
		var finds atomic.Int32
		find := func(ctx context.Context) (time.Time, error) {
			finds.Add(1)
			began := time.Now()
			select {
			case <-time.After(time.Second):
				return began, nil
			case <-ctx.Done():
				return began, ctx.Err()
			}
		}
		var all sync.WaitGroup
		ask := func(ctx context.Context, after time.Duration) {
			all.Go(func() {
				<-time.After(after)
				asked := time.Now()
				began, err := ts.next(ctx, find)
				if err == nil && began.Before(asked) {
					t.Errorf("the answer to who asked at %v is of %v", asked, began)
				}
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			})
		}
		gone, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		ask(t.Context(), 0)
		ask(gone, 500*time.Millisecond) // first of the next turn, and it leaves in the middle of it
		for range 50 {
			ask(t.Context(), 600*time.Millisecond)
		}
		ask(t.Context(), 10*time.Second)
		all.Wait()
		if n := finds.Load(); n != 3 {
			t.Errorf("%d answers were found, want 3", n)
		}
	})
}
