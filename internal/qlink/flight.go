package qlink

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	mathrand "math/rand/v2"
	"time"

	"github.com/qutemail/kme/internal/bb84"
)

// shot is a block on its way.
type shot struct {
	blockName
	gates    int64
	params   bb84.Params
	eve      bb84.Eve
	stall    time.Duration
	cuts     int64
	receiver *receiver // nil: nobody looks
	seed     [bb84.SeedSize]byte
	physics  mathrand.Source
}

// fire sends a block of gates from t and leaves what the receiver saw with it, all
// at once after the last gate.
func (f *fibre) fire(ctx context.Context, t *transmitter, name blockName, gates int64) error {
	begun := time.Now()
	s, err := f.begin(t, name, gates)
	if err != nil {
		return err
	}
	defer clear(s.seed[:])
	var seen, sent gateList
	defer sent.wipe()
	var doubles int64
	if s.receiver != nil {
		if seen, sent, doubles, err = f.fly(ctx, t, s); err != nil {
			f.abandon(t)
			return err
		}
	}
	count := seen.count
	lost, err := f.land(t, s, seen, sent, doubles)
	if err != nil {
		return err
	}
	sent = gateList{} // it is the transmitter's now
	f.log.Info("block fired", "session", name.session, "block", name.block, "gates", gates,
		"detections", count, "doubles", doubles, "eve", describe(s.eve), "lost", lost, "took", time.Since(begun))
	return nil
}

// begin checks that the block may be fired and takes note of all that decides it.
func (f *fibre) begin(t *transmitter, name blockName, gates int64) (*shot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch expected := f.params.Rates(f.eve).Gain * float64(gates); {
	case f.alice != t:
		return nil, refuse("another connection has taken this end")
	case !t.seeded || t.session != name.session:
		return nil, refuse("the transmitter is not seeded for session %d", name.session)
	case name.block <= t.last:
		return nil, refuse("block %d follows block %d", name.block, t.last)
	case gates < 1 || gates > bb84.MaxGates || expected > maxDetections:
		return nil, refuse("a block of %d gates, about %.3g detections: want 1 gate to %d detections", gates, expected, maxDetections)
	}
	t.endBlock()
	t.last = name.block
	if f.cut {
		return nil, ErrCut
	}
	choices, err := bb84.AliceChoices(&t.seed, name.session, name.block, f.params)
	if err != nil {
		return nil, err
	}
	t.choices, t.gates = choices, gates
	s := &shot{blockName: name, gates: gates, eve: f.eve, cuts: f.cuts, physics: f.physics()}
	f.upset.strike(s, f.params)
	if r := f.bob; r != nil {
		r.list.wipe() // whatever was not fetched by now is stale
		r.full = false
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
func (f *fibre) fly(ctx context.Context, t *transmitter, s *shot) (seen, sent gateList, doubles int64, err error) {
	bob, err := bb84.BobChoices(&s.seed, s.session, s.block, s.params)
	if err != nil {
		return seen, sent, 0, err
	}
	defer bob.Wipe()
	sampler, err := bb84.NewSampler(s.params, s.eve, s.gates, t.choices, bob, s.physics)
	if err != nil {
		return seen, sent, 0, err
	}
	defer func() {
		if err != nil {
			seen.wipe()
			sent.wipe()
		}
	}()
	if err := f.waitOut(ctx, s.stall); err != nil {
		return seen, sent, 0, err
	}
	for e, ok := sampler.Next(); ok; e, ok = sampler.Next() {
		if seen.count%4096 == 0 {
			if err := f.underWay(ctx, t, s); err != nil {
				return seen, sent, 0, err
			}
		}
		seen.addDetection(e.Detection)
		sent.add(e.Gate, nibble(e.Sent))
		if e.Double {
			doubles++
		}
	}
	return seen, sent, doubles, nil
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

// land leaves a block with the receiver that was there at its first gate.
func (f *fibre) land(t *transmitter, s *shot, seen, sent gateList, doubles int64) (lost bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cuts != s.cuts {
		seen.wipe()
		t.endBlock()
		return false, ErrCut
	}
	r := s.receiver
	t.sent = sent
	t.reader = gateReader{rest: sent.list, gate: -1}
	if r == nil || f.bob != r || r.session != s.session || r.seed != s.seed {
		seen.wipe()
		f.stats.lost++
		return true, nil
	}
	f.stats.detections += seen.count
	f.stats.doubles += doubles
	r.full, r.block, r.list = true, s.block, seen
	return false, nil
}

func (f *fibre) abandon(t *transmitter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t.endBlock()
}
