package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// classical runs a classical door of km2 and returns its address and what it
// refused. stop ends it and waits.
func classical(t *testing.T, cfg *tls.Config, handle func(context.Context, identity.KME, *Stream)) (addr string, refused *[]Refusal, stop func()) {
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	refused = new([]Refusal)
	done := make(chan error, 1)
	go func() {
		done <- ServeClassical(ctx, ln, ClassicalConfig{
			Shake: shaking(cfg), Identify: judge(t), Handle: handle, Log: quiet(), Changed: func() <-chan struct{} { return nil },
			Refused: func(_ context.Context, c identity.Caller, r Refusal) {
				if c.Remote() == "" || c.Certificate().Serial == "" {
					t.Error("a refusal without its caller's facts")
				}
				*refused = append(*refused, r)
			},
		})
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return ln.Addr().String(), refused, stop
}

// shaking makes handshakes one after the other, as cfg says, and drops those that fail.
func shaking(cfg *tls.Config) func(net.Listener) net.Listener {
	cfg = cfg.Clone()
	cfg.NextProtos = []string{ClassicalProtocol}
	return func(ln net.Listener) net.Listener { return shaken{ln, cfg} }
}

type shaken struct {
	net.Listener
	cfg *tls.Config
}

func (l shaken) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		conn := tls.Server(raw, l.cfg)
		if conn.Handshake() == nil {
			return conn, nil
		}
		_ = raw.Close()
	}
}

func echo(_ context.Context, _ identity.KME, s *Stream) {
	for {
		kind, body, err := s.Recv()
		if err != nil {
			return
		}
		if s.Send(kind, body) != nil {
			return
		}
	}
}

func TestStreamOverTLS(t *testing.T) {
	ca := newAuthority(t)
	var who identity.KME
	addr, _, stop := classical(t, ca.server(ca.issue(t, "kme", "km2")), func(ctx context.Context, from identity.KME, s *Stream) {
		who = from
		echo(ctx, from, s)
	})
	s, err := DialClassical(within(t, time.Minute), []string{addr}, ca.client(ca.issue(t, "kme", "km1")), letIn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	sent := [][]byte{nil, {0}, bytes.Repeat([]byte{7}, 100_000), bytes.Repeat([]byte{9}, MaxFrame-1)}
	parts := func(b []byte) [][]byte { return [][]byte{b[:len(b)/5], nil, b[len(b)/5:]} }
	var sending sync.WaitGroup
	sending.Go(func() {
		for i, b := range sent {
			if err := s.Send(byte(i*80), parts(b)...); err != nil {
				t.Error(err)
			}
		}
	})
	for i, want := range sent {
		kind, body, err := s.Recv()
		if err != nil || kind != byte(i*80) || !bytes.Equal(body, want) {
			t.Fatalf("frame %d: kind %d, %d bytes, %v", i, kind, len(body), err)
		}
	}
	sending.Wait()
	if err := s.Send(1, make([]byte, MaxFrame-1), []byte{1}); err == nil || !strings.Contains(err.Error(), "are more than") { // of ours: nothing went out
		t.Errorf("a frame that is too long: %v", err)
	}
	stop() // closes the stream at the door's end
	if _, _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("Recv after the other end closed: %v", err)
	}
	if who != mustKME(t, "km1") {
		t.Errorf("from %v, want km1", who)
	}
}

