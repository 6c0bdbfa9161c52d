package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

var unknownCritical = pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}

// saeMap names SAEs by their URI; only alice is known, and let in if enabled.
func saeMap(t testing.TB, enabled bool) *identity.Map {
	t.Helper()
	return saeMapOf(t, identity.Principal{Enabled: enabled})
}

// saeMapOf is saeMap with that row for alice.
func saeMapOf(t testing.TB, alice identity.Principal) *identity.Map {
	m, err := identity.NewMap(
		[]identity.Rule{{ID: "sae-uri", Pool: "sae", Role: identity.RoleSAE, URI: "qkd://sae.lab.test/{id}", Principal: "{id}"}},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 169 * time.Hour},
		map[string]identity.Principal{identity.PrincipalKey(identity.RoleSAE, "alice"): alice},
	)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// answer is what Identify said of one request.
type answer struct {
	caller identity.Caller
	err    error
}

// doorWith returns a function that calls the SAE door with the credential in dir and
// says what Identify made of it.
func doorWith(t *testing.T, ca string, current func() *identity.Map, now func() time.Time) func(dir string) answer {
	t.Helper()
	identify := pki.Identify("sae", current, now)
	var last atomic.Pointer[answer]
	km1 := load(t, mint(t, ca, "kme", "km1", nil))
	config := pki.ServerTLS(km1, pool(t, filepath.Join(ca, "sae/intermediate.pem")), tls.VersionTLS13)
	door := startDoor(t, config, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		caller, err := identify(r)
		last.Store(&answer{caller, err})
	}))
	return func(dir string) answer {
		if _, err := get(t, pki.ClientTLS(load(t, dir), pool(t, filepath.Join(ca, "root.pem")), nil), door); err != nil {
			t.Fatal(err)
		}
		return *last.Load()
	}
}

func reasonOf(err error) string {
	if denial, ok := errors.AsType[*identity.Denial](err); ok {
		return denial.Reason
	}
	return ""
}

func TestIdentify(t *testing.T) {
	ca := newCAs(t)
	var current atomic.Pointer[identity.Map]
	current.Store(saeMap(t, true))
	var later atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	call := doorWith(t, ca, current.Load, now)
	alice := mint(t, ca, "sae", "alice", nil)

	a := call(alice)
	if sae, ok := a.caller.SAE(); a.err != nil || !ok || sae.String() != "alice" {
		t.Errorf("alice: got %q %v (%v)", a.caller.ID(), a.caller.Role(), a.err)
	}
	if a.caller.Remote() == "" || a.caller.Certificate().Serial != load(t, alice).Leaf().SerialNumber.String() {
		t.Errorf("alice: got remote %q, certificate %+v", a.caller.Remote(), a.caller.Certificate())
	}

	for _, tt := range []struct {
		name, id string
		edit     func(*x509.Certificate)
		want     string
	}{
		{"a stranger", "mallory", nil, identity.UnknownPrincipal},
		{"a CA as leaf", "alice", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, identity.NotLeaf},
		{"no usage", "alice", func(c *x509.Certificate) { c.ExtKeyUsage = nil }, identity.BadEKU},
		{"two URIs", "alice", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, identity.Ambiguous},
		{"another CN", "alice", func(c *x509.Certificate) { c.Subject.CommonName = "bob" }, identity.CNMismatch},
	} {
		edit := tt.edit
		a := call(mint(t, ca, "sae", tt.id, edit))
		if reasonOf(a.err) != tt.want || a.caller.Role() != identity.RoleNone {
			t.Errorf("%s: got role %q, %v, want %s", tt.name, a.caller.Role(), a.err, tt.want)
		}
		if a.caller.Remote() == "" || a.caller.Certificate().Fingerprint == "" {
			t.Errorf("%s: the caller carries no facts", tt.name)
		}
	}

	later.Store(int64(2 * time.Hour)) // the connection outlived the certificate
	if got := reasonOf(call(alice).err); got != identity.Expired {
		t.Errorf("after its end: got %q, want %s", got, identity.Expired)
	}
	later.Store(0)
	current.Store(saeMap(t, false))
	if got := reasonOf(call(alice).err); got != identity.Disabled {
		t.Errorf("after a new map: got %q, want %s", got, identity.Disabled)
	}
}

// TestIdentifyWithoutTLS: no certificate, no caller, whatever the headers say.
func TestIdentifyWithoutTLS(t *testing.T) {
	identify := pki.Identify("sae", func() *identity.Map { return saeMap(t, true) }, time.Now)
	plain := httptest.NewRequest("GET", "/", nil)
	unverified := httptest.NewRequest("GET", "/", nil)
	unverified.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{load(t, mint(t, newCAs(t), "sae", "alice", nil)).Leaf()}}
	for _, r := range []*http.Request{plain, unverified} {
		r.Header.Set("X-Forwarded-Client-Cert", "URI=qkd://sae.lab.test/alice")
		caller, err := identify(r)
		if reasonOf(err) != identity.NoCertificate || caller.Role() != identity.RoleNone || caller.Remote() == "" {
			t.Errorf("got %+v, %v", caller, err)
		}
	}
}
