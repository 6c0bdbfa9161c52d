package qlink

import (
	"fmt"
	"log/slog"
	"sync"

	"github.com/qutemail/kme/internal/bb84"
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
	sent    gateList   // what it sent in the gates that clicked
	reader  gateReader // of sent: the entry at or before next
}

// receiver is Bob's end for as long as one connection lives. All under fibre.mu.
type receiver struct {
	seeded  bool
	seed    [bb84.SeedSize]byte
	session int64

	full  bool // holds a block
	block int64
	list  gateList
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
	t.sent.wipe()
	t.choices, t.gates, t.next, t.reader = nil, 0, 0, gateReader{}
}

func (r *receiver) darken() {
	r.list.wipe()
	clear(r.seed[:])
	*r = receiver{}
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

// sent answers what was sent at gates, which ascend strictly. Of a gate in which the
// receiver saw nothing it is decided now: nobody has had a use for it.
func (f *fibre) sent(t *transmitter, name blockName, gates []int64) ([]bb84.Sent, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.alice != t:
		return nil, refuse("another connection has taken this end")
	case !t.seeded || t.session != name.session || t.last != name.block || t.gates == 0:
		return nil, refuse("block %d of session %d is not in the transmitter's buffer", name.block, name.session)
	case len(gates) == 0:
		return nil, nil
	case gates[0] < t.next:
		return nil, refuse("gate %d was passed before: the next is %d", gates[0], t.next)
	case gates[len(gates)-1] >= t.gates:
		return nil, refuse("gate %d of a block of %d", gates[len(gates)-1], t.gates)
	}
	sent := make([]bb84.Sent, len(gates))
	for i, g := range gates {
		for t.reader.gate < g && t.reader.read() {
		}
		if t.reader.gate == g {
			sent[i] = fromNibble(t.reader.low)
		} else {
			sent[i] = t.choices.Sent()
		}
	}
	t.next = gates[len(gates)-1] + 1
	return sent, nil
}

// detections hands over what the receiver saw in a block, once, in wire form.
func (f *fibre) detections(r *receiver, name blockName) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.bob != r:
		return nil, refuse("another connection has taken this end")
	case !r.seeded || r.session != name.session:
		return nil, refuse("the receiver is not seeded for session %d", name.session)
	case r.full && r.block == name.block:
		body := r.list.encode()
		r.list.wipe()
		r.full = false
		return body, nil
	case f.cut:
		return nil, ErrCut
	}
	return nil, ErrLost
}
