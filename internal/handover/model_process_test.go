package handover

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// process is one life of a node: everything in it is forgotten at a crash. Two
// processes of one node may be alive; all but the one of its current run are
// zombies, which end at their next commit.
type process struct {
	w      *world
	site   *site
	node   string
	run    int64
	head   int64
	dead   bool
	queue  []*job
	hung   *transaction
	free   []key.ID // leased, and not in use
	lanes  []*lane
	intake []func()
	tasks  []*takeover
}

// lane is what a process has of one link.
type lane struct {
	link    string
	ready   bool // its own takeover is done at the peer: it may lease and announce
	asked   []Request
	sender  *Sender
	flying  map[int64]*flying
	session int64 // as it believes
}

func (p *process) lane(l string) *lane { return p.lanes[slices.Index(p.site.links, l)] }

func (p *process) readyLanes() []*lane {
	return slices.DeleteFunc(slices.Clone(p.lanes), func(l *lane) bool { return !l.ready })
}

// whole says that the process's own takeover is done everywhere.
func (p *process) whole() bool { return len(p.readyLanes()) == len(p.lanes) }

type flying struct {
	Announce
	*lane
	copies int // that have left
}

// takeover is a survivor's work on another node's run, or on its own earlier ones, at
// the peer at the other end of one link.
type takeover struct {
	RunStarted
	link  string
	heard bool
}

// commit queues a verb for the process's committer.
func (p *process) commit(verb string, j job) {
	j.verb = verb
	p.queue = append(p.queue, &j)
}

func (p *process) String() string { return fmt.Sprintf("%s/%d", p.node, p.run) }

func (p *process) die() {
	p.dead = true
	p.site.procs = slices.DeleteFunc(p.site.procs, func(q *process) bool { return q == p })
}

// flush sends up to n jobs to the database. If it hangs, the process does not
// learn whether they were committed, and may commit nothing else until it does.
func (p *process) flush(n int, hang bool) {
	tx := &transaction{node: p.node, run: p.run, head: p.head, jobs: slices.Clone(p.queue[:n])}
	p.queue = slices.Clone(p.queue[n:])
	switch {
	case hang:
		p.w.note("  %v: commit hangs: %v", p, tx)
		p.hung = tx
		p.site.hung = append(p.site.hung, tx)
	case p.site.apply(tx):
		p.w.note("  %v: %v", p, tx)
		p.learn(tx)
	default:
		p.w.note("  %v: fenced: %v", p, tx)
		p.die()
	}
}

func (p *process) learn(tx *transaction) {
	p.head, p.hung = tx.head+1, nil
	for _, j := range tx.jobs {
		if j.done != nil {
			j.done()
		}
	}
}

// resolve finds out what became of a commit that hung: the node's row says. If it
// was not committed, the same is committed again.
func (p *process) resolve() {
	tx, row := p.hung, p.site.node[p.node]
	switch {
	case p.w.broken.unknownIsFailed && *row == nodeRow{tx.run, tx.head}:
		p.w.note("  %v: taken for failed: %v", p, tx)
		p.hung = nil
		var rest []*job
		for _, j := range tx.jobs {
			if j.undone != nil {
				j.undone()
			} else {
				rest = append(rest, j)
			}
		}
		p.queue = append(rest, p.queue...)
	case row.run == p.run && tx.applied, p.site.apply(tx): // in the real row, its head says so
		p.w.note("  %v: committed after all: %v", p, tx)
		p.learn(tx)
	default:
		p.die()
	}
}

// start begins a new life of a node: it takes over its own earlier runs first.
func (s *site) start(node string) *process {
	p := &process{w: s.w, site: s, node: node}
	row := s.node[node]
	same := s.w.broken.restartInSameRun && row.run > 0
	if same {
		p.run = row.run
		for _, b := range s.blocks {
			for _, c := range b.chunks {
				if c.node == node && c.run == p.run {
					p.free = append(p.free, s.pooled(c)...)
				}
			}
		}
	} else {
		p.run = s.bumpRun(node)
		for _, l := range s.links {
			p.takeOver(node, p.run, l)
		}
	}
	s.w.note("  %v starts", p)
	p.head = row.head
	for _, l := range s.links {
		p.lanes = append(p.lanes, &lane{link: l, ready: same, sender: NewSender(node, p.run, 3), flying: make(map[int64]*flying), session: s.session[l]})
	}
	if s.tables != nil {
		s.tables.Begin(node, p.run)
	}
	s.procs = append(s.procs, p)
	return p
}

// say sends a message to whichever process at the other end of the link takes it.
func (p *process) say(l, what string, arrive func(r *process)) {
	p.w.net = append(p.w.net, &packet{what: what, to: p.site.over(l), arrive: arrive})
}

// reply sends an answer back to the process that asked.
func (r *process) reply(to *process, what string, arrive func()) {
	r.w.net = append(r.w.net, &packet{what: what, proc: to, arrive: func(*process) { arrive() }})
}

