//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Places of functions in CK_FUNCTION_LIST.
const (
	cGetTokenInfo = 6
	cOpenSession  = 12
	cCloseSession = 13
	cLogin        = 18
	cCreateObject = 20
	cCopyObject   = 21
	cGenerateKey  = 58
	cEncryptInit  = 29
	cEncrypt      = 30
	cDecryptInit  = 33
	cDecrypt      = 34
	cRandom       = 64
	functions     = 68
)

// control is how the module of testdata/fault.c is told to fail: the next left
// calls answer rv, after the real module has done its part if late is not 0, and
// calls wait inside while hold is not 0.
type control struct{ rv, left, late, hold, calls, inside, most uint }

func (c *control) fail(rv uint, times uint) {
	c.rv = rv
	atomic.StoreUintptr((*uintptr)(unsafe.Pointer(&c.left)), uintptr(times))
}

func (c *control) load(field *uint) uint {
	return uint(atomic.LoadUintptr((*uintptr)(unsafe.Pointer(field))))
}

func (c *control) setHold(v uintptr) {
	atomic.StoreUintptr((*uintptr)(unsafe.Pointer(&c.hold)), v)
}

const always = 1 << 30

// newFaults puts the fault module between b and SoftHSM.
func newFaults(t *testing.T, b *bench) *[functions]control {
	t.Helper()
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	so, ctl := filepath.Join(b.dir, "fault.so"), filepath.Join(b.dir, "ctl")
	if out, err := exec.Command(cc, "-O1", "-shared", "-fPIC", "-o", so, filepath.Join("testdata", "fault.c"), "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("building the fault module: %v\n%s", err, out)
	}
	size := int(unsafe.Sizeof([functions]control{}))
	f, err := os.Create(ctl)
	if err == nil {
		err = f.Truncate(int64(size))
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mem, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Munmap(mem) })
	t.Setenv("P11FAULT_MODULE", b.cfg.Module)
	t.Setenv("P11FAULT_CTL", ctl)
	b.cfg.Module = so
	return (*[functions]control)(unsafe.Pointer(unsafe.SliceData(mem)))
}

func newFaulty(t *testing.T) (*bench, *[functions]control, *Token) {
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
		at   int
		rv   uint
		call func() error
	}{
		{"C_EncryptInit", cEncryptInit, pkcs11.CKR_KEY_HANDLE_INVALID, func() error { _, _, err := k.Wrap(t.Context(), s.plain, s.aad); return err }},
		// The operation stays active in the real module: on this session every later
		// EncryptInit would answer CKR_OPERATION_ACTIVE.
		{"C_Encrypt", cEncrypt, pkcs11.CKR_DEVICE_ERROR, func() error { _, _, err := k.Wrap(t.Context(), s.plain, s.aad); return err }},
		{"C_Encrypt", cEncrypt, pkcs11.CKR_GENERAL_ERROR, func() error { _, _, err := k.Wrap(t.Context(), s.plain, s.aad); return err }},
		{"C_DecryptInit", cDecryptInit, pkcs11.CKR_SESSION_HANDLE_INVALID, func() error { _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); return err }},
		{"C_Decrypt", cDecrypt, pkcs11.CKR_DEVICE_REMOVED, func() error { _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); return err }},
		{"C_GenerateRandom", cRandom, pkcs11.CKR_DEVICE_ERROR, func() error { return token.Random(t.Context(), make([]byte, 8)) }},
	} {
		closed := f[cCloseSession].load(&f[cCloseSession].calls)
		f[c.at].fail(c.rv, 1)
		err := c.call()
		wantErr(t, c.name, err, ErrUnavailable)
		if !isRV(err, pkcs11.Error(c.rv)) || !strings.Contains(err.Error(), c.name) || c.at != cRandom && !strings.Contains(err.Error(), "epoch-1") {
			t.Errorf("%s: %v does not say which call, key and error it was", c.name, err)
		}
		if n := f[cCloseSession].load(&f[cCloseSession].calls) - closed; n != 1 {
			t.Errorf("%s: %d sessions closed, want 1", c.name, n)
		}
		if err := c.call(); err != nil {
			t.Errorf("%s, next call: %v", c.name, err)
		}
	}
	f[cOpenSession].fail(pkcs11.CKR_SESSION_COUNT, 1)
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
	f[cDecrypt].fail(pkcs11.CKR_GENERAL_ERROR, always)
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap", err, ErrUnavailable)
	calls := f[cEncryptInit].load(&f[cEncryptInit].calls)
	_, _, err = k.Wrap(t.Context(), s.plain, s.aad)
	wantErr(t, "Wrap while down", err, ErrUnavailable)
	if f[cEncryptInit].load(&f[cEncryptInit].calls) != calls {
		t.Error("Wrap reached the module while the token was down")
	}
	wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
	f[cDecrypt].fail(0, 0)
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
	f[cDecrypt].late = 1
	f[cDecrypt].fail(pkcs11.CKR_GENERAL_ERROR, 1)
	s.opens(t, k)
	f[cDecryptInit].fail(pkcs11.CKR_GENERAL_ERROR, 1)
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap", err, ErrUnavailable)
	s.opens(t, k)
}

