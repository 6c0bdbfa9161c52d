//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
)

// newNSS is a bench with the module of Mozilla's NSS instead of SoftHSM's.
func newNSS(t *testing.T) *bench {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/*/libsoftokn3.so")
	if len(found) == 0 {
		t.Fatal("NSS is not installed: apt-get install libnss3")
	}
	b := &bench{dir: t.TempDir()}
	db := filepath.Join(b.dir, "nss")
	if err := os.Mkdir(db, 0o700); err != nil {
		t.Fatal(err)
	}
	b.cfg = Config{
		Module: found[0], WeakAttributes: true, TokenLabel: testLabel, PINFile: filepath.Join(b.dir, "pin"),
		ModuleArgs: fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='' flags= dbTokenDescription='%s'", db, testLabel),
	}
	b.writePIN(t, testPIN, 0o400)
	m, err := load(b.cfg.Module, b.cfg.ModuleArgs)
	if err != nil {
		t.Fatal(err)
	}
	defer m.unload()
	if err := m.initialise(); err != nil {
		t.Fatal(err)
	}
	defer m.Finalize()
	slots, err := m.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		ti, err := m.GetTokenInfo(slot)
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(ti.Label) != testLabel {
			continue
		}
		s, err := m.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(m.login(s, pkcs11.CKU_SO, nil), m.InitPIN(s, testPIN)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	t.Fatalf("no token has the label %s", testLabel)
	return nil
}

// TestSecondVendor: what seals, opens, refuses and heals is the same on a module that
// shares no code with SoftHSM.
func TestSecondVendor(t *testing.T) {
	b := newNSS(t)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	s.opens(t, k)
	for size := 1; size <= 512; size = size*2 + 1 {
		plain := bytes.Repeat([]byte{7}, size)
		iv, ct, err := k.Wrap(t.Context(), plain, s.aad)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := k.Unwrap(t.Context(), iv, ct, s.aad); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes: got %x, %v", size, got, err)
		}
	}
	changed := bytes.Clone(s.ct)
	changed[3] ^= 1
	_, err := k.Unwrap(t.Context(), s.iv, changed, s.aad)
	wantErr(t, "Unwrap of a changed blob", err, ErrTampered)
	_, err = k.Unwrap(t.Context(), s.iv, s.ct, []byte("other"))
	wantErr(t, "Unwrap with another AAD", err, ErrTampered)
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Error(err)
	}
	if err := token.m.CloseAllSessions(token.slot); err != nil {
		t.Fatal(err)
	}
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Errorf("Heartbeat after the loss of every session: %v", err)
	}
	s.opens(t, k)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}

	token = b.open(t)
	if err := token.Verify(t.Context(), []KEKInfo{k.Info()}); err != nil {
		t.Error(err)
	}
	k = openKEK(t, token, k.Info())
	s.opens(t, k)
	if err := errors.Join(k.Close(), token.DestroyKEK(t.Context(), k.Info())); err != nil {
		t.Error(err)
	}
	_, err = token.OpenKEK(t.Context(), k.Info())
	wantErr(t, "OpenKEK of a destroyed KEK", err, ErrNoKEK)
}

// TestSecondVendorIsWeak: what NSS does not do is found, and accepted only by whoever
// says so.
func TestSecondVendorIsWeak(t *testing.T) {
	b := newNSS(t)
	_, checks, err := Examine(t.Context(), b.cfg)
	if err != nil {
		t.Fatal(err)
	}
	weak := make(map[string]bool)
	for _, c := range checks {
		if c.Err != nil && !c.Weak {
			t.Errorf("%s: %v", c.Name, c.Err)
		}
		if c.Weak {
			weak[c.Name] = true
		}
	}
	if !weak["it does AES-GCM and nothing else"] || !weak["it cannot be wrapped by another key"] || len(weak) != 2 {
		t.Errorf("weak: %v", weak)
	}
	b.cfg.WeakAttributes = false
	if _, err := Open(t.Context(), b.cfg); err == nil || !strings.Contains(err.Error(), "self-test") {
		t.Errorf("Open without WeakAttributes: got %v", err)
	}
}
