//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync"
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

// do runs f, which calls the module, in the turn that the caller has taken. discard (which
// may be nil) undoes what f has done. See perform.
func (t *Token) do(ctx context.Context, c class, f func() error, discard func()) error {
	return t.perform(ctx, c, funcs{f, discard})
}

// work is something that the module is asked to do in one turn.
type work interface {
	// run calls the module. left is not 0 any more when nobody waits for it.
	run(left *atomic.Int32) error
	// discard undoes what run has done.
	discard()
}

// funcs is work that does not look at who waits for it.
type funcs struct {
	f    func() error
	undo func() // nil: there is nothing to undo
}

func (w funcs) run(*atomic.Int32) error { return w.f() }

func (w funcs) discard() {
	if w.undo != nil {
		w.undo()
	}
}

// perform has a worker do w in the turn that the caller has taken, which is given back when
// w has ended. Nothing can call back a call that is in the module: if ctx ends first,
// perform leaves w to itself and fails with ErrUnavailable. What w writes to belongs to w
// then. It is discarded, once and in its turn, if it has failed, or has ended when nobody
// waited for it any more. Close waits for such calls.
func (t *Token) perform(ctx context.Context, c class, w work) error {
	if ctx.Done() == nil || t.closed { // a token that was closed is not called any more
		defer t.gate.leave(c)
		err := w.run(&nobodyLeaves)
		if err != nil {
			w.discard()
		}
		return err
	}
	v := visits.Get().(*visit)
	v.class, v.work = c, w
	t.visits <- v // never full: whoever is in it has a turn
	select {
	case err := <-v.done:
		v.end()
		return err
	case <-ctx.Done():
		t.stuck.Add(1)
		if !v.settled.CompareAndSwap(0, 1) {
			t.stuck.Add(-1)
			err := <-v.done
			v.end()
			return err
		}
		t.count.abandoned.Add(1)
		return fmt.Errorf("%w: the module has not returned: %w", ErrUnavailable, context.Cause(ctx))
	}
}

// visit is work in the module and who waits for it. It goes from the caller to a worker, and
// back with the answer. One that its caller has left stays the worker's, and is never used
// again.
type visit struct {
	class   class
	work    work
	settled atomic.Int32 // 1 as soon as it is the caller's again, or nobody's but the worker's
	done    chan error   // of one
}

// visits are those that have ended.
var visits = sync.Pool{New: func() any { return &visit{done: make(chan error, 1)} }}

// end gives back a visit whose answer has come.
func (v *visit) end() {
	v.work = nil
	v.settled.Store(0)
	visits.Put(v)
}

// serve does what comes, until the token is closed. There is a worker for each turn, so that
// whoever has one finds a worker, and one that is stuck in the module keeps both.
func (t *Token) serve() {
	for v := range t.visits {
		t.attend(v)
	}
}

func (t *Token) attend(v *visit) {
	w := v.work
	defer t.gate.leave(v.class)
	err := w.run(&v.settled)
	if v.settled.CompareAndSwap(0, 1) {
		if err != nil {
			w.discard()
		}
		v.done <- err // and v is the caller's
		return
	}
	t.stuck.Add(-1)
	w.discard()
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
	err = f(s)
	t.giveSession(s, err)
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

// giveSession puts s back, unless what was done on it failed with an error of the module.
// There are never more sessions than turns.
func (t *Token) giveSession(s pkcs11.SessionHandle, err error) {
	if isFault(err) {
		t.count.evicted.Add(1)
		_ = t.m.CloseSession(s)
		return
	}
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
