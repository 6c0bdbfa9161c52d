package kme

import (
	"cmp"
	"context"
	"errors"
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

// pool is the part of a link's atoms that this node has leased: in memory, still
// wrapped. Losing it loses nothing: a takeover frees the chunks.
type pool struct {
	lease  func(ctx context.Context, chunks int) ([]store.Lease, error)
	stored func(ctx context.Context) (int, error)
	fresh  func(key.Epoch) bool // false once atoms of that epoch are too old to be used
	nodes  func() int           // that share the link's chunks

	mu     sync.Mutex
	leases []*held
	used   time.Time // last time that somebody asked
}

// held is a leased chunk and its atoms not yet lent, in index order.
type held struct {
	store.Lease
	left []store.Atom
}

// maxLease bounds how many chunks one refill takes.
const maxLease = 32

// take lends number keys of atoms consecutive atoms each, from the oldest epochs
// first, or nothing at all: nil without an error means that the pool is too small.
func (p *pool) take(ctx context.Context, number, atoms int) ([]lent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used = time.Now()
	got := p.pick(nil, number, atoms)
	for len(got) < number*atoms {
		more, err := p.refill(ctx, number*atoms-len(got))
		if err != nil || !more {
			p.put(got)
			return nil, err
		}
		got = p.pick(got, number-len(got)/atoms, atoms)
	}
	return got, nil
}

// pick moves up to number keys from the leases to got. The caller holds mu.
func (p *pool) pick(got []lent, number, atoms int) []lent {
	p.leases = slices.DeleteFunc(p.leases, func(h *held) bool { return len(h.left) == 0 || !p.fresh(h.Epoch) })
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

// refill leases more chunks, and says whether there were any. The caller holds mu.
func (p *pool) refill(ctx context.Context, atoms int) (bool, error) {
	stored, err := p.stored(ctx)
	if err != nil {
		return false, err
	}
	if stored == 0 {
		return false, nil
	}
	need := (atoms + key.ChunkAtoms - 1) / key.ChunkAtoms
	want := max(need, min(maxLease, stored/(2*key.ChunkAtoms*p.nodes())))
	leases, err := p.lease(ctx, want)
	if err != nil {
		return false, err
	}
	for i := range leases {
		p.add(&held{Lease: leases[i], left: leases[i].Atoms})
	}
	return len(leases) > 0, nil
}

// add puts a chunk into its place, oldest epoch first. The caller holds mu.
func (p *pool) add(h *held) int {
	at, _ := slices.BinarySearchFunc(p.leases, h, func(a, b *held) int {
		return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Chunk, b.Chunk))
	})
	p.leases = slices.Insert(p.leases, at, h)
	return at
}

// untouched gives up up to most chunks that no request has had an atom of, the
// youngest first, and names them.
func (p *pool) untouched(most int) (chunks []int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := len(p.leases) - 1; i >= 0 && len(chunks) < most; i-- {
		if h := p.leases[i]; len(h.left) == len(h.Atoms) {
			chunks = append(chunks, h.Chunk)
			p.leases = slices.Delete(p.leases, i, i+1)
		}
	}
	return chunks
}

// forget drops all leases: their atoms are not in the database any more.
func (p *pool) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leases = nil
}

// give takes atoms back that were lent and not used.
func (p *pool) give(atoms []lent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.put(atoms)
}

func (p *pool) put(atoms []lent) {
	for _, a := range atoms {
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
func (l *link) share(ctx context.Context) {
	leases := l.pool.idle()
	if len(leases) == 0 {
		return
	}
	// It waits for the outcome, until the node stops: what may have been given back
	// must not be used.
	freed, err := l.k.Store.GiveBack(ctx, leasedOf(leases))
	if err != nil {
		l.k.Log.Warn("giving back leases", "link", l.ID, "err", err)
		if errors.Is(err, store.ErrDoubt) {
			return
		}
	}
	l.pool.restore(leases, freed)
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
