//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"
)

// Heartbeat asks the token itself whether it is there and, for every open KEK,
// whether the token object and its session copy still open a known blob. (Session
// copies alone prove nothing: they go on working when the token is gone.) If all is
// well it puts the token in use and returns nil.
//
// If not, and Config.Grace allows it, the session copies that still work are used on
// for a while: Heartbeat returns nil, and Health says so. Meanwhile it only looks for the
// keys anew; what would cost the copies (SoftHSM sees a token that is back only when it
// is initialised again) waits until the grace is over. Otherwise the token is down
// from that moment: every other call fails with ErrUnavailable. Heartbeat then waits
// until it is alone with the token and climbs a ladder, each step only if the one
// before did not help: find the keys again, on new sessions, log in again, initialise
// the module again. A PIN that was refused ends that for good (ErrPINRefused). A KEK
// that is missing from a token that works does not make the token unhealthy: that KEK
// alone answers ErrNoKEK until a later heartbeat finds it.
//
// Call it about once a second, from one goroutine. If ctx ends while calls are stuck in
// the module, its own or others', it fails; the token stays down until they return.
func (t *Token) Heartbeat(ctx context.Context) error {
	if err := t.gate.enter(ctx, beat); err != nil {
		return t.ail(fmt.Errorf("waiting for a turn: %w", err))
	}
	lost := make(chan int, 1)
	err := t.do(ctx, beat, func() error {
		n, err := t.probe()
		lost <- n
		return err
	}, nil)
	switch {
	case err == nil && <-lost == 0:
		t.goUp("by itself")
		return nil
	case err != nil && ctx.Err() != nil:
		return t.ail(err)
	}
	patient := err != nil && t.mayWait(ctx, err)
	if err != nil && !patient {
		t.goDown(err)
	}
	if err := t.gate.enter(ctx, alone); err != nil {
		return t.ail(fmt.Errorf("waiting to be alone with the token: %w", err))
	}
	ladder := t.ladder()
	if patient {
		ladder = ladder[:1] // the steps beyond give the copies up
	}
	err = t.do(ctx, alone, func() error { return t.climb(ladder) }, nil)
	switch {
	case err == nil:
		return nil
	case patient && ctx.Err() == nil:
		return nil // Health says how it stands
	}
	return t.ail(err)
}

// step is one of the ladder.
type step struct {
	name string
	take func() error
}

func (t *Token) ladder() []step {
	return []step{
		{"keys found again", t.refind},
		{"new sessions", t.renew},
		{"logged in again", t.relogin},
		{"module initialised again", t.reinitialise},
	}
}

// climb takes the steps until one has helped. The caller is alone with the token.
func (t *Token) climb(ladder []step) (err error) {
	if t.closed {
		return errors.New("token was closed")
	}
	for _, s := range ladder {
		if err = s.take(); err == nil {
			_, err = t.probe()
		}
		if err == nil {
			t.goUp(s.name)
			return nil
		}
	}
	return err
}

// ail takes the token out of use, if it is not out already, and says why. A heartbeat
// that was called off says nothing of the token.
func (t *Token) ail(err error) error {
	if !errors.Is(err, context.Canceled) {
		t.goDown(err)
	}
	return fmt.Errorf("%w: heartbeat of token %q: %w", ErrUnavailable, t.cfg.TokenLabel, err)
}

// mayWait says whether, though the token does not answer, its session copies are used
// on: they still open a known blob, and Config.Grace is not over.
func (t *Token) mayWait(ctx context.Context, cause error) bool {
	if t.cfg.Grace == 0 || t.down.Load() != nil {
		return false
	}
	o := t.grace.Load()
	if o != nil && time.Since(o.since) > t.cfg.Grace {
		return false
	}
	if err := t.gate.enter(ctx, beat); err != nil {
		return false
	}
	err := t.do(ctx, beat, func() error {
		return t.onSession(func(s pkcs11.SessionHandle) error {
			err := errors.New("there are no copies to be used on")
			for k := range t.keks {
				if k.gone != nil {
					continue
				}
				if err = k.canary.check(t.m, s, k.copy); err != nil {
					return err
				}
			}
			return err
		})
	}, nil)
	if err != nil {
		return false
	}
	if o == nil {
		t.grace.Store(&outage{cause: cause, since: time.Now()})
		t.count.outages.Add(1)
		t.log.Error("hsm away: its session keys are used on", "grace", t.cfg.Grace, "err", cause)
	}
	return true
}

// goUp puts the token back in use.
func (t *Token) goUp(how string) {
	for _, o := range []*outage{t.grace.Swap(nil), t.down.Swap(nil)} {
		if o != nil {
			t.count.recovered(how)
			t.log.Warn("hsm back", "how", how, "down_for", time.Since(o.since), "cause", o.cause)
		}
	}
}

// goDown takes the token out of use. Only a heartbeat puts it back.
func (t *Token) goDown(cause error) {
	if t.down.CompareAndSwap(nil, &outage{cause: cause, since: time.Now()}) {
		if t.grace.Swap(nil) == nil {
			t.count.outages.Add(1)
		}
		t.log.Error("hsm down", "err", cause)
	}
}

