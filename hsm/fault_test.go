//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm/hsmtest"
)

// newFaults puts a module that misbehaves between b and SoftHSM.
func newFaults(t *testing.T, b *bench) *hsmtest.Module {
	t.Helper()
	m, err := hsmtest.New(b.dir, b.cfg.Module)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, env := range m.Env {
		name, value, _ := strings.Cut(env, "=")
		t.Setenv(name, value)
	}
	b.cfg.Module = m.Path
	return m
}

func newFaulty(t *testing.T) (*bench, *hsmtest.Module, *Token) {
	t.Helper()
	b := newBench(t)
	f := newFaults(t, b)
	return b, f, b.open(t)
}

// TestFaultOfOneCall: any fault but that of the data closes the session it happened
// on, says which call and key it was, and leaves the next caller a good one.
func TestFaultOfOneCall(t *testing.T) {
	b, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	for _, c := range []struct {
		name string
		at   hsmtest.Function
		rv   uint
		call func() error
	}{
		{"C_EncryptInit", hsmtest.EncryptInit, pkcs11.CKR_KEY_HANDLE_INVALID, func() error { _, _, err := k.Wrap(t.Context(), s.plain, s.aad); return err }},
		// The operation stays active in the real module: on this session every later
		// EncryptInit would answer CKR_OPERATION_ACTIVE.
		{"C_Encrypt", hsmtest.Encrypt, pkcs11.CKR_DEVICE_ERROR, func() error { _, _, err := k.Wrap(t.Context(), s.plain, s.aad); return err }},
		{"C_Encrypt", hsmtest.Encrypt, pkcs11.CKR_GENERAL_ERROR, func() error { _, _, err := k.Wrap(t.Context(), s.plain, s.aad); return err }},
		{"C_DecryptInit", hsmtest.DecryptInit, pkcs11.CKR_SESSION_HANDLE_INVALID, func() error { _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); return err }},
		{"C_Decrypt", hsmtest.Decrypt, pkcs11.CKR_DEVICE_REMOVED, func() error { _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); return err }},
		{"C_GenerateRandom", hsmtest.GenerateRandom, pkcs11.CKR_DEVICE_ERROR, func() error { return token.Random(t.Context(), make([]byte, 8)) }},
	} {
		closed := f.Calls(hsmtest.CloseSession)
		f.Fail(c.at, c.rv, 1)
		err := c.call()
		wantErr(t, c.name, err, ErrUnavailable)
		if !isRV(err, pkcs11.Error(c.rv)) || !strings.Contains(err.Error(), c.name) || c.at != hsmtest.GenerateRandom && !strings.Contains(err.Error(), "epoch-1") {
			t.Errorf("%s: %v does not say which call, key and error it was", c.name, err)
		}
		if n := f.Calls(hsmtest.CloseSession) - closed; n != 1 {
			t.Errorf("%s: %d sessions closed, want 1", c.name, n)
		}
		if err := c.call(); err != nil {
			t.Errorf("%s, next call: %v", c.name, err)
		}
	}
	f.Fail(hsmtest.OpenSession, pkcs11.CKR_SESSION_COUNT, 1)
	token.idle = nil
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "C_OpenSession", err, ErrUnavailable)
	s.opens(t, k)
	if strings.Contains(b.logs.String(), "hsm down") {
		t.Errorf("one bad session took the token down:\n%s", b.logs.String())
	}
}

// TestBrokenTokenIsNotTampering: SoftHSM has one error for both. While it answers
// that to good blobs too, nobody is told of tampering, and the token is down at once.
func TestBrokenTokenIsNotTampering(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f.Fail(hsmtest.Decrypt, pkcs11.CKR_GENERAL_ERROR, hsmtest.Always)
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap", err, ErrUnavailable)
	calls := f.Calls(hsmtest.EncryptInit)
	_, _, err = k.Wrap(t.Context(), s.plain, s.aad)
	wantErr(t, "Wrap while down", err, ErrUnavailable)
	if f.Calls(hsmtest.EncryptInit) != calls {
		t.Error("Wrap reached the module while the token was down")
	}
	wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
	f.Fail(hsmtest.Decrypt, 0, 0)
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.opens(t, k)
}

