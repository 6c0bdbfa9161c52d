package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

// Plain keys live in buffers of ours, which are wiped. But an answer also passes through
// buffers of the standard library (HTTP, TLS) that nobody can reach, and whatever the
// garbage collector has freed keeps its bytes until the memory is used for something
// else. So the collector overwrites what it frees (clobberFree), and it is made to run
// soon after keys were handed out (sweeper). That is not all of it: hsm/README.md has what
// was still found.

// clobberFree has Go's runtime overwrite memory that the garbage collector frees. It is
// read once, when a process begins: main begins again with it.
const clobberFree = "clobberfree=1"

// withClobberFree is environ with clobberFree in GODEBUG; nil if it is there, or if
// whoever has started us has said that it is not to be.
func withClobberFree(environ []string) []string {
	const name = "GODEBUG="
	for i, e := range environ {
		value, ok := strings.CutPrefix(e, name)
		if !ok {
			continue
		}
		if strings.Contains(value, "clobberfree=") {
			return nil
		}
		with := append([]string(nil), environ...)
		with[i] = name + strings.Trim(value+","+clobberFree, ",")
		return with
	}
	return append(append([]string(nil), environ...), name+clobberFree)
}

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
		h.ServeHTTP(w, r)
	})
}

// connection notes the end of a connection: its buffers, with the last answers that it
// carried, are garbage from then on.
func (s *sweeper) connection(_ net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		s.left.Store(sweeps)
	}
}

// wiping is the listener of a door that answers with keys: what a connection of HTTP/1.1
// has sent is wiped. net/http gives the write buffer of a connection that has ended to
// another one, of any server of the process, which keeps it for as long as it is open:
// the rest of an old answer, behind the short ones of an operator who looks at alarms.
// (Those of HTTP/2 go back after each write, and the sweeper has them collected.)
type wiping struct{ net.Listener }

// Accept returns the next connection.
func (l wiping) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if t, ok := c.(*tls.Conn); ok && t.ConnectionState().NegotiatedProtocol != "h2" { // for which net/http wants a *tls.Conn
		return wipingConn{t}, err
	}
	return c, err
}

type wipingConn struct{ *tls.Conn }

// httpBuffer is the size in bytes of net/http's write buffer of a connection. What is
// longer comes from a handler's own buffer, around it.
const httpBuffer = 4 << 10

// Write sends b and wipes it, if it is net/http's.
func (c wipingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if len(b) <= httpBuffer {
		clear(b)
	}
	return n, err
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
