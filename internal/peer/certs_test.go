package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/identity"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// authority is a CA made for one test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "test CA"},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &authority{cert, k, pool}
}

// issue makes the certificate of a KME at 127.0.0.1, or of another role.
func (a *authority) issue(t testing.TB, role, id string) tls.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{{Scheme: "qkd", Host: role + ".lab.test", Path: "/" + id}},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
}

func (a *authority) server(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              a.pool,
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2", "http/1.1"},
	}
}

func (a *authority) client(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: a.pool, MinVersion: tls.VersionTLS13}
}

// judge names KMEs by the lab's rule, and SAEs by one that no peer should match.
func judge(t testing.TB) func(tls.ConnectionState) (identity.Caller, error) {
	t.Helper()
	principals := make(map[string]identity.Principal)
	for _, id := range []string{"km1", "km2", "km3"} {
		principals[identity.PrincipalKey(identity.RoleKME, id)] = identity.Principal{Enabled: true}
	}
	m, err := identity.NewMap([]identity.Rule{
		{ID: "kmes", Pool: "kme", Role: identity.RoleKME, URI: "qkd://kme.lab.test/{id}", Principal: "{id}"},
	}, identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 24 * time.Hour}, principals)
	if err != nil {
		t.Fatal(err)
	}
	return func(cs tls.ConnectionState) (identity.Caller, error) {
		if len(cs.PeerCertificates) == 0 {
			return identity.Stranger(nil), errors.New("no certificate")
		}
		return m.Judge("kme", cs.PeerCertificates[0], time.Now())
	}
}

func identifyHTTP(t testing.TB) func(*http.Request) (identity.Caller, error) {
	j := judge(t)
	return func(r *http.Request) (identity.Caller, error) { return j(*r.TLS) }
}

// letIn is for whoever passed TLS.
func letIn(*x509.Certificate) error { return nil }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// serveHTTP runs h behind TLS until the test ends and returns its address.
func serveHTTP(t testing.TB, cfg *tls.Config, h http.Handler) string {
	t.Helper()
	ln := listen(t)
	srv := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(tls.NewListener(ln, cfg))
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return ln.Addr().String()
}

func newClient(t testing.TB, address string, cfg *tls.Config) *Client {
	t.Helper()
	return newClientOf(t, cfg, address)
}

// newClientOf is a Client of a peer with several nodes.
func newClientOf(t testing.TB, cfg *tls.Config, addresses ...string) *Client {
	t.Helper()
	c, err := NewClient(ClientConfig{Addresses: addresses, TLS: cfg, Still: letIn, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// untilSeen is the patience of a caller that leaves once its message has arrived.
func untilSeen(t testing.TB, arrived func() bool) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	var watching sync.WaitGroup
	watching.Go(func() {
		defer cancel()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil && !arrived() {
			<-tick.C
		}
	})
	t.Cleanup(func() { cancel(); watching.Wait() })
	return ctx
}

func mustKME(t testing.TB, s string) identity.KME {
	t.Helper()
	k, err := identity.ParseKME(s)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// isDeadline says whether err is the caller's deadline and not the peer's silence.
func isDeadline(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, ErrSilent)
}
