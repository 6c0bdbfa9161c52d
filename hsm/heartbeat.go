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
// If not, the token is down from that moment: every other call fails with
// ErrUnavailable. Heartbeat then waits until it is alone with the token and tries,
// each step only if the one before did not help: to find the keys again, to log in
// again, to initialise the module again. A PIN that was refused once ends that for
// good. A KEK that is missing from a token that works does not make the token
// unhealthy: that KEK alone answers ErrNoKEK until a later heartbeat finds it.
//
// Call it about once a second, from one goroutine. If ctx ends while it waits for
// calls that are stuck in the module, it fails and has tried nothing.
func (t *Token) Heartbeat(ctx context.Context) error {
	if err := t.turns.Acquire(ctx, 1); err != nil {
		return t.sick(fmt.Errorf("waiting for a turn: %w", err))
	}
	lost, err := t.probe()
	t.turns.Release(1)
	if err == nil && lost == 0 {
		t.goUp("by itself")
		return nil
	}
	if err != nil {
		t.goDown(err)
	}
	if err := t.turns.Acquire(ctx, t.width); err != nil {
		return t.sick(fmt.Errorf("waiting to be alone with the token: %w", err))
	}
	defer t.turns.Release(t.width)
	if t.closed {
		return t.sick(errors.New("token was closed"))
	}
	for _, step := range []struct {
		name string
		take func() error
	}{
		{"keys found again", t.refind},
		{"logged in again", t.relogin},
		{"module initialised again", t.reinitialise},
	} {
		if err = step.take(); err == nil {
			_, err = t.probe()
		}
		if err == nil {
			t.goUp(step.name)
			return nil
		}
	}
	t.goDown(err) // if only a KEK was missing, it was not down so far
	return t.sick(err)
}

func (t *Token) sick(err error) error {
	return fmt.Errorf("%w: heartbeat of token %q: %w", ErrUnavailable, t.cfg.TokenLabel, err)
}

// goUp puts the token back in use.
func (t *Token) goUp(how string) {
	if o := t.down.Swap(nil); o != nil {
		t.log.Warn("hsm back", "how", how, "down_for", time.Since(o.since), "cause", o.cause)
	}
}

// goDown takes the token out of use. Only a heartbeat puts it back.
func (t *Token) goDown(cause error) {
	if t.down.CompareAndSwap(nil, &outage{cause: cause, since: time.Now()}) {
		t.log.Error("hsm down", "err", cause)
	}
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

// refind finds the token objects of the open KEKs again and copies those whose copy
// is gone. The caller of this and the next two holds all turns.
func (t *Token) refind() error {
	if err := t.loggedIn(); err != nil {
		return err
	}
	return t.onSession(func(s pkcs11.SessionHandle) error {
		for k := range t.keks {
			err := k.load(s)
			if isFault(err) {
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
		k.t.log.Error("copy of lost KEK lives on until the next login", "kek", k.info.String(), "err", err)
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
		k.copy = 0
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