func (p *process) tellHeld(h Held) {
	p.say(h.Link, "held", func(r *process) {
		var answer HeldAnswer
		r.commit("HeardHeld", job{act: func() { answer = r.site.heardHeld(h) }, done: func() {
			r.reply(p, "held-answer", func() {
				p.commit("HeardHeldAnswer", job{act: func() { p.site.heardHeldAnswer(h.BlockRef, answer) }})
			})
		}})
	})
}

func (p *process) lease() {
	var got []key.ID
	l := choose(p.w, p.readyLanes()).link
	p.commit("Lease", job{act: func() { got = p.site.lease(l, p.node, p.run) }, done: func() { p.giveBack(got) }})
}

// share ends the lease of a chunk of which the process has all the atoms that are
// left, for the site's other nodes.
func (p *process) share() {
	c := p.site.chunkOf(choose(p.w, p.free))
	if c == nil {
		return
	}
	var mine []key.ID
	p.free = slices.DeleteFunc(p.free, func(id key.ID) bool {
		if slices.Contains(c.ids, id) {
			mine = append(mine, id)
			return true
		}
		return false
	})
	done := false
	p.commit("GiveBack", job{act: func() { done = p.site.giveBack(p.node, p.run, c, mine) }, done: func() {
		if !done {
			p.giveBack(mine)
		}
	}})
}

func (p *process) giveBack(ids []key.ID) {
	p.free = append(p.free, ids...)
	slices.SortFunc(p.free, func(a, b key.ID) int {
		x, y := p.w.place[a], p.w.place[b]
		return cmp.Or(cmp.Compare(x.Session, y.Session), cmp.Compare(x.Block, y.Block), cmp.Compare(x.index, y.index))
	})
}

// ask makes a request of what is free of a link: keys of consecutive atoms of one chunk.
func (p *process) ask(l *lane, master identity.SAE, slaves []identity.SAE, keys, atoms int) bool {
	r := Request{
		ID: fmt.Sprintf("%s-%d-%d", p.node, p.run, p.w.serial()), Link: l.link, Master: master, Slaves: slaves,
		Bits: atoms * key.AtomBits, TTL: 1000,
	}
	for i := 0; i+atoms <= len(p.free) && len(r.Keys) < keys; {
		ids := p.free[i : i+atoms]
		first, last := p.w.place[ids[0]], p.w.place[ids[atoms-1]]
		if first.Link != l.link || first.BlockRef != last.BlockRef || last.index-first.index != atoms-1 || p.site.chunkOf(ids[0]) != p.site.chunkOf(ids[atoms-1]) {
			i++
			continue
		}
		r.Keys = append(r.Keys, Key{Session: first.Session, Block: first.Block, First: first.index, Atoms: slices.Clone(ids)})
		p.free = slices.Delete(p.free, i, i+atoms)
	}
	if len(r.Keys) == 0 {
		return false
	}
	l.asked = append(l.asked, r)
	p.w.note("  %v: asked %s", p, namesOf(r))
	return true
}

func (p *process) announce(l *lane, n int) {
	a := l.sender.Next(slices.Clone(l.asked[:n]))
	l.asked = slices.Clone(l.asked[n:])
	l.flying[a.Batch] = &flying{Announce: a, lane: l}
	p.w.note("  %v: batch %d of %d requests", p, a.Batch, len(a.Requests))
}

// send sends a copy of a batch: the first, or the same again. Whoever gets it may
// decline it at once.
func (p *process) send(f *flying) {
	f.copies++
	p.w.note("  %v: batch %d", p, f.Batch)
	p.say(f.link, "announce", func(r *process) {
		if p.w.declines() {
			r.reply(p, "declined", func() { p.answered(f, AnnounceAnswer{Standing: Declined}) })
			return
		}
		var answer AnnounceAnswer
		r.commit("Assign", job{act: func() { answer = r.site.assign(f.Announce) }, done: func() {
			r.reply(p, "announce-answer", func() { p.answered(f, answer) })
		}})
	})
	p.w.net[len(p.w.net)-1].again = func() { f.copies++ }
}

// notSent: the only copy could not be sent at all, or was declined.
func (p *process) notSent(f *flying) {
	if !f.sender.Unsent(f.Batch) {
		p.doubt(f)
		return
	}
	delete(f.flying, f.Batch)
	for _, r := range f.Requests {
		p.giveBack(slices.Collect(r.Atoms()))
	}
}

// doubt: the answer did not come in time.
func (p *process) doubt(f *flying) {
	p.w.note("  %v: batch %d", p, f.Batch)
	f.sender.Doubt(f.Batch)
	var ids []key.ID
	for _, r := range f.Requests {
		ids = slices.AppendSeq(ids, r.Atoms())
	}
	switch {
	case p.w.broken.voidInDoubt:
		for _, r := range f.Requests {
			v := Settlement{Request: r, Batch: f.Batch, node: p.node, run: p.run}.Void()
			p.commit("Burn", job{act: func() { p.site.burn(slices.Collect(r.Atoms()), &v) }})
		}
	case p.w.broken.settleByLast:
		p.askLast(f, ids)
	default:
		p.commit("Park", job{act: func() { p.site.park(ids, p.node, p.run) }})
	}
}