// TestPassingFaultIsNotTampering: a good blob that is refused once, by a token that
// is well again a moment later, opens. A failure of C_DecryptInit, which has not seen
// the blob, says nothing of tampering.
func TestPassingFaultIsNotTampering(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f.FailLate(hsmtest.Decrypt, pkcs11.CKR_GENERAL_ERROR, 1)
	s.opens(t, k)
	f.Fail(hsmtest.DecryptInit, pkcs11.CKR_GENERAL_ERROR, 1)
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap", err, ErrUnavailable)
	s.opens(t, k)
}

// TestNoPlainBytesAfterFault: the module may have written the key before it failed.
func TestNoPlainBytesAfterFault(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f.FailLate(hsmtest.Decrypt, pkcs11.CKR_DEVICE_ERROR, 1)
	out, err := openingOf(t, k, s)(t.Context())
	if !isRV(err, pkcs11.CKR_DEVICE_ERROR) {
		t.Errorf("got %v, want CKR_DEVICE_ERROR", err)
	}
	if !bytes.Equal(out, make([]byte, len(out))) {
		t.Errorf("%q is left in the buffer", out)
	}
}

// openingOf opens blobs in one turn as UnwrapAll does, and returns the buffer that the module
// writes to.
func openingOf(t *testing.T, k *KEK, blobs ...sealed) func(context.Context) ([]byte, error) {
	t.Helper()
	b := new(batch)
	for _, s := range blobs {
		if err := b.forOpening(s.iv[:], s.aad, s.ct); err != nil {
			t.Fatal(err)
		}
	}
	b.results()
	out := b.out
	return func(ctx context.Context) ([]byte, error) {
		return out, k.turn(ctx, urgent, b, opening)
	}
}

// TestLeftAlone: of what nobody waits for any more the module does what it has begun, and
// not the rest; what it has opened is wiped.
func TestLeftAlone(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	blobs := make([]sealed, turnItems)
	for i := range blobs {
		blobs[i] = wrap(t, k)
	}
	f.Hold(hsmtest.Decrypt, true)
	before := f.Calls(hsmtest.Decrypt)
	ctx, cancel := context.WithCancel(t.Context())
	var out []byte
	var err error
	var caller sync.WaitGroup
	caller.Go(func() { out, err = openingOf(t, k, blobs...)(ctx) })
	until(t, "the call is in the module", func() bool { return f.Inside(hsmtest.Decrypt) == 1 })
	cancel()
	caller.Wait()
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want ErrUnavailable because of context.Canceled", err)
	}
	f.Hold(hsmtest.Decrypt, false)
	until(t, "the call returns", func() bool { return token.stuck.Load() == 0 })
	if n := f.Calls(hsmtest.Decrypt) - before; n != 1 {
		t.Errorf("%d blobs were opened when nobody waited", n)
	}
	if err := token.Close(); err != nil { // so that the call is over
		t.Fatal(err)
	}
	if !bytes.Equal(out, make([]byte, len(out))) {
		t.Errorf("%q is left in the buffer", out)
	}
}

