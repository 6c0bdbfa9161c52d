package distill

import (
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"testing"

	"github.com/qutemail/kme/internal/bb84"
)

// flown is a block of real light with Eve in it, and what she knows of what Alice sent.
type flown struct {
	light
	knows map[int64]byte // by gate: Alice's bit, where Eve measured it in the basis it was sent in
}

// fly samples a block in which Eve intercepts a fraction of the pulses. Of an event with
// equal bases, the chance that she had measured it in these follows from Bayes: then the
// wrong bit is as rare as without her, with her in the other basis it comes half the time.
func fly(t *testing.T, link bb84.Params, gates int64, fraction float64, seed uint64) flown {
	t.Helper()
	f := flown{light{sent: make(map[int64]pulse)}, make(map[int64]byte)}
	var secrets [2][bb84.SeedSize]byte
	secrets[0][0], secrets[1][0] = byte(seed), byte(seed)+1
	alice, err := bb84.AliceChoices(&secrets[0], 1, 1, link)
	if err != nil {
		t.Fatal(err)
	}
	bob, err := bb84.BobChoices(&secrets[1], 1, 1, link)
	if err != nil {
		t.Fatal(err)
	}
	s, err := bb84.NewSampler(link, bb84.Eve{InterceptResend: fraction}, gates, alice, bob, rand.NewPCG(seed, 9))
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(seed, 10))
	quiet := link.Rates(bb84.Eve{})
	for e, ok := s.Next(); ok; e, ok = s.Next() {
		f.clicks = append(f.clicks, click{e.Gate, byte(e.Basis), e.Bit, e.Double})
		f.sent[e.Gate] = pulse{e.Sent.Bit, byte(e.Sent.Basis), e.Sent.Intensity}
		seen := 1 - quiet.Error[e.Sent.Intensity]
		if e.Bit != e.Sent.Bit {
			seen = 1 - seen
		}
		if random.Float64() < fraction/2*seen/((1-fraction/2)*seen+fraction/4) {
			f.knows[e.Gate] = e.Sent.Bit
		}
	}
	return f
}

// eve listens to a block, and has her best guess of every bit that comes of it.
type eve struct {
	flown
	sifted  siftedMessage
	closing closingMessage
}

// hear is what she makes of what Alice says.
func (e *eve) hear(t *testing.T, p Params) func(message) []message {
	return func(m message) []message {
		var err error
		switch m.kind {
		case kindSifted:
			e.sifted, err = parseSifted(m.body, len(e.clicks), p)
		case kindClosing:
			e.closing, err = parseClosing(m.body, p.KeyBits)
		}
		if err != nil {
			t.Error(err)
		}
		return []message{m}
	}
}

// key is the key made of the bits that bit gives for the detected gates.
func (e *eve) key(p Params, bit func(gate int64) byte) frame {
	n := len(e.clicks)
	bases, values := make([]byte, packedBytes(n)), make([]byte, packedBytes(n))
	for i, c := range e.clicks {
		setBit(bases, i, c.basis)
		setBit(values, i, bit(c.gate))
	}
	return sift(p, e.sifted.seed, e.sifted.matches, bases, values, e.sifted.intensities).key
}

// deviation is by how many sigma the share of equal bits differs from one half.
func deviation(a, b []byte, n int) float64 {
	equal := 0
	for i := range a {
		equal += 8 - bits.OnesCount8(a[i]^b[i])
	}
	equal -= 8*len(a) - n // the bits behind the last are 0 in both
	return (float64(equal) - float64(n)/2) / (math.Sqrt(float64(n)) / 2)
}

