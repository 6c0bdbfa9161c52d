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
	Length int    // of the secret, in bits: Params.SecretBits
	Terms  Terms

	Gates      int64   // gates fired
	Detected   int     // gates at which Bob's detectors clicked
	SiftedKey  int     // of these, both ends in the key basis
	SiftedTest int     // both ends in the test basis
	QBER       float64 // error rate of the test bits
	KeyQBER    float64 // error rate of the key bits, as reconciliation found it
	Leak       int     // bits revealed by reconciliation, without the tag
	Rounds     int     // questions that reconciliation asked
	Efficiency float64 // f: Leak over n h(KeyQBER); 0 if there were no errors

	// Transcript is SHA-256 over every message of the block before the two that
	// compare it: direction, kind, length, body. Equal at both ends.
	Transcript [32]byte
}

// Atoms is the number of whole atoms in the secret.
func (o Outcome) Atoms() int { return o.Length / key.AtomBits }

// failed is o without its secret, which is wiped.
func (o Outcome) failed() Outcome {
	clear(o.Bits)
	o.Bits, o.Length = nil, 0
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

// corrected sets the figures of reconciliation.
func (o *Outcome) corrected(errors, keyBits int) {
	o.KeyQBER = float64(errors) / float64(keyBits)
	if e := entropy(o.KeyQBER); e > 0 {
		o.Efficiency = float64(o.Leak) / (float64(keyBits) * e)
	}
}

// amplified sets the secret that the closing message makes of a verified key.
func (o *Outcome) amplified(p Params, k frame, closing closingMessage, transcript [32]byte) {
	verified := k.bytes()
	o.Bits = amplify(verified, p.KeyBits, closing.seed, p.SecretBits)
	clear(verified)
	o.Length = p.SecretBits
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
