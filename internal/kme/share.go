package kme

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// shares are this node's slices of the quotas that network.yaml sets for the site.
type shares struct{ sync.Map } // share -> *slice

// share names what a slice is of.
type share struct {
	subject string
	length  time.Duration
}

// slice is what this node has leased of a window and not used. Who finds it empty
// leases the next while others wait for it.
type slice struct {
	mu    sync.Mutex
	start time.Time
	left  int64
}

// Slices are a hundredth of a day's quota and a fourth of a second's, so that a node
// asks the database seldom and another one is not long without.
const (
	slicesOfDay    = 100
	slicesOfSecond = 4
)

// spendShares takes keys out of every quota that is on master and on its pairs with
// slaves, or out of none. back returns them, for a request that came to nothing.
func (k *KME) spendShares(ctx context.Context, master identity.SAE, slaves []identity.SAE, keys int) (back func(), err error) {
	var undo []func()
	back = func() {
		for _, f := range undo {
			f()
		}
	}
	for _, q := range k.Policies().QuotasOf(master, slaves) {
		for _, w := range []struct {
			length time.Duration
			limit  int64
			slices int64
		}{{time.Second, q.PerSecond, slicesOfSecond}, {24 * time.Hour, q.PerDay, slicesOfDay}} {
			if w.limit == 0 {
				continue
			}
			f, err := k.spendShare(ctx, q, w.length, w.limit, w.slices, int64(keys))
			if err != nil {
				back()
				return func() {}, err
			}
			undo = append(undo, f)
		}
	}
	return back, nil
}

func (k *KME) spendShare(ctx context.Context, q policies.Quota, length time.Duration, limit, slices, keys int64) (back func(), err error) {
	subject := q.Subject()
	if keys > limit {
		return nil, problem.New(problem.Invalid, "no request may be for more than %d keys", limit)
	}
	v, ok := k.shares.Load(share{subject, length})
	if !ok {
		v, _ = k.shares.LoadOrStore(share{subject, length}, new(slice))
	}
	s := v.(*slice)
	now := k.Now()
	start := now.Truncate(length)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil { // the time went by while others waited for the database
		return nil, err
	}
	if start.After(s.start) {
		s.start, s.left = start, 0
	}
	if s.left < keys {
		need := keys - s.left
		granted, err := k.Store.LeaseQuota(ctx, store.QuotaWindow{Subject: subject, Length: length, Start: s.start, Limit: limit}, need, max(need, limit/slices))
		if err != nil {
			return nil, err
		}
		if granted < need {
			return nil, unavailable(start.Add(length).Sub(now).Truncate(time.Second)+time.Second, "too many keys were asked for",
				fmt.Errorf("%w: the quota of %d keys in %v on %s is spent", errExcess, limit, length, subject))
		}
		s.left += granted
	}
	s.left -= keys
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.start.Equal(start) {
			s.left += keys
		}
	}, nil
}
