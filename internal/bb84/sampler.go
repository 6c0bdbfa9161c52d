package bb84

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
)

// MaxGates is the most gates a block can have: gaps are drawn in float64.
const MaxGates = 1 << 50

// Detection is one counted click as the receiver reports it.
type Detection struct {
	Gate   int64 // counted from 0 at the start of the block
	Basis  Basis // the receiver's
	Bit    byte  // 0 or 1; after a double click the receiver's own random bit
	Double bool  // both detectors clicked
}

// Event is a counted click and what the transmitter did in its gate.
type Event struct {
	Detection
	Sent Sent
}

// Sampler draws the events of one block in order of their gates. The gaps between
// clicks are geometric: floor(E / -ln(1-p)) with E exponential and p the chance of a
// click in a live gate; so a gate without a click is never looked at. Nor is a click
// without an afterpulse: their number up to one with it is geometric too. Given a click,
// the intensity of its pulse is drawn, by Alice's generator, with the chances that it
// then has; bases and bits are as they were. A Sampler is for one goroutine.
type Sampler struct {
	physics    *physics
	gap        *ziggurat // of the distribution of gaps
	alice, bob *Choices
	gates      int64                         // of the block
	next       int64                         // first gate not yet decided
	apart      float64                       // mean of the exponential whose whole part is the number of gates without a click
	clicked    spread                        // intensities of gates with a click of their own
	dark       spread                        // and of gates without
	light      [MaxIntensities][2]thresholds // by intensity; when the bases are equal, and when they are not
	dead       int64
	pending    bool    // an afterpulse may come in the gate next
	quiet      float64 // mean of the exponential whose whole part is the number of clicks without an afterpulse
	until      float64 // clicks without one that are still to come; infinite if there are no afterpulses
}

// thresholds on a 53-bit number for the outcome of a gate that has a click: below
// right only the detector of the bit sent clicked, from there below single only
// the other, above that both.
type thresholds struct {
	right, single uint64
}

// NewSampler starts a block of that many gates. The source decides what fibre, Eve
// and detectors do; its numbers must have nothing to do with the seeds of the
// ends.
func NewSampler(p Params, e Eve, gates int64, alice, bob *Choices, source rand.Source) (*Sampler, error) {
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("link parameters: %w", err)
	}
	if err := e.Validate(); err != nil {
		return nil, fmt.Errorf("eavesdropper: %w", err)
	}
	if gates < 1 || gates > MaxGates {
		return nil, fmt.Errorf("a block of %d gates: want 1 to 2^50", gates)
	}
	s := &Sampler{
		physics: newPhysics(source), gap: newZiggurat(),
		alice: alice, bob: bob, gates: gates,
		dead: p.DeadGates, quiet: -1 / math.Log1p(-p.Afterpulse),
	}
	var click float64
	with, without := make([]float64, len(p.Intensities)), make([]float64, len(p.Intensities))
	for k, in := range p.Intensities {
		same, mix := p.outcomes(e, in.Mu)
		s.light[k] = [2]thresholds{same.thresholds(), mix.thresholds()}
		with[k], without[k] = in.P*same.click(), in.P*(1-same.click())
		click += with[k]
	}
	s.apart = -1 / math.Log1p(-click) // infinite if nothing ever clicks
	s.until = s.untilAfterpulse()
	s.clicked, s.dark = newSpread(with), newSpread(without)
	return s, nil
}

func (o outcomes) thresholds() thresholds {
	click := o.click()
	if click <= 0 {
		return thresholds{}
	}
	return thresholds{
		right:  uint64(math.Round(o.right / click * unit)),
		single: uint64(math.Round((o.right + o.wrong) / click * unit)),
	}
}

// Next gives the next event, or false at the end of the block.
func (s *Sampler) Next() (Event, bool) {
	var one [1]Event
	n := s.Read(one[:])
	return one[0], n == 1
}

// Read draws the next events, as many as there is room for, and says how many these are:
// fewer at the end of the block alone.
func (s *Sampler) Read(events []Event) int {
	read := 0
	for read < len(events) && s.next < s.gates {
		read += s.read(events[read:])
	}
	return read
}

// read draws some of the next events, at least one unless the block ends. It looks at the
// choices of the ends as they lie in memory, so that nothing is called for one of them.
func (s *Sampler) read(events []Event) int {
	bobs := s.bob.coming(len(events))
	alices := s.alice.coming(len(bobs) / drawBytes)
	events = events[:len(alices)/drawBytes]
	next, pending, until := s.next, s.pending, s.until
	read := 0
	for i := range events {
		gap := s.physics.exponential(s.gap) * s.apart
		var mask byte // bit 0: the detector of 0 clicked, bit 1: that of 1
		own, intensities := true, &s.clicked
		if pending {
			if until--; until < 0 {
				mask = 1 + byte(s.physics.word()>>63)
				until = s.untilAfterpulse()
				if own = gap < 1; !own { // or the gate has a click of its own, too
					intensities = &s.dark
				}
				gap = 0
			}
		}
		if !(gap < float64(s.gates-next)) { // true for NaN: nothing ever clicks
			next = s.gates
			break
		}
		gate := next + int64(gap)
		next, pending = gate+1+s.dead, true

		basis, coin := s.bob.choose(binary.LittleEndian.Uint64(bobs[drawBytes*i:]))
		sent := s.alice.sentBy(binary.LittleEndian.Uint64(alices[drawBytes*i:]), intensities)
		if own {
			mask |= s.click(sent, basis)
		}
		e := &events[i]
		*e = Event{Detection{Gate: gate, Basis: basis, Bit: mask >> 1}, sent}
		if mask == 3 {
			e.Bit, e.Double = coin, true
		}
		read++
	}
	s.next, s.pending, s.until = next, pending, until
	s.bob.drop(read)
	s.alice.drop(read)
	return read
}

// untilAfterpulse draws how many clicks have no afterpulse before one has.
func (s *Sampler) untilAfterpulse() float64 {
	return math.Floor(s.physics.exponential(s.gap) * s.quiet)
}

// click draws which detectors a gate's own click is in.
func (s *Sampler) click(sent Sent, bob Basis) byte {
	t := &s.light[sent.Intensity][sent.Basis^bob]
	u := s.physics.word() >> 11
	_, right := bits.Sub64(u, t.right, 0)
	_, single := bits.Sub64(u, t.single, 0)
	return 1<<(sent.Bit^byte(1-right)) | 3*byte(1-single)
}
