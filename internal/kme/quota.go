package kme

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// Quota bounds what one SAE may have of what all share.
type Quota struct {
	Rate    float64 // atoms a second that an SAE may ask for or take
	Burst   int     // atoms at once, after a pause; at least MinBurst
	Untaken int     // keys of one master that may wait here for one slave
}

// MinBurst is the least burst of a Quota: the largest request.
const MinBurst = askAtoms

// fullRetry is when a master may ask again whose slave has too much to take.
const fullRetry = 10 * time.Second

// errExcess is why an SAE is refused that wants more than its share: come again later.
var errExcess = errors.New("more than its share")

// How such refusals are told to one caller: after a burst so many a second, each after a
// wait of excessWait at most.
const (
	excessRate  = 20
	excessBurst = 50
	excessWait  = time.Second
)

// buckets hold what each caller may still have of something. Only SAEs that are homed
// here, gateways and peers come to have one.
type buckets struct{ sync.Map } // identity.SAE, a gateway's ID or identity.KME -> *rate.Limiter

// of is the bucket of a caller, which holds burst if it is new.
func (b *buckets) of(caller any, perSecond float64, burst int) *rate.Limiter {
	l, ok := b.Load(caller)
	if !ok {
		l, _ = b.LoadOrStore(caller, rate.NewLimiter(rate.Limit(perSecond), burst))
	}
	return l.(*rate.Limiter)
}

// spend takes the atoms of a request out of its caller's bucket (an SAE's, or a gateway's
// where it names none), whatever becomes of the request. What the bucket does not hold is
// refused, and takes nothing.
func (k *KME) spend(caller any, atoms int) *problem.Error {
	now := k.Now()
	r := k.atoms.of(caller, k.Quota.Rate, k.Quota.Burst).ReserveN(now, atoms)
	if !r.OK() {
		return problem.New(problem.Invalid, "no request may be for more than %d keys of 256 bits", k.Quota.Burst)
	}
	wait := r.DelayFrom(now)
	if wait == 0 {
		return nil
	}
	r.CancelAt(now)
	return spent(wait.Truncate(time.Second)+time.Second,
		fmt.Errorf("%w: %v has spent its %g atoms a second: %d more are there in %v", errExcess, caller, k.Quota.Rate, atoms, wait.Round(time.Millisecond)))
}

// Admit says why a caller that has spent its bucket to the last atom is not even listened
// to: whatever it asks for would be refused, and to read it costs too. It takes nothing.
func (k *KME) Admit(c identity.Caller) error {
	var spender any = c.ID()
	if sae, ok := c.SAE(); ok {
		spender = sae
	}
	l, known := k.atoms.Load(spender)
	if !known || l.(*rate.Limiter).TokensAt(k.Now()) >= 1 {
		return nil
	}
	return spent(time.Second, fmt.Errorf("%w: %v has spent its %g atoms a second", errExcess, spender, k.Quota.Rate))
}

// spent is what a caller gets that has asked for more than its share.
func spent(retry time.Duration, cause error) *problem.Error {
	return unavailable(retry, "too many keys were asked for in a short time", cause)
}

// tire keeps a caller (an SAE or a peer) waiting that is to be told that it wants more
// than its share, or what it was told before: one that comes again at once would take the
// machine from the others by being turned away.
func (k *KME) tire(ctx context.Context, caller any) {
	now := k.Now()
	r := k.excess.of(caller, excessRate, excessBurst).ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > excessWait {
		r.CancelAt(now)
		wait = excessWait
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
}

// room is nil if keys more of master's may wait here for slave, and else says why not.
func (k *KME) room(slave, master identity.SAE, keys int) error {
	if n := k.Store.Untaken(slave, master); n+keys > k.Quota.Untaken {
		return fmt.Errorf("%d keys of %s wait for %s, %d more are asked for, and %d may wait", n, master, slave, keys, k.Quota.Untaken)
	}
	return nil
}

// full is what a master gets whose slave does not take its keys.
func full(cause error) *problem.Error {
	return unavailable(fullRetry, "too many keys wait to be taken by the slave SAE", fmt.Errorf("%w: %w", errExcess, cause))
}

// rooms is the room that requests of one announce have been given, each beside
// those before it. Announces that are judged at the same moment do not see each
// other: the cap may be passed by what is in flight.
type rooms map[[2]identity.SAE]int

// give reserves room for a request, or says why there is none.
func (given rooms) give(k *KME, r handover.Request) error {
	for _, slave := range r.Slaves {
		if err := k.room(slave, r.Master, given[[2]identity.SAE{slave, r.Master}]+len(r.Keys)); err != nil {
			return err
		}
	}
	for _, slave := range r.Slaves {
		given[[2]identity.SAE{slave, r.Master}] += len(r.Keys)
	}
	return nil
}
