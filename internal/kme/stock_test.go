package kme

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/qutemail/kme/internal/store"
)

// TestStock: when little is in hand more is leased before anybody has to wait for it,
// and whoever finds enough in hand does not wait for a lease under way.
func TestStock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFibre()
		for range 16 {
			f.grow(1, ^uint64(0))
		}
		leasing, goOn := make(chan struct{}), make(chan struct{})
		leases := 0
		f.pool.wanting = make(chan struct{}, 1)
		f.pool.lease = func(ctx context.Context, most int) ([]store.Lease, error) {
			if leases++; leases == 2 {
				close(leasing)
				<-goOn
			}
			return f.lease(ctx, most)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- f.pool.stock(ctx) }()
		take := func(number int) {
			t.Helper()
			if got, err := f.pool.take(t.Context(), number, 1); err != nil || len(got) != number {
				t.Fatalf("take: %d atoms, %v", len(got), err)
			}
			synctest.Wait()
		}
		take(1) // half of 16 chunks are leased
		take(8*64*3/4 - 1)
		if leases != 1 {
			t.Errorf("%d leases with a quarter in hand, want 1", leases)
		}
		take(1)
		<-leasing
		take(8*64/4 - 1) // while the second lease is under way
		close(goOn)
		synctest.Wait()
		if _, short := f.pool.lend(nil, 8*64, 1); short != 0 {
			t.Errorf("%d atoms are missing after the second lease", short)
		}
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