// TestRefusedPINIsNotTriedAgain: an HSM locks after a few wrong PINs. Whoever comes
// first has the PIN refused; after that nobody tries it, until there is another one.
func TestRefusedPINIsNotTriedAgain(t *testing.T) {
	t.Run("at start", func(t *testing.T) {
		b := newBench(t)
		f := newFaults(t, b)
		logins := func() int { return f.Calls(hsmtest.Login) }
		refused := func(what string, tries int, cfg Config) {
			t.Helper()
			before := logins()
			if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrPINRefused) {
				t.Errorf("%s: got %v, want ErrPINRefused", what, err)
			}
			if n := logins() - before; n != tries {
				t.Errorf("%s: %d logins, want %d", what, n, tries)
			}
		}
		notes := filepath.Join(b.dir, "refused")
		other := b.cfg // another node of the site
		b.cfg.RefusalFile, other.RefusalFile = notes, filepath.Join(b.dir, "other")
		b.writePIN(t, "wrong-1", 0o400)
		refused("first try", 1, b.cfg)
		refused("again", 0, b.cfg)
		refused("the other node", 0, other)
		b.writePIN(t, "wrong-1", 0o400)
		refused("with the file written anew", 0, other)
		b.writePIN(t, "wrong-2", 0o400)
		refused("another wrong one", 1, other)
		b.writePIN(t, "wrong-1", 0o400)
		refused("the first one again", 0, other)
		other.RetryPIN = true
		refused("when told to", 1, other)
		if text, err := os.ReadFile(notes); err != nil || bytes.Contains(text, []byte("wrong")) {
			t.Errorf("notes: %s, %v", text, err)
		}

		// The token's own notes may have gone, with its backup.
		b.writePIN(t, testPIN, 0o400)
		plain := b.cfg
		plain.RefusalFile = ""
		token, err := Open(t.Context(), plain)
		if err != nil {
			t.Fatal(err)
		}
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
		b.writePIN(t, "wrong-1", 0o400)
		refused("known from the file", 0, b.cfg)

		b.writePIN(t, testPIN, 0o400)
		token = b.open(t)
		if left, err := token.refusals(token.anchor); err != nil || len(left) != 0 {
			t.Errorf("%d notes are left, %v", len(left), err)
		}
		if _, err := os.Stat(notes); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("file of notes: %v", err)
		}
	})
	t.Run("token takes no note", func(t *testing.T) {
		b := newBench(t)
		f := newFaults(t, b)
		b.cfg.RefusalFile = filepath.Join(b.dir, "refused")
		b.writePIN(t, "wrong-1", 0o400)
		f.Fail(hsmtest.CreateObject, pkcs11.CKR_USER_NOT_LOGGED_IN, hsmtest.Always)
		for range 2 {
			if _, err := Open(t.Context(), b.cfg); !errors.Is(err, ErrPINRefused) {
				t.Errorf("got %v, want ErrPINRefused", err)
			}
		}
		if n := f.Calls(hsmtest.Login); n != 1 {
			t.Errorf("%d logins, want 1", n)
		}
	})
	t.Run("note that cannot be read", func(t *testing.T) {
		b := newBench(t)
		f := newFaults(t, b)
		b.cfg.RefusalFile = filepath.Join(b.dir, "refused")
		if err := os.WriteFile(b.cfg.RefusalFile, []byte("refused-pin-v1 600000 00"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), b.cfg); !errors.Is(err, ErrPINRefused) || f.Calls(hsmtest.Login) != 0 {
			t.Errorf("got %v and %d logins, want ErrPINRefused and none", err, f.Calls(hsmtest.Login))
		}

		// When told to, it is tried once: a wrong one is noted, and the right one takes all notes away.
		b.cfg.RetryPIN = true
		b.writePIN(t, "wrong-1", 0o400)
		if _, err := Open(t.Context(), b.cfg); !errors.Is(err, ErrPINRefused) || f.Calls(hsmtest.Login) != 1 {
			t.Errorf("a wrong PIN, when told to: got %v and %d logins, want ErrPINRefused and one", err, f.Calls(hsmtest.Login))
		}
		b.writePIN(t, testPIN, 0o400)
		token := b.open(t)
		if left, err := token.refusals(token.anchor); err != nil || len(left) != 0 {
			t.Errorf("%d notes are left, %v", len(left), err)
		}
	})
	for name, rv := range map[string]uint{"wrong": pkcs11.CKR_PIN_INCORRECT, "locked": pkcs11.CKR_PIN_LOCKED} {
		t.Run(name+" while running", func(t *testing.T) {
			_, f, token := newFaulty(t)
			k := newKEK(t, token, "epoch-1")
			s := wrap(t, k)
			if err := token.m.CloseAllSessions(token.slot); err != nil {
				t.Fatal(err)
			}
			f.Fail(hsmtest.Login, rv, hsmtest.Always)
			before := f.Calls(hsmtest.Login)
			for range 3 {
				wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
			}
			f.Fail(hsmtest.Login, 0, 0)
			wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
			if n := f.Calls(hsmtest.Login) - before; n != 1 {
				t.Errorf("%d logins, want 1", n)
			}
			_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
			wantErr(t, "Unwrap", err, ErrUnavailable)
		})
	}
}

