package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/registers"
)

// Plain keys live in buffers of ours, which are wiped. But whatever the garbage collector
// has freed keeps its bytes until the memory is used for something else, and an answer
// passes through buffers of the standard library that nobody can reach. So the collector
// overwrites what it frees (clobberFree), it is made to run soon after keys were handed out
// (sweeper), over HTTP/1.1 an answer goes from its handler's buffer to TLS, which encrypts
// it (past), and over HTTP/2 it is overwritten where it has been: in net/http's buffers of
// the response and the connection by what follows it (saedoor.Exchange.Write), in that
// between them and TLS by us (wiping). hsm/README.md has what is still found.

const (
	sweepEvery = 2 * time.Second
	sweeps     = 3 // after the last answer
	// collections of the last sweep, one at once after the other. The buffers that the
	// standard library shares out (sync.Pool) are given up by the second collection in
	// which nobody has used them: those of HTTP/2 are the peers' and operators' too, who
	// ask every second, write a few bytes over the start of an answer with keys, and have
	// the rest of it live on.
	atOnce = 3
)

// sweeper runs the garbage collector while keys are handed out and a little beyond.
type sweeper struct {
	left atomic.Int32
}

// watch notes each request of a handler that answers with keys.
func (s *sweeper) watch(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer s.left.Store(sweeps)
		c, _ := r.Context().Value(connKey{}).(*wipingConn) // nil: another listener's
		h.ServeHTTP(past{w, c}, r)
	})
}

// past has bodies whose length was said before go past net/http's buffers, where the
// connection can do that (wipingConn): those of HTTP/1.1 are shared by all connections, and
// would keep an answer until another one happens to be written over it.
type past struct {
	http.ResponseWriter
	conn *wipingConn // nil: it cannot do that
}

// Write sends b, behind the header and together with it.
func (w past) Write(b []byte) (int, error) {
	to, ok := w.ResponseWriter.(io.ReaderFrom) // not that of HTTP/2
	if !ok || w.Header().Get("Content-Length") == "" {
		return w.ResponseWriter.Write(b)
	}
	w.conn.hold()
	n, err := int64(0), http.NewResponseController(w.ResponseWriter).Flush()
	if err == nil {
		n, err = to.ReadFrom(bytes.NewReader(b))
	}
	return int(n), cmp.Or(err, w.conn.release())
}

// Unwrap serves http.ResponseController.
func (w past) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// connection notes the end of a connection: its buffers, with the last answers that it
// carried, are garbage from then on.
func (s *sweeper) connection(_ net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		s.left.Store(sweeps)
	}
}

// wiping is the listener of a door that answers with keys: its connections wipe what went
// through net/http's write buffers, and take a body of HTTP/1.1 past them (past). net/http
// gives the write buffer of a connection that has ended (of HTTP/2: after each write) to
// another one, of any server of the process, which keeps it: the rest of an old answer,
// behind the short ones of an operator who looks at alarms.
//
// net/http speaks HTTP/2 over TLS on a *tls.Conn only. On these it does so as if there were
// no TLS below (behindTLS). What is spoken is what the connection begins with: what was
// agreed on in the handshake, or the client has it its own way.
type wiping struct{ net.Listener }

// Accept returns the next connection.
func (l wiping) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &wipingConn{conn: c.(*tls.Conn)}, nil
}

// wipingConn has of a *tls.Conn what net/http may see of it.
type wipingConn struct {
	conn
	state *tls.ConnectionState // which requests see: see behindTLS

	// Of HTTP/1.1, whose handler is the only one that writes while it runs: a header that
	// waits for the body, so that an answer is one write, one packet and one read.
	holding bool
	held    []byte
}

type conn interface {
	net.Conn
	CloseWrite() error
	NetConn() net.Conn
}

// httpBuffer is the size in bytes of net/http's write buffers of a connection. What is
// longer comes from a handler's own buffer, around them, or is a frame of HTTP/2 that is
// too long for them.
const httpBuffer = 4 << 10

// hold has Write keep what it is given until more follows (ReadFrom), or release.
func (c *wipingConn) hold() {
	if c != nil {
		c.holding = true
	}
}

// release sends what is held, if nothing has followed.
func (c *wipingConn) release() error {
	if c == nil || !c.holding {
		return nil
	}
	c.holding = false
	if len(c.held) == 0 {
		return nil
	}
	_, err := c.conn.Write(c.held)
	c.held = c.held[:0]
	return err
}

// Write sends b and wipes it, if it is net/http's.
func (c *wipingConn) Write(b []byte) (n int, err error) {
	defer registers.Clear() // net/http and TLS have copied it
	if c.holding {
		c.held, n = append(c.held, b...), len(b)
	} else {
		n, err = c.conn.Write(b)
	}
	if len(b) <= httpBuffer {
		clear(b)
	}
	return n, err
}

// ReadFrom sends what is in src, behind what is held. net/http calls it with a body that it
// need not see, and bytes.Reader writes its own bytes.
func (c *wipingConn) ReadFrom(src io.Reader) (int64, error) {
	defer registers.Clear()
	return io.Copy(behind{c}, src)
}

// behind sends bytes of a handler.
type behind struct{ c *wipingConn }

// Write sends b, and leaves no copy of it.
func (w behind) Write(b []byte) (int, error) {
	head := len(w.c.held)
	if head == 0 {
		return w.c.conn.Write(b)
	}
	all := append(append(make([]byte, 0, head+len(b)), w.c.held...), b...)
	defer clear(all)
	w.c.held = w.c.held[:0]
	n, err := w.c.conn.Write(all)
	return max(0, n-head), err
}

// connKey is the key of a connection, in the context of its requests.
type connKey struct{}

// behindTLS has s speak HTTP/1.1 and HTTP/2 on connections of a wiping listener, and its
// handler see the TLS of each as it would see that of others.
func behindTLS(s *http.Server) {
	s.Protocols = new(http.Protocols)
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	tell, handler := s.ConnContext, s.Handler
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		state := c.(*wipingConn).conn.(*tls.Conn).ConnectionState()
		c.(*wipingConn).state = &state
		return tell(context.WithValue(ctx, connKey{}, c), c)
	}
	s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.TLS = r.Context().Value(connKey{}).(*wipingConn).state
		handler.ServeHTTP(w, r)
	})
}

// run sweeps until ctx ends.
func (s *sweeper) run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if s.left.Load() == 0 {
			continue
		}
		runtime.GC()
		if s.left.Add(-1) > 0 {
			continue
		}
		for range atOnce - 1 {
			runtime.GC()
		}
	}
}
