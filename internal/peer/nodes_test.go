package peer

import (
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/problem"
)

// nobody is an address at which nothing listens; mute one at which connections are
// made, by the kernel's backlog, and nothing is said.
func nobody(t *testing.T) string {
	ln := listen(t)
	_ = ln.Close()
	return ln.Addr().String()
}

func mute(t *testing.T) string {
	ln := listen(t)
	t.Cleanup(func() { _ = ln.Close() })
	return ln.Addr().String()
}

// node serves a site, as one of a peer's nodes.
func (s *site) node(t *testing.T, ca *authority) string {
	return serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
}

// TestNextNode: a call goes on from node to node as long as none of it has left, and
// later ones go to the node that answered.
func TestNextNode(t *testing.T) {
	ca := newAuthority(t)
	s := &site{answer: handover.AnnounceAnswer{Standing: handover.Ahead}}
	addresses := []string{nobody(t), mute(t), s.node(t, ca)}
	c := newClientOf(t, ca.client(ca.issue(t, "kme", "km1")), addresses...)
	for batch := range int64(3) {
		_, err := c.Announce(within(t, 6*time.Second), anAnnounce(batch+1)) // half of it for the mute one
		wantFate(t, err, answered)
		if n := s.count(batch + 1); n != 1 {
			t.Errorf("batch %d was seen %d times", batch+1, n)
		}
		if at := c.at.Load(); at != 2 {
			t.Errorf("after batch %d the client is at address %d", batch+1, at)
		}
	}
	_, err := newClientOf(t, ca.client(ca.issue(t, "kme", "km1")), nobody(t), mute(t), nobody(t)).Announce(within(t, 100*time.Millisecond), anAnnounce(9))
	wantFate(t, err, notSent)
}

// TestNodeAfterDoubt: what may have left goes to no other node within the call; the
// next call does. A refusal is the whole peer's, and a decline the node's.
func TestNodeAfterDoubt(t *testing.T) {
	ca := newAuthority(t)
	var heard atomic.Int64
	deaf := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		heard.Add(1)
		<-r.Context().Done()
	}))
	refusing, declining := &site{err: problem.New(problem.Unauthorized, "no")}, &site{answer: handover.AnnounceAnswer{Standing: handover.Declined}}
	good := &site{answer: handover.AnnounceAnswer{Standing: handover.Ahead}}
	c := newClientOf(t, ca.client(ca.issue(t, "kme", "km1")), deaf, declining.node(t, ca), good.node(t, ca))
	_, err := c.Announce(untilSeen(t, func() bool { return heard.Load() > 0 }), anAnnounce(1))
	wantFate(t, err, unknown)
	if declining.count(1)+good.count(1) != 0 {
		t.Error("a batch in doubt went on to the next node")
	}
	_, err = c.Announce(within(t, time.Minute), anAnnounce(1))
	wantFate(t, err, answered)
	if declining.count(1) != 1 || good.count(1) != 0 {
		t.Errorf("the next node was asked %d times, the one after it %d", declining.count(1), good.count(1))
	}
	_, err = c.Announce(within(t, time.Minute), anAnnounce(1))
	wantFate(t, err, answered)
	if good.count(1) != 1 {
		t.Error("after a node declined, another was not asked")
	}

	c = newClientOf(t, ca.client(ca.issue(t, "kme", "km1")), refusing.node(t, ca), good.node(t, ca))
	for range 2 {
		_, err = c.Announce(within(t, time.Minute), anAnnounce(2))
		wantFate(t, err, refused)
	}
}

// TestClassicalNextNode: the channel is opened to a node that answers.
func TestClassicalNextNode(t *testing.T) {
	ca := newAuthority(t)
	addr, _, _ := classical(t, ca.server(ca.issue(t, "kme", "km2")), echo)
	s, err := DialClassical(within(t, time.Minute), []string{nobody(t), addr}, ca.client(ca.issue(t, "kme", "km1")), letIn)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := DialClassical(within(t, time.Minute), []string{nobody(t), nobody(t)}, ca.client(ca.issue(t, "kme", "km1")), letIn); err == nil {
		t.Error("a channel to nobody")
	}
}

// TestPeerLapsed: a peer that is not let in any more hears no further message and no further
// frame, over the connections that it has; once it is let in again, it does.
func TestPeerLapsed(t *testing.T) {
	ca := newAuthority(t)
	lapsed := errors.New("revoked")
	var out atomic.Bool
	still := func(leaf *x509.Certificate) error {
		if leaf.Subject.CommonName != "km2" {
			t.Errorf("asked about %s", leaf.Subject.CommonName)
		}
		if out.Load() {
			return lapsed
		}
		return nil
	}
	site := &site{answer: handover.AnnounceAnswer{Standing: handover.Ahead}}
	c, err := NewClient(ClientConfig{Addresses: []string{site.node(t, ca)}, TLS: ca.client(ca.issue(t, "kme", "km1")), Still: still, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	addr, _, _ := classical(t, ca.server(ca.issue(t, "kme", "km2")), echo)
	s, err := DialClassical(within(t, time.Minute), []string{addr}, ca.client(ca.issue(t, "kme", "km1")), still)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if err := s.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}

	_, err = c.Announce(within(t, time.Minute), anAnnounce(1))
	wantFate(t, err, answered)
	if err := s.Send(1, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	out.Store(true)
	if _, _, err := s.Recv(); !errors.Is(err, lapsed) {
		t.Errorf("the stream ends with %v", err)
	}
	_, err = c.Announce(within(t, time.Minute), anAnnounce(2))
	wantFate(t, err, notSent)
	if !errors.Is(err, lapsed) || site.count(2) != 0 {
		t.Errorf("%v, and it was told %d times", err, site.count(2))
	}
	out.Store(false)
	_, err = c.Announce(within(t, time.Minute), anAnnounce(2))
	wantFate(t, err, answered)
}