func TestStartIsTriedAgain(t *testing.T) {
	b := newBench(t)
	f := newFaults(t, b)
	f.Fail(hsmtest.GetTokenInfo, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, 2)
	k := newKEK(t, b.open(t), "epoch-1")
	wrap(t, k).opens(t, k)
}

// TestSelfTestGuardsOpen: a token that cannot seal, or cannot open, is not used.
func TestSelfTestGuardsOpen(t *testing.T) {
	b := newBench(t)
	f := newFaults(t, b)
	for _, at := range []hsmtest.Function{hsmtest.EncryptInit, hsmtest.Encrypt, hsmtest.Decrypt} {
		f.Fail(at, pkcs11.CKR_MECHANISM_INVALID, hsmtest.Always)
		if _, err := Open(t.Context(), b.cfg); err == nil || !strings.Contains(err.Error(), "self-test") {
			t.Errorf("Open with function %d broken: got %v", at, err)
		}
		f.Fail(at, 0, 0)
	}
	b.open(t)
}

// until waits for what another goroutine or thread is about to do.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// TestSlowTokenHoldsFewThreads: never more than MaxConcurrent calls are in the
// module, and whoever waits for a turn can give up.
func TestSlowTokenHoldsFewThreads(t *testing.T) {
	b := newBench(t)
	b.cfg.MaxConcurrent = 2
	f := newFaults(t, b)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f.Hold(hsmtest.Decrypt, true)
	var callers sync.WaitGroup
	for range 200 {
		callers.Go(func() {
			if _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); err != nil {
				t.Error(err)
			}
		})
	}
	until(t, "two calls are in the module and the others wait", func() bool {
		return f.Inside(hsmtest.Decrypt) == 2 && token.gate.waiting() == 198
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := k.Unwrap(ctx, s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap that gave up", err, ErrUnavailable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled in it", err)
	}
	f.Hold(hsmtest.Decrypt, false)
	callers.Wait()
	if most := f.Most(hsmtest.Decrypt); most != 2 {
		t.Errorf("%d calls in the module at once, want 2", most)
	}
	s.opens(t, k)
}

// TestStuckModule: whoever waits for a module that does not return is answered when his
// time is over, and what the module writes afterwards is wiped; with every turn stuck
// the token is down; and all is well, without a restart, when the module returns.
func TestStuckModule(t *testing.T) {
	b := newBench(t)
	b.cfg.MaxConcurrent = 2
	f := newFaults(t, b)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	k2 := newKEK(t, token, "epoch-0")
	f.Hold(hsmtest.Decrypt, true)
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	for token.stuck.Load() < 2 { // one that is over before it begins is none
		_, err := k.Unwrap(short(), s.iv, s.ct, s.aad)
		wantErr(t, "Unwrap", err, ErrUnavailable)
	}
	_, err := token.NewKEK(t.Context(), "epoch-2") // it would keep all others out while it waits
	wantErr(t, "NewKEK", err, ErrUnavailable)
	if err := k2.Close(); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "calls are stuck") { // so would this
		t.Errorf("Close: %v, want that it does not wait", err)
	}
	wantErr(t, "Heartbeat", token.Heartbeat(short()), ErrUnavailable)
	if h := token.Health(); h.Stage != Down {
		t.Errorf("Health: %+v", h)
	}
	_, _, err = k.Wrap(t.Context(), s.plain, s.aad) // at once, without a time of its own
	wantErr(t, "Wrap while down", err, ErrUnavailable)
	f.Hold(hsmtest.Decrypt, false)
	until(t, "the calls return", func() bool { return token.stuck.Load() == 0 })
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.opens(t, k)
}

// TestStuckHeartbeat: it is answered in its time too, and so is a ladder that hangs.
func TestStuckHeartbeat(t *testing.T) {
	for name, at := range map[string]hsmtest.Function{"heartbeat": hsmtest.GetTokenInfo, "ladder": hsmtest.CloseAllSessions} {
		t.Run(name, func(t *testing.T) {
			_, f, token := newFaulty(t)
			k := newKEK(t, token, "epoch-1")
			s := wrap(t, k)
			f.Hold(at, true)
			if at == hsmtest.CloseAllSessions {
				if err := token.m.CloseSession(token.anchor); err != nil { // so that a login is needed
					t.Fatal(err)
				}
			}
			for range 2 {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				wantErr(t, "Heartbeat", token.Heartbeat(ctx), ErrUnavailable)
				cancel()
			}
			f.Heal()
			until(t, "the heartbeat finds the token well", func() bool { return token.Heartbeat(t.Context()) == nil })
			s.opens(t, k)
		})
	}
}

