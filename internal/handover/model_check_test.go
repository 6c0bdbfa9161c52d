package handover

import (
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// checkStep is the safety that holds after every step, whoever has just died.
// I1, I2 and I7 are besides checked where a key is handed out (hand, usable).
func (w *world) checkStep() {
	for _, s := range w.sites {
		if w.lying && s == w.sites[1] {
			continue
		}
		s.checkArithmetic()
		s.checkBlocks()
		s.checkLeases()
	}
	if !w.lying {
		w.checkOwners(false)
	}
}

// checkArithmetic is I6: what a block brought is in the pool, or an event says where
// it went.
func (s *site) checkArithmetic() {
	for _, b := range s.blocks {
		sum := 0
		for _, id := range b.ids {
			if s.key[id] {
				sum++
			}
		}
		for _, n := range b.out {
			sum += n
		}
		if sum != b.Atoms {
			s.w.fail("I6: block %s at %v: %d of %d atoms are accounted for: %v", b.BlockRef, s.end, sum, b.Atoms, b.out)
		}
	}
}

// checkBlocks is I7 before anything is served: a block is READY only while the other
// end holds it.
func (s *site) checkBlocks() {
	if s.w.lying {
		return
	}
	for _, b := range s.blocks {
		if other := s.over(b.Link).block[b.BlockRef]; b.state == Ready && (other == nil || other.state == Lost) {
			s.w.fail("I7: block %s is READY at %v, and %v does not hold it", b.BlockRef, s.end, s.over(b.Link).end)
		}
	}
}

// checkLeases: an atom is in the hands of at most one process that could still
// commit, and there for one purpose.
func (s *site) checkLeases() {
	holder := make(map[key.ID]*process)
	for _, p := range s.procs {
		if s.node[p.node].run != p.run {
			continue // a zombie: it can do nothing with what it remembers
		}
		has := func(id key.ID) {
			if q := holder[id]; q != nil {
				s.w.fail("atom %s is in the hands of %v and of %v", short(id), p, q)
			}
			holder[id] = p
		}
		for _, id := range p.free {
			has(id)
		}
		for _, l := range p.lanes {
			for _, r := range l.asked {
				for id := range r.Atoms() {
					has(id)
				}
			}
			for _, f := range l.flying {
				for _, r := range f.Requests {
					for id := range r.Atoms() {
						has(id)
					}
				}
			}
		}
	}
}

// settle lets a fair network and patient processes finish what is under way, and
// checks that nothing is left: liveness.
func (w *world) settle() {
	w.note("SETTLING")
	w.declining = false
	for _, s := range w.sites {
		for _, tx := range s.hung {
			if !tx.applied {
				w.note("  %s/%d: %v: %v", tx.node, tx.run, tx, s.apply(tx))
			}
		}
		s.hung = nil
	}
	for _, s := range w.sites {
		w.revive(s)
	}
	// The links come up again: what is not held by then will never be.
	for _, s := range w.sites {
		for _, session := range s.session {
			w.session = max(w.session, session+1)
		}
	}
	if !w.quieten() {
		w.fail("nothing ends: %s", w.leftOver())
	}
	w.checkSettled()
}

// quieten drains and nudges until there is nothing left to do.
func (w *world) quieten() bool {
	for round := range 100 {
		for _, s := range w.sites {
			w.revive(s)
		}
		w.drain()
		w.checkStep()
		if w.nudge(round) {
			return true
		}
		if w.bad != "" {
			return false
		}
	}
	return false
}

// warmUp has the nodes up and some blocks in both pools before anything goes wrong.
func (w *world) warmUp() {
	w.quieten()
	for range 1 + w.pick(3) {
		w.distil()
		for _, p := range w.procs(func(p *process) bool { return len(p.intake) > 0 }) {
			for _, take := range p.intake {
				take()
			}
			p.intake = nil
		}
	}
	w.quieten()
	for _, p := range w.procs(able) {
		p.lease()
	}
	w.drain()
}

// revive ends zombies, as their next commit would, and starts nodes that are down.
func (w *world) revive(s *site) {
	for _, p := range slices.Clone(s.procs) {
		if s.node[p.node].run != p.run {
			p.die()
		}
	}
	for _, n := range s.names {
		if !slices.ContainsFunc(s.procs, func(p *process) bool { return p.node == n }) {
			s.start(n)
		}
	}
}

// drain commits and delivers until neither is left to do.
func (w *world) drain() {
	for range 1000 {
		idle := len(w.net) == 0
		for _, p := range w.procs(func(*process) bool { return true }) {
			if p.hung != nil {
				p.resolve()
			}
			if len(p.queue) > 0 && !p.dead && p.hung == nil {
				idle = false
				p.flush(len(p.queue), false)
			}
		}
		for range len(w.net) {
			w.arrive(0)
		}
		if idle || w.bad != "" {
			return
		}
	}
	w.fail("messages never end")
}

// nudge has everybody repeat what is unanswered. It says whether there was nothing.
func (w *world) nudge(round int) bool {
	quiet := true
	for _, p := range w.procs(func(*process) bool { return true }) {
		p.intake = nil
		for _, l := range p.lanes {
			for _, r := range l.asked {
				p.giveBack(slices.Collect(r.Atoms()))
			}
			l.asked = nil
			for b := range l.sender.last {
				if f := l.flying[b+1]; f != nil {
					quiet = false
					if round > 5 && !l.sender.flying[f.Batch].doubt {
						p.doubt(f)
					}
					p.send(f)
				}
			}
		}
		for _, t := range p.tasks {
			quiet = false
			p.tellRun(t)
		}
	}
	for _, s := range w.sites {
		p := s.procs[0]
		for _, l := range s.links {
			if s.session[l] < w.session {
				quiet = false
				p.commit("OpenSession", job{act: func() { s.openSession(l, w.session) }})
			}
		}
		for _, v := range s.voids {
			if !v.acked {
				quiet = false
				p.tellVoid(v)
			}
		}
		for _, g := range s.pendingGrants() {
			quiet = false
			p.tellGrant(g)
		}
		for _, b := range s.blocks {
			if b.state == BlockHeld {
				quiet = false
				p.tellHeld(b.Held)
			}
		}
		for _, u := range s.unfinished() {
			quiet = false
			if len(p.tasks) == 0 {
				p.takeOver(u.node, s.node[u.node].run, u.link)
			}
		}
		if len(s.parked) > 0 || slices.ContainsFunc(s.procs, func(p *process) bool { return !p.whole() }) {
			quiet = false
		}
	}
	return quiet
}

// leftOver names what keeps a world from settling.
func (w *world) leftOver() string {
	for _, s := range w.sites {
		if len(s.parked) > 0 {
			return "keys are parked at " + s.end.String()
		}
		for _, v := range s.voids {
			if !v.acked {
				return "a void of " + v.Node + " is not acknowledged"
			}
		}
		for _, g := range s.pendingGrants() {
			return g.String() + " is not acknowledged"
		}
		if n := s.unfinished(); len(n) > 0 {
			return "a chunk of " + n[0].link + " is leased by a dead run of " + n[0].node
		}
		for _, b := range s.blocks {
			if b.state == BlockHeld {
				return "block " + b.String() + " stays HELD"
			}
		}
		for _, p := range s.procs {
			if slices.ContainsFunc(p.lanes, func(l *lane) bool { return len(l.flying) > 0 }) {
				return "a batch of " + p.node + " is never answered"
			}
			if len(p.tasks) > 0 || !p.whole() {
				return "a takeover by " + p.node + " does not end"
			}
		}
	}
	return "messages"
}

// checkSettled: when all is quiet, the ends agree, and every key is somewhere.
func (w *world) checkSettled() {
	for _, s := range w.sites {
		s.checkPairs()
		s.checkPools()
		s.checkAllHeldBySomebody()
	}
	w.checkOwners(true)
}

// checkPairs: a key has a master if and only if it has its slaves.
func (s *site) checkPairs() {
	for _, d := range s.dues {
		if s.peerOf(d.Key).served[d.Key] == d.Voided {
			s.w.fail("key %s is due to %v at %v: served to its master %v, voided %v",
				short(d.Key), d.SAE, s.end, s.peerOf(d.Key).served[d.Key], d.Voided)
		}
	}
	for id := range s.served {
		if len(s.peerOf(id).due[id]) == 0 {
			s.w.fail("key %s was served at %v, and is due to nobody", short(id), s.end)
		}
	}
}

// checkPools: what one end may still use, the other has.
func (s *site) checkPools() {
	for _, b := range s.blocks {
		if s.w.expiry[b.BlockRef] {
			continue
		}
		for _, id := range b.ids {
			if s.key[id] && !s.over(b.Link).key[id] {
				s.w.fail("atom %s of block %s is in the pool of %v alone", short(id), b.BlockRef, s.end)
			}
		}
	}
}

// checkAllHeldBySomebody: an atom of a leased chunk is free in the process that
// leased it: none is forgotten.
func (s *site) checkAllHeldBySomebody() {
	free := make(map[key.ID]*process)
	for _, p := range s.procs {
		for _, id := range p.free {
			free[id] = p
		}
	}
	for _, b := range s.blocks {
		for _, c := range b.chunks {
			for _, id := range c.ids {
				p := free[id]
				switch {
				case p != nil && !s.key[id] && !s.w.expiry[b.BlockRef]:
					s.w.fail("atom %s is free in %s, and not in the pool", short(id), p.node)
				case p == nil && s.key[id] && c.node != "":
					s.w.fail("atom %s is leased by %s, which has forgotten it", short(id), c.node)
				case p != nil && c.node != p.node:
					s.w.fail("atom %s is free in %s, and its chunk is leased by %q", short(id), p.node, c.node)
				}
			}
		}
	}
}
