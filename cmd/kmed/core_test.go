package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qutemail/kme/hsm"
)

// TestLinkSecret: a link's secret is read where the configuration says, and a token that
// does not have it says what to do.
func TestLinkSecret(t *testing.T) {
	dir := t.TempDir()
	conf, err := hsm.WriteSoftHSMConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	pin, file := filepath.Join(dir, "pin"), filepath.Join(dir, "secret")
	err = errors.Join(hsm.InitToken(softHSM, "km1", "so-pin-774410", "pin-483920"),
		os.WriteFile(pin, []byte("pin-483920\n"), 0o600), os.WriteFile(file, []byte("what the file has"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	token, err := hsm.Open(t.Context(), hsm.Config{Module: softHSM, TokenLabel: "km1", PINFile: pin})
	if err != nil {
		t.Fatal(err)
	}
	defer token.Close()
	n := &node{token: token}

	inHSM := n.linkSecret(LinkConfig{ID: "km1-km2", AuthInHSM: true})
	if _, err := inHSM(t.Context()); !errors.Is(err, hsm.ErrNoAuthSecret) || !strings.Contains(err.Error(), "kmed hsm auth-secret") {
		t.Errorf("a token without the secret: %v", err)
	}
	secret := bytes.Repeat([]byte{7}, hsm.AuthSecretBytes)
	if err := token.SetAuthSecret(t.Context(), "km1-km2", secret); err != nil {
		t.Fatal(err)
	}
	if got, err := inHSM(t.Context()); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("from the token: %d bytes, %v", len(got), err)
	}
	inFile := n.linkSecret(LinkConfig{ID: "km1-km2", AuthFile: file})
	if got, err := inFile(t.Context()); err != nil || string(got) != "what the file has" {
		t.Errorf("from the file: %q, %v", got, err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		if got, err := inFile(t.Context()); err == nil || !strings.Contains(err.Error(), "only its owner may read") {
			t.Errorf("from a file of mode %o: %q, %v", mode, got, err)
		}
	}
}
