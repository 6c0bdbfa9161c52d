package pki

import (
	"crypto/x509"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// TestSeen: a gate knows of each certificate when a connection of it was open last, and
// forgets those that were away for the longest, and none that is there.
func TestSeen(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	judge := func(leaf *x509.Certificate, _ time.Time) (identity.Caller, error) {
		if leaf.Subject.CommonName != "" {
			return identity.Stranger(leaf), &identity.Denial{Reason: identity.NoRule}
		}
		return identity.Stranger(leaf), nil // as good as a caller: what counts is the certificate
	}
	issuers := new(Issuers)
	issuers.current.Store(new(issuerSet))
	g := NewGate(GateConfig{Limits: Limits{Connections: 2 * maxSeen}, Judge: judge, Now: func() time.Time { return now }, Credential: new(Credential), Issuers: issuers})
	enter := func(serial int64, cn string) *gateConn {
		c := &gateConn{g: g, leaf: &x509.Certificate{Raw: fmt.Append(nil, serial, cn), SerialNumber: big.NewInt(serial)}}
		c.leaf.Subject.CommonName = cn
		if err := g.admit(c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	find := func(serial string) *Seen {
		for _, s := range g.Seen() {
			if s.Certificate.Serial == serial {
				return &s
			}
		}
		return nil
	}
	first, second := enter(1, ""), enter(1, "")
	enter(2, "stranger")
	if s := find("1"); len(g.Seen()) != 1 || s == nil || s.Open != 2 || !s.Last.Equal(now) {
		t.Fatalf("two connections of one certificate: %+v", g.Seen())
	}
	now = now.Add(time.Minute)
	g.leave(first)
	g.leave(first) // closed by both
	now = now.Add(time.Minute)
	if s := find("1"); s.Open != 1 || !s.Last.Equal(now) {
		t.Errorf("one of two is left: %+v", s)
	}
	g.leave(second)
	left := now
	now = now.Add(time.Minute)
	if s := find("1"); s.Open != 0 || !s.Last.Equal(left) {
		t.Errorf("nothing is open: %+v, want it last seen at %v", s, left)
	}
	stays := enter(3, "")
	for serial := range int64(maxSeen) {
		now = now.Add(time.Second)
		g.leave(enter(10+serial, ""))
	}
	if n := len(g.Seen()); n != maxSeen || find("1") != nil || find("10") != nil || find("11") == nil || find("3") == nil {
		t.Errorf("%d certificates are known (1: %v, 10: %v, 11: %v, 3: %v)", n, find("1"), find("10"), find("11"), find("3"))
	}
	g.leave(stays)
}
