package kme

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/policies"
)

// limited has k hold to these quotas.
func (k *KME) limited(qs ...policies.Quota) {
	set := *k.Policies()
	set.Quotas = make(map[identity.SAE][]policies.Quota)
	for _, q := range qs {
		set.Quotas[q.SAE] = append(set.Quotas[q.SAE], q)
	}
	k.Policies = func() *policies.Set { return &set }
}

// TestShares: two nodes that give out keys as fast as they can give out as many as the
// site's quota says, and no more; what is returned can be had again; the next window
// is another one; and each pair has its own.
func TestShares(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.guarded()
	alice, bob, both, anna := saeID(t, "alice"), saeID(t, "bob"), saeID(t, "both"), saeID(t, "anna")
	quotas := []policies.Quota{{SAE: alice, PerDay: 1000}, {SAE: alice, With: bob, PerSecond: 50, PerDay: 300}}
	a.limited(quotas...)
	b := &KME{Config: Config{Store: a.Store, Now: s.now}}
	b.Policies = a.Policies
	spend := func(k *KME, keys int, slaves ...identity.SAE) (func(), error) {
		return k.spendShares(t.Context(), alice, slaves, keys)
	}
	drain := func(slaves ...identity.SAE) int64 {
		var got atomic.Int64
		var all sync.WaitGroup
		for _, k := range []*KME{a, b, a, b} {
			all.Go(func() {
				for {
					if _, err := spend(k, 1, slaves...); err != nil {
						if problem.KindOf(err) != problem.Unavailable {
							t.Error(err)
						}
						return
					}
					got.Add(1)
				}
			})
		}
		all.Wait()
		return got.Load()
	}
	if got := drain(bob); got != 50 {
		t.Errorf("in a second, with bob: %d keys, want 50", got)
	}
	if _, err := a.spendShares(t.Context(), anna, []identity.SAE{bob}, 128); err != nil {
		t.Errorf("anna, on whom there is no quota: %v", err)
	}
	s.step(time.Second)
	back, err := spend(a, 50, bob)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := spend(b, 1, bob); problem.KindOf(err) != problem.Unavailable {
		t.Errorf("the 51st of a second: %v", err)
	}
	back()
	if _, err := spend(a, 50, both, bob); err != nil {
		t.Errorf("what was returned: %v", err)
	}
	for range 10 {
		s.step(time.Second)
		drain(bob)
	}
	s.step(time.Second)
	if got := drain(bob); got != 0 {
		t.Errorf("with bob, whose day is spent: %d keys", got)
	}
	if got := drain(both); got != 700 {
		t.Errorf("with others: %d keys, want what is left of 1000", got)
	}
	s.step(12 * time.Hour) // it was half past twelve: the next day
	if got := drain(both, bob); got != 50 {
		t.Errorf("on the next day: %d keys, want 50 in the first second", got)
	}
	if _, err := spend(a, 51, bob); problem.KindOf(err) != problem.Invalid {
		t.Errorf("more than a second's quota at once: %v", err)
	}
	if got := a.Policies().QuotasOf(alice, []identity.SAE{both}); !slices.Equal(got, quotas[:1]) {
		t.Errorf("on alice with both: %+v", got)
	}
}