// TestUnwrapsGoFirst: intake's wraps wait while somebody waits for a key.
func TestUnwrapsGoFirst(t *testing.T) {
	b := newBench(t)
	b.cfg.MaxConcurrent = 2
	f := newFaults(t, b)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f.Hold(hsmtest.Encrypt, true)
	f.Hold(hsmtest.Decrypt, true)
	var callers sync.WaitGroup
	var mu sync.Mutex
	var order []string
	in := func(what string, f func() error) {
		callers.Go(func() {
			if err := f(); err != nil {
				t.Error(err)
			}
			mu.Lock()
			order = append(order, what)
			mu.Unlock()
		})
	}
	for range 3 {
		in("wrap", func() error {
			_, err := k.WrapAllInBackground(t.Context(), [][]byte{s.plain}, [][]byte{s.aad})
			return err
		})
	}
	until(t, "intake has one turn and waits for another", func() bool {
		return f.Inside(hsmtest.Encrypt) == 1 && token.gate.waiting() == 2
	})
	for range 3 {
		in("unwrap", func() error { _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); return err })
	}
	until(t, "an unwrap has the last turn", func() bool {
		return f.Inside(hsmtest.Decrypt) == 1 && token.gate.waiting() == 4
	})
	f.Hold(hsmtest.Decrypt, false)
	until(t, "every unwrap is done", func() bool { mu.Lock(); defer mu.Unlock(); return len(order) == 3 })
	if f.Inside(hsmtest.Encrypt) != 1 {
		t.Errorf("%d wraps of intake in the module, want 1", f.Inside(hsmtest.Encrypt))
	}
	f.Hold(hsmtest.Encrypt, false)
	callers.Wait()
	if got := strings.Join(order, " "); got != "unwrap unwrap unwrap wrap wrap wrap" {
		t.Errorf("done in the order %s", got)
	}
}

