package approval

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"slices"
	"testing"
	"time"
)

func certificate(t *testing.T, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestApproval: what was signed holds, also after a journey as JSON, and nothing else
// does.
func TestApproval(t *testing.T) {
	t.Parallel()
	now := time.Now()
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	act := must(NewAct("compromise-key", "01a2"))
	for name, key := range map[string]crypto.Signer{
		"P-256": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), "P-384": must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)), "Ed25519": edwards,
	} {
		leaf, other := certificate(t, key), certificate(t, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
		signed, err := Sign(act, "km1/a", now.Add(10*time.Minute), leaf, key)
		if err != nil {
			t.Fatal(err)
		}
		var a Approval
		if err := json.Unmarshal(must(json.Marshal(signed)), &a); err != nil {
			t.Fatal(err)
		}
		if got, err := a.Verify(act, "km1/a", now); err != nil || !got.Equal(leaf) {
			t.Errorf("%s: %v", name, err)
		}
		for what, bad := range map[string]func(*Approval, *Act, *string, *time.Time){
			"another act":                func(_ *Approval, act *Act, _ *string, _ *time.Time) { *act = "compromise-key 01a3" },
			"another act, said to be it": func(a *Approval, act *Act, _ *string, _ *time.Time) { *act, a.Act = "zeroize", "zeroize" },
			"another node":               func(_ *Approval, _ *Act, node *string, _ *time.Time) { *node = "km1/b" },
			"another node, said so":      func(a *Approval, _ *Act, node *string, _ *time.Time) { *node, a.Node = "km1/b", "km1/b" },
			"too late":                   func(_ *Approval, _ *Act, _ *string, now *time.Time) { *now = now.Add(10 * time.Minute) },
			"a later end":                func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Expires = a.Expires.Add(time.Minute) },
			"too early":                  func(_ *Approval, _ *Act, _ *string, now *time.Time) { *now = now.Add(-MaxLife) },
			"another nonce":              func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Nonce[0] ^= 1 },
			"a short nonce":              func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Nonce = nil },
			"another's certificate":      func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Certificate = other.Raw },
			"no certificate":             func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Certificate = nil },
			"another signature":          func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Signature[len(a.Signature)-1] ^= 1 },
			"no signature":               func(a *Approval, _ *Act, _ *string, _ *time.Time) { a.Signature = nil },
		} {
			var a Approval
			if err := json.Unmarshal(must(json.Marshal(signed)), &a); err != nil {
				t.Fatal(err)
			}
			act, node, now := act, "km1/a", now
			bad(&a, &act, &node, &now)
			if _, err := a.Verify(act, node, now); err == nil {
				t.Errorf("%s: %s holds", name, what)
			}
		}
	}
	weak := must(rsa.GenerateKey(rand.Reader, 2048))
	if _, err := Sign(act, "km1/a", now, certificate(t, weak), weak); err == nil {
		t.Error("an RSA key signs")
	}
}

func TestNewAct(t *testing.T) {
	t.Parallel()
	for want, words := range map[Act][]string{
		"erase a@b 3": {"erase", "a@b", "3"},
		// It is not the act on two things.
		`erase "a b"`:       {"erase", "a b"},
		`erase "a\"" b`:     {"erase", `a"`, "b"},
		`erase "a\\" b`:     {"erase", `a\`, "b"},
		`erase "\"a" "b\""`: {"erase", `"a`, `b"`},
	} {
		act, err := NewAct(words[0], words[1:]...)
		if err != nil || act != want {
			t.Errorf("%q: got %q, %v", words, act, err)
		}
		if got := act.Words(); !slices.Equal(got, words) {
			t.Errorf("%q has the words %q, want %q", act, got, words)
		}
		if read, err := ReadAct(" " + string(act) + "\n"); err != nil || read != act {
			t.Errorf("%q is read as %q, %v", act, read, err)
		}
	}
	for _, bad := range [][]string{{""}, {"a", ""}, {"a", "b\n"}, {"a", "b\u202ec"}, {"a", "b\u00a0c"}, {"a", "\xff"}} {
		if act, err := NewAct(bad[0], bad[1:]...); err == nil {
			t.Errorf("%q is %q", bad, act)
		}
	}
	for _, bad := range []string{"", " \n", "a\nb", "a\tb", "\xff", "a  b", `"a" b`, `a "b`, `a "b"c`, "a `b c`"} {
		if act, err := ReadAct(bad); err == nil {
			t.Errorf("%q is %q", bad, act)
		}
	}
}
