//go:build cgo

package hsm

import (
	"crypto/ed25519"
	"errors"
	"testing"
)

func TestSigningKey(t *testing.T) {
	b, token := newToken(t)
	const label = "kme/km1/audit"
	if _, err := token.OpenSigningKey(t.Context(), label); !errors.Is(err, ErrNoSigningKey) || errors.Is(err, ErrUnavailable) {
		t.Fatalf("opening a key that is not there: %v", err)
	}
	made, err := token.NewSigningKey(t.Context(), label)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := token.NewSigningKey(t.Context(), label); err == nil {
		t.Error("a second key was made under one label")
	}
	if keks, err := token.ListKEKs(t.Context()); err != nil || len(keks) != 0 {
		t.Errorf("the signing key is listed as a KEK: %v, %v", keks, err)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := b.open(t).OpenSigningKey(t.Context(), label)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("qutemail.example/km1/audit/1\n4\nroot\n")
	sig, err := again.Sign(t.Context(), message)
	if err != nil || !ed25519.Verify(made.Public(), message, sig) {
		t.Errorf("signature %x of a key opened again, error %v", sig, err)
	}
}
