package kme

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// TestSpend: an SAE may have its burst at once and its rate in the long run; what
// is refused takes nothing and says when to come again; others have their own.
func TestSpend(t *testing.T) {
	t.Parallel()
	c := newClock()
	k := &KME{Config: Config{Now: c.now, Quota: Quota{Rate: 100, Burst: 3000}}}
	spend := func(sae string, atoms int, retry time.Duration) {
		t.Helper()
		err := k.spend(saeID(t, sae), atoms)
		switch {
		case retry == 0 && err != nil:
			t.Errorf("%s, %d atoms: %v", sae, atoms, err)
		case retry > 0 && (err == nil || err.Kind != problem.Unavailable || err.RetryAfter != retry):
			t.Errorf("%s, %d atoms: %+v, want 503 and to come again after %v", sae, atoms, err, retry)
		}
	}
	spend("alice", 2000, 0)
	spend("alice", 1000, 0)
	spend("alice", 250, 3*time.Second) // there in 2.5 s
	spend("alice", 1, time.Second)
	spend("bob", 3000, 0)
	c.step(time.Second)
	spend("alice", 101, time.Second)
	spend("alice", 100, 0) // the refused ones took nothing
	c.step(-40 * time.Second)
	spend("alice", 1, time.Second)
	c.step(30 * time.Second)
	spend("alice", 1, 0) // a clock that went back is not waited for
	if err := k.spend(saeID(t, "alice"), 3001); err == nil || err.Kind != problem.Invalid {
		t.Errorf("a request for more than the burst: %v, want invalid: it can never be met", err)
	}
}

// TestListenedTo: an SAE that has spent its bucket is not listened to until there is an atom
// again, which takes nothing; one that has asked for nothing is.
func TestListenedTo(t *testing.T) {
	t.Parallel()
	c := newClock()
	k := &KME{Config: Config{Now: c.now, Quota: Quota{Rate: 2, Burst: 3000}}}
	admitted := func(sae string, want bool) {
		t.Helper()
		err := k.Admit(asSAE(t, sae, c.now()))
		var p *problem.Error
		if (err == nil) != want || err != nil && (!errors.As(err, &p) || p.Kind != problem.Unavailable || p.RetryAfter != time.Second || !errors.Is(err, errExcess)) {
			t.Errorf("%s: %v, want that it is listened to: %v", sae, err, want)
		}
	}
	admitted("alice", true)
	if err := k.spend(saeID(t, "alice"), 3000); err != nil {
		t.Fatal(err)
	}
	admitted("alice", false)
	admitted("bob", true)
	c.step(499 * time.Millisecond)
	admitted("alice", false)
	c.step(2 * time.Millisecond)
	for range 3 {
		admitted("alice", true)
	}
	if err := k.spend(saeID(t, "alice"), 1); err != nil {
		t.Errorf("the atom that is there: %v", err)
	}
	admitted("alice", false)
}

// TestTire: who is told again and again that it wants more than its share is told so more
// slowly, however many ask in its name at once; others and those who come again later are not.
func TestTire(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := &KME{Config: Config{Now: time.Now}}
		told := func(sae string, times int) time.Duration {
			began := time.Now()
			var all sync.WaitGroup
			for range times {
				all.Go(func() { k.tire(t.Context(), saeID(t, sae)) })
			}
			all.Wait()
			return time.Since(began)
		}
		if took := told("alice", excessBurst); took != 0 {
			t.Errorf("the first %d were told after %v", excessBurst, took)
		}
		if took := told("alice", excessRate/2); took != time.Second/2 {
			t.Errorf("the next %d were told after %v, want half a second", excessRate/2, took)
		}
		if took := told("alice", 10*excessRate); took != excessWait {
			t.Errorf("%d at once were told after %v, want %v at most", 10*excessRate, took, excessWait)
		}
		if took := told("bob", 1); took != 0 {
			t.Errorf("another was told after %v", took)
		}
		<-time.After(time.Minute)
		if took := told("alice", excessBurst); took != 0 {
			t.Errorf("after a minute it was told after %v", took)
		}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		if k.tire(gone, saeID(t, "alice")); time.Since(began) != 0 {
			t.Errorf("who has gone was waited for: %v", time.Since(began))
		}
	})
}

// TestRoom: requests of an announce have room beside what waits and beside each
// other, each pair its own.
func TestRoom(t *testing.T) {
	t.Parallel()
	k := newSite(t).node()
	k.Quota.Untaken = 3
	alice, bob, bert := saeID(t, "alice"), saeID(t, "bob"), saeID(t, "bert")
	epoch := key.EpochAt(k.Now(), time.Hour)
	if _, err := k.Store.EnsureEpoch(t.Context(), epoch); err != nil {
		t.Fatal(err)
	}
	due := store.Due{
		Key: key.NewLocalID(epoch.Start(time.Hour)), SAE: bob, Master: alice, Bits: 256, Provenance: key.LocalRNG, CT: make([]byte, 48),
		ExpiresAt: k.Now().Add(time.Minute), ExpiryEpoch: epoch,
	}
	if err := k.Store.Serve(t.Context(), store.ServeJob{Due: []store.Due{due}}); err != nil {
		t.Fatal(err)
	}
	given := make(rooms)
	for i, r := range []struct {
		slaves []identity.SAE
		keys   int
		ok     bool
	}{
		{[]identity.SAE{bob}, 3, false},
		{[]identity.SAE{bert, bob}, 1, true},
		{[]identity.SAE{bert, bob}, 2, false}, // and bert gets none of it
		{[]identity.SAE{bert}, 2, true},
		{[]identity.SAE{bob}, 1, true},
		{[]identity.SAE{bob}, 1, false},
		{[]identity.SAE{bert}, 1, false},
	} {
		err := given.give(k, handover.Request{Master: alice, Slaves: r.slaves, Keys: make([]handover.Key, r.keys)})
		if (err == nil) != r.ok {
			t.Errorf("request %d: %v, want room: %t", i, err, r.ok)
		}
	}
	if err := given.give(k, handover.Request{Master: bert, Slaves: []identity.SAE{bob}, Keys: make([]handover.Key, 3)}); err != nil {
		t.Errorf("another master: %v", err)
	}
}
