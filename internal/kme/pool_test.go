package kme

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// fibre is a link's atoms as the database has them, and the pool that a node leases
// from them: what a pool does is compared with it after each step.
type fibre struct {
	pool   pool
	chunks []*chunk
	oldest key.Epoch // atoms of earlier ones are too old to be used
	away   bool      // leases fail

	lent map[key.ID]lent // what requests hold
	used map[key.ID]bool // what was served or burned: it must never come again
}

// chunk is one that this end owns, of a block that is READY.
type chunk struct {
	store.Lease
	leased bool
}

var errAway = errors.New("the database is away")

func one() int { return 1 }

func newFibre() *fibre {
	f := &fibre{lent: make(map[key.ID]lent), used: make(map[key.ID]bool)}
	f.pool = pool{lease: f.lease, free: f.free, fresh: f.fresh, nodes: one}
	return f
}

func (f *fibre) fresh(e key.Epoch) bool { return e >= f.oldest }

// lease does what store.Lease promises: the oldest epochs first, each chunk once.
func (f *fibre) lease(_ context.Context, most int) ([]store.Lease, error) {
	if f.away {
		return nil, errAway
	}
	slices.SortFunc(f.chunks, func(a, b *chunk) int {
		return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Chunk, b.Chunk))
	})
	var leases []store.Lease
	for _, c := range f.chunks {
		if !c.leased && len(leases) < most {
			c.leased = true
			l := c.Lease
			l.Atoms = slices.DeleteFunc(slices.Clone(l.Atoms), func(a store.Atom) bool { return f.used[a.ID] })
			leases = append(leases, l)
		}
	}
	return leases, nil
}

// free does what store.Free promises.
func (f *fibre) free(_ context.Context, most int) (chunks int, err error) {
	for _, c := range f.chunks {
		if !c.leased && slices.ContainsFunc(c.Atoms, func(a store.Atom) bool { return !f.used[a.ID] }) {
			chunks++
		}
	}
	return min(chunks, most), nil
}

// grow adds a chunk of the epoch with those of its 64 atoms whose bits are set.
func (f *fibre) grow(e key.Epoch, present uint64) {
	n := len(f.chunks)
	c := &chunk{Lease: store.Lease{
		Chunk: int64(n), BlockRef: handover.BlockRef{Link: "fibre", Session: 1, Block: int64(n / 4)},
		First: n % 4 * key.ChunkAtoms, Epoch: e, Provenance: key.Simulated,
	}}
	for i := range key.ChunkAtoms {
		if present>>i&1 == 1 {
			c.Atoms = append(c.Atoms, store.Atom{ID: key.ID{byte(n >> 8), byte(n), byte(i)}, Index: c.First + i})
		}
	}
	f.chunks = append(f.chunks, c)
}

// giveBack does what store.GiveBack promises: a chunk is free again if all that is left
// of it was given back.
func (f *fibre) giveBack(leased []store.Leased) (freed []int64) {
	for _, l := range leased {
		c := f.chunks[slices.IndexFunc(f.chunks, func(c *chunk) bool { return c.Chunk == l.Chunk })]
		left := 0
		for _, a := range c.Atoms {
			if !f.used[a.ID] {
				left++
			}
		}
		if left == l.Atoms {
			c.leased = false
			freed = append(freed, l.Chunk)
		}
	}
	return freed
}

// left are the indices of the atoms of a chunk that could be lent, ascending.
func (f *fibre) left(c *chunk) (indices []int) {
	if !f.fresh(c.Epoch) {
		return nil
	}
	for _, a := range c.Atoms {
		if _, held := f.lent[a.ID]; !held && !f.used[a.ID] {
			indices = append(indices, a.Index)
		}
	}
	return indices
}

// keys is how many keys of so many consecutive atoms can be made, of leased chunks
// alone or of all.
func (f *fibre) keys(atoms int, leasedAlone bool) (n int) {
	for _, c := range f.chunks {
		if c.leased || !leasedAlone {
			n += keysIn(f.left(c), atoms)
		}
	}
	return n
}

func keysIn(indices []int, atoms int) (keys int) {
	run := 0
	for i, index := range indices {
		if i > 0 && index != indices[i-1]+1 {
			run = 0
		}
		if run++; run == atoms {
			keys++
			run = 0
		}
	}
	return keys
}

