package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// TestProfileEnforces looks at what the template would have to let through first.
func TestProfileEnforces(t *testing.T) {
	p := profile{settings: settings{Role: identity.RoleSAE, TrustDomain: "lab.test"}}
	good := func() *x509.Certificate {
		c := &x509.Certificate{
			URIs:        []*url.URL{{Scheme: "qkd", Host: "sae.lab.test", Path: "/alice"}},
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			PublicKey:   &ecdsa.PublicKey{Curve: elliptic.P256()},
		}
		c.Subject.CommonName = "alice"
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}}, identity.RoleExtension(identity.RoleSAE)}
		return c
	}
	if err := p.Enforce(good()); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*x509.Certificate){
		"no URI":        func(c *x509.Certificate) { c.URIs = nil },
		"two URIs":      func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"another's URI": func(c *x509.Certificate) { c.URIs[0].Path = "/bob" },
		"another role":  func(c *x509.Certificate) { c.URIs[0].Host = "kme.lab.test" },
		"a user":        func(c *x509.Certificate) { c.URIs[0].User = url.User("u") },
		"a port":        func(c *x509.Certificate) { c.URIs[0].Host += ":1" },
		"bad ID":        func(c *x509.Certificate) { c.Subject.CommonName, c.URIs[0].Path = "..", "/.." },
		"e-mail":        func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b.test"} },
		"host name":     func(c *x509.Certificate) { c.DNSNames = []string{"localhost"} },
		"CA":            func(c *x509.Certificate) { c.IsCA = true },
		"key usage":     func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"server too": func(c *x509.Certificate) {
			c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		},
		"no role":           func(c *x509.Certificate) { c.ExtraExtensions = c.ExtraExtensions[:1] },
		"the role of a KME": func(c *x509.Certificate) { c.ExtraExtensions[1] = identity.RoleExtension(identity.RoleKME) },
		"two roles": func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, identity.RoleExtension(identity.RoleKME))
		},
		"any usage": func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} },
	} {
		c := good()
		spoil(c)
		if p.Enforce(c) == nil {
			t.Errorf("%s: not refused", name)
		}
	}
}

// TestOwnCertificate: renewed in time, kept if that fails, an error only if there is none.
func TestOwnCertificate(t *testing.T) {
	lasting := func(d time.Duration) *tls.Certificate {
		return &tls.Certificate{Leaf: &x509.Certificate{NotAfter: time.Now().Add(d)}}
	}
	fresh, old := lasting(24*time.Hour), lasting(7*time.Hour)
	broken := errors.New("no key")
	for _, tt := range []struct {
		name      string
		have      *tls.Certificate
		made      *tls.Certificate
		err       error
		want      *tls.Certificate
		wantError error
	}{
		{"the first", nil, fresh, nil, fresh, nil},
		{"none to be had", nil, nil, broken, nil, broken},
		{"still good", fresh, nil, broken, fresh, nil},
		{"due", old, fresh, nil, fresh, nil},
		{"due, but it fails", old, nil, broken, old, nil},
	} {
		o := ownCertificate{
			issue: func() (*tls.Certificate, error) { return tt.made, tt.err },
			log:   slog.New(slog.DiscardHandler), cert: tt.have,
		}
		if got, err := o.get(nil); got != tt.want || !errors.Is(err, tt.wantError) {
			t.Errorf("%s: got %p, %v, want %p, %v", tt.name, got, err, tt.want, tt.wantError)
		}
	}
}

// TestServersAreNobody: what ACME issues has host names and no identity, and only where
// it was asked for.
func TestServersAreNobody(t *testing.T) {
	server := func() *x509.Certificate {
		return &x509.Certificate{
			DNSNames: []string{"localhost"}, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, PublicKey: &ecdsa.PublicKey{Curve: elliptic.P256()},
		}
	}
	kme := settings{Role: identity.RoleKME, TrustDomain: "lab.test", ACME: true}
	if err := (profile{kme}).Enforce(server()); err != nil {
		t.Error(err)
	}
	if (profile{settings{Role: kme.Role, TrustDomain: kme.TrustDomain}}).Enforce(server()) == nil {
		t.Error("a plain server without acme")
	}
	for name, spoil := range map[string]func(*x509.Certificate){
		"a client":       func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) },
		"an identity":    func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "qkd", Host: "kme.lab.test", Path: "/km1"}} },
		"no name":        func(c *x509.Certificate) { c.DNSNames = nil },
		"an e-mail":      func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b"} },
		"a CA":           func(c *x509.Certificate) { c.IsCA = true },
		"a weak key":     func(c *x509.Certificate) { c.PublicKey = &ecdsa.PublicKey{Curve: elliptic.P521()} },
		"more key usage": func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
	} {
		c := server()
		spoil(c)
		if (profile{kme}).Enforce(c) == nil {
			t.Errorf("%s: allowed", name)
		}
	}
}

// flaky is a key that signs as long as it is told to.
type flaky struct {
	crypto.Signer
	works atomic.Bool
}

func (f *flaky) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	if f.works.Load() {
		return nil, nil
	}
	return nil, errors.New("CKR_OBJECT_HANDLE_INVALID")
}

// TestHeartbeat: a CA whose token is gone ends, so that a new process finds it again;
// one that stumbled does not.
func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := new(flaky)
		key.works.Store(true)
		done := make(chan error, 1)
		go func() { done <- heartbeat(t.Context(), key, heartbeatEvery, slog.New(slog.DiscardHandler)) }()
		time.Sleep(heartbeatEvery / 2) // between two heartbeats from here on
		for range 3 {
			time.Sleep(time.Minute)
			key.works.Store(false)
			time.Sleep(2 * heartbeatEvery)
			key.works.Store(true)
		}
		select {
		case err := <-done:
			t.Fatalf("it ended: %v", err)
		default:
		}
		key.works.Store(false)
		time.Sleep(4 * heartbeatEvery)
		if err := <-done; !errors.Is(err, ErrNoKey) {
			t.Errorf("got %v, want %v", err, ErrNoKey)
		}
	})
}