// Health says how the token stands since the last heartbeat.
func (t *Token) Health() Health {
	if o := t.down.Load(); o != nil {
		return Health{Down, o.since, o.cause}
	}
	if o := t.grace.Load(); o != nil {
		return Health{Grace, o.since, o.cause}
	}
	return Health{Stage: Well}
}

// probe looks at everything that is in use. lost is how many open KEKs are known to
// be missing. The caller holds a turn.
func (t *Token) probe() (lost int, err error) {
	if t.closed {
		return 0, errors.New("token was closed")
	}
	if err := t.loggedIn(); err != nil {
		return 0, err
	}
	return lost, t.onSession(func(s pkcs11.SessionHandle) error {
		for k := range t.keks {
			if k.gone != nil {
				lost++
				continue
			}
			if err := k.canary.check(t.m, s, k.object); err != nil {
				return fmt.Errorf("token object of KEK %s: %w", k.info, err)
			}
			if err := k.canary.check(t.m, s, k.copy); err != nil {
				return fmt.Errorf("session copy of KEK %s: %w", k.info, err)
			}
		}
		return nil
	})
}

// present says whether the token that was opened is in its slot. SoftHSM reads its
// directory for C_GetTokenInfo; C_GetSessionInfo or finding objects would not notice
// that it is gone.
func (t *Token) present() error {
	ti, err := t.m.GetTokenInfo(t.slot)
	if err != nil {
		return fault("C_GetTokenInfo", err)
	}
	if info := infoOf(ti); info != t.info {
		return fmt.Errorf("slot %d has another token: %+v, not %+v", t.slot, info, t.info)
	}
	return nil
}

// loggedIn says whether the token is present and sees us as its user. Without that
// private objects are invisible, and each KEK would seem to be missing.
func (t *Token) loggedIn() error {
	if err := t.present(); err != nil {
		return err
	}
	si, err := t.m.GetSessionInfo(t.anchor)
	if err != nil {
		return fault("C_GetSessionInfo", err)
	}
	if si.State != pkcs11.CKS_RO_USER_FUNCTIONS && si.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return fmt.Errorf("anchor session is in state %d: not logged in", si.State)
	}
	return nil
}

// inSight says whether the token is well, by the last heartbeat, and sees us as its user.
func (t *Token) inSight() error {
	if h := t.Health(); h.Stage != Well {
		return fmt.Errorf("the token is away: %w", h.Cause)
	}
	return t.loggedIn()
}

// refind finds the token objects of the open KEKs again and copies those whose copy
// is gone. The caller of this and the next two holds all turns.
func (t *Token) refind() error {
	if err := t.loggedIn(); err != nil {
		return err
	}
	return t.onSession(func(s pkcs11.SessionHandle) error {
		for k := range t.keks {
			err := k.load(s)
			if isFault(err) || errors.Is(err, ErrUnavailable) {
				return fmt.Errorf("KEK %s: %w", k.info, err)
			}
			k.settle(err)
		}
		return nil
	})
}

// settle records whether the KEK was found in a token that works. If it was not,
// its copy is given up too: the copy of a destroyed key must not live on.
func (k *KEK) settle(err error) {
	switch {
	case err == nil && k.gone != nil:
		k.t.log.Warn("KEK back", "kek", k.info.String())
	case err != nil && k.gone == nil:
		k.t.log.Error("KEK lost", "kek", k.info.String(), "err", err)
	}
	if k.gone = err; err == nil {
		return
	}
	if !errors.Is(err, ErrNoKEK) { // found, but not what it was
		k.gone = fmt.Errorf("%w: %w", ErrNoKEK, err)
	}
	if err := k.dropCopy(); err != nil {
		k.t.log.Error("copy of lost KEK lives on until a heartbeat has destroyed it", "kek", k.info.String(), "err", err)
	}
}

// renew gives up the sessions of the pool, which may all be dead though the anchor is
// not, and tries on a new one.
func (t *Token) renew() error {
	t.dropSessions()
	return t.refind()
}

// dropSessions closes the sessions of the pool.
func (t *Token) dropSessions() {
	t.mu.Lock()
	idle := t.idle
	t.idle = nil
	t.mu.Unlock()
	for _, s := range idle {
		_ = t.m.CloseSession(s) // it may be dead
	}
}

// relogin closes every session, and with them every copy, and starts afresh.
func (t *Token) relogin() error {
	if err := t.present(); err != nil {
		return err
	}
	t.idle = nil
	_ = t.m.CloseAllSessions(t.slot) // it may know none of them any more
	for k := range t.keks {
		k.copy = 0 // whatever has become of it, CloseKEK would find it
	}
	if err := t.login(); err != nil {
		return err
	}
	return t.refind()
}

// reinitialise gives the module up and takes it again, which is the only way to
// make SoftHSM look at a directory anew once it has seen it missing.
func (t *Token) reinitialise() error {
	_ = t.m.Finalize() // it is not initialised if this step failed the last time
	if err := t.initialise(); err != nil {
		return err
	}
	if err := t.relogin(); err != nil {
		return err
	}
	return t.selfTest()
}
