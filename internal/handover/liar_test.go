package handover

import (
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// TestLyingPeer plays histories in which the second site says anything at any
// time, besides what an honest one would. The first must still hand no key to two
// pairs, account for every atom, and not come to harm.
func TestLyingPeer(t *testing.T) {
	var sum total
	start := time.Now()
	for seed := uint64(0); time.Since(start) < effort(2*time.Second); seed++ {
		w := newWorldOf(2, random(seed), broken{}, [3]Tables{})
		w.lying = true
		w.play(length(seed))
		sum.add(w)
		if w.bad != "" {
			t.Fatalf("history %d: %s", seed, w.bad)
		}
	}
	t.Logf("%d histories, %d steps, %d lies, %d keys served, %d taken", sum.histories, sum.steps, sum.of["lie"], sum.served, sum.taken)
}

// lie says something that an honest peer might say, but not now.
func (w *world) lie() {
	w.steps["lie"]++
	s := w.sites[0]
	if len(s.procs) == 0 {
		return
	}
	p := choose(w, s.procs)
	switch w.pick(9) {
	case 0, 1:
		a := w.madeUpAnnounce()
		if a.Check() == nil { // the door lets nothing else in
			p.commit("Assign", job{act: func() { s.assign(a) }})
		}
	case 2:
		v := Void{Node: w.someNode(), Run: int64(w.pick(4)), Batch: int64(w.pick(6)), Keys: w.someAtoms(3)}
		p.commit("Void", job{act: func() { s.void(v) }})
	case 3:
		r := RunStarted{Node: w.someNode(), Run: int64(1 + w.pick(6))}
		p.commit("HearRun", job{act: func() { s.hearRun(r) }})
	case 4:
		h := w.madeUpHeld()
		p.commit("HeardHeld", job{act: func() { s.heardHeld(h) }})
	case 5:
		ref, answer := w.madeUpHeld().BlockRef, choose(w, []HeldAnswer{Equal, Different, NotYet, Never})
		p.commit("HeardHeldAnswer", job{act: func() { s.heardHeldAnswer(ref, answer) }})
	case 6:
		w.flight(func(_ *process, f *flying) bool { return f.copies > 0 }, func(p *process, f *flying) {
			p.answered(f, w.madeUpAnswer(f.Announce))
		})
	case 7:
		if len(p.tasks) == 0 {
			return
		}
		var rows []Assigned
		for range w.pick(4) {
			atoms := w.someAtoms(3)
			rows = append(rows, Assigned{Run: int64(w.pick(5)), Batch: int64(w.pick(6)), Key: atoms[0], Atoms: atoms})
		}
		p.heard(p.tasks[0], rows, w.pick(4) > 0)
	case 8:
		g := Granted{ChunkRef{w.madeUpHeld().BlockRef, key.ChunkAtoms * w.pick(2)}, 1 + w.pick(5)}
		p.commit("HearGrant", job{act: func() { s.hearGrant(g) }})
	}
}

func (w *world) someNode() string { return choose(w, []string{"b1", "b2", "b9", "a1"}) }

// someAtoms are at least one and at most n atoms of any block, some perhaps twice,
// or of none.
func (w *world) someAtoms(n int) []key.ID {
	ids := make([]key.ID, 1+w.pick(n))
	for i := range ids {
		block := int64(1 + w.pick(int(w.blocks)+1))
		name := key.Name{Link: link, Session: int64(1 + w.pick(3)), Block: block}
		ids[i] = name.ID(time.UnixMilli(0), w.pick(6))
	}
	return ids
}

func (w *world) madeUpAnnounce() Announce {
	node := w.someNode()
	known := w.sites[0].peer[node]
	a := Announce{Node: node, Run: known.Run + int64(w.pick(3)) - 1, Batch: max(1, known.Last+int64(w.pick(4))-1)}
	everybody := append(w.sites[0].saes[:2:2], w.sites[1].saes...)
	for i := range 1 + w.pick(3) {
		atoms := 1 + w.pick(2)
		r := Request{
			ID: string(rune('x' + i)), Link: link, Master: choose(w, everybody), Slaves: []identity.SAE{choose(w, everybody)},
			Bits: atoms * key.AtomBits, TTL: 1000,
		}
		for range 1 + w.pick(3) {
			ids := w.someAtoms(1)
			at := w.place[ids[0]]
			for len(ids) < atoms {
				name := key.Name{Link: link, Session: at.Session, Block: at.Block}
				ids = append(ids, name.ID(time.UnixMilli(0), at.index+w.pick(2)))
			}
			r.Keys = append(r.Keys, Key{Session: max(1, at.Session), Block: at.Block, First: at.index, Atoms: ids})
		}
		a.Requests = append(a.Requests, r)
	}
	return a
}

func (w *world) madeUpHeld() Held {
	h := Held{BlockRef: BlockRef{link, int64(1 + w.pick(3)), int64(1 + w.pick(int(w.blocks)+1))}, Atoms: 3, Owners: "b"}
	if b := w.sites[0].block[h.BlockRef]; b != nil && w.pick(2) == 0 {
		h.Digest = b.Digest
	}
	return h
}

func (w *world) madeUpAnswer(a Announce) AnnounceAnswer {
	answer := AnnounceAnswer{Standing: choose(w, []Standing{Fresh, Repeat, Ahead, Stale, Declined, "sure"})}
	for _, r := range a.Requests {
		switch w.pick(8) {
		case 0: // an answer that is too short
		case 1:
			answer.Results = append(answer.Results, Result{ID: "another", Accepted: true})
		case 2, 3:
			answer.Results = append(answer.Results, Result{ID: r.ID, Lacking: w.someAtoms(4)})
		default:
			answer.Results = append(answer.Results, Result{ID: r.ID, Accepted: true})
		}
	}
	return answer
}
