package pki

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// failures bounds what handshakes that come to nothing cost a door: each network has a
// bucket, out of which a failed handshake takes a token and a good one does not. While the
// bucket is empty, no handshake of that network is begun. Those that were under way when it
// ran empty may fail as well, and have to be made up for: in the long run no more than
// a bucket's rate gets as far as TLS.
type failures struct {
	rate  rate.Limit // tokens a second; 0: nothing is bounded
	burst int        // tokens of a full bucket

	mu       sync.Mutex
	networks map[netip.Prefix]*rate.Limiter
	rest     *rate.Limiter // of all networks that a full table has no room for
	swept    time.Time
}

// maxFailing bounds the networks that are told apart, some 200 bytes each.
const maxFailing = 4096

func newFailures(perSecond, burst int) *failures {
	f := &failures{rate: rate.Limit(perSecond), burst: burst, networks: make(map[netip.Prefix]*rate.Limiter)}
	f.rest = f.bucket()
	return f
}

func (f *failures) bucket() *rate.Limiter { return rate.NewLimiter(f.rate, f.burst) }

// tooMany says whether the bucket of n is empty.
func (f *failures) tooMany(n netip.Prefix, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.networks[n]
	switch {
	case f.rate == 0, b == nil && len(f.networks) < maxFailing:
		return false
	case b == nil:
		b = f.rest
	}
	return b.TokensAt(now) < 1
}

// add takes a token out of the bucket of n for a handshake that has failed.
func (f *failures) add(n netip.Prefix, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rate == 0 {
		return
	}
	b := f.networks[n]
	if b == nil && len(f.networks) >= maxFailing {
		f.sweep(now)
	}
	switch {
	case b == nil && len(f.networks) < maxFailing:
		b = f.bucket()
		f.networks[n] = b
	case b == nil:
		b = f.rest
	}
	b.ReserveN(now, 1) // on credit, if there is none
}

// known is how many networks have failed of late.
func (f *failures) known(now time.Time) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sweep(now)
	return len(f.networks)
}

// sweep forgets the networks whose buckets are full again, at most once a second, since it
// looks at all of them. The holder has mu.
func (f *failures) sweep(now time.Time) {
	if since := now.Sub(f.swept); since >= 0 && since < time.Second {
		return
	}
	f.swept = now
	for n, b := range f.networks {
		if b.TokensAt(now) >= float64(f.burst) {
			delete(f.networks, n)
		}
	}
}
