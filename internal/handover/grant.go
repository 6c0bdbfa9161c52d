package handover

import (
	"errors"
	"fmt"
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// Chunks change hands by grants. The owner commits that it is not the owner any
// more, then tells the other end until that has acknowledged it. In between nobody
// assigns from the chunk: that costs time and no key. The grants of a chunk are
// counted, by both ends alike, so that one which was delayed or repeated is known
// as one of the past.
//
// Why there is never a second owner: only the owner gives, and what it gives has no
// lease, so that no announce of the chunk's atoms is or will be on its way from
// there. The owner's counter is the highest there is: a grant that is higher than
// one's own can but be the other end's last word.

// ChunkRef names a chunk: its block, and the index of its first atom in it.
type ChunkRef struct {
	BlockRef
	First int `json:"first"`
}

// String is the form used in logs and errors.
func (r ChunkRef) String() string { return fmt.Sprintf("%s+%d", r.BlockRef, r.First) }

// Chunk is what an end knows of a chunk's owner.
type Chunk struct {
	Mine   bool // it is this end, which alone assigns the chunk's atoms
	Grants int  // how often the chunk has changed hands
}

// MayGive says whether the chunk may be given to the other end: by its owner, as
// long as no run has leased it (one that is dead and not yet taken over counts, and
// with it whatever it has parked), and only if both ends hold its block. One
// without atoms is not worth it.
func (c Chunk) MayGive(block BlockState, leased bool, left int) bool {
	return c.Mine && block == Ready && !leased && left > 0 && c.Grants < MaxGrants
}

// Give returns the chunk as it is for who gives it.
func (c Chunk) Give() Chunk { return Chunk{Grants: c.Grants + 1} }

// OnGrant decides what becomes of a chunk when the other end grants it. Every grant
// is acknowledged, whether or not it changes anything: it has been heard before
// then, or it is of a chunk that is not known here any more. Such a one is nobody's
// from then on, and no harm is done, since this end has dropped its keys; it cannot
// come to be known again, since a block is held once.
//
// Of a block that is still HELD here the grant counts as of any other: that it is
// READY there says that this end's copy is equal, and its chunks will be leased as
// soon as it is READY here too.
func (c Chunk) OnGrant(grants int) Chunk {
	if grants <= c.Grants {
		return c
	}
	return Chunk{Mine: true, Grants: grants}
}

// Surplus is how many chunks the end that has here atoms left gives to the other
// one, which has there: none unless the other has come down to half of what is
// here, and then half the difference, rounded down. So nothing goes to and fro: who
// gives is left with no less than who is given, and is given back only after it has
// used half of that.
func Surplus(here, there int) (chunks int) {
	if 2*there > here {
		return 0
	}
	return (here - there) / (2 * key.ChunkAtoms)
}

// Grant gives chunks of one or more links between two ends to the end that hears it.
type Grant struct {
	Chunks []Granted `json:"chunks"`
}

// Granted is one chunk of a Grant, and the number of times that it has changed
// hands, this one included.
type Granted struct {
	ChunkRef
	Grants int `json:"grants"`
}

// GrantAnswer acknowledges grants. Each is named with its counter: what is
// acknowledged is not the chunk's latest grant but this one.
type GrantAnswer struct {
	Chunks []Granted `json:"chunks"`
}

// Acked are those of the grants that the answer acknowledges.
func (g Grant) Acked(a GrantAnswer) []Granted {
	return slices.DeleteFunc(slices.Clone(g.Chunks), func(c Granted) bool { return !slices.Contains(a.Chunks, c) })
}

// Check says what is wrong with g, nil if nothing is.
func (g Grant) Check() error {
	if len(g.Chunks) == 0 {
		return errors.New("grant of no chunks")
	}
	return checkGranted("grant", g.Chunks)
}

// Check says what is wrong with a, nil if nothing is.
func (a GrantAnswer) Check() error { return checkGranted("answer to grant", a.Chunks) }

func checkGranted(what string, chunks []Granted) error {
	if len(chunks) > MaxGranted {
		return fmt.Errorf("%s of %d chunks, more than %d", what, len(chunks), MaxGranted)
	}
	seen := make(map[Granted]bool, len(chunks))
	for _, c := range chunks {
		if err := c.BlockRef.Check(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if c.First < 0 || c.First >= MaxBlockAtoms || c.First%key.ChunkAtoms != 0 {
			return fmt.Errorf("%s: no chunk of block %s begins at atom %d", what, c.BlockRef, c.First)
		}
		if c.Grants < 1 || c.Grants > MaxGrants {
			return fmt.Errorf("%s: chunk %s with counter %d", what, c.ChunkRef, c.Grants)
		}
		if seen[c] {
			return fmt.Errorf("%s: chunk %s is there twice", what, c.ChunkRef)
		}
		seen[c] = true
	}
	return nil
}
