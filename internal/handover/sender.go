package handover

import (
	"errors"
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
	Full    bool     // with Return: the reason is that the slaves have too much to take
	Parked  bool     // the batch was in doubt: its keys were parked, and are to be unparked

	node string
	run  int64
}

// Void takes the request's keys back at the peer: after Reclaim, or when a Commit
// comes up short here.
func (s Settlement) Void() Void {
	v := Void{Node: s.node, Run: s.run, Batch: s.Batch}
	for _, k := range s.Request.Keys {
		v.Keys = append(v.Keys, k.ID())
	}
	return v
}

// ErrAhead says that the peer cannot judge a batch yet: one before it is missing
// there, or the run has not been told. It is to be sent again, unchanged.
var ErrAhead = errors.New("the peer has not come to this batch yet")

// ErrDeclined says that the peer has not looked at the copy of the batch that it
// answers: if it was the only one, the batch was never told (Unsent).
var ErrDeclined = errors.New("the peer cannot judge a batch now")

// ErrStale says that the run of a batch was taken over: its process may do nothing
// more, and whoever took it over settles its batches.
var ErrStale = errors.New("the run has been taken over")

// Sender numbers the announces of one node to one peer in one run, and decides
// what an answer means. It is owned by one goroutine; it forgets everything at a
// crash, and a takeover of the run then does what it would have done.
//
// A batch that has been sent stays in flight until the peer has answered it. Its
// keys are meanwhile neither served nor used for anything else, however long that
// takes: only the answer, or a finished takeover, says whether they were assigned.
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

// Unsent takes back a batch that the peer can never act on (of its only copy not
// one byte has left, or it was refused as a whole), and says whether that is
// possible: only of the newest number, since a gap would hold up those behind, and
// only if no other copy may be on its way. Otherwise the batch is to be put in
// doubt and repeated.
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

// Answered decides on each request of a batch from the peer's answer. It returns
// nothing for a batch that is not in flight: it was settled before. With an error
// the batch stays in flight: ErrAhead, ErrDeclined, ErrStale, or an answer that
// does not fit the batch, which no honest peer gives. The answer must be to a copy
// of the batch as it is in flight, not of one that was taken back (Unsent).
func (s *Sender) Answered(batch int64, answer AnnounceAnswer) ([]Settlement, error) {
	f := s.flying[batch]
	if f == nil {
		return nil, nil
	}
	switch answer.Standing {
	case Fresh, Repeat:
	case Ahead:
		return nil, fmt.Errorf("batch %d of run %d: %w", batch, s.run, ErrAhead)
	case Declined:
		return nil, fmt.Errorf("batch %d of run %d: %w", batch, s.run, ErrDeclined)
	case Stale:
		return nil, fmt.Errorf("batch %d of run %d: %w", batch, s.run, ErrStale)
	default:
		return nil, fmt.Errorf("batch %d of run %d is %q to the peer", batch, s.run, answer.Standing)
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
		settled[i] = f.settle(r, res)
	}
	delete(s.flying, batch)
	return settled, nil
}

func (f *flight) settle(r Request, res Result) Settlement {
	s := Settlement{Request: r, Batch: f.announce.Batch, Parked: f.doubt, node: f.announce.Node, run: f.announce.Run}
	switch {
	case res.Accepted && !f.doubt:
		s.Verb = Commit
	case res.Accepted:
		s.Verb = Reclaim
	default:
		s.Verb, s.Burn, s.Why, s.Full = Return, own(r, res.Lacking), res.Why, res.Full
	}
	return s
}

// own keeps of lacking what the request did name: a peer cannot burn other keys.
func own(r Request, lacking []key.ID) []key.ID {
	named := make(map[key.ID]bool, r.AtomCount())
	for id := range r.Atoms() {
		named[id] = true
	}
	return slices.DeleteFunc(slices.Clone(lacking), func(id key.ID) bool { return !named[id] })
}
