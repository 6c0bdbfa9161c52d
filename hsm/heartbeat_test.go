//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"
)

// move renames from to to, and says how to undo it.
func move(t *testing.T, from, to string) (back func()) {
	t.Helper()
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	rename(from, to)
	return func() { t.Helper(); rename(to, from) }
}

// TestTokenGoesAway provokes what can happen to a SoftHSM token under a running
// process. Each time one heartbeat must notice and the first one after the end of
// the trouble must heal, with the *KEK and the blobs of before still good.
func TestTokenGoesAway(t *testing.T) {
	for name, provoke := range map[string]func(t *testing.T, b *bench, token *Token) (end func()){
		"all tokens moved away": func(t *testing.T, b *bench, _ *Token) func() {
			return move(t, filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "away"))
		},
		"this token moved away": func(t *testing.T, b *bench, _ *Token) func() {
			dirs, err := filepath.Glob(filepath.Join(b.dir, "tokens", "*"))
			if err != nil || len(dirs) != 1 {
				t.Fatal(dirs, err)
			}
			return move(t, dirs[0], filepath.Join(b.dir, "away"))
		},
		"another token under the same label": func(t *testing.T, b *bench, _ *Token) func() {
			mine, theirs := filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "theirs", "tokens")
			aside := filepath.Join(b.dir, "aside")
			move(t, mine, aside)
			move(t, theirs, mine)
			return func() { t.Helper(); move(t, mine, theirs); move(t, aside, mine) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			// Made now: later the module belongs to the Token.
			other := &bench{cfg: b.cfg, dir: filepath.Join(b.dir, "theirs")}
			other.use(t)
			if err := InitToken(b.cfg.Module, testLabel, testSOPIN, testPIN); err != nil {
				t.Fatal(err)
			}
			b.use(t)
			token := b.open(t)
			k, k2 := newKEK(t, token, "epoch-1"), newKEK(t, token, "epoch-2")
			s, s2 := wrap(t, k), wrap(t, k2)
			for range 2 { // it must heal every time, not once
				end := provoke(t, b, token)
				for range 3 {
					wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
					_, _, err := k.Wrap(t.Context(), s.plain, s.aad)
					wantErr(t, "Wrap", err, ErrUnavailable)
					_, err = k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
					wantErr(t, "Unwrap", err, ErrUnavailable)
					if err != nil && !strings.Contains(err.Error(), "down since") {
						t.Errorf("Unwrap tried a token that is down: %v", err)
					}
				}
				end()
				if err := token.Heartbeat(t.Context()); err != nil {
					t.Fatalf("Heartbeat after the trouble: %v", err)
				}
				s.opens(t, k)
				s2.opens(t, k2)
				wrap(t, k).opens(t, k)
			}
			if err := token.SetCounter(t.Context(), "run", 1); err != nil {
				t.Error(err)
			}
			if err := errors.Join(k2.Close(), token.DestroyKEK(t.Context(), k2.Info())); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAwayWithoutKEKs: a token none of whose keys is open is watched as well.
func TestAwayWithoutKEKs(t *testing.T) {
	b, token := newToken(t)
	back := move(t, filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "away"))
	wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
	back()
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestCloseKEKWhileAway: its copy went with the module, and healing must not bring
// it back.
func TestCloseKEKWhileAway(t *testing.T) {
	b, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	back := move(t, filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "away"))
	wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
	if err := errors.Join(k.Close(), k.Close()); err != nil {
		t.Error(err)
	}
	back()
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, _, err := k.Wrap(t.Context(), []byte("plain"), nil)
	wantErr(t, "Wrap under a closed KEK", err, ErrNoKEK)
	if err := token.DestroyKEK(t.Context(), k.Info()); err != nil {
		t.Error(err)
	}
}

// TestHeartbeatHealsAtOnce provokes troubles that are over at once: one heartbeat
// notices and heals, and does no more for it than it must.
func TestHeartbeatHealsAtOnce(t *testing.T) {
	for name, c := range map[string]struct {
		provoke func(token *Token) error
		how     string
	}{
		"all sessions closed, as by a restart of the HSM": {func(token *Token) error { return token.m.CloseAllSessions(token.slot) }, "logged in again"},
		"logged out":                 {func(token *Token) error { return token.m.Logout(token.anchor) }, "logged in again"},
		"module finalized":           {func(token *Token) error { return token.m.Finalize() }, "module initialised again"},
		"module initialised afresh":  {func(token *Token) error { return errors.Join(token.m.Finalize(), token.m.Initialize()) }, "logged in again"},
		"anchor session closed":      {func(token *Token) error { return token.m.CloseSession(token.anchor) }, "logged in again"},
		"session of the pool closed": {func(token *Token) error { return token.m.CloseSession(token.idle[0]) }, "keys found again"},
		"copy of a KEK destroyed": {func(token *Token) error {
			for k := range token.keks {
				return token.m.DestroyObject(token.anchor, k.copy)
			}
			return errors.New("no KEK")
		}, "keys found again"},
	} {
		t.Run(name, func(t *testing.T) {
			b, token := newToken(t)
			k := newKEK(t, token, "epoch-1")
			s := wrap(t, k)
			if err := c.provoke(token); err != nil {
				t.Fatal(err)
			}
			if err := token.Heartbeat(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.opens(t, k)
			wrap(t, k).opens(t, k)
			if logs := b.logs.String(); strings.Count(logs, "hsm down") != 1 || !strings.Contains(logs, c.how) {
				t.Errorf("log does not say once that the hsm was down, and how it came back (%s):\n%s", c.how, logs)
			}
		})
	}
}

func TestDeadSessionIsReplaced(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	dead := token.idle[0]
	if err := token.m.CloseSession(dead); err != nil {
		t.Fatal(err)
	}
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap on a dead session", err, ErrUnavailable)
	if !isRV(err, pkcs11.CKR_SESSION_HANDLE_INVALID) {
		t.Errorf("got %v, want the module's error in it", err)
	}
	s.opens(t, k)
	if token.idle[0] == dead {
		t.Error("the dead session is still in the pool")
	}
}

// TestKEKDestroyedByAnother: a KEK that is gone from a token that works takes only
// itself out, and its copy with it.
func TestKEKDestroyedByAnother(t *testing.T) {
	_, token := newToken(t)
	k, k2 := newKEK(t, token, "epoch-1"), newKEK(t, token, "epoch-2")
	s := wrap(t, k)
	rw(t, token, func(h pkcs11.SessionHandle) error { return token.m.DestroyObject(h, k.object) })
	copied := k.copy
	for range 2 {
		if err := token.Heartbeat(t.Context()); err != nil {
			t.Fatalf("Heartbeat: %v", err)
		}
		_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
		wantErr(t, "Unwrap under the destroyed KEK", err, ErrNoKEK)
	}
	rw(t, token, func(h pkcs11.SessionHandle) error {
		if _, err := token.m.inspect(h, copied, false); !isRV(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			t.Errorf("copy of the destroyed KEK: got %v, want it gone", err)
		}
		return nil
	})
	wrap(t, k2).opens(t, k2)
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}

// TestLostKEKComesBack: as from a backup. Here the key was but called otherwise for
// a while.
func TestLostKEKComesBack(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	rename := func(label string) {
		rw(t, token, func(h pkcs11.SessionHandle) error {
			return token.m.SetAttributeValue(h, k.object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)})
		})
	}
	rename("mislaid")
	if err := token.m.CloseAllSessions(token.slot); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := token.Heartbeat(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
		wantErr(t, "Unwrap while the KEK is lost", err, ErrNoKEK)
	}
	found, err := token.m.find(token.anchor, named("mislaid", k.info.ID))
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	k.object = found[0] // to rename it: its handle is a new one
	rename(k.info.Label)
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.opens(t, k)
}

// TestAwayAndBackUnderLoad: callers see ErrUnavailable and nothing else, and
// afterwards all is well.
func TestAwayAndBackUnderLoad(t *testing.T) {
	b, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	ctx, stop := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for ctx.Err() == nil {
				plain, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
				if err == nil && !bytes.Equal(plain, s.plain) || err != nil && !errors.Is(err, ErrUnavailable) {
					t.Errorf("Unwrap: got %q, %v", plain, err)
				}
			}
		})
	}
	for range 10 {
		back := move(t, filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "away"))
		if err := token.Heartbeat(t.Context()); err == nil {
			t.Error("Heartbeat did not notice")
		}
		back()
		if err := token.Heartbeat(t.Context()); err != nil {
			t.Error(err)
		}
	}
	stop()
	callers.Wait()
	s.opens(t, k)
}
