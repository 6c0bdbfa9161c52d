//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"
)

// with runs f on a read-only session of the pool, in one turn. what names the key
// or act in errors. If f fails with an error of the module, the result is
// ErrUnavailable and the session is closed, never to be used again; any other
// error of f is passed on as it is.
func (t *Token) with(ctx context.Context, what string, f func(pkcs11.SessionHandle) error) error {
	if err := t.enter(ctx, 1); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer t.turns.Release(1)
	return judged(what, t.onSession(f))
}

// alone does the same on a read-write session that is opened for f, with no other
// call in the module. Every change of a token object goes through here: SoftHSM
// 2.6.1 locks its files against other processes only, so that a thread can read an
// object half written by another (C_GenerateKey then fails with GENERAL_ERROR, or
// the new key has no length).
func (t *Token) alone(ctx context.Context, what string, f func(pkcs11.SessionHandle) error) error {
	if err := t.enter(ctx, t.width); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer t.turns.Release(t.width)
	s, err := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return judged(what, fault("C_OpenSession", err))
	}
	err = f(s)
	_ = t.m.CloseSession(s)
	return judged(what, err)
}

// enter waits for turns and refuses them while the token is down. On success the
// caller releases them.
func (t *Token) enter(ctx context.Context, turns int64) error {
	if err := t.turns.Acquire(ctx, turns); err != nil {
		return fmt.Errorf("%w: token %q: waiting for a turn: %w", ErrUnavailable, t.cfg.TokenLabel, err)
	}
	if o := t.down.Load(); o != nil {
		t.turns.Release(turns)
		return fmt.Errorf("%w: token %q: down since %s: %w", ErrUnavailable, t.cfg.TokenLabel, o.since.Format(time.RFC3339), o.cause)
	}
	return nil
}

// onSession runs f on a session of the pool, which gets it back unless f failed
// with an error of the module. The caller holds a turn.
func (t *Token) onSession(f func(pkcs11.SessionHandle) error) error {
	s, err := t.takeSession()
	if err != nil {
		return err
	}
	if err = f(s); isFault(err) {
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