// TestStreamOfNobody: a stream is closed when its certificate names nobody any more, and
// not when something else has changed.
func TestStreamOfNobody(t *testing.T) {
	ca := newAuthority(t)
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	var changed atomic.Pointer[chan struct{}]
	change := func() {
		next := make(chan struct{})
		if before := changed.Swap(&next); before != nil {
			close(*before)
		}
	}
	change()
	var revoked atomic.Bool
	known := judge(t)
	done, over := make(chan error, 1), make(chan error, 1)
	go func() {
		done <- ServeClassical(ctx, ln, ClassicalConfig{
			Shake: shaking(ca.server(ca.issue(t, "kme", "km2"))), Log: quiet(), Refused: func(context.Context, identity.Caller, Refusal) {},
			Changed: func() <-chan struct{} { return *changed.Load() },
			Identify: func(s tls.ConnectionState) (identity.Caller, error) {
				if revoked.Load() {
					return identity.Caller{}, errors.New("revoked")
				}
				return known(s)
			},
			Handle: func(ctx context.Context, from identity.KME, s *Stream) {
				echo(ctx, from, s)
				_, _, err := s.Recv()
				over <- err
			},
		})
	}()
	s, err := DialClassical(within(t, time.Minute), []string{ln.Addr().String()}, ca.client(ca.issue(t, "kme", "km1")), letIn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	change()
	if err := s.Send(1, []byte("still there?")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Recv(); err != nil {
		t.Fatalf("closed by a change that was not about it: %v", err)
	}
	revoked.Store(true)
	change()
	if _, _, err := s.Recv(); err == nil {
		t.Error("a stream of a revoked certificate goes on")
	}
	if err := <-over; err == nil {
		t.Error("its handler goes on")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestClassicalRefuses(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	addr, refused, stop := classical(t, ca.server(ca.issue(t, "kme", "km2")), func(context.Context, identity.KME, *Stream) {
		t.Error("a stranger was let in")
	})
	// expectEnd dials, and reads until the door has closed.
	expectEnd := func(name string, cfg *tls.Config) {
		s, err := DialClassical(within(t, time.Minute), []string{addr}, cfg, letIn)
		if err != nil {
			return
		}
		if _, _, err := s.Recv(); err == nil {
			t.Errorf("%s: a frame came", name)
		}
		_ = s.Close()
	}
	expectEnd("an SAE", ca.client(ca.issue(t, "sae", "alice")))
	expectEnd("an unknown KME", ca.client(ca.issue(t, "kme", "km9")))
	foreign := ca.client(other.issue(t, "kme", "km1"))
	expectEnd("another CA", foreign)
	if c, err := tls.Dial("tcp", addr, ca.client(ca.issue(t, "kme", "km1"))); err == nil { // no ALPN: perhaps HTTP
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a connection without our protocol was answered")
		}
		_ = c.Close()
	}
	stop()
	if len(*refused) != 2 {
		t.Errorf("%d refusals recorded, want 2: %v", len(*refused), *refused)
	}
}

// TestBeats: two ends that have nothing to say for an hour do not lose each other,
// even when one of them is not reading.
func TestBeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		defer func() { _, _ = a.Close(), b.Close() }()
		got := make(chan error, 1)
		go func() {
			_, _, err := b.Recv()
			got <- err
		}()
		go func() { _, _, _ = a.Recv() }()
		<-time.After(time.Hour)
		if err := a.Send(1, nil); err != nil {
			t.Error(err)
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
}

func TestSilentPeerIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, other := net.Pipe()
		defer func() { _ = other.Close() }()
		go func() { _, _ = io.Copy(io.Discard, other) }() // takes everything and says nothing
		s := NewStream(conn, nil)
		defer func() { _ = s.Close() }()
		start := time.Now()
		_, _, err := s.Recv()
		if !errors.Is(err, ErrSilent) || time.Since(start) != silence {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	})
}

// TestPromisedFrame: who promises the longest frame has memory made for what he sends, or for
// four times as much.
func TestPromisedFrame(t *testing.T) {
	t.Parallel()
	for _, sent := range []int{0, 1, piece, 3 * piece, 1 << 20} {
		wire := append(binary.BigEndian.AppendUint32(nil, MaxFrame), make([]byte, 1+sent)...)
		in := &asked{Reader: bytes.NewReader(wire)}
		if _, _, err := readFrame(in, MaxFrame); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v", sent, err)
		}
		if in.most > max(piece, 4*sent) {
			t.Errorf("of %d bytes there was room for %d at a time", sent, in.most)
		}
	}
}

// asked notes for how many bytes there was room.
type asked struct {
	io.Reader
	most int
}

func (a *asked) Read(b []byte) (int, error) {
	a.most = max(a.most, len(b))
	return a.Reader.Read(b)
}

func TestStalledPeerIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, other := net.Pipe() // nobody reads at the other end
		defer func() { _ = other.Close() }()
		s := NewStream(conn, nil)
		defer func() { _ = s.Close() }()
		start := time.Now()
		if err := s.Send(1, []byte("x")); !errors.Is(err, ErrSilent) || time.Since(start) != stall {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	})
}

// TestSlowPeerIsNotSilent: a long frame may take any time as long as it moves.
func TestSlowPeerIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		slow := &throttled{a.conn}
		a.conn = slow
		defer func() { _, _ = a.Close(), b.Close() }()
		body := bytes.Repeat([]byte{5}, 1<<20)
		go func() { _ = a.Send(2, body) }()
		start := time.Now()
		_, got, err := b.Recv()
		if err != nil || !bytes.Equal(got, body) || time.Since(start) < silence {
			t.Errorf("after %v: %d bytes, %v", time.Since(start), len(got), err)
		}
	})
}

// throttled waits before each write.
type throttled struct{ net.Conn }

func (c *throttled) Write(b []byte) (int, error) {
	<-time.After(2 * time.Second)
	return c.Conn.Write(b)
}

func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		defer func() { _, _ = a.Close(), b.Close() }()
		go func() { _, _, _ = b.Recv() }()
		start := time.Now()
		if err := a.SetDeadline(start.Add(time.Minute)); err != nil { // beyond silence: beats keep it alive until then
			t.Fatal(err)
		}
		if _, _, err := a.Recv(); !isDeadline(err) || time.Since(start) != time.Minute {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	})
}

func TestCloseWakesRecv(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		defer func() { _ = b.Close() }()
		got := make(chan error, 1)
		go func() {
			_, _, err := a.Recv()
			got <- err
		}()
		synctest.Wait()
		_ = a.Close()
		if err := <-got; err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		_ = a.Close()
	})
}

func pair(t *testing.T) (*Stream, *Stream) {
	t.Helper()
	x, y := net.Pipe()
	return NewStream(x, nil), NewStream(y, nil)
}
