package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

// startDoor serves over config on this machine and returns its URL for host localhost.
func startDoor(t *testing.T, config *tls.Config, h http.Handler) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = config
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return strings.Replace(s.URL, "127.0.0.1", "localhost", 1)
}

// get makes one request on a connection of its own.
func get(t *testing.T, config *tls.Config, url string) (*http.Response, error) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get(url)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	return resp, err
}

var okay = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})

func TestDoorLetsIn(t *testing.T) {
	ca, other := newCAs(t), newCAs(t)
	roots := pool(t, filepath.Join(ca, "root.pem"))
	km1 := load(t, mint(t, ca, "kme", "km1", nil))
	door := startDoor(t, pki.ServerTLS(km1, pool(t, filepath.Join(ca, "sae/intermediate.pem")), tls.VersionTLS13), okay)

	for _, tt := range []struct {
		name string
		ca   string
		role identity.Role
		edit func(*x509.Certificate)
		ok   bool
	}{
		{"an SAE", ca, "sae", nil, true},
		{"another role under the same root", ca, "operator", nil, false},
		{"a KME", ca, "kme", nil, false},
		{"an SAE of another PKI", other, "sae", nil, false},
		{"not yet valid", ca, "sae", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, false},
		{"for servers only", ca, "sae", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, false},
		{"a URI of another role", ca, "sae", func(c *x509.Certificate) { c.URIs[0].Host = "operator.lab.test" }, false},
		{"a critical extension nobody knows", ca, "sae", func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, unknownCritical)
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := load(t, mint(t, tt.ca, tt.role, "alice", tt.edit))
			if _, err := get(t, pki.ClientTLS(client, roots, nil), door); (err == nil) != tt.ok {
				t.Errorf("got %v, want let in: %v", err, tt.ok)
			}
		})
	}

	t.Run("no certificate", func(t *testing.T) {
		if _, err := get(t, pki.AnonymousTLS(roots), door); err == nil { // the alert, or a broken pipe
			t.Error("let in")
		}
	})
	t.Run("a certificate that ends", func(t *testing.T) {
		client := load(t, mint(t, ca, "sae", "alice", nil))
		config := pki.ServerTLS(km1, pool(t, filepath.Join(ca, "sae/intermediate.pem")), tls.VersionTLS13)
		config.Time = func() time.Time { return time.Now().Add(2 * time.Hour) }
		if _, err := get(t, pki.ClientTLS(client, roots, nil), startDoor(t, config, okay)); err == nil {
			t.Error("let in after its end")
		}
	})
	t.Run("a door without a pool", func(t *testing.T) {
		client := load(t, mint(t, ca, "sae", "alice", nil))
		if _, err := get(t, pki.ClientTLS(client, roots, nil), startDoor(t, pki.ServerTLS(km1, nil, 0), okay)); err == nil {
			t.Error("let in by nobody")
		}
	})
}

func TestVersionsAndTickets(t *testing.T) {
	ca := newCAs(t)
	roots := pool(t, filepath.Join(ca, "root.pem"))
	saes := pool(t, filepath.Join(ca, "sae/intermediate.pem"))
	km1 := load(t, mint(t, ca, "kme", "km1", nil))
	alice := load(t, mint(t, ca, "sae", "alice", nil))
	for _, tt := range []struct {
		name     string
		min, max uint16 // of the door, of the client
		ok       bool
	}{
		{"1.3 door, 1.2 client", tls.VersionTLS13, tls.VersionTLS12, false},
		{"1.2 door, 1.2 client", tls.VersionTLS12, tls.VersionTLS12, true},
		{"1.2 door, 1.3 client", tls.VersionTLS12, tls.VersionTLS13, true},
		{"1.0 asked for, 1.1 client", tls.VersionTLS10, tls.VersionTLS11, false},
	} {
		config := pki.ClientTLS(alice, roots, nil)
		config.MinVersion, config.MaxVersion = tls.VersionTLS10, tt.max
		if _, err := get(t, config, startDoor(t, pki.ServerTLS(km1, saes, tt.min), okay)); (err == nil) != tt.ok {
			t.Errorf("%s: got %v, want let in: %v", tt.name, err, tt.ok)
		}
	}

	door := startDoor(t, pki.ServerTLS(km1, saes, tls.VersionTLS12), okay)
	config := pki.ClientTLS(alice, roots, nil)
	config.ClientSessionCache = tls.NewLRUClientSessionCache(10)
	for range 3 {
		resp, err := get(t, config, door)
		if err != nil {
			t.Fatal(err)
		}
		if resp.TLS.DidResume {
			t.Error("a session was resumed")
		}
		if resp.Proto != "HTTP/2.0" {
			t.Errorf("protocol: got %s, want HTTP/2.0", resp.Proto)
		}
	}
}

