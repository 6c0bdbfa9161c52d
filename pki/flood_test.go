package pki_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

// from has a client connect from an address of its own.
func from(c *http.Client, address string) *http.Client {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	c.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, to string) (net.Conn, error) {
		return dialer.DialContext(ctx, "tcp4", to)
	}
	return c
}

// hears says whether a connection from an address is answered. It may be gone before the
// dialler knows that it was there.
func (d *door) hears(address string) bool {
	raw, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).Dial("tcp4", d.address())
	if err != nil {
		return !errors.Is(err, syscall.ECONNRESET)
	}
	defer raw.Close()
	_, err = raw.Read(make([]byte, 1))
	return err == nil
}

// TestFlood: from where too many handshakes fail nothing new is taken, and that is on
// record; what is open goes on, and so do others. When time has passed, the next one is
// heard again.
func TestFlood(t *testing.T) {
	t.Parallel()
	const bad, burst = "127.0.0.9", 5
	d := newDoor(t, pki.Limits{Handshakes: 64, HandshakesPerNetwork: 64, Connections: 64, Failures: 1, FailureBurst: burst})
	d.stop()
	alice, km1 := d.alice(), mint(t, d.ca, "kme", "km1", nil)
	open := from(d.client(alice), bad)
	d.want(open, http.StatusOK)
	refused := int64(0)
	fails := func(c *http.Client) {
		t.Helper()
		if status, err := d.ask(c); err == nil {
			t.Errorf("let in: %d", status)
		}
		refused++
		d.until("it is counted", func() bool { return d.refusals.Refused() == refused })
	}
	for range burst {
		fails(from(d.client(km1), bad))
	}
	d.record("within the burst", "handshake unknown-ca 5")

	fails(from(d.client(alice), bad))
	if d.hears(bad) {
		t.Error("it is heard")
	}
	refused++
	d.until("it is counted", func() bool { return d.refusals.Refused() == refused })
	d.refusals.Flush(t.Context())
	d.mu.Lock()
	if len(d.recorded) != 1 || d.recorded[0].Network != bad+"/32" || d.recorded[0].Count != 2 || d.recorded[0].Remote == "" {
		t.Errorf("on record: %+v, want two of %s", d.recorded, bad)
	}
	d.mu.Unlock()
	d.record("beyond the burst", "handshake flood 2")

	d.want(open, http.StatusOK) // on the connection that it has: it would get no other
	d.want(d.client(alice), http.StatusOK)

	d.later.Add(int64(time.Second))
	for range 2 * burst { // which succeed, and cost nothing
		d.want(from(d.client(alice), bad), http.StatusOK)
	}
	fails(from(d.client(km1), bad))
	fails(from(d.client(alice), bad))
	d.record("after a second", "handshake flood 1, handshake unknown-ca 1")
	d.want(open, http.StatusOK)
}

// pipes is a listener whose connections are in memory, from addresses as they please.
type pipes struct {
	come   chan net.Conn
	closed chan struct{}
	close  func()
}

func newPipes() *pipes {
	p := &pipes{come: make(chan net.Conn), closed: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.closed) })
	return p
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.come:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.close(); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(address string) net.Conn {
	here, there := net.Pipe()
	p.come <- cameFrom{there, &net.TCPAddr{IP: net.ParseIP(address), Port: 1}}
	return here
}

type cameFrom struct {
	net.Conn
	remote net.Addr
}

func (c cameFrom) RemoteAddr() net.Addr { return c.remote }

// TestFloodInTime: which networks are kept out, and for how long; and that those who wait
// for the gate in vain are not to blame.
func TestFloodInTime(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	roots := pool(t, filepath.Join(d.ca, "root.pem"))
	alice, km1 := load(t, d.alice()), load(t, mint(t, d.ca, "kme", "km1", nil))
	outside := time.Now()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		now := func() time.Time { return outside.Add(time.Since(began)) }
		reasons := make(map[string]int)
		refusals := &pki.Refusals{Record: func(_ context.Context, rs []pki.Refusal) error {
			for _, r := range rs {
				reasons[r.Reason+" "+r.Network] += r.Count
			}
			return nil
		}}
		gate := pki.NewGate(pki.GateConfig{
			Door: "sae", Credential: d.credential, Issuers: d.issuers, Revocations: d.revoked, Refusals: refusals, Now: now, Log: quiet,
			Judge: func(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
				return d.people.Load().Judge("sae", leaf, now)
			},
			Limits: pki.Limits{Handshakes: 64, HandshakesPerNetwork: 64, HandshakesAtWork: 1, Connections: 64, Failures: 1, FailureBurst: 3},
		})
		way := newPipes()
		ln := gate.Listen(way)
		defer ln.Close()
		go func() { // who is let in is told so
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Write([]byte{1})
				_ = conn.Close()
			}
		}()
		enters := func(c *pki.Credential, address string) bool {
			raw := way.dial(address)
			defer raw.Close()
			cfg := pki.ClientTLS(c, roots, nil)
			cfg.ServerName, cfg.Time = "localhost", now
			n, _ := tls.Client(raw, cfg).Read(make([]byte, 1))
			return n == 1
		}
		want := func(c *pki.Credential, address string, in bool, when string) {
			t.Helper()
			if enters(c, address) != in {
				t.Errorf("%s, from %s: let in is %v", when, address, !in)
			}
			synctest.Wait() // until it is counted
		}
		for range 3 {
			want(km1, "2001:db8::1", false, "of another CA")
			want(km1, "203.0.113.1", false, "of another CA")
		}
		want(alice, "2001:db8::2", false, "of the /64 that failed")
		want(alice, "203.0.113.1", false, "of the address that failed")
		want(alice, "2001:db8:0:1::1", true, "of another /64")
		want(alice, "192.0.2.1", true, "of another network")
		<-time.After(time.Second)
		want(alice, "2001:db8::2", true, "when there is a token again")

		release := gate.Occupy()
		var waiting sync.WaitGroup
		for range 4 {
			waiting.Go(func() {
				if enters(alice, "198.51.100.1") {
					t.Error("let in without a turn")
				}
			})
		}
		waiting.Wait()
		synctest.Wait() // until it is counted
		release()
		want(alice, "198.51.100.1", true, "of where four had no turn")

		refusals.Flush(t.Context())
		if diff := cmp.Diff(map[string]int{"unknown-ca ": 6, "flood 2001:db8::/64": 1, "flood 203.0.113.1/32": 1, "busy ": 4}, reasons); diff != "" {
			t.Errorf("on record (-want +got):\n%s", diff)
		}
	})
}

// TestHandshakesAtWork: who has said half of its handshake and no more keeps nobody waiting.
func TestHandshakesAtWork(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{Handshakes: 64, HandshakesPerNetwork: 64, HandshakesAtWork: 1, Connections: 64})
	for range 3 {
		raw, err := net.Dial("tcp", d.address())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		// It says its ClientHello, is answered, and says no more.
		silent := tls.Client(&oneWord{Conn: raw}, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
		if err := silent.Handshake(); !errors.Is(err, errSilent) {
			t.Fatal(err)
		}
	}
	if n := d.gate.Shaking(); n != 3 {
		t.Errorf("%d handshakes are under way, want 3", n)
	}
	d.want(d.client(d.alice()), http.StatusOK)
}

// oneWord is a connection to which one thing can be said.
type oneWord struct {
	net.Conn
	said bool
}

var errSilent = errors.New("nothing more is said")

func (c *oneWord) Write(b []byte) (int, error) {
	if c.said {
		return 0, errSilent
	}
	c.said = true
	return c.Conn.Write(b)
}
