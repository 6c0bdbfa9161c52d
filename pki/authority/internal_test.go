package authority

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/url"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// TestProfileEnforces looks at what the template would have to let through first.
func TestProfileEnforces(t *testing.T) {
	p := profile{settings{Role: identity.RoleSAE, TrustDomain: "lab.test"}}
	good := func() *x509.Certificate {
		c := &x509.Certificate{
			URIs:        []*url.URL{{Scheme: "qkd", Host: "sae.lab.test", Path: "/alice"}},
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			PublicKey:   &ecdsa.PublicKey{Curve: elliptic.P256()},
		}
		c.Subject.CommonName = "alice"
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
