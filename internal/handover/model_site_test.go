package handover

import (
	"fmt"
	"slices"
	"strings"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// site is the durable state of one site: the tables of the store that matter to
// the handover, with the same atomic steps as its verbs. Each method is one
// transaction, or part of one: it is called from site.apply alone (bumpRun and
// reads excepted).
type site struct {
	w       *world
	end     End
	links   []string // to its peers
	names   []string // of its nodes
	saes    []identity.SAE
	session map[string]int64 // by link
	block   map[BlockRef]*blockRow
	blocks  []*blockRow          // in the order in which they came
	key     map[key.ID]bool      // the pool
	due     map[key.ID][]*dueRow // by key
	dues    []*dueRow            // in the order in which they came
	parked  map[key.ID]parkedRow // by atom
	voids   []*voidRow           // void_out
	grants  []*grantRow          // grant_out
	node    map[string]*nodeRow  // node_run
	peer    map[string]PeerRun   // peer_run
	served  map[key.ID]bool      // by key: what the audit says
	hung    []*transaction       // sent to the database, and not known to have ended
	procs   []*process           // volatile: who is alive here
	tables  Tables               // the real ones, nil if there are none
	acting  *transaction         // that is being applied
}

type blockRow struct {
	Held
	state  BlockState
	ids    []key.ID
	chunks []*chunkRow
	out    map[string]int // atoms in the events that say they left
}

type chunkRow struct {
	Chunk
	ref  ChunkRef
	ids  []key.ID
	node string
	run  int64
}

type dueRow struct {
	DueRow
	slaves []identity.SAE
	atoms  []key.ID
	taken  bool
}

type parkedRow struct {
	node string
	run  int64
}

type voidRow struct {
	Void
	acked bool
}

type grantRow struct {
	Granted
	acked bool
}

type nodeRow struct{ run, head int64 }

// transaction is one batch of a process's committer.
type transaction struct {
	node    string
	run     int64
	head    int64 // that it follows
	jobs    []*job
	applied bool
}

// job is one verb in a transaction: act changes the tables, done is called once
// the process knows that it is committed, undone only by a broken rule.
type job struct {
	verb   string
	act    func()
	done   func()
	undone func()
}

func (tx *transaction) String() string {
	var verbs []string
	for _, j := range tx.jobs {
		verbs = append(verbs, j.verb)
	}
	return strings.Join(verbs, ", ")
}

// apply commits tx if the node's row still is as tx expects it.
func (s *site) apply(tx *transaction) bool {
	row := s.node[tx.node]
	if (row.run != tx.run || row.head != tx.head) && !s.w.broken.noFence {
		return false
	}
	row.head++
	tx.applied, s.acting = true, tx
	for _, j := range tx.jobs {
		j.act()
	}
	if s.acting = nil; s.tables != nil {
		s.tables.Compare(s.dump())
	}
	return true
}

// over is the site at the other end of one of s's links.
func (s *site) over(l string) *site {
	switch {
	case s != s.w.sites[0]:
		return s.w.sites[0]
	case l == second:
		return s.w.sites[2]
	}
	return s.w.sites[1]
}

// peerOf is the site with which s shares a key.
func (s *site) peerOf(id key.ID) *site { return s.over(s.w.place[id].Link) }

// chunkOf is the chunk of an atom, nil if there is no such block here.
func (s *site) chunkOf(id key.ID) *chunkRow {
	at, ok := s.w.place[id]
	if !ok || s.block[at.BlockRef] == nil {
		return nil
	}
	return s.block[at.BlockRef].chunks[at.index/key.ChunkAtoms]
}

// leave deletes those of ids that are in the pool and notes in the event why.
func (s *site) leave(why string, ids ...key.ID) []key.ID {
	var gone []key.ID
	for _, id := range ids {
		if s.key[id] {
			delete(s.key, id)
			gone = append(gone, id)
		}
	}
	for _, id := range gone {
		s.block[s.w.place[id].BlockRef].out[why]++
	}
	return gone
}

// hold is HoldBlock: HELD, if session still is the link's.
func (s *site) hold(h Held, ids []key.ID) bool {
	if h.Session != s.session[h.Link] && !s.w.broken.holdInAnySession || s.block[h.BlockRef] != nil {
		s.did(DoHold{h, ids, false})
		return false
	}
	s.did(DoHold{h, ids, true})
	b := &blockRow{Held: h, state: BlockHeld, ids: ids, out: make(map[string]int)}
	for i := 0; i < len(ids); i += key.ChunkAtoms {
		b.chunks = append(b.chunks, &chunkRow{
			Chunk: Chunk{Mine: h.Owners.Of(i) == s.end}, ref: ChunkRef{h.BlockRef, i}, ids: ids[i:min(i+key.ChunkAtoms, len(ids))],
		})
	}
	s.block[h.BlockRef], s.blocks = b, append(s.blocks, b)
	for _, id := range ids {
		s.key[id] = true
	}
	return true
}

// openSession closes all older sessions of a link for ever.
func (s *site) openSession(l string, session int64) {
	s.session[l] = max(s.session[l], session)
	s.did(DoOpenSession{l, session})
}

func (s *site) heardHeld(h Held) HeldAnswer {
	b := s.block[h.BlockRef]
	closed := h.Session < s.session[h.Link] || s.w.broken.neverTooEarly
	if b == nil {
		_, answer := OnHeld(Absent, false, closed)
		s.did(DoHeardHeld{h, answer})
		return answer
	}
	after, answer := OnHeld(b.state, b.Digest == h.Digest, closed)
	s.move(b, after)
	s.did(DoHeardHeld{h, answer})
	return answer
}

func (s *site) heardHeldAnswer(ref BlockRef, answer HeldAnswer) {
	if b := s.block[ref]; b != nil {
		s.move(b, OnHeldAnswer(b.state, answer))
	}
	s.did(DoHeardHeldAnswer{ref, answer})
}

func (s *site) move(b *blockRow, to BlockState) {
	if to == Lost && b.state != Lost {
		s.leave("lost", b.ids...)
	}
	b.state = to
}

// lease gives a node's run the oldest chunk of a link that is free.
func (s *site) lease(l, node string, run int64) (ids []key.ID) {
	defer func() { s.did(DoLease{l, ids}) }()
	for _, b := range s.blocks {
		if b.Link != l || b.state != Ready && !(b.state == BlockHeld && s.w.broken.leaseHeld) {
			continue
		}
		for _, c := range b.chunks {
			if c.node == "" && (c.Mine || s.w.broken.leaseAnyOwner) && s.left(c) > 0 {
				c.node, c.run = node, run
				return s.pooled(c)
			}
		}
	}
	return nil
}

// giveBack ends the lease of a chunk if all that is left of it is in the process's hand.
func (s *site) giveBack(node string, run int64, c *chunkRow, ids []key.ID) (done bool) {
	defer func() { s.did(DoGiveBack{ids, done}) }()
	if c.node != node || c.run != run || s.left(c) != len(ids) && !s.w.broken.sharedLent {
		return false
	}
	c.node, c.run = "", 0
	return true
}

// pooled are a chunk's atoms that may be used.
func (s *site) pooled(c *chunkRow) []key.ID {
	var ids []key.ID
	for _, id := range c.ids {
		if _, parked := s.parked[id]; s.key[id] && !parked {
			ids = append(ids, id)
		}
	}
	return ids
}

func (s *site) left(c *chunkRow) int {
	n := 0
	for _, id := range c.ids {
		if s.key[id] {
			n++
		}
	}
	return n
}

// serve is the initiator's commit: all of the request's atoms, or nothing.
func (s *site) serve(r Request) bool {
	for id := range r.Atoms() {
		if !s.key[id] {
			s.did(DoServe{r, false})
			return false
		}
	}
	s.did(DoServe{r, true})
	for _, k := range r.Keys {
		s.usable(k, "served")
		s.leave("served", k.Atoms...)
		s.served[k.ID()] = true
		s.w.hand(s, k.ID(), k.Atoms, r.Master, r.Slaves, r.Master)
	}
	return true
}

// usable checks I7: neither end uses a key of a block that the other does not hold.
func (s *site) usable(k Key, how string) {
	ref := s.w.place[k.ID()].BlockRef
	for _, end := range []*site{s, s.over(ref.Link)} {
		if b := end.block[ref]; !s.w.lying && (b == nil || b.state == Lost) {
			s.w.fail("I7: key %s of block %s %s at %v, but %v does not hold it", short(k.ID()), ref, how, s.end, end.end)
		}
	}
}

// burn deletes for ever what is left of atoms, and leaves a void to be told.
func (s *site) burn(ids []key.ID, void *Void) {
	s.leave("burned", ids...)
	for _, id := range ids {
		delete(s.parked, id)
	}
	s.did(DoBurn{s.w.place[ids[0]].Link, ids, void})
	if void != nil {
		s.voids = append(s.voids, &voidRow{Void: *void})
	}
}

func (s *site) park(ids []key.ID, node string, run int64) {
	for _, id := range ids {
		s.parked[id] = parkedRow{node, run}
	}
	s.did(DoPark{ids})
}

func (s *site) unpark(ids []key.ID) {
	for _, id := range ids {
		delete(s.parked, id)
	}
	s.did(DoUnpark{ids})
}

// assign is the receiver's commit of an announce.
func (s *site) assign(a Announce) AnnounceAnswer {
	p := s.peer[a.Node]
	answer := AnnounceAnswer{Standing: p.Judge(a.Run, a.Batch)}
	if answer.Standing == Stale && s.w.broken.staleAccepted {
		answer.Standing = Fresh
	}
	pooled := func(id key.ID) bool { return s.key[id] }
	switch answer.Standing {
	case Repeat:
		answer.Results = DecideRepeat(a, s.dueRows, pooled)
		if s.w.broken.repeatFromLast {
			for i, r := range a.Requests {
				answer.Results[i] = Result{ID: r.ID, Accepted: true}
			}
		}
	case Fresh:
		answer.Results = DecideFresh(a.Requests, s.admit, pooled)
		for i, res := range answer.Results {
			if res.Accepted {
				s.assignRequest(a, a.Requests[i])
			}
		}
		if a.Run == p.Run {
			s.peer[a.Node] = PeerRun{Run: p.Run, Last: a.Batch}
		}
	}
	s.did(DoAssign{a, answer})
	return answer
}

func (s *site) assignRequest(a Announce, r Request) {
	for _, k := range r.Keys {
		s.usable(k, "assigned")
		b := s.block[s.w.place[k.ID()].BlockRef]
		if b.state == BlockHeld {
			s.move(b, Ready)
		}
		s.leave("assigned", k.Atoms...)
		for _, slave := range r.Slaves {
			row := &dueRow{
				DueRow: DueRow{Key: k.ID(), SAE: slave, Master: r.Master, Node: a.Node, Run: a.Run, Batch: a.Batch},
				slaves: r.Slaves, atoms: k.Atoms,
			}
			s.due[k.ID()] = append(s.due[k.ID()], row)
			s.dues = append(s.dues, row)
		}
	}
}

// admit is what a receiver asks besides the pool: who owns the chunk, that the
// atoms lie where the key says, and whose SAEs they are.
func (s *site) admit(r Request) string {
	for _, k := range r.Keys {
		for i, id := range k.Atoms {
			at, ok := s.w.place[id]
			if !ok || s.block[at.BlockRef] == nil {
				continue // it is refused as lacking
			}
			if at.BlockRef != (BlockRef{r.Link, k.Session, k.Block}) || at.index != k.First+i {
				return "atoms that lie elsewhere"
			}
			if s.chunkOf(id).Mine && !s.w.broken.leaseAnyOwner {
				return "a chunk that is owned here"
			}
		}
	}
	if !slices.Contains(s.over(r.Link).saes, r.Master) {
		return "master is not homed there"
	}
	for _, slave := range r.Slaves {
		if !slices.Contains(s.saes, slave) {
			return "slave is not homed here"
		}
	}
	return ""
}

func (s *site) dueRows(id key.ID) []DueRow {
	var rows []DueRow
	for _, d := range s.due[id] {
		row := d.DueRow
		row.Voided = row.Voided && !d.taken // the row has ended before
		rows = append(rows, row)
	}
	return rows
}

// void is idempotent; it says whether it is to be acknowledged.
func (s *site) void(v Void) bool {
	if s.w.broken.voidByCurrentRun && v.Run != s.peer[v.Node].Run {
		return false
	}
	for _, d := range s.dues {
		if v.Voids(d.DueRow) {
			d.Voided = true
		}
	}
	s.did(DoVoid{v})
	return true
}

// take hands a due key to its slave, once.
func (s *site) take(d *dueRow) {
	s.did(DoTake{d.Key, d.SAE, !d.taken && !d.Voided})
	if d.taken || d.Voided {
		return
	}
	d.taken = true
	s.w.hand(s, d.Key, d.atoms, d.Master, d.slaves, d.SAE)
}

func short(id key.ID) string { return fmt.Sprintf("%x", id[9:12]) }
