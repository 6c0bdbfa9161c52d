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
	knows map[int64]byte // by gate: Alice's bit, where Eve has it for certain
}

// intercepts is how likely it is, of an event with equal bases, that an Eve who intercepts a
// fraction of the pulses had measured it in these, by Bayes: then the wrong bit is as rare
// as without her, with her in the other basis it comes half the time.
func intercepts(link bb84.Params, fraction float64) func(bb84.Event) float64 {
	quiet := link.Rates(bb84.Eve{})
	return func(e bb84.Event) float64 {
		seen := 1 - quiet.Error[e.Sent.Intensity]
		if e.Bit != e.Sent.Bit {
			seen = 1 - seen
		}
		return fraction / 2 * seen / ((1-fraction/2)*seen + fraction/4)
	}
}

// splits is how likely it is that an event is of a pulse of several photons, of which an Eve
// who splits them has kept one: she measures it when the bases are told.
func splits(link bb84.Params) func(bb84.Event) float64 {
	click := func(photons int) float64 {
		return 1 - (1-link.DarkPerGate)*(1-link.DarkPerGate)*math.Pow(1-link.EtaBob, float64(photons))
	}
	rates := link.Rates(bb84.Eve{SplitPhotons: true})
	own := 0. // chance of a click that is no afterpulse
	chance := make([]float64, len(link.Intensities))
	for k, in := range link.Intensities {
		p := math.Exp(-in.Mu) * in.Mu
		for n := 2; n < 30; n++ {
			p *= in.Mu / float64(n)
			chance[k] += p * click(n-1)
		}
		own += in.P * chance[k]
	}
	// The gain of the signal is what it is without her, and shares are in proportion.
	signal := -math.Expm1(-link.Eta()*link.Intensities[0].Mu) + 2*link.DarkPerGate
	for k, in := range link.Intensities {
		gain := signal * rates.Share[k] / in.P / (rates.Share[0] / link.Intensities[0].P)
		chance[k] = min(1, chance[k]/gain)
	}
	return func(e bb84.Event) float64 { return chance[e.Sent.Intensity] }
}

// fly samples a block with Eve in it, who knows Alice's bit as likely as knows says.
func fly(t *testing.T, link bb84.Params, gates int64, eve bb84.Eve, knows func(bb84.Event) float64, seed uint64) flown {
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
	s, err := bb84.NewSampler(link, eve, gates, alice, bob, rand.NewPCG(seed, 9))
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(seed, 10))
	for e, ok := s.Next(); ok; e, ok = s.Next() {
		f.clicks = append(f.clicks, click{e.Gate, byte(e.Basis), e.Bit, e.Double})
		f.sent[e.Gate] = pulse{e.Sent.Bit, byte(e.Sent.Basis), e.Sent.Intensity}
		if random.Float64() < knows(e) {
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

// guess is by how many sigma her best guess of the secret's bits differs from a half, and
// that of the key before amplification.
func (e *eve) guess(p Params, out Outcome, random *rand.Rand) (secret, raw float64) {
	guess := e.key(p, func(gate int64) byte {
		if bit, sure := e.knows[gate]; sure {
			return bit
		}
		return byte(random.Uint32() & 1)
	})
	hashed := amplify(guess, p.KeyBits, e.closing.seed, p.SecretBits)
	mine := make([]byte, packedBytes(out.Length))
	copyBits(mine, hashed, 8*PadBytes*p.Pads, out.Length)
	key := e.key(p, func(gate int64) byte { return e.sent[gate].bit })
	return deviation(mine, out.Bits, out.Length), deviation(guess.bytes(), key.bytes(), p.KeyBits)
}

// TestEveLearnsNothing: her best guess of every bit of an accepted block is right half
// the time, whatever she intercepts up to the fraction at which blocks are given up. She
// guesses linearly, as amplification is: of a sum of bits the best guess is the sum of
// the best guesses. Without amplification the same guess is better than that.
func TestEveLearnsNothing(t *testing.T) {
	link := bb84.Standard()
	link.Km, link.DeadGates, link.PX = 0, 0, .73
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
			spy := &eve{flown: fly(t, link, p.Gates, bb84.Eve{InterceptResend: fraction}, intercepts(link, fraction), uint64(i))}
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
			z, zRaw := spy.guess(p, out, random)
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

// TestEveSplitsPhotonsForNothing: over the lab's 10 km no gain shows it when she splits photon
// numbers (TestSplitPhotonsUnseen in package qlink). She then knows every bit of a pulse of several
// photons, and still nothing of the secret.
func TestEveSplitsPhotonsForNothing(t *testing.T) {
	link := bb84.Standard()
	rates := link.Rates(bb84.Eve{})
	p := Params{
		KeyBits: 1 << 19, FrameBits: 1 << 18, PX: link.PX, Intensities: 3, Pads: 2, EpsSec: 1e-14,
		KeyErrors: anything, Doubles: Limits{0, 1 << 24}, LeakLimit: int(1.08 * (1 << 19) * bb84.Entropy(.02)),
	}
	keyRate := rates.Gain * p.PX * p.PX
	p.Gates = int64(1.02 * float64(p.KeyBits) / keyRate)
	p.TestBits = int(.97 * float64(p.Gates) * rates.Gain * (1 - p.PX) * (1 - p.PX))
	counts := bb84.Counts{KeyBits: float64(p.KeyBits), TestBits: float64(p.TestBits)}
	limits := func(expected float64) (Limits, bb84.Interval) {
		by := 6*math.Sqrt(expected) + .02*expected
		return Limits{int(expected - by), int(expected + by)}, bb84.Interval{Min: expected - by, Max: expected + by}
	}
	for k := range link.Intensities {
		p.Key[k], counts.Key[k] = limits(rates.Share[k] * float64(p.KeyBits))
		p.Test[k], counts.Test[k] = limits(rates.Share[k] * float64(p.TestBits))
		most := 1.3*rates.Share[k]*float64(p.TestBits)*rates.Error[k] + 50
		p.TestErrors[k], counts.TestErrors[k] = Limits{Max: int(most)}, bb84.Interval{Max: most}
	}
	bounds := counts.Bounds(link.Intensities, p.EpsSec)
	bounds.Vacuum = 0
	p.SecretBits = bounds.Length(float64(p.LeakLimit), TagBits, p.EpsSec)
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	spy := &eve{flown: fly(t, link, p.Gates, bb84.Eve{SplitPhotons: true}, splits(link), 7)}
	e := newEnds(p, spy.light, 7)
	a, b, closeBoth := newPipe()
	a.meddle = spy.hear(t, p)
	out, _, err, bobErr := e.run(a, b, closeBoth)
	if err != nil || bobErr != nil {
		t.Fatalf("she is seen: Alice %v, Bob %v (QBER %.4f)", err, bobErr, out.QBER)
	}
	z, raw := spy.guess(p, out, rand.New(rand.NewPCG(35, 36)))
	t.Logf("of %d events she knows %d; %d bits: her guess is %.1f sigma from a half; of the key before amplification %.1f",
		len(spy.clicks), len(spy.knows), out.Length, z, raw)
	if math.Abs(z) > 4 {
		t.Errorf("Eve's guess of %d bits is %.1f sigma from a half", out.Length, z)
	}
	if raw < 20 {
		t.Errorf("without amplification her guess is %.1f sigma from a half: this test would not notice", raw)
	}
}
