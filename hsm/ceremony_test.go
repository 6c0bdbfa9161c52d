//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm/hsmtest"
)

// TestVerify: what keeps a node from starting on a token.
func TestVerify(t *testing.T) {
	_, token := newToken(t)
	a, b := newKEK(t, token, "epoch-1").Info(), newKEK(t, token, "epoch-2").Info()
	if err := token.Verify(t.Context(), []KEKInfo{a, b}); err != nil {
		t.Error(err)
	}
	wrong, missing := a, b
	wrong.CheckValue[1] ^= 1
	missing.ID = []byte("another")
	err := token.Verify(t.Context(), []KEKInfo{wrong, missing})
	if !errors.Is(err, ErrNoKEK) || !strings.Contains(err.Error(), "it is another key") {
		t.Errorf("got %v, want it to name both", err)
	}
	// A key of the same label, and one that can do more than a KEK.
	rw(t, token, func(s pkcs11.SessionHandle) error {
		_, err := token.m.generateKEK(s, true, a.Label, []byte("twin"))
		return err
	})
	err = token.Verify(t.Context(), []KEKInfo{b})
	if err == nil || !strings.Contains(err.Error(), `two keys have the label "epoch-1"`) {
		t.Errorf("with a label twice: got %v", err)
	}
	keys, err := token.Keys(t.Context())
	if err != nil || len(keys) != 3 || keys[0].Err == nil || keys[1].Err == nil || keys[2].Err != nil {
		t.Errorf("Keys: got %v, %v, want two of them wrong", keys, err)
	}
}

func TestAuthSecret(t *testing.T) {
	b := newBench(t)
	token := b.open(t)
	_, err := token.AuthSecret(t.Context(), "km1-km2")
	wantErr(t, "AuthSecret of a link without one", err, ErrNoAuthSecret)
	secret, err := token.NewAuthSecret(t.Context())
	if err != nil || len(secret) != AuthSecretBytes {
		t.Fatalf("NewAuthSecret: %d bytes, %v", len(secret), err)
	}
	if err := token.SetAuthSecret(t.Context(), "km1-km2", secret[1:]); err == nil {
		t.Error("a secret that is too short was taken")
	}
	if err := token.SetAuthSecret(t.Context(), "km1-km2", secret); err != nil {
		t.Fatal(err)
	}
	if err := token.SetAuthSecret(t.Context(), "km1-km2", secret); err == nil {
		t.Error("a second one was taken")
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = b.open(t)
	got, err := token.AuthSecret(t.Context(), "km1-km2")
	if err != nil || !bytes.Equal(got, secret) {
		t.Errorf("AuthSecret: got another one, %v", err)
	}
	_, err = token.AuthSecret(t.Context(), "km1-km3")
	wantErr(t, "AuthSecret of another link", err, ErrNoAuthSecret)
	if err := token.DestroyAuthSecret(t.Context(), "km1-km2"); err != nil {
		t.Error(err)
	}
	_, err = token.AuthSecret(t.Context(), "km1-km2")
	wantErr(t, "AuthSecret after its end", err, ErrNoAuthSecret)
	wantErr(t, "second DestroyAuthSecret", token.DestroyAuthSecret(t.Context(), "km1-km2"), ErrNoAuthSecret)
}

func TestNewPIN(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	pin, err := NewPIN(path)
	if err != nil || len(pin) != 32 {
		t.Fatalf("got %d bytes, %v", len(pin), err)
	}
	if again, err := NewPIN(path); again != pin || err != nil {
		t.Errorf("with the file there: another PIN, %v", err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := NewPIN(path); err == nil {
		t.Error("a file that others can read was taken")
	}
}

// TestExamineFindsWhatIsMissing: each thing that a module does not do is named.
func TestExamineFindsWhatIsMissing(t *testing.T) {
	for want, at := range map[string]hsmtest.Function{
		"it can be copied to a session object":         hsmtest.CopyObject,
		"AES-GCM seals, 32 bytes":                      hsmtest.EncryptInit,
		"it opens, 32 bytes":                           hsmtest.Decrypt,
		"an AES-256 key can be generated as a session": hsmtest.GenerateKey,
	} {
		b := newBench(t)
		f := newFaults(t, b)
		f.Fail(at, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, hsmtest.Always)
		_, checks, err := Examine(t.Context(), b.cfg)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, c := range checks {
			found = found || strings.HasPrefix(c.Name, want) && isRV(c.Err, pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
		}
		if !found {
			t.Errorf("%q is not among what has failed: %v", want, checks)
		}
	}
}
