package kme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// lent is a pool atom that a request holds: it goes back to the pool unless it is
// served or burned.
type lent struct {
	store.Atom
	from *store.Lease
}

// atomIDs are the IDs of atoms, in order.
func atomIDs(lends []lent) []key.ID {
	ids := make([]key.ID, len(lends))
	for i := range lends {
		ids[i] = lends[i].ID
	}
	return ids
}

// places are where atoms lie in the store, in order.
func places(lends []lent) []store.Place {
	at := make([]store.Place, len(lends))
	for i := range lends {
		at[i] = lends[i].Place
	}
	return at
}

// pool is the part of a link's atoms that this node has leased: in memory, still
// wrapped. Losing it loses nothing: a takeover frees the chunks.
type pool struct {
	lease func(ctx context.Context, chunks int) ([]store.Lease, error)
	free  func(ctx context.Context, most int) (chunks int, err error) // that can be leased, counted no further than most
	fresh func(key.Epoch) bool                                        // false once atoms of that epoch are too old to be used
	nodes func() int                                                  // that share the link's chunks

	stocking turn // had while chunks are leased or given back, and before mu

	mu      sync.Mutex
	leases  []*held
	newest  int64                    // the highest chunk that ever was in hand
	burned  int64                    // chunks below this one are not in the database any more
	dropped []func(store.Lease) bool // leases whose atoms are burned, those among them that are lent
	used    time.Time                // last time that somebody asked
	low     int                      // atoms in hand below which more are leased ahead of need
	wanting chan struct{}            // there are fewer: to whoever stocks
}

// turn is had by one at a time, and waited for no longer than a context. The zero value is free.
type turn struct {
	once sync.Once
	had  chan struct{}
}

func (t *turn) enter(ctx context.Context) error {
	t.once.Do(func() { t.had = make(chan struct{}, 1) })
	select {
	case t.had <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *turn) leave() { <-t.had }

// held is a leased chunk and its atoms not yet lent, in index order.
type held struct {
	store.Lease
	left []store.Atom
}

// maxLease bounds how many chunks one refill takes.
const maxLease = 64

// take lends number keys of atoms consecutive atoms each, from the oldest epochs
// first, or nothing at all: nil without an error means that the pool is too small.
// Only those wait for the database for whom there is not enough in hand.
func (p *pool) take(ctx context.Context, number, atoms int) ([]lent, error) {
	if got, _ := p.lend(nil, number, atoms); got != nil {
		return got, nil
	}
	if err := p.stocking.enter(ctx); err != nil {
		return nil, fmt.Errorf("waiting for chunks to be leased: %w", err)
	}
	defer p.stocking.leave()
	got, short := p.lend(nil, number, atoms)
	for got == nil {
		leases, err := p.more(ctx, short)
		if err != nil || len(leases) == 0 {
			return nil, err
		}
		got, short = p.lend(leases, number, atoms)
	}
	return got, nil
}

// lend adds leases, and lends all that is asked for, or nothing and says how many
// atoms are missing.
func (p *pool) lend(leases []store.Lease, number, atoms int) (got []lent, short int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used = time.Now()
	p.enter(leases)
	if got = p.pick(nil, number, atoms); len(got) < number*atoms {
		p.put(got)
		return nil, number*atoms - len(got)
	}
	left := 0
	for _, h := range p.leases {
		left += len(h.left)
	}
	if left < p.low {
		select {
		case p.wanting <- struct{}{}:
		default: // it is known, or nobody stocks
		}
	}
	return got, 0
}

// enter takes new leases in hand. The caller holds mu.
func (p *pool) enter(leases []store.Lease) {
	if len(leases) == 0 {
		return
	}
	p.low = 0
	for i := range leases {
		p.add(&held{Lease: leases[i], left: leases[i].Atoms})
		p.low += len(leases[i].Atoms) / 4
	}
}

// stock leases more whenever there is little in hand, so that nobody has to wait for
// it, until ctx ends.
func (p *pool) stock(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.wanting:
		}
		if err := p.stocking.enter(ctx); err != nil {
			return err
		}
		asking, cancel := context.WithTimeout(ctx, requestTime) // requests wait for this
		leases, err := p.more(asking, 1)
		cancel()
		if err == nil { // otherwise the request that misses them says why
			p.mu.Lock()
			p.enter(leases)
			p.mu.Unlock()
		}
		p.stocking.leave()
	}
}

// pick moves up to number keys from the leases to got. The caller holds mu.
func (p *pool) pick(got []lent, number, atoms int) []lent {
	stale := 0 // the oldest come first
	for stale < len(p.leases) && !p.fresh(p.leases[stale].Epoch) {
		stale++
	}
	p.leases = slices.DeleteFunc(slices.Delete(p.leases, 0, stale), func(h *held) bool { return len(h.left) == 0 })
	for _, h := range p.leases {
		for i := 0; number > 0 && i+atoms <= len(h.left); {
			if h.left[i+atoms-1].Index != h.left[i].Index+atoms-1 {
				i++ // a gap: a key is made of consecutive atoms
				continue
			}
			for _, a := range h.left[i : i+atoms] {
				got = append(got, lent{a, &h.Lease})
			}
			h.left = slices.Delete(h.left, i, i+atoms)
			number--
		}
		if number == 0 {
			break
		}
	}
	return got
}

