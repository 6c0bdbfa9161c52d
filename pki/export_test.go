package pki

import (
	"context"
	"net"
	"net/http"
)

// Fetch asks every URL once, as Run does.
func (r *Revocations) Fetch(ctx context.Context) { r.fetch(ctx) }

// Through has r ask by another way than the network.
func (r *Revocations) Through(ask func(*http.Request) (*http.Response, error)) {
	r.client.Transport = roundTripper(ask)
}

type roundTripper func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Flush has what was gathered recorded, as Run does.
func (q *Refusals) Flush(ctx context.Context) { q.flush(ctx) }

// Failed has the record say that a handshake failed.
func (g *Gate) Failed(remote net.Addr, err error) { g.refuse(nil, remote, err) }

// Refused is how many refusals there were, recorded or not.
func (q *Refusals) Refused() (n int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, of := range q.total {
		n += of
	}
	return n
}

// Open is how many connections are open.
func (g *Gate) Open() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.open)
}

// Shaking is how many handshakes are under way.
func (g *Gate) Shaking() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shaking
}

// Occupy takes the turn of one handshake, until it is released.
func (g *Gate) Occupy() (release func()) {
	g.turns <- struct{}{}
	return func() { <-g.turns }
}

// Good is how many connections are open whose certificate named a caller.
func (g *Gate) Good() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for c := range g.open {
		if c.good {
			n++
		}
	}
	return n
}

// Over has e speak to its CA over connections that dial makes.
func (e Enrolment) Over(dial func(ctx context.Context, network, address string) (net.Conn, error)) Enrolment {
	e.dial = dial
	return e
}

// Renew makes one attempt.
func (r *Renewal) Renew(ctx context.Context) error { return r.renew(ctx) }

// StoreHalf is storeCredential that dies when the key is replaced and the certificate is
// not, or even before that.
func StoreHalf(dir string, next []byte, key []byte) error {
	if err := replaceFile(dir+"/"+nextCertFile, next, 0o644); err != nil || key == nil {
		return err
	}
	return replaceFile(dir+"/"+keyFile, key, 0o600)
}
