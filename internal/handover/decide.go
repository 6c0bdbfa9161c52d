package handover

import (
	"fmt"
	"maps"
	"slices"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// BlockState is where a block stands at one end.
type BlockState string

// The states of a block. Only chunks of Ready blocks are leased. A Lost block's
// row stays, without keys, so that it goes on answering Different.
const (
	Absent    BlockState = ""
	BlockHeld BlockState = "held"
	Ready     BlockState = "ready"
	Lost      BlockState = "lost"
)

// OnHeld decides what becomes of my block, and what I answer, when the other end
// says that it holds a block of that name. same says whether the digests are
// equal; closed whether the block's session is durably closed here, so that I can
// never commit it any more.
//
// A block that goes to Lost from Ready means that the ends disagree about a block
// they once agreed on: an alarm.
func OnHeld(mine BlockState, same, closed bool) (BlockState, HeldAnswer) {
	switch {
	case mine == Absent && closed:
		return Absent, Never
	case mine == Absent:
		return Absent, NotYet
	case mine == Lost || !same:
		return Lost, Different
	}
	return Ready, Equal
}

// OnHeldAnswer decides what becomes of my block when the other end answers my Held.
//
// A Ready block goes to Lost here too if the other end disowns it. No history of
// two honest ends with their memories does that: an alarm.
func OnHeldAnswer(mine BlockState, answer HeldAnswer) BlockState {
	switch {
	case mine == Absent || mine == Lost:
		return mine
	case answer == Different || answer == Never:
		return Lost
	case answer == Equal:
		return Ready
	}
	return mine
}

// PeerRun is what a receiver keeps durably for each node of the peer: the highest
// run it has been told and the last batch of that run committed here.
type PeerRun struct {
	Run  int64
	Last int64
	Anew bool // Last was forgotten, and all atoms of that time are gone: the next batch may have any higher number
}

// Judge says what a batch of a run is to the receiver. A run must be told
// (RunStarted) before its first batch counts.
func (p PeerRun) Judge(run, batch int64) Standing {
	switch {
	case run < p.Run:
		return Stale
	case run > p.Run || batch > p.Last+1 && !p.Anew:
		return Ahead
	case batch <= p.Last:
		return Repeat
	}
	return Fresh
}

// Behind says how p falls short of what was answered for this node; "" if it does
// not. As with Figures, the answer must be older than the reading of p.
func (p PeerRun) Behind(a Acked) string {
	if p.Run < a.Run || p.Run == a.Run && p.Last < a.Batch {
		return fmt.Sprintf("batch %d of run %d of node %s was answered here, and batch %d of run %d is the last that is known", a.Batch, a.Run, a.Node, p.Last, p.Run)
	}
	return ""
}

// Hear returns p after a RunStarted, and whether it may be answered with the
// assigned keys of lower runs: a run that is lower than one already told may not.
func (p PeerRun) Hear(run int64) (PeerRun, bool) {
	switch {
	case run > p.Run:
		return PeerRun{Run: run, Anew: p.Anew}, true
	case run == p.Run:
		return p, true
	}
	return p, false
}

// DecideFresh decides the requests of a fresh batch in order. admit returns why a
// request may not be assigned whatever the pool holds ("" if it may); pooled says
// whether an atom is in the pool here. An atom goes to at most one request, and
// once: no honest peer names it twice.
func DecideFresh(requests []Request, admit func(Request) string, pooled func(key.ID) bool) []Result {
	taken := make(map[key.ID]bool)
	results := make([]Result, len(requests))
	for i, r := range requests {
		results[i] = Result{ID: r.ID}
		if why := admit(r); why != "" {
			results[i].Why = why
			continue
		}
		if lacking := lackingOf(r, func(id key.ID) bool { return pooled(id) && !taken[id] }); len(lacking) > 0 {
			results[i].Why, results[i].Lacking = "atoms not in the pool", lacking
			continue
		}
		if !takeAll(r, taken) {
			results[i].Why = "an atom named twice"
			continue
		}
		results[i].Accepted = true
	}
	return results
}

// takeAll adds the atoms of r to taken. If one is there already it adds none and
// says no.
func takeAll(r Request, taken map[key.ID]bool) bool {
	mine := make(map[key.ID]bool)
	for id := range r.Atoms() {
		if mine[id] || taken[id] {
			return false
		}
		mine[id] = true
	}
	maps.Copy(taken, mine)
	return true
}

// DueRow is what a receiver keeps of one key for one SAE until its epoch ends.
type DueRow struct {
	Key    key.ID
	SAE    identity.SAE
	Master identity.SAE
	Node   string
	Run    int64
	Batch  int64
	Voided bool
}

// DecideRepeat answers a batch that was committed before, from the rows alone: a
// request is accepted only if each of its keys is due to exactly its slaves under
// this node, run and batch and was not voided. rows returns the due rows of a key.
//
// The atoms that a refused request lacks may have become more since the batch was
// committed, never fewer.
func DecideRepeat(a Announce, rows func(key.ID) []DueRow, pooled func(key.ID) bool) []Result {
	taken := make(map[key.ID]bool)
	results := make([]Result, len(a.Requests))
	for i, r := range a.Requests {
		assigned := !slices.ContainsFunc(r.Keys, func(k Key) bool { return !assignedAs(a, r, rows(k.ID())) })
		if assigned && takeAll(r, taken) {
			results[i] = Result{ID: r.ID, Accepted: true}
			continue
		}
		results[i] = Result{ID: r.ID, Why: "not assigned by this batch", Lacking: lackingOf(r, pooled)}
	}
	return results
}

func assignedAs(a Announce, r Request, rows []DueRow) bool {
	if len(rows) != len(r.Slaves) {
		return false
	}
	for _, row := range rows {
		if row.Voided || row.Node != a.Node || row.Run != a.Run || row.Batch != a.Batch ||
			row.Master != r.Master || !slices.Contains(r.Slaves, row.SAE) {
			return false
		}
	}
	return true
}

func lackingOf(r Request, pooled func(key.ID) bool) []key.ID {
	var lacking []key.ID
	for id := range r.Atoms() {
		if !pooled(id) {
			lacking = append(lacking, id)
		}
	}
	return lacking
}

// Voids says whether v takes back the key of row. It is matched against the
// batch that made the row, never against the node's current run.
func (v Void) Voids(row DueRow) bool {
	return row.Node == v.Node && row.Run == v.Run && row.Batch == v.Batch && slices.Contains(v.Keys, row.Key)
}
