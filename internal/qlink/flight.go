package qlink

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

// shot is a block on its way.
type shot struct {
	blockName
	gates    int64
	params   bb84.Params
	eve      bb84.Eve
	stall    time.Duration
	cuts     int64
	expected int // detections, roughly
	choices  *bb84.Choices
	receiver *receiver // nil: nobody looks
	seed     [bb84.SeedSize]byte
	physics  mathrand.Source
}

// traces are what a block leaves at the ends: the gates that clicked, and what was seen
// and what was sent in each of them, secret.
type traces struct {
	clicked    distill.Gates
	seen, sent []byte // seenCode, sentCode
	doubles    int64
}

func (l *traces) add(events []bb84.Event) {
	l.seen, l.sent = room(l.seen, len(events)), room(l.sent, len(events))
	for i := range events {
		e := &events[i]
		l.clicked.Add(e.Gate)
		l.seen, l.sent = append(l.seen, seenCode(e.Detection)), append(l.sent, sentCode(e.Sent))
		if e.Double {
			l.doubles++
		}
	}
}

func (l *traces) wipe() {
	scrap(l.seen)
	scrap(l.sent)
}

// scraps are lists that were wiped, for the next blocks: millions of bytes that need not come
// anew from the system.
var scraps sync.Pool

// scrap wipes a list that nobody uses any more.
func scrap(list []byte) {
	if cap(list) > 0 {
		clear(list)
		list = list[:0]
		scraps.Put(&list)
	}
}

// list is an empty one with room for so many bytes.
func list(room int) []byte {
	if l, ok := scraps.Get().(*[]byte); ok && cap(*l) >= room {
		return *l
	}
	return make([]byte, 0, room)
}

// room is list with room for n more, and leaves no copy behind.
func room(list []byte, n int) []byte {
	if cap(list)-len(list) >= n {
		return list
	}
	grown := append(make([]byte, 0, 2*cap(list)+n), list...)
	scrap(list)
	return grown
}

// fire sends a block of gates from t and leaves what the receiver saw with it, all
// at once after the last gate.
func (f *fibre) fire(ctx context.Context, t *transmitter, name blockName, gates int64) (err error) {
	begun := time.Now()
	s, err := f.begin(t, name, gates)
	if err != nil {
		return err
	}
	defer func() {
		clear(s.seed[:])
		if err != nil {
			s.choices.Wipe()
		}
	}()
	var left traces
	if s.receiver != nil {
		if left, err = f.fly(ctx, t, s); err != nil {
			return err
		}
	}
	lost, err := f.land(t, s, left)
	if err != nil {
		return err
	}
	f.log.Info("block fired", "session", name.session, "block", name.block, "gates", gates,
		"detections", left.clicked.Len(), "doubles", left.doubles, "eve", describe(s.eve), "lost", lost, "took", time.Since(begun))
	return nil
}

// begin checks that the block may be fired and takes note of all that decides it.
func (f *fibre) begin(t *transmitter, name blockName, gates int64) (*shot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	expected := f.params.Rates(f.eve).Gain * float64(gates)
	switch {
	case f.alice != t:
		return nil, refuse("another connection has taken this end")
	case !t.seeded || t.session != name.session:
		return nil, refuse("the transmitter is not seeded for session %d", name.session)
	case name.block <= t.last:
		return nil, refuse("block %d follows block %d", name.block, t.last)
	case gates < 1 || gates > distill.MaxGates || expected > maxDetections:
		return nil, refuse("a block of %d gates, about %.3g detections: want 1 gate to %d detections", gates, expected, maxDetections)
	}
	t.last = name.block
	if f.cut {
		return nil, ErrCut
	}
	choices, err := bb84.AliceChoices(&t.seed, name.session, name.block, f.params)
	if err != nil {
		return nil, err
	}
	t.forget(max(0, len(t.held)-maxHeld+1))
	s := &shot{blockName: name, gates: gates, expected: int(expected), choices: choices, eve: f.eve, cuts: f.cuts, physics: f.physics()}
	f.upset.strike(s, f.params)
	if r := f.bob; r != nil {
		r.forget(max(0, len(r.held)-maxHeld+1)) // what was not fetched by now is stale
		if r.seeded && r.session == name.session {
			s.receiver, s.seed = r, r.seed
		}
	}
	f.stats.blocks++
	f.stats.gates += gates
	return s, nil
}

// physics is a generator for one block. It is called under mu.
func (f *fibre) physics() mathrand.Source {
	if f.seed != 0 {
		return mathrand.NewPCG(f.seed, uint64(f.stats.blocks))
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails: it ends the process instead
	return mathrand.NewPCG(binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:]))
}

// fly plays a block out.
func (f *fibre) fly(ctx context.Context, t *transmitter, s *shot) (left traces, err error) {
	bob, err := bb84.BobChoices(&s.seed, s.session, s.block, s.params)
	if err != nil {
		return left, err
	}
	defer bob.Wipe()
	sampler, err := bb84.NewSampler(s.params, s.eve, s.gates, s.choices, bob, s.physics)
	if err != nil {
		return left, err
	}
	defer func() {
		if err != nil {
			left.wipe()
		}
	}()
	if err := f.waitOut(ctx, s.stall); err != nil {
		return left, err
	}
	most := s.expected + s.expected/64 + 64
	left = traces{clicked: distill.NewGates(most), seen: list(most), sent: list(most)}
	events := make([]bb84.Event, 512) // as much key stream as the ends make at a time
	defer clear(events)
	for n := len(events); n == len(events); {
		if err := f.underWay(ctx, t, s); err != nil {
			return left, err
		}
		n = sampler.Read(events)
		left.add(events[:n])
	}
	return left, nil
}

// underWay says why a block must not go on, if it must not.
func (f *fibre) underWay(ctx context.Context, t *transmitter, s *shot) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case f.alice != t:
		return refuse("another connection has taken this end")
	case f.cuts != s.cuts:
		return ErrCut
	}
	return nil
}

// land leaves a block with the transmitter, and with the receiver that was there at its
// first gate.
func (f *fibre) land(t *transmitter, s *shot, left traces) (lost bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cuts != s.cuts {
		left.wipe()
		return false, ErrCut
	}
	r := s.receiver
	t.held = append(t.held, &emission{
		block: s.block, gates: s.gates, choices: s.choices,
		clicked: left.clicked, at: left.clicked.Reader(), sent: left.sent,
	})
	if r == nil || f.bob != r || r.session != s.session || r.seed != s.seed {
		scrap(left.seen)
		f.stats.lost++
		return true, nil
	}
	f.stats.detections += int64(left.clicked.Len())
	f.stats.doubles += left.doubles
	r.held = append(r.held, measurement{s.block, left.clicked, left.seen})
	return false, nil
}
