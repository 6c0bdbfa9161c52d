package handover

import (
	"fmt"
	"maps"
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// Verb is what an initiator does with a request's keys once their fate is known.
type Verb byte

// The verbs.
const (
	Commit  Verb = iota // assigned in time: delete the keys here, then answer
	Return              // not assigned: burn Burn, give the rest back to the lease
	Reclaim             // assigned, but nobody waits any more: burn all of it and void it at the peer
)

// Settlement is the decision on one request of an answered batch.
type Settlement struct {
	Request Request
	Batch   int64
	Verb    Verb
	Burn    []key.ID // with Return: atoms that the peer does not have
	Why     string   // with Return: the peer's reason
}

// Sender numbers the announces of one node to one peer in one run, and decides
// what an answer means. It is owned by one goroutine; it forgets everything at a
// crash, and a takeover of the run then does what it would have done.
type Sender struct {
	node   string
	run    int64
	window int
	last   int64 // the highest batch number given out
	flying map[int64]*flight
}

type flight struct {
	announce Announce
	doubt    bool // its callers have been told 503
}

// NewSender returns a Sender that keeps at most window batches in flight.
func NewSender(node string, run int64, window int) *Sender {
	return &Sender{node: node, run: run, window: window, flying: make(map[int64]*flight)}
}

// Free says whether another batch may be sent.
func (s *Sender) Free() bool { return len(s.flying) < s.window }

// Next makes the next batch of requests. It is to be sent as it is, and repeated
// unchanged until it is answered.
func (s *Sender) Next(requests []Request) Announce {
	s.last++
	a := Announce{Node: s.node, Run: s.run, Batch: s.last, Requests: requests}
	s.flying[s.last] = &flight{announce: a}
	return a
}

// Unsent takes back a batch of which not one byte has left, and says whether that
// is possible: only of the newest number, since a gap would hold up those behind.
// Otherwise the batch is in doubt.
func (s *Sender) Unsent(batch int64) bool {
	if f := s.flying[batch]; batch != s.last || f == nil || f.doubt {
		return false
	}
	delete(s.flying, batch)
	s.last--
	return true
}

// Doubt says that the answer to a batch did not come in time. Its keys are parked:
// neither leasable nor burned, until the same batch is answered.
func (s *Sender) Doubt(batch int64) {
	if f := s.flying[batch]; f != nil {
		f.doubt = true
	}
}

// Repeats are the batches in doubt, to be sent again unchanged.
func (s *Sender) Repeats() []Announce {
	var as []Announce
	for _, b := range slices.Sorted(maps.Keys(s.flying)) {
		if f := s.flying[b]; f.doubt {
			as = append(as, f.announce)
		}
	}
	return as
}

// Answered decides on each request of a batch from the peer's answer. An answer
// that does not fit the batch leaves it in flight and is an error.
func (s *Sender) Answered(batch int64, answer AnnounceAnswer) ([]Settlement, error) {
	f := s.flying[batch]
	if f == nil {
		return nil, nil // answered before
	}
	if answer.Standing != Fresh && answer.Standing != Repeat {
		return nil, fmt.Errorf("batch %d of run %d is %s to the peer", batch, s.run, answer.Standing)
	}
	if len(answer.Results) != len(f.announce.Requests) {
		return nil, fmt.Errorf("batch %d: %d results for %d requests", batch, len(answer.Results), len(f.announce.Requests))
	}
	settled := make([]Settlement, len(answer.Results))
	for i, res := range answer.Results {
		r := f.announce.Requests[i]
		if res.ID != r.ID {
			return nil, fmt.Errorf("batch %d: result %d is of request %q, want %q", batch, i, res.ID, r.ID)
		}
		settled[i] = Settlement{Request: r, Batch: batch}
		switch {
		case res.Accepted && !f.doubt:
			settled[i].Verb = Commit
		case res.Accepted:
			settled[i].Verb = Reclaim
		default:
			settled[i].Verb, settled[i].Burn, settled[i].Why = Return, own(r, res.Lacking), res.Why
		}
	}
	delete(s.flying, batch)
	return settled, nil
}

// own keeps of lacking what the request did name: a peer cannot burn other keys.
func own(r Request, lacking []key.ID) []key.ID {
	named := make(map[key.ID]bool)
	for _, k := range r.Keys {
		for _, id := range k.Atoms {
			named[id] = true
		}
	}
	var ids []key.ID
	for _, id := range lacking {
		if named[id] {
			ids = append(ids, id)
		}
	}
	return ids
}