// TestEveLearnsNothing: her best guess of every bit of an accepted block is right half
// the time, whatever she intercepts up to the fraction at which blocks are given up. She
// guesses linearly, as amplification is: of a sum of bits the best guess is the sum of
// the best guesses. Without amplification the same guess is better than that.
func TestEveLearnsNothing(t *testing.T) {
	link := bb84.Standard()
	link.Km, link.DeadGates = 0, 0
	p := Params{
		KeyBits: 1 << 18, FrameBits: 1 << 17, TestBits: 1 << 15, PX: link.PX, Intensities: 3, Pads: 2, EpsSec: 1e-7,
		Key: anything, Test: anything, KeyErrors: anything, Doubles: Limits{0, 1 << 24},
		LeakLimit: int(1.08 * (1 << 18) * bb84.Entropy(.03)),
	}
	rates := link.Rates(bb84.Eve{})
	p.Gates = int64(1.02 * float64(p.KeyBits) / (rates.Gain * p.PX * p.PX))
	// The most errors that pass: a QBER of about 3 %, twice the fibre's own.
	counts := bb84.Counts{KeyBits: float64(p.KeyBits), TestBits: float64(p.TestBits)}
	for k := range link.Intensities {
		counts.Key[k] = bb84.Exactly(rates.Share[k] * float64(p.KeyBits))
		counts.Test[k] = bb84.Exactly(rates.Share[k] * float64(p.TestBits))
		most := 2.2*rates.Share[k]*float64(p.TestBits)*rates.Error[k] + 20
		p.TestErrors[k].Max = int(most)
		counts.TestErrors[k] = bb84.Interval{Max: most}
	}
	bounds := counts.Bounds(link.Intensities, p.EpsSec)
	bounds.Vacuum = 0
	p.SecretBits = bounds.Length(float64(p.LeakLimit), TagBits, p.EpsSec)
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(33, 34))
	passed, raw := 0, 0.
	for i, fraction := range []float64{0, .01, .03, .05, .15} {
		t.Run(fmt.Sprint(fraction), func(t *testing.T) {
			spy := &eve{flown: fly(t, link, p.Gates, fraction, uint64(i))}
			e := newEnds(p, spy.light, uint64(i))
			a, b, closeBoth := newPipe()
			a.meddle = spy.hear(t, p)
			out, _, err, bobErr := e.run(a, b, closeBoth)
			if fraction > .1 {
				if abort, ok := err.(*Abort); !ok || abort.Reason != ReasonQBER {
					t.Errorf("above the threshold: %v", err)
				}
				return
			}
			if err != nil || bobErr != nil {
				t.Fatalf("Alice %v, Bob %v (QBER %.4f)", err, bobErr, out.QBER)
			}
			passed++
			if want := rates.QBER + fraction/4; math.Abs(out.QBER-want) > 4*math.Sqrt(want/float64(p.TestBits))+fraction*.01 {
				t.Errorf("QBER %.4f, want %.4f", out.QBER, want)
			}
			guess := spy.key(p, func(gate int64) byte {
				if bit, sure := spy.knows[gate]; sure {
					return bit
				}
				return byte(random.Uint32() & 1)
			})
			secret := amplify(guess, p.KeyBits, spy.closing.seed, p.SecretBits)
			mine := make([]byte, packedBytes(out.Length))
			copyBits(mine, secret, 8*PadBytes*p.Pads, out.Length)
			z := deviation(mine, out.Bits, out.Length)
			key := spy.key(p, func(gate int64) byte { return spy.sent[gate].bit })
			zRaw := deviation(guess.bytes(), key.bytes(), p.KeyBits)
			t.Logf("QBER %.4f, %d bits: her guess is %.1f sigma from a half; of the key before amplification %.1f", out.QBER, out.Length, z, zRaw)
			if math.Abs(z) > 4 {
				t.Errorf("Eve's guess of %d bits is %.1f sigma from a half", out.Length, z)
			}
			raw = max(raw, zRaw)
		})
	}
	if passed != 4 {
		t.Errorf("%d blocks were accepted, want 4", passed)
	}
	if raw < 4 {
		t.Errorf("without amplification her guess is %.1f sigma from a half: this test would not notice", raw)
	}
}