func TestClientRefusesServer(t *testing.T) {
	ca, other := newCAs(t), newCAs(t)
	roots := pool(t, filepath.Join(ca, "root.pem"))
	saes := pool(t, filepath.Join(ca, "sae/intermediate.pem"))
	alice := load(t, mint(t, ca, "sae", "alice", nil))
	isKM1 := pki.PeerURI("qkd://kme.lab.test/km1")
	server := func(ca string, role identity.Role, id string, edit func(*x509.Certificate)) string {
		return startDoor(t, pki.ServerTLS(load(t, mint(t, ca, role, id, edit)), saes, tls.VersionTLS12), okay)
	}
	km1 := server(ca, "kme", "km1", nil)
	for _, tt := range []struct {
		name   string
		url    string
		roots  *x509.CertPool
		verify func(*x509.Certificate) error
		ok     bool
	}{
		{"km1", km1, roots, isKM1, true},
		{"km1, whoever it is", km1, roots, nil, true},
		{"km2", server(ca, "kme", "km2", nil), roots, isKM1, false},
		{"another host name", strings.Replace(km1, "localhost", "127.0.0.1", 1), roots, isKM1, false},
		{"another PKI", server(other, "kme", "km1", nil), roots, isKM1, false},
		{"no roots", km1, nil, isKM1, false},
		{"an SAE that serves", server(ca, "sae", "km1", func(c *x509.Certificate) { c.DNSNames = []string{"localhost"} }), roots, nil, false},
		{"two URIs", server(ca, "kme", "km1", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), roots, isKM1, false},
	} {
		if _, err := get(t, pki.ClientTLS(alice, tt.roots, tt.verify), tt.url); (err == nil) != tt.ok {
			t.Errorf("%s: got %v, want accepted: %v", tt.name, err, tt.ok)
		}
	}

	old := pki.ServerTLS(load(t, mint(t, ca, "kme", "km1", nil)), saes, tls.VersionTLS12)
	old.MaxVersion = tls.VersionTLS12
	if _, err := get(t, pki.ClientTLS(alice, roots, isKM1), startDoor(t, old, okay)); err == nil {
		t.Error("a client of ours spoke TLS 1.2")
	}
}

// TestHotReload: the door shows the new certificate to new connections.
func TestHotReload(t *testing.T) {
	ca := newCAs(t)
	dir := mint(t, ca, "kme", "km1", nil)
	km1, alice := load(t, dir), load(t, mint(t, ca, "sae", "alice", nil))
	door := startDoor(t, pki.ServerTLS(km1, pool(t, filepath.Join(ca, "sae/intermediate.pem")), tls.VersionTLS13), okay)
	client := pki.ClientTLS(alice, pool(t, filepath.Join(ca, "root.pem")), nil)

	next := mint(t, ca, "kme", "km1", nil)
	for _, file := range []string{"key.pem", "cert.pem"} {
		if err := copyFile(next, dir, file); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []*x509.Certificate{km1.Leaf(), load(t, next).Leaf()} {
		resp, err := get(t, client, door)
		if err != nil {
			t.Fatal(err)
		}
		if !resp.TLS.PeerCertificates[0].Equal(want) {
			t.Errorf("the door showed serial %v, want %v", resp.TLS.PeerCertificates[0].SerialNumber, want.SerialNumber)
		}
		if err := km1.Reload(); err != nil {
			t.Fatal(err)
		}
	}
}
