package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Identify returns the function with which a door of a pool that has no Gate asks who
// is calling: it knows no CRL. A Gate has its own.
func Identify(pool string, current func() *identity.Map, now func() time.Time) func(*http.Request) (identity.Caller, error) {
	return func(r *http.Request) (identity.Caller, error) {
		return identify(r, func(leaf *x509.Certificate) (identity.Caller, error) { return current().Judge(pool, leaf, now()) })
	}
}

// Identify says who is calling. The chain has been verified by the handshake; what a
// CA has revoked since, what the rules, rows and switches of this moment say and how
// the connection's keys were agreed on is judged again on every request. All of them
// must let the caller in. On an error the Caller is a stranger that still carries what
// is known of the certificate, and where it called from.
func (g *Gate) Identify(r *http.Request) (identity.Caller, error) {
	now := g.cfg.Now()
	return identify(r, func(leaf *x509.Certificate) (identity.Caller, error) {
		if err := g.cfg.Revocations.Check(leaf, now); err != nil {
			return identity.Stranger(leaf), err
		}
		return g.cfg.Judge(leaf, now)
	})
}

// suiteNames are those of cipher suites: crypto/tls makes a new list of all of them whenever
// it is asked for one, which took longer than all else that a request's caller is judged by.
var suiteNames = sync.OnceValue(func() map[uint16]string {
	names := make(map[uint16]string)
	for _, s := range slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()) {
		names[s.ID] = s.Name
	}
	return names
})

func suiteName(id uint16) string {
	if name, known := suiteNames()[id]; known {
		return name
	}
	return tls.CipherSuiteName(id)
}

// identify is the only place that looks at a request's certificate.
func identify(r *http.Request, judge func(*x509.Certificate) (identity.Caller, error)) (identity.Caller, error) {
	s := identity.Session{Remote: r.RemoteAddr}
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		denial := &identity.Denial{Reason: identity.NoCertificate}
		return identity.Stranger(nil).WithSession(s), fmt.Errorf("identifying the caller: %w", denial)
	}
	if r.TLS.CurveID != 0 {
		s.Group = r.TLS.CurveID.String()
	}
	s.TLS = strings.TrimSuffix(tls.VersionName(r.TLS.Version)+" "+suiteName(r.TLS.CipherSuite)+" "+s.Group, " ")
	s.Since, _ = r.Context().Value(handshakeKey{}).(time.Time)
	leaf := r.TLS.VerifiedChains[0][0]
	caller, err := judge(leaf)
	if err == nil && caller.NeedsHybrid() && !s.Hybrid() {
		caller, err = identity.Stranger(leaf), &identity.Denial{Reason: identity.NotHybrid, Detail: s.Group}
	}
	if err != nil {
		err = fmt.Errorf("identifying the caller: %w", err)
	}
	return caller.WithSession(s), err
}

// handshakeKey is the key of when a connection shook hands, in the context of its
// requests.
type handshakeKey struct{}

// ConnContext is http.Server's: it tells requests when their connection shook hands.
func (g *Gate) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if conn, ok := c.(interface{ NetConn() net.Conn }); ok { // a *tls.Conn, or one around it
		if raw, ok := conn.NetConn().(*gateConn); ok {
			return context.WithValue(ctx, handshakeKey{}, raw.since)
		}
	}
	return ctx
}
