package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/handover"
)

// fate is what a Client's error says.
type fate string

const (
	answered fate = "answered"
	notSent  fate = "not sent"
	refused  fate = "refused"
	unknown  fate = "unknown"
)

func fateOf(err error) fate {
	_, no := errors.AsType[*Refused](err)
	switch {
	case err == nil:
		return answered
	case errors.Is(err, ErrNotSent):
		return notSent
	case no:
		return refused
	}
	return unknown
}

func wantFate(t *testing.T, err error, want fate) {
	t.Helper()
	if got := fateOf(err); got != want {
		t.Errorf("%s, want %s: %v", got, want, err)
	}
}

func TestNotSent(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	s := &site{}
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
	me := ca.issue(t, "kme", "km1")

	t.Run("nobody listens", func(t *testing.T) {
		ln := listen(t)
		_ = ln.Close()
		_, err := newClient(t, ln.Addr().String(), ca.client(me)).Announce(within(t, time.Minute), anAnnounce(1))
		wantFate(t, err, notSent)
	})
	t.Run("server of another CA", func(t *testing.T) {
		cfg := ca.client(me)
		cfg.RootCAs = other.pool
		_, err := newClient(t, addr, cfg).Announce(within(t, time.Minute), anAnnounce(1))
		wantFate(t, err, notSent)
	})
	t.Run("server is not the peer", func(t *testing.T) {
		cfg := ca.client(me)
		cfg.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not km2") }
		_, err := newClient(t, addr, cfg).Announce(within(t, time.Minute), anAnnounce(1))
		wantFate(t, err, notSent)
	})
	t.Run("server has another name", func(t *testing.T) {
		_, port, _ := net.SplitHostPort(addr)
		cfg := ca.client(me)
		cfg.ServerName = "km2.example"
		_, err := newClient(t, "127.0.0.1:"+port, cfg).Announce(within(t, time.Minute), anAnnounce(1))
		wantFate(t, err, notSent)
	})
	t.Run("no handshake in time", func(t *testing.T) {
		ln := listen(t) // connects, by the kernel's backlog, and says nothing
		defer func() { _ = ln.Close() }()
		_, err := newClient(t, ln.Addr().String(), ca.client(me)).Announce(within(t, 50*time.Millisecond), anAnnounce(1))
		wantFate(t, err, notSent)
	})
	t.Run("time over before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := newClient(t, addr, ca.client(me)).Announce(ctx, anAnnounce(1))
		wantFate(t, err, notSent)
	})
	t.Run("malformed by ourselves", func(t *testing.T) {
		_, err := newClient(t, addr, ca.client(me)).Announce(within(t, time.Minute), handover.Announce{})
		wantFate(t, err, notSent)
	})
	if len(s.asked) != 0 {
		t.Errorf("the peer was asked %v", s.asked)
	}
}

