package pki

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Refusal is a handshake that a Gate ended, or several alike.
type Refusal struct {
	Door        string
	Reason      string               // one word
	Detail      string               // of the first
	Remote      string               // of the first: address and port
	Certificate identity.Certificate // what was shown, verified or not; empty if nothing was
	Network     string               // of a Flood: whose handshakes had failed; empty if it were several
	Count       int
}

const (
	refusalKinds = 64 // told apart at a time; what is beyond is counted by door and reason
	refusalEvery = 5 * time.Second
)

// Refusals gathers what the Gates refuse and has it recorded in summaries, so that a
// flood of bad handshakes is a few events and never a queue ahead of deliveries.
// Nothing is lost but details: what cannot be recorded is kept, and counted on.
type Refusals struct {
	// Record writes them; those that it has an error for are offered again.
	Record func(context.Context, []Refusal) error

	mu      sync.Mutex
	waiting map[refusalKey]Refusal
	total   map[refusalKey]int64 // since the start, by door and reason
}

type refusalKey struct{ door, reason, who string }

func (q *Refusals) add(r Refusal) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.waiting == nil {
		q.waiting, q.total = make(map[refusalKey]Refusal), make(map[refusalKey]int64)
	}
	q.total[refusalKey{r.Door, r.Reason, ""}]++
	r.Count = 1
	q.merge(r)
}

// merge adds r to those that wait. q.mu is held.
func (q *Refusals) merge(r Refusal) {
	key := refusalKey{r.Door, r.Reason, cmp.Or(r.Certificate.Fingerprint, r.Network)}
	if _, known := q.waiting[key]; !known && len(q.waiting) >= refusalKinds {
		key.who = ""
		r.Certificate, r.Network = identity.Certificate{}, ""
	}
	if known, ok := q.waiting[key]; ok {
		known.Count += r.Count
		r = known
	}
	q.waiting[key] = r
}

// Run has the refusals recorded every five seconds until ctx ends, and once more
// then.
func (q *Refusals) Run(ctx context.Context) error {
	tick := time.NewTicker(refusalEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			q.flush(context.WithoutCancel(ctx))
			return nil
		case <-tick.C:
			q.flush(ctx)
		}
	}
}

func (q *Refusals) flush(ctx context.Context) {
	q.mu.Lock()
	all := slices.SortedFunc(maps.Values(q.waiting), func(a, b Refusal) int {
		return cmp.Or(cmp.Compare(a.Door, b.Door), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Certificate.Fingerprint, b.Certificate.Fingerprint), cmp.Compare(a.Network, b.Network))
	})
	clear(q.waiting)
	q.mu.Unlock()
	if len(all) == 0 {
		return
	}
	if err := q.Record(ctx, all); err != nil {
		q.mu.Lock()
		for _, r := range all {
			q.merge(r)
		}
		q.mu.Unlock()
	}
}
