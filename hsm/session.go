//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// with runs f on a read-only session of the pool, in an urgent turn. what names the key
// or act in errors. If f fails with an error of the module, the result is ErrUnavailable
// and the session is closed, never to be used again; any other error of f is passed on
// as it is. After an error nothing that f writes to may be looked at: see do.
func (t *Token) with(ctx context.Context, what string, f func(pkcs11.SessionHandle) error) error {
	return t.call(ctx, urgent, what, func() error { return t.onSession(f) }, nil)
}

// alone does the same on a read-write session that is opened for f, with no other
// call in the module. Every change of a token object goes through here: SoftHSM
// 2.6.1 locks its files against other processes only, so that a thread can read an
// object half written by another (C_GenerateKey then fails with GENERAL_ERROR, or
// the new key has no length).
func (t *Token) alone(ctx context.Context, what string, f func(pkcs11.SessionHandle) error) error {
	return t.call(ctx, alone, what, func() error { return t.onOwnSession(f) }, nil)
}

// call runs f in a turn of the class. See with and do.
func (t *Token) call(ctx context.Context, c class, what string, f func() error, discard func()) error {
	if err := t.admit(ctx, c, what); err != nil {
		return err
	}
	return judged(what, t.do(ctx, c, f, discard))
}

// admit waits for a turn, as enter does, but nobody waits for long to be alone.
func (t *Token) admit(ctx context.Context, c class, what string) error {
	if c == alone {
		return t.admitAlone(ctx, what, t.enter)
	}
	if err := t.enter(ctx, c); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// admitAlone has enter wait for all turns. Whoever does keeps everybody out meanwhile:
// not for long, and not for what may never end.
func (t *Token) admitAlone(ctx context.Context, what string, enter func(context.Context, class) error) error {
	if n := t.stuck.Load(); n > 0 {
		return fmt.Errorf("%w: token %q: %s: %d calls are stuck in the module", ErrUnavailable, t.cfg.TokenLabel, what, n)
	}
	waiting, cancel := context.WithTimeout(ctx, alonePatience)
	defer cancel()
	if err := enter(waiting, alone); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// onOwnSession runs f on a read-write session of its own. If the token has no more, those
// that wait for the next call are given up for it: the caller is alone, and nobody is on one.
func (t *Token) onOwnSession(f func(pkcs11.SessionHandle) error) error {
	s, err := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if isRV(err, pkcs11.CKR_SESSION_COUNT) {
		t.mu.Lock()
		idle := t.idle
		t.idle = nil
		t.mu.Unlock()
		for _, s := range idle {
			_ = t.m.CloseSession(s)
		}
		s, err = t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	}
	if err != nil {
		return fault("C_OpenSession", err)
	}
	err = f(s)
	_ = t.m.CloseSession(s)
	return err
}

// do runs f, which calls the module, in the turn that the caller has taken, and gives
// the turn back when f has ended. Nothing can call back a call that is in the module:
// if ctx ends first, do leaves f to itself and fails with ErrUnavailable. What f
// writes to belongs to f then. discard (which may be nil) undoes what f has done: it is
// called, once and in f's turn, if f has failed, or has ended when nobody waited for it any
// more. Close waits for such calls.
func (t *Token) do(ctx context.Context, c class, f func() error, discard func()) error {
	if discard == nil {
		discard = func() {}
	}
	if ctx.Done() == nil {
		defer t.gate.leave(c)
		err := f()
		if err != nil {
			discard()
		}
		return err
	}
	var settled atomic.Bool
	done := make(chan error, 1)
	go func() {
		defer t.gate.leave(c)
		err := f()
		if settled.CompareAndSwap(false, true) {
			if err != nil {
				discard()
			}
			done <- err
			return
		}
		t.stuck.Add(-1)
		discard()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		t.stuck.Add(1)
		if !settled.CompareAndSwap(false, true) {
			t.stuck.Add(-1)
			return <-done
		}
		t.count.abandoned.Add(1)
		return fmt.Errorf("%w: the module has not returned: %w", ErrUnavailable, context.Cause(ctx))
	}
}

// enter waits for a turn, and refuses it while the token is down. On success the
// caller gives it back.
func (t *Token) enter(ctx context.Context, c class) error {
	if err := t.isDown(); err != nil {
		return err
	}
	if err := t.waitForTurn(ctx, c); err != nil {
		return err
	}
	if err := t.isDown(); err != nil { // since
		t.gate.leave(c)
		return err
	}
	return nil
}

// waitForTurn is enter, whether or not the token is down.
func (t *Token) waitForTurn(ctx context.Context, c class) error {
	if err := t.gate.enter(ctx, c); err != nil {
		return fmt.Errorf("%w: token %q: waiting for a turn: %w", ErrUnavailable, t.cfg.TokenLabel, err)
	}
	return nil
}

func (t *Token) isDown() error {
	o := t.down.Load()
	if o == nil {
		return nil
	}
	return fmt.Errorf("%w: token %q: down since %s: %w", ErrUnavailable, t.cfg.TokenLabel, o.since.Format(time.RFC3339), o.cause)
}

// onSession runs f on a session of the pool, which gets it back unless f failed
// with an error of the module. The caller holds a turn.
func (t *Token) onSession(f func(pkcs11.SessionHandle) error) error {
	s, err := t.takeSession()
	if err != nil {
		return err
	}
	if err = f(s); isFault(err) {
		t.count.evicted.Add(1)
		_ = t.m.CloseSession(s)
	} else {
		t.giveSession(s)
	}
	return err
}

func (t *Token) takeSession() (pkcs11.SessionHandle, error) {
	t.mu.Lock()
	if n := len(t.idle); n > 0 {
		s := t.idle[n-1]
		t.idle = t.idle[:n-1]
		t.mu.Unlock()
		return s, nil
	}
	t.mu.Unlock()
	s, err := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION)
	return s, fault("C_OpenSession", err)
}

// giveSession puts s back. There are never more sessions than turns.
func (t *Token) giveSession(s pkcs11.SessionHandle) {
	t.mu.Lock()
	t.idle = append(t.idle, s)
	t.mu.Unlock()
}

// sure runs look between two looks at the token itself, which must be as see says: only
// then what look has not found is not there.
func sure(see, look func() error) error {
	if err := see(); err != nil {
		return unsure(err)
	}
	found := look()
	if err := see(); err != nil && found != nil {
		return fmt.Errorf("%w (and before: %v)", unsure(err), found) // not what found is: it may be ErrNoKEK
	} else if err != nil {
		return unsure(err)
	}
	return found
}

func unsure(err error) error {
	if isFault(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// isFault says whether err came from the module.
func isFault(err error) bool {
	_, ok := errors.AsType[pkcs11.Error](err)
	return ok
}

// judged says what was being done, and that the token is at fault if it is.
func judged(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case isFault(err):
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