// TestUnknown: whatever happens after the first byte leaves the outcome unknown,
// and the message is not repeated behind our back.
func TestUnknown(t *testing.T) {
	ca := newAuthority(t)
	var seen atomic.Int64
	var behave atomic.Value
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		seen.Add(1)
		behave.Load().(func(http.ResponseWriter, *http.Request))(w, r)
	}))
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	for name, b := range map[string]func(http.ResponseWriter, *http.Request){
		"no answer in time": hang,
		"connection closed": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"half an answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, `{"standing":`)
		},
		"another site": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		"server error": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) },
		"no content":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) },
		"not JSON":     func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "sure") },
		"too long":     func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat(" ", maxBody+1)) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, addr, ca.client(ca.issue(t, "kme", "km1")))
			behave.Store(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"standing":"ahead"}`) })
			if _, err := c.Announce(within(t, time.Minute), anAnnounce(1)); err != nil { // so that the next uses a kept connection
				t.Fatal(err)
			}
			behave.Store(b)
			before := seen.Load()
			ctx := within(t, time.Minute)
			if name == "no answer in time" {
				ctx = untilSeen(t, func() bool { return seen.Load() > before })
			}
			_, err := c.Announce(ctx, anAnnounce(2))
			wantFate(t, err, unknown)
			if n := seen.Load() - before; n != 1 {
				t.Errorf("the peer saw it %d times", n)
			}
		})
	}
}

// proxy passes bytes on until each connection's budget is spent, then cuts it. A
// budget below 0 is endless; deaf makes it swallow what the peer says instead.
type proxy struct {
	ln     net.Listener
	target string
	budget func() (int64, bool) // bytes, and whether they are those to the server
	deaf   atomic.Bool
	wg     sync.WaitGroup
	mu     sync.Mutex
	conns  []net.Conn
}

func newProxy(t *testing.T, target string, budget func() (int64, bool)) *proxy {
	p := &proxy{ln: listen(t), target: target, budget: budget}
	p.wg.Go(func() {
		for {
			c, err := p.ln.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.pass(c) })
		}
	})
	t.Cleanup(func() {
		_ = p.ln.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}

func (p *proxy) pass(client net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		_ = client.Close()
		return
	}
	p.mu.Lock()
	p.conns = append(p.conns, client, server)
	p.mu.Unlock()
	n, up := p.budget()
	shut := func() { _ = client.Close(); _ = server.Close() }
	copyN := func(dst io.Writer, src io.Reader, mine bool) {
		defer shut()
		if n >= 0 && mine {
			src = io.LimitReader(src, n)
		}
		_, _ = io.Copy(dst, src)
	}
	p.wg.Go(func() {
		copyN(client, reader(func(b []byte) (int, error) {
			n, err := server.Read(b)
			if p.deaf.Load() {
				n = 0
			}
			return n, err
		}), !up)
	})
	copyN(server, client, up)
}

type reader func([]byte) (int, error)

func (r reader) Read(b []byte) (int, error) { return r(b) }

// TestFateUnderCuts cuts connections anywhere, handshakes included, and holds the
// Client's word against what the peer saw, by one way to it or by several.
func TestFateUnderCuts(t *testing.T) {
	for _, ways := range []int{1, 3} {
		t.Run(fmt.Sprint(ways), func(t *testing.T) { fateUnderCuts(t, ways) })
	}
}

func fateUnderCuts(t *testing.T, ways int) {
	ca := newAuthority(t)
	s := &site{answer: handover.AnnounceAnswer{Standing: handover.Fresh, Results: []handover.Result{{ID: "r-1", Accepted: true}}}}
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(1, 2))
	addresses := make([]string, ways)
	for i := range addresses {
		addresses[i] = newProxy(t, addr, func() (int64, bool) {
			mu.Lock()
			defer mu.Unlock()
			return rnd.Int64N(9000 / int64(ways)), rnd.Int64N(2) == 0
		}).ln.Addr().String()
	}
	c := newClientOf(t, ca.client(ca.issue(t, "kme", "km1")), addresses...)
	got := map[fate]int{}
	for b := range int64(400) {
		_, err := c.Announce(within(t, time.Minute), anAnnounce(b+1))
		f := fateOf(err)
		got[f]++
		n := s.count(b + 1)
		if n > 1 || f == answered && n != 1 || f == notSent && n != 0 || f == refused {
			t.Fatalf("batch %d: the Client says %s (%v), the peer saw it %d times", b+1, f, err, n)
		}
	}
	for b, n := range s.copies {
		if n > 1 {
			t.Errorf("the peer saw batch %d %d times", b, n)
		}
	}
	t.Logf("fates: %v", got)
	if got[answered] == 0 || got[notSent] == 0 || got[unknown] == 0 {
		t.Errorf("the cuts were not varied enough: %v", got)
	}
}

// TestDeadKeptConnections: connections that were kept and whose other end is gone
// cost neither a wrong word nor a failed call.
func TestDeadKeptConnections(t *testing.T) {
	ca := newAuthority(t)
	s := &site{answer: handover.AnnounceAnswer{Standing: handover.Ahead}}
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
	p := newProxy(t, addr, func() (int64, bool) { return -1, true })
	c := newClient(t, p.ln.Addr().String(), ca.client(ca.issue(t, "kme", "km1")))
	for round := range int64(20) {
		var calls sync.WaitGroup
		for i := range int64(4) {
			calls.Go(func() {
				batch := 1 + round*4 + i
				_, err := c.Announce(within(t, time.Minute), anAnnounce(batch))
				if f, n := fateOf(err), s.count(batch); n > 1 || f == answered && n != 1 || f == notSent && n != 0 {
					t.Errorf("batch %d: %s (%v), seen %d times", batch, f, err, n)
				}
			})
		}
		calls.Wait()
		p.cut()
	}
}

// TestHalfOpenPeer: a peer that swallows everything costs one call its deadline;
// the other kept connections to it are given up with it.
func TestHalfOpenPeer(t *testing.T) {
	ca := newAuthority(t)
	s := &site{answer: handover.AnnounceAnswer{Standing: handover.Ahead}}
	const kept = 4 // connections, each of which has carried a message and rests
	var inside atomic.Int64
	all, rests := make(chan struct{}), make(chan error, kept)
	handler := Handler(s, identifyHTTP(t), quiet())
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if inside.Add(1) == kept {
			close(all)
		}
		<-all
		handler.ServeHTTP(w, r)
	}))
	p := newProxy(t, addr, func() (int64, bool) { return -1, true })
	c := newClient(t, p.ln.Addr().String(), ca.client(ca.issue(t, "kme", "km1")))
	resting := httptrace.WithClientTrace(within(t, time.Minute), &httptrace.ClientTrace{PutIdleConn: func(err error) { rests <- err }})
	for i := range int64(kept) {
		go func() { _, _ = c.Announce(resting, anAnnounce(i+1)) }()
	}
	for range kept {
		select {
		case err := <-rests:
			if err != nil {
				t.Fatal(err)
			}
		case <-resting.Done():
			t.Fatal(resting.Err())
		}
	}
	p.deaf.Store(true)
	_, err := c.Announce(untilSeen(t, func() bool { return s.count(10) > 0 }), anAnnounce(10))
	wantFate(t, err, unknown)
	_, err = c.Announce(within(t, 100*time.Millisecond), anAnnounce(11)) // a new connection, on which no handshake ends
	wantFate(t, err, notSent)
	p.deaf.Store(false)
	_, err = c.Announce(within(t, time.Minute), anAnnounce(10))
	wantFate(t, err, answered)
	if n := s.count(10); n != 2 {
		t.Errorf("the peer saw batch 10 %d times, want the unknown one and the repeat", n)
	}
}

// broken is a connection whose writes fail after n more bytes.
type broken struct {
	net.Conn
	n int
}

func (b *broken) Write(p []byte) (int, error) {
	n := min(b.n, len(p))
	b.n -= n
	if n < len(p) {
		return n, errors.New("broken pipe")
	}
	return n, nil
}

func (b *broken) Read([]byte) (int, error) { return 0, io.EOF }
func (b *broken) Close() error             { return nil }

// TestConnKnowsWhatLeft looks at the one place that ErrNotSent rests on.
func TestConnKnowsWhatLeft(t *testing.T) {
	ca := newAuthority(t)
	ln := listen(t)
	defer func() { _ = ln.Close() }()
	server := tls.NewListener(ln, ca.server(ca.issue(t, "kme", "km2")))
	var wg sync.WaitGroup
	defer wg.Wait()
	dial := func(t *testing.T) *conn {
		wg.Go(func() {
			s, err := server.Accept()
			if err != nil {
				return
			}
			_, _ = bufio.NewReader(s).ReadByte()
			_ = s.Close()
		})
		c, err := dialTLS(t.Context(), ln.Addr().String(), ca.client(ca.issue(t, "kme", "km1")), "http/1.1")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	for _, tc := range []struct {
		takes  int // bytes that the kernel takes before it fails
		unsent bool
	}{{0, true}, {1, false}, {20, false}} {
		t.Run(fmt.Sprint(tc.takes), func(t *testing.T) {
			c := dial(t)
			real := c.raw.Conn
			defer func() { _ = real.Close() }()
			c.begin()
			c.raw.Conn = &broken{Conn: real, n: tc.takes}
			if _, err := c.Write([]byte("POST")); err == nil {
				t.Fatal("the write did not fail")
			}
			if got := c.cutOff(); got != tc.unsent {
				t.Errorf("unsent %v, want %v", got, tc.unsent)
			}
		})
	}
	t.Run("cut", func(t *testing.T) {
		c := dial(t)
		c.begin()
		if !c.cutOff() {
			t.Error("a request without a write was sent")
		}
		before := c.raw.sent.Load()
		if _, err := c.Write([]byte("POST")); err == nil || c.raw.sent.Load() != before {
			t.Errorf("a byte left after the cut: %v", err)
		}
	})
}
