package distill

import (
	"fmt"
	"math"

	"github.com/qutemail/kme/internal/key"
)

// Outcome is a distilled block. After an Abort it holds the figures known by then, and
// no bits.
type Outcome struct {
	Session, Block int64

	Bits   []byte // secret, packed, least significant bit first; the caller wipes it
	Length int    // of Bits, in bits: Params.KeyedBits
	Pads   []Pad  // secret: what the block gives to the reserve; the caller wipes them
	Spent  PadName
	Terms  Terms

	Gates      int64       // gates fired
	Detected   int         // gates at which Bob's detectors clicked
	Doubles    int         // of these, double clicks; Alice's end does not know them
	SiftedKey  int         // of these, both ends in the key basis
	SiftedTest int         // both ends in the test basis
	Key, Test  ByIntensity // the bits used, of these
	TestErrors ByIntensity // errors among the test bits
	KeyErrors  ByIntensity // and among the key bits, as reconciliation found them
	QBER       float64     // error rate of the test bits
	KeyQBER    float64     // error rate of the key bits
	Leak       int         // bits revealed by reconciliation, without the tag
	Rounds     int         // questions that reconciliation asked
	Efficiency float64     // f: Leak over n h(KeyQBER); 0 if there were no errors
	EpsSec     float64     // what the block adds to the chance that a key is not secret
	EpsCor     float64     // to the chance that keys differ or that a forgery went unseen

	// Transcript is SHA-256 over every message of the block before the two that
	// compare it: direction, kind, length, body. Equal at both ends.
	Transcript [32]byte
}

// Atoms is the number of whole atoms in the secret.
func (o Outcome) Atoms() int { return o.Length / key.AtomBits }

// Gain is the chance that a pulse of intensity k was detected, as the sifted events show
// it: those used stand for all. It is 0 if nothing was sifted.
func (o Outcome) Gain(p Params, k int) float64 {
	used := o.Key.total() + o.Test.total()
	pulses := float64(o.Gates) * p.Chances[k] * (p.PX*p.PX + (1-p.PX)*(1-p.PX))
	if used == 0 || !(pulses > 0) {
		return 0
	}
	return float64(o.Key[k]+o.Test[k]) / float64(used) * float64(o.SiftedKey+o.SiftedTest) / pulses
}

// failed is o without its secret, which is wiped.
func (o Outcome) failed() Outcome {
	clear(o.Bits)
	clear(o.Pads)
	o.Bits, o.Length, o.Pads = nil, 0, nil
	return o
}

// enough says which count is below the profile's.
func (o *Outcome) enough(p Params) error {
	if o.SiftedKey < p.KeyBits || o.SiftedTest < p.TestBits {
		return fmt.Errorf("%d key bits and %d test bits were sifted, %d and %d are needed",
			o.SiftedKey, o.SiftedTest, p.KeyBits, p.TestBits)
	}
	return nil
}

// gains says which intensity shows too many or too few bits.
func (o *Outcome) gains(p Params) error {
	for k := range p.Intensities {
		if !p.Key[k].hold(o.Key[k]) {
			return fmt.Errorf("%d key bits of intensity %d, where %d to %d pass", o.Key[k], k, p.Key[k].Min, p.Key[k].Max)
		}
		if !p.Test[k].hold(o.Test[k]) {
			return fmt.Errorf("%d test bits of intensity %d, where %d to %d pass", o.Test[k], k, p.Test[k].Min, p.Test[k].Max)
		}
	}
	return nil
}

// tested sets the errors of the test bits, and says which intensity shows too many.
func (o *Outcome) tested(p Params, errors ByIntensity) error {
	o.TestErrors = errors
	o.QBER = float64(errors.total()) / float64(p.TestBits)
	return within(p.Intensities, errors, p.TestErrors, "test")
}

// corrected sets the figures of reconciliation, and says which intensity shows too many
// errors, if that matters.
func (o *Outcome) corrected(p Params, errors ByIntensity) error {
	o.KeyErrors = errors
	o.KeyQBER = float64(errors.total()) / float64(p.KeyBits)
	if e := entropy(o.KeyQBER); e > 0 {
		o.Efficiency = float64(o.Leak) / (float64(p.KeyBits) * e)
	}
	if p.Intensities > 2 {
		return nil
	}
	return within(p.Intensities, errors, p.KeyErrors, "key")
}

func within(intensities int, counts ByIntensity, limits [MaxIntensities]Limits, what string) error {
	for k := range intensities {
		if !limits[k].hold(counts[k]) {
			return fmt.Errorf("%d errors among the %s bits of intensity %d, where %d to %d pass", counts[k], what, k, limits[k].Min, limits[k].Max)
		}
	}
	return nil
}

// amplified sets the secret that the closing message makes of a verified key.
func (o *Outcome) amplified(p Params, k frame, closing closingMessage, transcript [32]byte) {
	secret := amplify(k, p.KeyBits, closing.seed, p.SecretBits)
	defer clear(secret)
	o.Pads = make([]Pad, p.Pads)
	for i := range o.Pads {
		o.Pads[i].Name = PadName{o.Session, o.Block, i}
		copy(o.Pads[i].Bits[:], secret[i*PadBytes:])
	}
	o.Length = p.KeyedBits()
	o.Bits = make([]byte, packedBytes(o.Length))
	copyBits(o.Bits, secret, 8*PadBytes*p.Pads, o.Length)
	o.Terms = closing.terms
	o.Transcript = transcript
}

// entropy is the binary entropy of x in bits.
func entropy(x float64) float64 {
	if x <= 0 || x >= 1 {
		return 0
	}
	return -x*math.Log2(x) - (1-x)*math.Log2(1-x)
}

// expectedRate is the error rate that the passes are made for, equal at both ends.
func expectedRate(errors, testBits int) float64 {
	return (float64(errors) + 0.5) / float64(testBits)
}

// reconcileProgress guesses from the leak how much of reconciliation is done.
func reconcileProgress(leak, keyBits int, rate float64) float64 {
	const usual = 1.05 // efficiency
	return min(0.99, float64(leak)/(usual*float64(keyBits)*entropy(rate)))
}

func leakError(leak, limit int) error {
	return fmt.Errorf("%d bits would be revealed, %d may be", leak, limit)
}

// epsilons sets what the block adds to the chances that the product promises to bound:
// verification by a polynomial of KeyBits/128 terms, and the tags of either direction.
func (o *Outcome) epsilons(p Params, transcript int64) {
	field := math.Ldexp(1, -128)
	o.EpsSec = p.EpsSec
	o.EpsCor = (float64(p.KeyBits/128) + 1 + 2*float64(transcript/16+1)) * field
}