// askLast is the broken way to settle a doubt: to ask what the last batch was, and
// to believe that a later one did not and will not arrive.
func (p *process) askLast(f *flying, ids []key.ID) {
	p.say(f.link, "last", func(r *process) {
		known := r.site.peer[p.node]
		r.reply(p, "last-answer", func() {
			if f.flying[f.Batch] != f || known.Run == p.run && known.Last >= f.Batch {
				return
			}
			delete(f.flying, f.Batch)
			delete(f.sender.flying, f.Batch)
			f.sender.last = min(f.sender.last, f.Batch-1)
			p.giveBack(ids)
		})
	})
}

func (p *process) answered(f *flying, answer AnnounceAnswer) {
	if f.flying[f.Batch] != f {
		return // it has been answered, or was taken back
	}
	settled, err := f.sender.Answered(f.Batch, answer)
	switch {
	case errors.Is(err, ErrDeclined):
		if f.copies == 1 || p.w.broken.takenBackTwice {
			p.notSent(f)
		}
		return
	case err != nil:
		if !errors.Is(err, ErrAhead) && !errors.Is(err, ErrStale) && !p.w.lying {
			p.w.fail("an honest peer's answer does not fit: %v", err)
		}
		return
	}
	delete(f.flying, f.Batch)
	for _, s := range settled {
		if s.Parked && p.w.broken.voidInDoubt {
			continue // burned before
		}
		p.settle(s)
	}
}

func (p *process) settle(s Settlement) {
	r := s.Request
	atoms := slices.Collect(r.Atoms())
	if s.Parked {
		p.commit("Unpark", job{act: func() { p.site.unpark(atoms) }})
	}
	switch s.Verb {
	case Commit:
		p.serve(s)
	case Reclaim:
		void := s.Void()
		p.commit("Burn", job{act: func() {
			if p.w.broken.reclaimUnvoided {
				p.site.burn(atoms, nil)
				return
			}
			p.site.burn(atoms, &void)
		}})
	case Return:
		p.w.disagree(s)
		if len(s.Burn) > 0 {
			p.commit("Burn", job{act: func() { p.site.burn(s.Burn, nil) }})
		}
		rest := slices.DeleteFunc(slices.Clone(atoms), func(id key.ID) bool { return slices.Contains(s.Burn, id) })
		p.commit("nothing", job{act: func() {}, done: func() { p.giveBack(rest) }})
	}
}

// serve commits what the peer has assigned. What comes up short is burned and voided.
func (p *process) serve(s Settlement) {
	whole := false
	atoms := slices.Collect(s.Request.Atoms())
	p.commit("Serve", job{
		act: func() { whole = p.site.serve(s.Request) },
		done: func() {
			if !whole {
				void := s.Void()
				p.commit("Burn", job{act: func() { p.site.burn(atoms, &void) }})
			}
		},
		undone: func() { p.giveBack(atoms) },
	})
}

// takeOver begins, or takes up, the takeover of a node's lower runs at one peer.
func (p *process) takeOver(node string, run int64, l string) {
	p.tasks = append(p.tasks, &takeover{RunStarted: RunStarted{Node: node, Run: run}, link: l})
}

func (p *process) tellRun(t *takeover) {
	if p.w.broken.freeUnanswered {
		defer p.heard(t, nil, true)
	}
	p.say(t.link, "run", func(r *process) {
		var rows []Assigned
		var ok bool
		r.commit("HearRun", job{act: func() { rows, ok = r.site.hearRun(t.RunStarted) }, done: func() {
			r.reply(p, "run-answer", func() { p.heard(t, rows, ok) })
		}})
	})
}

// heard ends a takeover once the peer has said what it assigned.
func (p *process) heard(t *takeover, rows []Assigned, ok bool) {
	if t.heard {
		return
	}
	t.heard = true
	over := func() { p.tasks = slices.DeleteFunc(p.tasks, func(o *takeover) bool { return o == t }) }
	if !ok { // a higher run is known: somebody else has taken over since
		over()
		return
	}
	for _, o := range Orphans(t.RunStarted, rows, func(id key.ID) bool { return p.site.key[id] }) {
		p.commit("Burn", job{act: func() { p.site.burn(o.Atoms, &o.Void) }})
	}
	p.commit("EndTakeover", job{act: func() { p.site.endTakeover(t.Node, t.Run, t.link) }, done: func() {
		over()
		if t.Node == p.node && t.Run == p.run {
			p.lane(t.link).ready = true
		}
	}})
}

func (p *process) tellVoid(v *voidRow) {
	p.say(p.w.place[v.Keys[0]].Link, "void", func(r *process) {
		ok := false
		r.commit("Void", job{act: func() { ok = r.site.void(v.Void) }, done: func() {
			if ok {
				r.reply(p, "void-answer", func() { p.commit("AckVoid", job{act: func() { p.site.ackVoid(v) }}) })
			}
		}})
	})
}

// namesOf lists the keys of a request, for the diary.
func namesOf(r Request) string {
	s := r.ID
	for id := range r.Atoms() {
		s += " " + short(id)
	}
	return s
}
