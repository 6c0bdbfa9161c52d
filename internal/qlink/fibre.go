package qlink

import (
	"fmt"
	"log/slog"
	"sync"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

// maxDetections is how many detections of a block the receiver is built to hold,
// on the average.
const maxDetections = 1 << 22

// fibre is the quantum channel without its sockets: transmitter, fibre, receiver.
type fibre struct {
	params bb84.Params
	seed   uint64 // Config.PhysicsSeed
	log    *slog.Logger

	mu    sync.Mutex
	eve   bb84.Eve
	upset trouble
	cut   bool
	cuts  int64        // counts cuts, so that a block under way sees one that was mended
	alice *transmitter // nil while Alice's KME is not there
	bob   *receiver    // nil while Bob's is not
	stats stats
}

// stats counts since the start.
type stats struct {
	blocks, gates, detections, doubles int64
	lost                               int64 // blocks that no receiver saw
}

// transmitter is Alice's end for as long as one connection lives. It is used by
// the goroutine of that connection alone, and under fibre.mu.
type transmitter struct {
	seeded  bool
	seed    [bb84.SeedSize]byte
	session int64
	last    int64 // number of the last block begun, -1 before the first

	gates   int64 // of that block; 0 if it failed
	next    int64 // first gate of it not yet answered for
	choices *bb84.Choices
	clicked distill.Gates       // the gates that clicked
	at      distill.GatesReader // of these, the one at or before next
	sent    []byte              // what it sent in each of them (sentCode)
}

// receiver is Bob's end for as long as one connection lives. All under fibre.mu.
type receiver struct {
	seeded  bool
	seed    [bb84.SeedSize]byte
	session int64

	full    bool // holds a block
	block   int64
	clicked distill.Gates
	seen    []byte // at each of these (seenCode)
}

func (f *fibre) attachAlice(t *transmitter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.alice = t
}

func (f *fibre) attachBob(r *receiver) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.bob = r
}

// detachAlice forgets what t knew. The end stays with whoever has replaced it.
func (f *fibre) detachAlice(t *transmitter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.alice == t {
		f.alice = nil
	}
	t.darken()
}

func (f *fibre) detachBob(r *receiver) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bob == r {
		f.bob = nil
	}
	r.darken()
}

func (t *transmitter) darken() {
	t.endBlock()
	clear(t.seed[:])
	*t = transmitter{last: -1}
}

func (t *transmitter) endBlock() {
	if t.choices != nil {
		t.choices.Wipe()
	}
	scrap(t.sent)
	t.choices, t.gates, t.next, t.clicked, t.at, t.sent = nil, 0, 0, distill.Gates{}, distill.GatesReader{}, nil
}

func (r *receiver) darken() {
	r.empty()
	clear(r.seed[:])
	*r = receiver{}
}

// empty forgets the block that it holds.
func (r *receiver) empty() {
	scrap(r.seen)
	r.full, r.clicked, r.seen = false, distill.Gates{}, nil
}

func refuse(format string, args ...any) error {
	return &Refusal{Reason: fmt.Sprintf(format, args...)}
}

// seedAlice starts a session at the transmitter.
func (f *fibre) seedAlice(t *transmitter, session int64, seed *[bb84.SeedSize]byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.alice != t {
		return refuse("another connection has taken this end")
	}
	t.darken()
	t.seeded, t.seed, t.session = true, *seed, session
	return nil
}

// seedBob starts a session at the receiver.
func (f *fibre) seedBob(r *receiver, session int64, seed *[bb84.SeedSize]byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bob != r {
		return refuse("another connection has taken this end")
	}
	r.darken()
	r.seeded, r.seed, r.session = true, *seed, session
	return nil
}

// sent answers what was sent at the gates asked for, in wire form. Of a gate in which the
// receiver saw nothing it is decided now: nobody has had a use for it.
func (f *fibre) sent(t *transmitter, name blockName, question []byte) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gates, err := parseAsked(question, t.clicked)
	if err != nil {
		return nil, err
	}
	asked := gates.Reader()
	switch {
	case f.alice != t:
		return nil, refuse("another connection has taken this end")
	case !t.seeded || t.session != name.session || t.last != name.block || t.gates == 0:
		return nil, refuse("block %d of session %d is not in the transmitter's buffer", name.block, name.session)
	case !asked.Next():
		return encodeChoices(nil), nil
	case asked.Gate < t.next:
		return nil, refuse("gate %d was passed before: the next is %d", asked.Gate, t.next)
	case gates.End() > t.gates:
		return nil, refuse("gate %d of a block of %d", gates.End()-1, t.gates)
	}
	if t.next == 0 && gates.Equal(t.clicked) { // Bob has named all that clicked, as he should
		t.next = gates.End()
		return encodeChoices(t.sent), nil
	}
	sent := make([]byte, 0, gates.Len())
	defer func() { clear(sent) }()
	for more := true; more; more = asked.Next() {
		for t.at.Gate < asked.Gate && t.at.Next() {
		}
		if t.at.Gate == asked.Gate {
			sent = append(sent, t.sent[t.at.At])
		} else {
			sent = append(sent, sentCode(t.choices.Sent()))
		}
	}
	t.next = gates.End()
	return encodeChoices(sent), nil
}

// detections hands over what the receiver saw in a block, once, in wire form.
func (f *fibre) detections(r *receiver, name blockName) (gates [][]byte, seen []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.bob != r:
		return nil, nil, refuse("another connection has taken this end")
	case !r.seeded || r.session != name.session:
		return nil, nil, refuse("the receiver is not seeded for session %d", name.session)
	case r.full && r.block == name.block:
		gates, seen = encodeDetections(r.clicked, r.seen)
		r.empty()
		return gates, seen, nil
	case f.cut:
		return nil, nil, ErrCut
	}
	return nil, nil, ErrLost
}