// take asks the pool for keys and says what is wrong with what it gave.
func (f *fibre) take(t *rapid.T, number, atoms int) []lent {
	here, all := f.keys(atoms, true), f.keys(atoms, false)
	before := slices.DeleteFunc(slices.Clone(f.chunks), func(c *chunk) bool { return !c.leased })
	got, err := f.pool.take(context.Background(), number, atoms)
	switch {
	case err != nil && (!f.away || here >= number || !errors.Is(err, errAway) || got != nil):
		t.Fatalf("take(%d, %d): %d atoms and %v, with %d keys leased", number, atoms, len(got), err, here)
	case err != nil:
		return nil
	case got == nil && (here >= number || all >= number && !f.away):
		t.Fatalf("take(%d, %d): nothing, with %d keys leased and %d in all", number, atoms, here, all)
	case got == nil:
		return nil
	case len(got) != number*atoms:
		t.Fatalf("take(%d, %d): %d atoms", number, atoms, len(got))
	}
	newest := got[0].from.Epoch
	for i, a := range got {
		if _, held := f.lent[a.ID]; held || f.used[a.ID] || !f.fresh(a.from.Epoch) {
			t.Fatalf("take(%d, %d): atom %s of epoch %d is lent, used or too old", number, atoms, a.ID, a.from.Epoch)
		}
		if first := got[i-i%atoms]; a.from.Chunk != first.from.Chunk || a.Index != first.Index+i%atoms {
			t.Fatalf("take(%d, %d): the key of atom %d has atom %d of chunk %d in place %d", number, atoms, first.Index, a.Index, a.from.Chunk, i%atoms)
		}
		f.lent[a.ID] = a
		newest = max(newest, a.from.Epoch)
	}
	for _, c := range before {
		if left := keysIn(f.left(c), atoms); c.Epoch < newest && left > 0 {
			t.Fatalf("take(%d, %d): of epoch %d, with %d keys of epoch %d left", number, atoms, newest, left, c.Epoch)
		}
	}
	return got
}

// check compares what the pool has with what it should have.
func (f *fibre) check(t *rapid.T) {
	seen := make(map[int64]bool)
	for _, h := range f.pool.leases {
		if seen[h.Chunk] {
			t.Fatalf("chunk %d is in the pool twice", h.Chunk)
		}
		seen[h.Chunk] = true
	}
	for _, c := range f.chunks {
		if !c.leased || !f.fresh(c.Epoch) {
			continue
		}
		var has []int
		for _, h := range f.pool.leases {
			if h.Chunk == c.Chunk {
				for _, a := range h.left {
					has = append(has, a.Index)
				}
			}
		}
		if want := f.left(c); !slices.Equal(has, want) {
			t.Fatalf("chunk %d has the atoms %v, want %v", c.Chunk, has, want)
		}
	}
}

// TestPool: whatever is asked for, given back, served, leased and grown too old, no
// atom is lent twice and none is lost; a key is made of consecutive atoms of one
// chunk; a request is filled whole, from the oldest epochs, or not at all, and only
// if it cannot be.
func TestPool(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := newFibre()
		var requests [][]lent
		draw := func(t *rapid.T) []lent { // one of the requests, which ends
			if len(requests) == 0 {
				return nil
			}
			i := rapid.IntRange(0, len(requests)-1).Draw(t, "request")
			r := requests[i]
			requests = slices.Delete(requests, i, i+1)
			return r
		}
		t.Repeat(map[string]func(*rapid.T){
			"": f.check,
			"block": func(t *rapid.T) {
				e := f.oldest + key.Epoch(rapid.IntRange(-1, 3).Draw(t, "epoch"))
				for range rapid.IntRange(1, 3).Draw(t, "chunks") {
					f.grow(e, rapid.Uint64().Draw(t, "atoms"))
				}
			},
			"take": func(t *rapid.T) {
				number, atoms := rapid.IntRange(1, 40).Draw(t, "number"), rapid.SampledFrom([]int{1, 1, 2, 3, 16}).Draw(t, "atoms")
				if got := f.take(t, number, atoms); got != nil {
					requests = append(requests, got)
				}
			},
			"give back": func(t *rapid.T) {
				back := rapid.Permutation(draw(t)).Draw(t, "order")
				kept := back[:rapid.IntRange(0, len(back)).Draw(t, "burned")]
				for _, a := range back {
					delete(f.lent, a.ID)
				}
				for _, a := range kept {
					f.used[a.ID] = true
				}
				f.pool.give(back[len(kept):])
			},
			"serve": func(t *rapid.T) {
				for _, a := range draw(t) {
					delete(f.lent, a.ID)
					f.used[a.ID] = true
				}
			},
			"share": func(t *rapid.T) {
				leases := f.pool.empty()
				if rapid.Bool().Draw(t, "late") { // what comes back meanwhile was lent when it began
					back := draw(t)
					for _, a := range back {
						delete(f.lent, a.ID)
					}
					f.pool.give(back)
				}
				f.pool.restore(leases, f.giveBack(leasedOf(leases)))
			},
			"age":   func(*rapid.T) { f.oldest++ },
			"flaky": func(*rapid.T) { f.away = !f.away },
		})
	})
}

