package pki

import (
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Seen is a certificate that named a caller at a door since the process began.
type Seen struct {
	Caller      string // its ID
	Certificate identity.Certificate
	Last        time.Time // a connection of it was open
	Open        int       // connections that are
}

// maxSeen bounds what a Gate remembers of certificates, a few hundred bytes each. The one
// that was away for the longest goes first.
const maxSeen = 4096

// Seen lists the certificates that have named callers, by caller, the newest first.
func (g *Gate) Seen() []Seen {
	now := g.cfg.Now()
	g.mu.Lock()
	list := make([]Seen, 0, len(g.seen))
	for _, s := range g.seen {
		one := *s
		if one.Open > 0 {
			one.Last = now
		}
		list = append(list, one)
	}
	g.mu.Unlock()
	slices.SortFunc(list, func(a, b Seen) int {
		if c := strings.Compare(a.Caller, b.Caller); c != 0 {
			return c
		}
		return b.Certificate.NotAfter.Compare(a.Certificate.NotAfter)
	})
	return list
}

// see notes a connection of a caller. The holder has mu.
func (g *Gate) see(c identity.Caller) *Seen {
	cert := c.Certificate()
	s := g.seen[cert.Fingerprint]
	if s == nil {
		if len(g.seen) >= maxSeen {
			g.forget()
		}
		s = &Seen{Certificate: cert}
		g.seen[cert.Fingerprint] = s
	}
	s.Caller = c.ID()
	s.Open++
	return s
}

// forget drops the certificate that was away for the longest, if one is. The holder has mu.
func (g *Gate) forget() {
	oldest := ""
	for fingerprint, s := range g.seen {
		if s.Open == 0 && (oldest == "" || s.Last.Before(g.seen[oldest].Last)) {
			oldest = fingerprint
		}
	}
	delete(g.seen, oldest)
}