// TestOutages: what a module can do for a while, each noticed by one heartbeat, with
// nothing answered but ErrUnavailable meanwhile, and healed by the first heartbeat after.
func TestOutages(t *testing.T) {
	for name, c := range map[string]struct {
		begin func(f *hsmtest.Module, token *Token)
		how   string // a step of the ladder
	}{
		"device error at everything": {func(f *hsmtest.Module, _ *Token) {
			for _, at := range []hsmtest.Function{hsmtest.EncryptInit, hsmtest.DecryptInit, hsmtest.GetTokenInfo, hsmtest.OpenSession, hsmtest.Initialize} {
				f.Fail(at, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
			}
		}, "module initialised again"},
		"token removed": {func(f *hsmtest.Module, _ *Token) {
			f.Fail(hsmtest.GetTokenInfo, pkcs11.CKR_TOKEN_NOT_PRESENT, hsmtest.Always)
			f.Fail(hsmtest.DecryptInit, pkcs11.CKR_DEVICE_REMOVED, hsmtest.Always)
			f.Fail(hsmtest.EncryptInit, pkcs11.CKR_DEVICE_REMOVED, hsmtest.Always)
		}, ""},
		"restarted, and no session can be opened at first": {func(f *hsmtest.Module, token *Token) {
			_ = token.m.CloseAllSessions(token.slot)
			f.Fail(hsmtest.OpenSession, pkcs11.CKR_SESSION_COUNT, hsmtest.Always)
		}, ""},
		"no slot is listed": {func(f *hsmtest.Module, token *Token) {
			_ = token.m.Finalize()
			f.Fail(hsmtest.GetSlotList, pkcs11.CKR_FUNCTION_FAILED, hsmtest.Always)
		}, "module initialised again"},
		"login fails, but not for the PIN": {func(f *hsmtest.Module, token *Token) {
			_ = token.m.Logout(token.anchor)
			f.Fail(hsmtest.Login, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
		}, ""},
		"keys cannot be copied": {func(f *hsmtest.Module, token *Token) {
			_ = token.m.CloseAllSessions(token.slot)
			f.Fail(hsmtest.CopyObject, pkcs11.CKR_HOST_MEMORY, hsmtest.Always)
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b, f, token := newFaulty(t)
			k := newKEK(t, token, "epoch-1")
			s := wrap(t, k)
			c.begin(f, token)
			for range 2 {
				wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
				_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
				wantErr(t, "Unwrap", err, ErrUnavailable)
			}
			f.Heal()
			if err := token.Heartbeat(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.opens(t, k)
			wrap(t, k).opens(t, k)
			if logs := b.logs.String(); strings.Count(logs, "hsm down") != 1 || strings.Count(logs, "hsm back") != 1 || !strings.Contains(logs, c.how) {
				t.Errorf("log does not say once that the hsm was down and came back (%s):\n%s", c.how, logs)
			}
		})
	}
}

// TestSessionsRunOut: a token that has fewer sessions than turns serves with those.
func TestSessionsRunOut(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f.MaxSessions(2) // the anchor, and one of the pool
	f.Hold(hsmtest.Decrypt, true)
	first := make(chan error, 1)
	go func() {
		_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
		first <- err
	}()
	until(t, "a call is in the module", func() bool { return f.Inside(hsmtest.Decrypt) == 1 })
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap without a session", err, ErrUnavailable)
	if !isRV(err, pkcs11.CKR_SESSION_COUNT) {
		t.Errorf("got %v, want CKR_SESSION_COUNT in it", err)
	}
	f.Hold(hsmtest.Decrypt, false)
	if err := <-first; err != nil {
		t.Error(err)
	}
	s.opens(t, k)
	if token.Health().Stage != Well {
		t.Errorf("Health: %+v", token.Health())
	}
}

// TestStoreFull: no key can be made, none is left half made, and the others work.
func TestStoreFull(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	f.Fail(hsmtest.GenerateKey, pkcs11.CKR_FUNCTION_FAILED, hsmtest.Always)
	_, err := token.NewKEK(t.Context(), "epoch-2")
	wantErr(t, "NewKEK", err, ErrUnavailable)
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Error(err)
	}
	wrap(t, k).opens(t, k)
	f.Heal()
	newKEK(t, token, "epoch-2")
	if err := token.Verify(t.Context(), []KEKInfo{k.Info()}); err != nil {
		t.Error(err)
	}
}

// TestKeyFileCut: SoftHSM does not notice that a key's file is cut while it is in use.
// The next start does.
func TestKeyFileCut(t *testing.T) {
	b := newBench(t)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(b.dir, "tokens", "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if filepath.Base(file) == "token.object" {
			continue
		}
		st, err := os.Stat(file)
		if err == nil {
			err = os.Truncate(file, st.Size()/2)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	token = b.open(t)
	if err := token.Verify(t.Context(), []KEKInfo{k.Info()}); err == nil {
		t.Error("Verify took a key whose file was cut")
	}
	if _, err := token.OpenKEK(t.Context(), k.Info()); err == nil {
		t.Error("OpenKEK took a key whose file was cut")
	}
}

// TestStartPatience: a module that fails at first is waited for, and one that refuses
// the PIN is not.
func TestStartPatience(t *testing.T) {
	b := newBench(t)
	f := newFaults(t, b)
	b.cfg.StartPatience = time.Minute
	f.Fail(hsmtest.Initialize, pkcs11.CKR_DEVICE_ERROR, 2)
	f.Fail(hsmtest.OpenSession, pkcs11.CKR_DEVICE_REMOVED, 1)
	k := newKEK(t, b.open(t), "epoch-1")
	wrap(t, k).opens(t, k)
	if n := f.Calls(hsmtest.Login); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// TestTokenFileBeingWritten: a token whose file another process has just emptied, to write
// it anew, is looked for again.
func TestTokenFileBeingWritten(t *testing.T) {
	b := newBench(t)
	files, err := filepath.Glob(filepath.Join(b.dir, "tokens", "*", "token.object"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	whole, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	write := func(content []byte) {
		if err := os.WriteFile(files[0], content, 0o600); err != nil {
			t.Error(err)
		}
	}
	write(nil)
	told := 0
	b.cfg.Log = slog.New(slog.NewTextHandler(writerFunc(func(line []byte) {
		if strings.Contains(string(line), "0 tokens have the label") {
			told++
			write(whole)
		}
	}), nil))
	wrap(t, newKEK(t, b.open(t), "epoch-1"))
	if told != 1 {
		t.Errorf("it was looked for again %d times, want once", told)
	}
}

// TestFewSessions: a token that has no session left for a change gets one of those that
// wait for the next call.
func TestFewSessions(t *testing.T) {
	b := newBench(t)
	f := newFaults(t, b)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	wrap(t, k).opens(t, k) // on a session that stays open
	f.MaxSessions(2)       // with the one that is logged in
	k = newKEK(t, token, "epoch-2")
	wrap(t, k).opens(t, k)
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

// TestGrace: with the token away, its session copies are used on for as long as the
// configuration allows, no KEK is made, and all is said aloud.
func TestGrace(t *testing.T) {
	b := newBench(t)
	b.cfg.Grace = time.Hour
	f := newFaults(t, b)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	for range 2 {
		f.Fail(hsmtest.GetTokenInfo, pkcs11.CKR_TOKEN_NOT_PRESENT, hsmtest.Always)
		f.Fail(hsmtest.GenerateKey, pkcs11.CKR_TOKEN_NOT_PRESENT, hsmtest.Always)
		for range 2 {
			if err := token.Heartbeat(t.Context()); err != nil {
				t.Fatalf("Heartbeat: %v", err)
			}
			if h := token.Health(); h.Stage != Grace || h.Cause == nil {
				t.Errorf("Health: %+v", h)
			}
			s.opens(t, k)
			wrap(t, k).opens(t, k)
		}
		_, err := token.NewKEK(t.Context(), "epoch-2")
		wantErr(t, "NewKEK without a token", err, ErrUnavailable)
		f.Heal()
		if err := token.Heartbeat(t.Context()); err != nil || token.Health().Stage != Well {
			t.Fatalf("Heartbeat: %v, %+v", err, token.Health())
		}
		s.opens(t, k)
	}

	// When it is over, or when the copies are dead too, there is none.
	back := move(t, filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "away"))
	if err := token.Heartbeat(t.Context()); err != nil || token.Health().Stage != Grace {
		t.Fatal(err, token.Health())
	}
	s.opens(t, k)
	token.cfg.Grace = time.Nanosecond
	wantErr(t, "Heartbeat after the grace", token.Heartbeat(t.Context()), ErrUnavailable)
	token.cfg.Grace = time.Hour
	wantErr(t, "Heartbeat later", token.Heartbeat(t.Context()), ErrUnavailable)
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap after the grace", err, ErrUnavailable)
	back()
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.opens(t, k)
	back = move(t, filepath.Join(b.dir, "tokens"), filepath.Join(b.dir, "away"))
	if err := token.m.CloseAllSessions(token.slot); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "Heartbeat without copies", token.Heartbeat(t.Context()), ErrUnavailable)
	back()
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.opens(t, k)
}

// TestNobodyWaitsForKEK: a KEK that the module makes when its caller has been told that
// there is none is destroyed as soon as the module comes back.
func TestNobodyWaitsForKEK(t *testing.T) {
	_, f, token := newFaulty(t)
	f.Hold(hsmtest.GenerateKey, true)
	for token.stuck.Load() == 0 { // a call that is over before it begins is none
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := token.NewKEK(ctx, "epoch-1")
		wantErr(t, "NewKEK", err, ErrUnavailable)
		cancel()
	}
	f.Hold(hsmtest.GenerateKey, false)
	until(t, "the call returns, and all that it did", func() bool {
		keks, err := token.ListKEKs(t.Context())
		return err == nil && token.stuck.Load() == 0 && len(keks) == 0 && f.Calls(hsmtest.DestroyObject) > 0
	})
	if _, err := token.NewKEK(t.Context(), "epoch-1"); err != nil { // nothing of it is left
		t.Error(err)
	}
}