// TestIdlePool: what nobody has asked for in a while is given back, and nothing before.
func TestIdlePool(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFibre()
		f.grow(1, ^uint64(0))
		got, err := f.pool.take(t.Context(), 1, 1)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(idleLease - 1)
		if leases := f.pool.idle(); leases != nil {
			t.Errorf("before its time: %d leases", len(leases))
		}
		f.pool.give(got)
		time.Sleep(time.Nanosecond)
		if leases := f.pool.idle(); len(leases) != 1 || len(leases[0].left) != key.ChunkAtoms {
			t.Errorf("idle: %v", leases)
		}
		if leases := f.pool.idle(); leases != nil {
			t.Errorf("given back twice: %v", leases)
		}
	})
}

// TestShareOfNodes: a node leases the less at once the more nodes there are.
func TestShareOfNodes(t *testing.T) {
	t.Parallel()
	for nodes, want := range map[int]int{1: 8, 2: 4, 4: 2, 100: 1} {
		f := newFibre()
		f.pool.nodes = func() int { return nodes }
		for range 16 {
			f.grow(1, ^uint64(0))
		}
		if _, err := f.pool.take(t.Context(), 1, 1); err != nil || len(f.pool.leases) != want {
			t.Errorf("one of %d nodes leases %d of 16 chunks, %v; want %d", nodes, len(f.pool.leases), err, want)
		}
	}
}

// TestPoolOfManyRequests: requests at the same time never hold the same atom, and
// what they give back is there again.
func TestPoolOfManyRequests(t *testing.T) {
	t.Parallel()
	const chunks = 8
	f := newFibre()
	for range chunks {
		f.grow(1, ^uint64(0))
	}
	var mu sync.Mutex
	held := make(map[key.ID]bool)
	hold := func(atoms []lent, now bool) {
		mu.Lock()
		defer mu.Unlock()
		for _, a := range atoms {
			if held[a.ID] == now {
				t.Errorf("atom %s is held: %t", a.ID, now)
			}
			held[a.ID] = now
		}
	}
	var g sync.WaitGroup
	for size := 1; size <= 4; size++ {
		g.Go(func() {
			for range 200 {
				got, err := f.pool.take(t.Context(), 3, size)
				if err != nil || got == nil {
					t.Errorf("take(3, %d): %v, %v", size, got, err)
					return
				}
				hold(got, true)
				hold(got, false)
				f.pool.give(got)
			}
		})
	}
	g.Wait()
	if got, err := f.pool.take(t.Context(), chunks*key.ChunkAtoms, 1); err != nil || got == nil {
		t.Errorf("not all atoms are there at the end: %v", err)
	}
}

// TestForget: what was burned does not come back, though a request had it in hand.
func TestForget(t *testing.T) {
	t.Parallel()
	f := newFibre()
	f.grow(1, ^uint64(0))
	f.grow(1, ^uint64(0))
	got, err := f.pool.take(t.Context(), 3, 1)
	if err != nil || len(got) != 3 {
		t.Fatalf("take: %d atoms, %v", len(got), err)
	}
	f.pool.forget()
	f.pool.give(got)
	if again, short := f.pool.lend(nil, 1, 1); short != 1 {
		t.Errorf("%d atoms that were burned are lent", len(again))
	}
	f.chunks = nil
	f.grow(1, ^uint64(0))
	f.chunks[0].Chunk = 7 // a new one
	if got, err = f.pool.take(t.Context(), 1, 1); err != nil || len(got) != 1 || got[0].from.Chunk != 7 {
		t.Errorf("take from a new chunk: %v, %v", got, err)
	}
}

// TestDrop: what a compromise has burned does not come back from requests that had it.
func TestDrop(t *testing.T) {
	t.Parallel()
	f := newFibre()
	f.grow(1, ^uint64(0))
	f.grow(1, ^uint64(0))
	got, err := f.pool.take(t.Context(), key.ChunkAtoms+1, 1) // of both
	if err != nil || len(got) != key.ChunkAtoms+1 {
		t.Fatalf("take: %d atoms, %v", len(got), err)
	}
	bad := got[0].from.Chunk
	f.pool.drop(func(l store.Lease) bool { return l.Chunk == bad })
	f.pool.give(got)
	again, short := f.pool.lend(nil, key.ChunkAtoms, 1)
	if short != 0 {
		t.Fatalf("%d atoms are missing", short)
	}
	for _, a := range again {
		if a.from.Chunk == bad {
			t.Fatalf("atom %d of a burned chunk is lent", a.Index)
		}
	}
}

// TestPoolIsNotWaitedFor: a request waits for chunks that somebody else leases no longer
// than it has time.
func TestPoolIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	f := newFibre()
	if err := f.pool.stocking.enter(t.Context()); err != nil { // the database hangs
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := f.pool.take(ctx, 1, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("take: %d atoms, %v", len(got), err)
	}
}