// TestNoPlainBytesAfterFault: the module may have written the key before it failed.
func TestNoPlainBytesAfterFault(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	f[cDecrypt].late = 1
	f[cDecrypt].fail(pkcs11.CKR_DEVICE_ERROR, 1)
	buf := make([]byte, len(s.ct))
	rw(t, token, func(h pkcs11.SessionHandle) error {
		if _, err := token.m.unseal(h, k.copy, s.iv[:], s.aad, s.ct, buf); !isRV(err, pkcs11.CKR_DEVICE_ERROR) {
			t.Errorf("got %v, want CKR_DEVICE_ERROR", err)
		}
		return nil
	})
	if !bytes.Equal(buf, make([]byte, len(buf))) {
		t.Errorf("%q is left in the buffer", buf)
	}
}

// TestRefusedPINIsNotTriedAgain: an HSM locks after a few wrong PINs. Whoever comes
// first has the PIN refused; after that nobody tries it, until there is another one.
func TestRefusedPINIsNotTriedAgain(t *testing.T) {
	t.Run("at start", func(t *testing.T) {
		b := newBench(t)
		f := newFaults(t, b)
		logins := func() uint { return f[cLogin].load(&f[cLogin].calls) }
		refused := func(what string, tries uint, cfg Config) {
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
		f[cCreateObject].fail(pkcs11.CKR_USER_NOT_LOGGED_IN, always)
		for range 2 {
			if _, err := Open(t.Context(), b.cfg); !errors.Is(err, ErrPINRefused) {
				t.Errorf("got %v, want ErrPINRefused", err)
			}
		}
		if n := f[cLogin].load(&f[cLogin].calls); n != 1 {
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
		if _, err := Open(t.Context(), b.cfg); err == nil || f[cLogin].load(&f[cLogin].calls) != 0 {
			t.Errorf("got %v and %d logins, want none", err, f[cLogin].load(&f[cLogin].calls))
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
			f[cLogin].fail(rv, always)
			before := f[cLogin].load(&f[cLogin].calls)
			for range 3 {
				wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
			}
			f[cLogin].fail(0, 0)
			wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
			if n := f[cLogin].load(&f[cLogin].calls) - before; n != 1 {
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
	f[cGetTokenInfo].fail(pkcs11.CKR_TOKEN_NOT_RECOGNIZED, 2)
	k := newKEK(t, b.open(t), "epoch-1")
	wrap(t, k).opens(t, k)
}

// TestSelfTestGuardsOpen: a token that cannot seal, or cannot open, is not used.
func TestSelfTestGuardsOpen(t *testing.T) {
	b := newBench(t)
	f := newFaults(t, b)
	for _, at := range []int{cEncryptInit, cEncrypt, cDecrypt} {
		f[at].fail(pkcs11.CKR_MECHANISM_INVALID, always)
		if _, err := Open(t.Context(), b.cfg); err == nil || !strings.Contains(err.Error(), "self-test") {
			t.Errorf("Open with function %d broken: got %v", at, err)
		}
		f[at].fail(0, 0)
	}
	b.open(t)
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
	c := &f[cDecrypt]
	c.setHold(1)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			if _, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad); err != nil {
				t.Error(err)
			}
		})
	}
	for deadline := time.Now().Add(20 * time.Second); c.load(&c.inside) < 2; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("no two calls got into the module")
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := k.Unwrap(ctx, s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap that gave up", err, ErrUnavailable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled in it", err)
	}
	wantErr(t, "Heartbeat that gave up", token.Heartbeat(ctx), ErrUnavailable)
	c.setHold(0)
	callers.Wait()
	if most := c.load(&c.most); most != 2 {
		t.Errorf("%d calls in the module at once, want 2", most)
	}
	s.opens(t, k)
}
