package handover

import (
	"bytes"
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// hearRun notes a peer node's run and lists what lower ones were assigned.
func (s *site) hearRun(r RunStarted) (rows []Assigned, ok bool) {
	defer func() { s.did(DoHearRun{r, s.live(rows), ok}) }()
	before := s.peer[r.Node]
	p, ok := before.Hear(r.Run)
	if !ok && s.w.broken.runLowered {
		p, ok = PeerRun{Run: r.Run}, true
	}
	if !ok {
		return nil, false
	}
	s.peer[r.Node] = p
	if s.w.broken.runAnsweredOnce && before.Run == r.Run {
		return nil, true
	}
	listed := make(map[key.ID]bool)
	for _, d := range s.dues {
		if d.Node == r.Node && d.Run < r.Run && !listed[d.Key] {
			listed[d.Key] = true
			a := Assigned{Run: d.Run, Batch: d.Batch, Key: d.Key, Atoms: d.atoms}
			if s.w.broken.firstAtomOnly {
				a.Atoms = a.Atoms[:1]
			}
			rows = append(rows, a)
		}
	}
	return rows, true
}

// live are those of the rows, in the order of their keys, that some slave has not
// taken and that were not voided: of the others the run's heirs need not hear.
func (s *site) live(rows []Assigned) []Assigned {
	rows = slices.DeleteFunc(slices.Clone(rows), func(a Assigned) bool {
		return !slices.ContainsFunc(s.due[a.Key], func(d *dueRow) bool { return !d.taken && !d.Voided })
	})
	slices.SortFunc(rows, func(a, b Assigned) int { return bytes.Compare(a.Key[:], b.Key[:]) })
	return rows
}

func (s *site) ackVoid(v *voidRow) {
	if !v.acked {
		v.acked = true
		s.did(DoAckVoid{v.Void})
	}
}

// bumpRun is a transaction of its own.
func (s *site) bumpRun(node string) int64 {
	s.node[node].run++
	if s.tables != nil {
		s.tables.Bump(node, s.node[node].run)
	}
	s.w.note("  run %d of %s", s.node[node].run, node)
	return s.node[node].run
}

// endTakeover frees what lower runs had of a link, if run still is the node's.
func (s *site) endTakeover(node string, run int64, l string) {
	over := s.node[node].run != run
	s.did(DoEndTakeover{node, run, l, !over})
	if over && !s.w.broken.freeAnyRun {
		return
	}
	for _, b := range s.blocks {
		for _, c := range b.chunks {
			if c.node == node && (c.run < run || s.w.broken.freeAnyRun) && (b.Link == l || s.w.broken.freeAllLinks) {
				c.node, c.run = "", 0
			}
		}
	}
	if s.w.broken.keepParked {
		return
	}
	for id, p := range s.parked {
		if c := s.chunkOf(id); p.node == node && p.run < run && !(s.key[id] && c.node == node && c.run < run) {
			delete(s.parked, id)
		}
	}
}

// unfinished is what a takeover has not ended for: nodes, each at the links of which it
// has left something.
func (s *site) unfinished() []leftover {
	var left []leftover
	for _, b := range s.blocks {
		for _, c := range b.chunks {
			if u := (leftover{c.node, b.Link}); c.node != "" && c.run < s.node[c.node].run && s.left(c) > 0 && !slices.Contains(left, u) {
				left = append(left, u)
			}
		}
	}
	return left
}

type leftover struct{ node, link string }

// expire deletes a block's atoms that nobody here has leased.
func (s *site) expire(b *blockRow) {
	for _, c := range b.chunks {
		if c.node == "" {
			s.leave("expired", c.ids...)
		}
	}
}