// more leases chunks for so many atoms at least, as far as there are any: at most
// half of what this node would have if the nodes shared it all. The caller holds
// stocking.
func (p *pool) more(ctx context.Context, atoms int) ([]store.Lease, error) {
	sharers := 2 * p.nodes()
	free, err := p.free(ctx, maxLease*sharers)
	if err != nil || free == 0 {
		return nil, err
	}
	p.mu.Lock()
	all := free + len(p.leases)
	p.mu.Unlock()
	need := (atoms + key.ChunkAtoms - 1) / key.ChunkAtoms
	return p.lease(ctx, max(need, min(maxLease, all/sharers)))
}

// add puts a chunk into its place, oldest epoch first. The caller holds mu.
func (p *pool) add(h *held) int {
	p.newest = max(p.newest, h.Chunk)
	at, _ := slices.BinarySearchFunc(p.leases, h, func(a, b *held) int {
		return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Chunk, b.Chunk))
	})
	p.leases = slices.Insert(p.leases, at, h)
	return at
}

// drop takes out of hand the leases that are meant: their atoms are burned. Those that
// requests have in hand do not come back.
func (p *pool) drop(meant func(store.Lease) bool) {
	_ = p.stocking.enter(context.Background()) // never fails
	defer p.stocking.leave()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leases = slices.DeleteFunc(p.leases, func(h *held) bool { return meant(h.Lease) })
	p.dropped = append(p.dropped, meant)
}

// forget drops all leases, also one that is being made: their atoms are not in the
// database any more. Nor are those that requests have in hand, and may yet give back.
func (p *pool) forget() {
	_ = p.stocking.enter(context.Background()) // never fails
	defer p.stocking.leave()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leases = nil
	p.burned = p.newest + 1
}

// give takes atoms back that were lent and not used.
func (p *pool) give(atoms []lent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.put(atoms)
}

func (p *pool) put(atoms []lent) {
	for _, a := range atoms {
		if a.from.Chunk < p.burned || slices.ContainsFunc(p.dropped, func(meant func(store.Lease) bool) bool { return meant(*a.from) }) {
			continue
		}
		i := slices.IndexFunc(p.leases, func(h *held) bool { return h.Chunk == a.from.Chunk })
		if i < 0 { // its chunk was emptied meanwhile and dropped from the list
			i = p.add(&held{Lease: *a.from})
		}
		h := p.leases[i]
		at, _ := slices.BinarySearchFunc(h.left, a.Index, func(x store.Atom, index int) int { return x.Index - index })
		h.left = slices.Insert(h.left, at, a.Atom)
	}
}

// empty takes all leases out of the pool.
func (p *pool) empty() []*held {
	_ = p.stocking.enter(context.Background()) // never fails
	defer p.stocking.leave()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.drain()
}

func (p *pool) drain() []*held {
	leases := p.leases
	p.leases = nil
	return leases
}

// idle is empty if nobody has asked for a while, and otherwise nothing.
func (p *pool) idle() []*held {
	_ = p.stocking.enter(context.Background()) // never fails
	defer p.stocking.leave()
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.used) < idleLease {
		return nil
	}
	return p.drain()
}

// leasedOf says what of each chunk is in our hand. Atoms that are lent are not: a
// chunk with such atoms cannot be given back.
func leasedOf(leases []*held) (list []store.Leased) {
	for _, h := range leases {
		list = append(list, store.Leased{Chunk: h.Chunk, Atoms: len(h.left)})
	}
	return list
}

// share gives back what this node has leased and nobody asks it for: the site's
// other nodes may have run out.
func (l *link) share(ctx context.Context) { l.giveBack(ctx, l.pool.idle()) }

// giveBack gives back leases that were taken out of the pool, and says whether any
// of their chunks is free now.
func (l *link) giveBack(ctx context.Context, leases []*held) bool {
	if len(leases) == 0 {
		return false
	}
	// It waits for the outcome, until the node stops: what may have been given back
	// must not be used.
	freed, err := l.k.Store.GiveBack(ctx, leasedOf(leases))
	if err != nil {
		l.k.Log.Warn("giving back leases", "link", l.ID, "err", err)
		if errors.Is(err, store.ErrDoubt) {
			return false
		}
	}
	l.pool.restore(leases, freed)
	return len(freed) > 0
}

// restore puts back what was taken out and is not free.
func (p *pool) restore(leases []*held, freed []int64) {
	for _, h := range leases {
		if slices.Contains(freed, h.Chunk) {
			continue
		}
		var back []lent
		for _, a := range h.left {
			back = append(back, lent{a, &h.Lease})
		}
		p.give(back)
	}
}
