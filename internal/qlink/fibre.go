package qlink

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

// maxDetections is how many detections of a block the receiver is built to hold,
// on the average.
const maxDetections = 1 << 23

// maxHeld is how many blocks a device holds, so that light goes on while the ends sift what
// was fired before: a few, for ends so far apart that a message there and back takes as long
// as the light of some blocks.
const maxHeld = 4

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

	held []*emission // what may be asked for, ascending; at most maxHeld
}

// emission is what a transmitter holds of a block.
type emission struct {
	block, gates int64
	next         int64 // first gate not yet answered for
	choices      *bb84.Choices
	clicked      distill.Gates       // the gates that clicked
	at           distill.GatesReader // of these, the one at or before next
	sent         []byte              // what was sent in each of them (sentCode)
}

// receiver is Bob's end for as long as one connection lives. All under fibre.mu.
type receiver struct {
	seeded  bool
	seed    [bb84.SeedSize]byte
	session int64

	held []measurement // what was not fetched, ascending; at most maxHeld
}

// measurement is what a receiver holds of a block.
type measurement struct {
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
	t.forget(len(t.held))
	clear(t.seed[:])
	*t = transmitter{last: -1}
}

// forget drops the first blocks that it holds.
func (t *transmitter) forget(blocks int) {
	for _, e := range t.held[:blocks] {
		e.choices.Wipe()
		scrap(e.sent)
	}
	t.held = slices.Delete(t.held, 0, blocks)
}

func (r *receiver) darken() {
	r.forget(len(r.held))
	clear(r.seed[:])
	*r = receiver{}
}

// forget drops the first blocks that it holds.
func (r *receiver) forget(blocks int) {
	for _, m := range r.held[:blocks] {
		scrap(m.seen)
	}
	r.held = slices.Delete(r.held, 0, blocks)
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
// receiver saw nothing it is decided now: nobody has had a use for it. What lies before, in
// this block and those fired before it, is not answered for any more.
func (f *fibre) sent(t *transmitter, name blockName, question []byte) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, before := new(emission), slices.IndexFunc(t.held, func(e *emission) bool { return e.block == name.block })
	if before >= 0 {
		e = t.held[before]
	}
	gates, err := parseAsked(question, e.clicked)
	if err != nil {
		return nil, err
	}
	asked := gates.Reader()
	asking := asked.Next()
	switch {
	case f.alice != t:
		return nil, refuse("another connection has taken this end")
	case !t.seeded || t.session != name.session || before < 0:
		return nil, refuse("block %d of session %d is not in the transmitter's buffer", name.block, name.session)
	case asking && asked.Gate < e.next:
		return nil, refuse("gate %d was passed before: the next is %d", asked.Gate, e.next)
	case gates.End() > e.gates:
		return nil, refuse("gate %d of a block of %d", gates.End()-1, e.gates)
	}
	t.forget(before)
	if !asking {
		return encodeChoices(nil), nil
	}
	if e.next == 0 && gates.Equal(e.clicked) { // Bob has named all that clicked, as he should
		e.next = gates.End()
		return encodeChoices(e.sent), nil
	}
	sent := make([]byte, 0, gates.Len())
	defer func() { clear(sent) }()
	for more := true; more; more = asked.Next() {
		for e.at.Gate < asked.Gate && e.at.Next() {
		}
		if e.at.Gate == asked.Gate {
			sent = append(sent, e.sent[e.at.At])
		} else {
			sent = append(sent, sentCode(e.choices.Sent()))
		}
	}
	e.next = gates.End()
	return encodeChoices(sent), nil
}

// detections hands over what the receiver saw in a block, once, in wire form.
func (f *fibre) detections(r *receiver, name blockName) (gates [][]byte, seen []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := slices.IndexFunc(r.held, func(m measurement) bool { return m.block == name.block })
	switch {
	case f.bob != r:
		return nil, nil, refuse("another connection has taken this end")
	case !r.seeded || r.session != name.session:
		return nil, nil, refuse("the receiver is not seeded for session %d", name.session)
	case at >= 0:
		m := r.held[at]
		gates, seen = encodeDetections(m.clicked, m.seen)
		scrap(m.seen)
		r.held = slices.Delete(r.held, at, at+1)
		return gates, seen, nil
	case f.cut:
		return nil, nil, ErrCut
	}
	return nil, nil, ErrLost
}
