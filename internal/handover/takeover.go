package handover

import (
	"cmp"
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// Orphan is what a taken-over run left assigned at the peer by one batch and did
// not serve: its atoms are burned here and its keys voided there, in one
// transaction.
type Orphan struct {
	Void  Void
	Atoms []key.ID // of the keys in Void, those that are in the pool here
}

// Orphans decides what a survivor burns and voids, from a peer's answer to
// RunStarted: each key of the node's lower runs that still has an atom in the pool
// here. A key that has none was served, or burned before. One Orphan for each run
// and batch, in order; the takeover may end once all of them are committed, for
// every peer of the node. Burning twice, or by two survivors, is harmless.
//
// What a peer says of other runs than lower ones, or of keys without atoms, is
// passed over.
func Orphans(started RunStarted, assigned []Assigned, pooled func(key.ID) bool) []Orphan {
	type batch struct{ run, number int64 }
	found := make(map[batch]*Orphan)
	for _, a := range assigned {
		if a.Run >= started.Run || len(a.Atoms) == 0 {
			continue
		}
		atoms := slices.DeleteFunc(slices.Clone(a.Atoms), func(id key.ID) bool { return !pooled(id) })
		if len(atoms) == 0 {
			continue
		}
		b := batch{a.Run, a.Batch}
		if found[b] == nil {
			found[b] = &Orphan{Void: Void{Node: started.Node, Run: a.Run, Batch: a.Batch}}
		}
		found[b].Void.Keys = append(found[b].Void.Keys, a.Key)
		found[b].Atoms = append(found[b].Atoms, atoms...)
	}
	orphans := make([]Orphan, 0, len(found))
	for _, o := range found {
		orphans = append(orphans, *o)
	}
	slices.SortFunc(orphans, func(x, y Orphan) int {
		return cmp.Or(cmp.Compare(x.Void.Run, y.Void.Run), cmp.Compare(x.Void.Batch, y.Void.Batch))
	})
	return orphans
}
