package handover

import (
	"slices"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// steps is everything that can happen, one thing at a time. do says whether it
// could. Faults are missing from half of the histories each, and frequent in some.
var steps = []struct {
	name   string
	weight int
	fault  bool
	do     func(w *world) bool
}{
	{"deliver", 40, false, (*world).deliver},
	{"commit", 40, false, (*world).commit},
	{"distil", 3, false, (*world).distil},
	{"intake", 6, false, (*world).takeIn},
	{"tell held", 2, false, (*world).tellHeld},
	{"lease", 4, false, (*world).lease},
	{"ask", 20, false, (*world).ask},
	{"announce", 15, false, (*world).announce},
	{"send", 20, false, (*world).send},
	{"take", 10, false, (*world).take},
	{"tell run", 4, false, (*world).tellRun},
	{"tell void", 4, false, (*world).tellVoid},
	{"tell grant", 4, false, (*world).tellGrant},
	{"start", 4, false, (*world).start},
	{"finish takeover", 2, false, (*world).finishTakeover},
	{"resolve", 6, false, func(w *world) bool { return w.with(func(p *process) bool { return p.hung != nil }, (*process).resolve) }},

	{"lose", 4, true, (*world).lose},
	{"repeat", 4, true, (*world).repeat},
	{"doubt", 8, true, (*world).doubt},
	{"not sent", 6, true, (*world).notSent},
	{"crash", 1, true, func(w *world) bool { return w.with(func(*process) bool { return true }, (*process).die) }},
	{"start another", 1, true, (*world).startAnother},
	{"take over", 1, true, (*world).takeOver},
	{"hang", 3, true, (*world).hang},
	{"end hung", 3, true, (*world).endHung},
	{"open session", 1, true, (*world).openSession},
	{"expire", 1, true, (*world).expire},
	{"share", 2, false, func(w *world) bool {
		return w.with(func(p *process) bool { return able(p) && len(p.free) > 0 }, (*process).share)
	}},
	{"give", 9, true, (*world).give}, // no fault, but rare or frequent like one
}

// step does one thing that can be done.
func (w *world) step() {
	if w.lying && w.pick(3) == 0 {
		w.lie()
		return
	}
	for range 20 {
		sum := 0
		for _, st := range steps {
			sum += w.busy[st.name]
		}
		n := w.pick(sum)
		for _, st := range steps {
			if n -= w.busy[st.name]; n < 0 {
				w.note("%s", st.name)
				if st.do(w) {
					w.steps[st.name]++
					return
				}
				break
			}
		}
	}
}

func choose[T any](w *world, from []T) T { return from[w.pick(len(from))] }

// able processes may lease and announce, on some link.
func able(p *process) bool { return len(p.readyLanes()) > 0 && p.hung == nil }

// lanes finds a link's part of an able process that fits.
func (w *world) lanes(fits func(*process, *lane) bool, do func(*process, *lane)) bool {
	ready := func(p *process) []*lane {
		return slices.DeleteFunc(p.readyLanes(), func(l *lane) bool { return !fits(p, l) })
	}
	return w.with(func(p *process) bool { return p.hung == nil && len(ready(p)) > 0 }, func(p *process) { do(p, choose(w, ready(p))) })
}

func (w *world) procs(which func(*process) bool) []*process {
	var ps []*process
	for _, s := range w.sites {
		for _, p := range s.procs {
			if which(p) {
				ps = append(ps, p)
			}
		}
	}
	return ps
}

func (w *world) with(which func(*process) bool, do func(*process)) bool {
	ps := w.procs(which)
	if len(ps) == 0 {
		return false
	}
	p := choose(w, ps)
	w.note("  %v", p)
	do(p)
	return true
}

// deliver brings any message that is on its way; half of the time the oldest.
func (w *world) deliver() bool {
	if len(w.net) == 0 {
		return false
	}
	i := 0
	if w.pick(2) == 0 {
		i = w.pick(len(w.net))
	}
	w.arrive(i)
	return true
}

func (w *world) arrive(i int) {
	p := w.net[i]
	w.net = slices.Delete(w.net, i, i+1)
	to := p.proc
	if to == nil && len(p.to.procs) > 0 {
		to = choose(w, p.to.procs)
	}
	if to == nil || to.dead {
		return
	}
	w.note("  %s to %v", p.what, to)
	p.arrive(to)
}

func (w *world) lose() bool {
	if len(w.net) == 0 {
		return false
	}
	i := w.pick(len(w.net))
	w.note("  %s", w.net[i].what)
	w.net = slices.Delete(w.net, i, i+1)
	return true
}

func (w *world) repeat() bool {
	if len(w.net) == 0 || len(w.net) > 20 {
		return false
	}
	p := choose(w, w.net)
	if p.again != nil {
		p.again()
	}
	w.net = append(w.net, p)
	return true
}

// declines says whether whoever got an announce can do nothing now.
func (w *world) declines() bool { return w.declining && w.pick(6) == 0 }

func waiting(p *process) bool { return p.hung == nil && len(p.queue) > 0 }

func (w *world) commit() bool {
	return w.with(waiting, func(p *process) { p.flush(1+w.pick(len(p.queue)), false) })
}

func (w *world) hang() bool {
	return w.with(waiting, func(p *process) { p.flush(1+w.pick(len(p.queue)), true) })
}

// endHung has a database carry out a commit that hung there, or drop it.
func (w *world) endHung() bool {
	for _, s := range w.sites {
		if len(s.hung) > 0 {
			i := w.pick(len(s.hung))
			tx := s.hung[i]
			s.hung = slices.Delete(s.hung, i, i+1)
			if w.pick(3) > 0 && !tx.applied {
				w.note("  %s/%d: %v: %v", tx.node, tx.run, tx, s.apply(tx))
			}
			return true
		}
	}
	return false
}

// distil makes a block at both ends, which two processes that work in the same
// session will take in, each in its own time, or never. The ends seldom disagree.
func (w *world) distil() bool {
	if w.blocks >= 12 {
		return false
	}
	l := choose(w, w.sites[0].links)
	alice, bob := w.sites[0].procs, w.sites[0].over(l).procs
	if len(alice) == 0 || len(bob) == 0 {
		return false
	}
	a, b := choose(w, alice), choose(w, bob)
	session := a.lane(l).session
	if session != b.lane(l).session {
		return false
	}
	w.blocks++
	ref := BlockRef{Link: l, Session: session, Block: w.blocks}
	atoms := choose(w, []int{1, 2, 3, 5, 66})
	owners := choose(w, []Owners{"a", "b"})
	if atoms > key.ChunkAtoms {
		owners += owners[:1]
		if w.pick(2) == 0 {
			owners = "ab"
		}
	}
	name := key.Name{Link: l, Session: ref.Session, Block: ref.Block}
	ids := make([]key.ID, atoms)
	for i := range ids {
		ids[i] = name.ID(time.UnixMilli(0), i)
		w.place[ids[i]] = placed{ref, i}
	}
	for _, p := range []*process{a, b} {
		if w.pick(12) == 0 {
			owners = Owners([]byte{owners[0] ^ 'a' ^ 'b'}) + owners[1:]
		}
		h := Held{BlockRef: ref, Atoms: atoms, Owners: owners, Digest: DigestOf(ids, owners)}
		p.intake = append(p.intake, func() {
			held := false
			p.commit("HoldBlock", job{act: func() { held = p.site.hold(h, ids) }, done: func() {
				if held {
					p.tellHeld(h)
				}
			}})
		})
	}
	return true
}

func (w *world) takeIn() bool {
	return w.with(func(p *process) bool { return len(p.intake) > 0 }, func(p *process) {
		i := w.pick(len(p.intake))
		take := p.intake[i]
		p.intake = slices.Delete(p.intake, i, i+1)
		take()
	})
}

func (w *world) tellHeld() bool {
	told := false
	return w.with(func(*process) bool { return true }, func(p *process) {
		for _, b := range p.site.blocks {
			if b.state == BlockHeld {
				told = true
				p.tellHeld(b.Held)
			}
		}
	}) && told
}

func (w *world) lease() bool {
	return w.with(func(p *process) bool { return able(p) && len(p.free) < 4 }, (*process).lease)
}

// openSession begins the next session of a link at one end; the other may follow, later.
func (w *world) openSession() bool {
	return w.with(func(*process) bool { return true }, func(p *process) {
		l := choose(w, p.lanes)
		next := max(p.site.session[l.link], p.site.over(l.link).session[l.link])
		if next == p.site.session[l.link] {
			next++
		}
		p.commit("OpenSession", job{act: func() { p.site.openSession(l.link, next) }, done: func() { l.session = next }})
	})
}

func (w *world) ask() bool {
	return w.lanes(func(p *process, l *lane) bool { return len(p.free) > 0 && len(l.asked) < 4 }, func(p *process, l *lane) {
		slaves := p.site.over(l.link).saes
		if n := w.pick(3); n < 2 {
			slaves = []identity.SAE{slaves[n]}
		}
		p.ask(l, choose(w, p.site.saes), slaves, 1+w.pick(2), 1+w.pick(2))
	})
}

func (w *world) announce() bool {
	return w.lanes(func(_ *process, l *lane) bool { return len(l.asked) > 0 && l.sender.Free() }, func(p *process, l *lane) {
		p.announce(l, 1+w.pick(len(l.asked)))
	})
}

// flight finds a batch in flight that fits.
func (w *world) flight(fits func(*process, *flying) bool, do func(*process, *flying)) bool {
	type one struct {
		p *process
		f *flying
	}
	var all []one
	for _, p := range w.procs(func(*process) bool { return true }) {
		for _, l := range p.lanes {
			for b := range l.sender.last {
				if f := l.flying[b+1]; f != nil && fits(p, f) {
					all = append(all, one{p, f})
				}
			}
		}
	}
	if len(all) == 0 {
		return false
	}
	o := choose(w, all)
	do(o.p, o.f)
	return true
}

// send says a batch, for the first time or again: an answer may have been Ahead.
func (w *world) send() bool {
	return w.flight(func(_ *process, f *flying) bool { return f.copies == 0 || w.pick(3) == 0 }, (*process).send)
}

func (w *world) notSent() bool {
	return w.flight(func(_ *process, f *flying) bool { return f.copies == 0 }, (*process).notSent)
}

func (w *world) doubt() bool {
	return w.flight(func(_ *process, f *flying) bool {
		in := f.sender.flying[f.Batch]
		return f.copies > 0 && in != nil && !in.doubt
	}, (*process).doubt)
}

func (w *world) take() bool {
	return w.with(func(p *process) bool { return len(p.site.dues) > 0 }, func(p *process) {
		d := choose(w, p.site.dues)
		p.commit("Take", job{act: func() { p.site.take(d) }})
	})
}

func (w *world) tellRun() bool {
	return w.with(func(p *process) bool { return len(p.tasks) > 0 }, func(p *process) { p.tellRun(choose(w, p.tasks)) })
}

func (w *world) tellVoid() bool {
	told := false
	return w.with(func(*process) bool { return true }, func(p *process) {
		for _, v := range p.site.voids {
			if !v.acked {
				told = true
				p.tellVoid(v)
			}
		}
	}) && told
}

// start begins a node that is down.
func (w *world) start() bool {
	for _, s := range w.sites {
		for _, n := range s.names {
			if !slices.ContainsFunc(s.procs, func(p *process) bool { return p.node == n }) {
				s.start(n)
				return true
			}
		}
	}
	return false
}

// startAnother begins a node's next life while the last one goes on, as a zombie.
func (w *world) startAnother() bool {
	s := choose(w, w.sites)
	if len(s.procs) > 3 {
		return false
	}
	s.start(choose(w, s.names))
	return true
}

// takeOver has a node take over the other one of its site, dead or only slow.
func (w *world) takeOver() bool {
	return w.with(able, func(p *process) {
		for _, n := range p.site.names {
			if n == p.node {
				continue
			}
			run := p.site.bumpRun(n)
			for _, l := range p.site.links {
				p.takeOver(n, run, l)
			}
		}
	})
}

func (w *world) finishTakeover() bool {
	found := false
	return w.with(able, func(p *process) {
		for _, u := range p.site.unfinished() {
			if !slices.ContainsFunc(p.tasks, func(t *takeover) bool { return t.Node == u.node && t.link == u.link }) {
				found = true
				p.takeOver(u.node, p.site.node[u.node].run, u.link)
			}
		}
	}) && found
}

func (w *world) expire() bool {
	s := choose(w, w.sites)
	if len(s.blocks) == 0 || w.pick(4) > 0 {
		return false
	}
	b := choose(w, s.blocks)
	w.expiry[b.BlockRef] = true
	s.expire(b)
	return true
}
