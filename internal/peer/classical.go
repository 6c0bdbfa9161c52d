package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/deadpeer"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// ClassicalProtocol is the ALPN name of a Stream, which the TLS of a classical door offers
// alone.
const ClassicalProtocol = "kme-classical/1"

// maxStreams is how many streams of one peer are open at a time, of all its links and
// nodes: what is beyond is turned away, so that a peer takes no place from another.
const maxStreams = 64

// DialClassical opens a Stream to the classical door at the first of addresses
// (host:port, one for each of the peer's nodes) that answers. cfg has our
// certificate and must accept the peer's KME alone. still is asked while the Stream is open
// whether the certificate that the peer has shown is still let in, and else ends it.
func DialClassical(ctx context.Context, addresses []string, cfg *tls.Config, still func(leaf *x509.Certificate) error) (*Stream, error) {
	var errs []error
	for _, address := range addresses {
		c, err := dialTLS(ctx, address, cfg, ClassicalProtocol)
		if err == nil {
			return NewStream(c.Conn, func() error { return still(c.leaf()) }), nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// ClassicalConfig is what a classical door needs. All fields must be set.
type ClassicalConfig struct {
	// Shake makes the TLS handshakes of a listener's connections, in which the other side must
	// show a certificate of the KME CA: those of the listener that it returns are *tls.Conn.
	Shake    func(net.Listener) net.Listener
	Identify func(tls.ConnectionState) (identity.Caller, error)
	// Changed is closed when Identify may answer otherwise: it is asked again then, and a
	// stream of nobody any more is closed.
	Changed func() <-chan struct{}
	// Handle works with one stream, which is closed when it returns. It must
	// return soon after ctx ends.
	Handle func(ctx context.Context, from identity.KME, s *Stream)
	// Refused is told of each stream turned away after TLS. It records one event.
	Refused func(ctx context.Context, c identity.Caller, r Refusal)
	Log     *slog.Logger
}

// ServeClassical accepts streams on ln until ctx ends; then it closes ln and every
// stream, waits for the handlers and returns nil. It returns an error if ln fails.
func ServeClassical(ctx context.Context, ln net.Listener, c ClassicalConfig) error {
	ctx, cancel := context.WithCancel(ctx)
	ln = c.Shake(watchful{ln})
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	var streams sync.WaitGroup
	defer func() {
		stop()
		_ = ln.Close() // which waits, also if it is being closed
		cancel()
		streams.Wait()
	}()
	open := places{of: make(map[identity.KME]int)}
	for pause := time.Duration(0); ; {
		raw, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accepting a classical stream: %w", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			c.Log.WarnContext(ctx, "accepting a classical stream", "err", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		pause = 0
		streams.Go(func() { c.serve(ctx, raw.(*tls.Conn), &open) })
	}
}

// places counts the open streams of each peer.
type places struct {
	mu sync.Mutex
	of map[identity.KME]int
}

// enter takes a place for a stream of a peer, or says that it has too many.
func (p *places) enter(from identity.KME) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.of[from] == maxStreams {
		return false
	}
	p.of[from]++
	return true
}

func (p *places) leave(from identity.KME) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.of[from]--
}

// watchful is a listener whose connections notice an end that has gone without a word.
type watchful struct{ net.Listener }

func (l watchful) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	deadpeer.Notice(raw)
	return raw, err
}

// serve takes one connection to its end.
func (c ClassicalConfig) serve(ctx context.Context, conn *tls.Conn, open *places) {
	defer func() { _ = conn.Close() }()
	log := c.Log.With("remote", conn.RemoteAddr().String())
	state := conn.ConnectionState()
	changed := c.Changed()
	if state.NegotiatedProtocol != ClassicalProtocol {
		log.WarnContext(ctx, "stream without the classical protocol")
		return
	}
	caller, err := c.Identify(state)
	caller = caller.WithRemote(conn.RemoteAddr().String())
	from, ok := caller.KME()
	if err == nil && !ok {
		err = fmt.Errorf("role %q is no KME", caller.Role())
	}
	if err != nil {
		log.WarnContext(ctx, "stream refused", "err", err)
		c.Refused(ctx, caller, Refusal{Route: "classical", Err: err})
		return
	}
	if !open.enter(from) {
		c.Refused(ctx, caller, Refusal{Route: "classical", Err: problem.Because(problem.Unavailable, ErrTooMany)})
		return
	}
	defer open.leave(from)
	s := NewStream(conn, nil)
	defer func() { _ = s.Close() }()
	ctx, done := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer done()
	watch.Go(func() {
		defer func() { _ = s.Close() }()
		tick := time.NewTicker(time.Second) // a certificate ends by itself, and who is let in changes beside the CRLs
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			case <-tick.C:
			}
			changed = c.Changed()
			if _, err := c.Identify(state); err != nil {
				log.WarnContext(ctx, "stream closed", "err", err)
				return
			}
		}
	})
	c.Handle(ctx, from, s)
}
