package handover

import (
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// What follows lets the model's histories be played to real tables as well: see
// TestReplay. It is exported for that test alone, which imports a package that
// imports this one.

// Effort is how long to play.
var Effort = effort

// Tables are those of one site. They are told of each verb that a history commits,
// and with it of what came of it in the model.
type Tables interface {
	Begin(node string, run int64) // a run that will commit
	Bump(node string, run int64)  // a run that its node's lower ones are fenced by
	Do(node string, run int64, verb any)
	Compare(model []string) // after each transaction
}

// The verbs, each with its outcome if it has one.
type (
	DoOpenSession struct {
		Link    string
		Session int64
	}
	DoHold struct {
		Held
		IDs  []key.ID
		Done bool
	}
	DoHeardHeld struct {
		Held
		Answer HeldAnswer
	}
	DoHeardHeldAnswer struct {
		BlockRef
		Answer HeldAnswer
	}
	DoLease struct {
		Link string
		IDs  []key.ID
	}
	DoGiveBack struct {
		IDs  []key.ID // of one chunk
		Done bool
	}
	DoServe struct {
		Request
		Done bool
	}
	DoBurn struct {
		Link string
		IDs  []key.ID
		Void *Void
	}
	DoPark   struct{ IDs []key.ID }
	DoUnpark struct{ IDs []key.ID }
	DoAssign struct {
		Announce
		Answer AnnounceAnswer
	}
	DoVoid    struct{ Void }
	DoAckVoid struct{ Void }
	DoTake    struct {
		Key  key.ID
		SAE  identity.SAE
		Done bool
	}
	DoHearRun struct {
		RunStarted
		Rows []Assigned
		OK   bool
	}
	DoEndTakeover struct {
		Node string
		Run  int64
		Link string
		Done bool
	}
	DoGive struct {
		Link  string
		Given int
	}
	DoTakeGrant struct{ Granted }
	DoAckGrant  struct{ Granted }
)

// Replay plays a numbered history of the model, and with it the tables of its sites: the
// third has none to play in most. It returns what went wrong in the model, and the history's diary.
//
// Nothing expires in it: an end expires whole epochs, and the model single blocks.
func Replay(seed uint64, tables [3]Tables) (steps int, bad string, diary []string) {
	w := newWorldOn(random(seed), broken{}, tables)
	w.noting = true
	w.busy["expire"] = 0
	w.play(length(seed))
	for _, n := range w.steps {
		steps += n
	}
	return steps, w.bad, w.diary
}

// did tells the site's tables, if there are any, of a verb.
func (s *site) did(verb any) {
	if s.tables != nil {
		s.tables.Do(s.acting.node, s.acting.run, verb)
	}
}

// dump is the site's tables as text, a line for each row.
func (s *site) dump() []string {
	var rows []string
	add := func(format string, args ...any) { rows = append(rows, fmt.Sprintf(format, args...)) }
	for _, b := range s.blocks {
		add("block %d/%d %s", b.Session, b.Block, b.state)
		for _, c := range b.chunks {
			owner, lease := "peer", ""
			if c.Mine {
				owner = "here"
			}
			if c.node != "" && s.left(c) > 0 {
				lease = fmt.Sprintf(" leased %s/%d", c.node, c.run)
			}
			add("chunk %d/%d+%d %s %d left %d%s", b.Session, b.Block, c.ref.First, owner, c.Grants, s.left(c), lease)
		}
		for _, id := range b.ids {
			if s.key[id] {
				add("key %s", id)
			}
		}
	}
	for _, d := range s.dues {
		gone := ""
		switch {
		case d.taken:
			gone = "taken"
		case d.Voided:
			gone = "void"
		}
		add("due %s %s of %s by %s/%d/%d %s", d.Key, d.SAE, d.Master, d.Node, d.Run, d.Batch, gone)
	}
	for id, p := range s.parked {
		add("parked %s %s/%d", id, p.node, p.run)
	}
	for _, v := range s.voids {
		add("void %s/%d/%d %s... acked %v", v.Node, v.Run, v.Batch, hex.EncodeToString(v.Keys[0][:]), v.acked)
	}
	for _, g := range s.grants {
		add("grant %d/%d+%d %d acked %v", g.Session, g.Block, g.First, g.Grants, g.acked)
	}
	for name, n := range s.node {
		if n.run > 0 {
			add("run %s %d", name, n.run)
		}
	}
	for name, p := range s.peer {
		add("peer %s %d %d", name, p.Run, p.Last)
	}
	slices.Sort(rows)
	return rows
}
