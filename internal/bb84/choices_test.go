package bb84

import (
	"bytes"
	"encoding/hex"
	"math"
	"testing"

	"pgregory.net/rapid"
)

func testSeed(first byte) *[SeedSize]byte {
	var s [SeedSize]byte
	for i := range s {
		s[i] = first + byte(i)
	}
	return &s
}

func choices(t testing.TB, alice bool, seed *[SeedSize]byte, session, block int64, px float64) *Choices {
	t.Helper()
	c, err := BobChoices(seed, session, block, px)
	if alice {
		c, err = AliceChoices(seed, session, block, px)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The choices are part of no protocol, but a restarted simulator must not change
// what a seed means. The streams were checked against OpenSSL's HKDF and AES.
func TestChoicesVectors(t *testing.T) {
	for _, tc := range []struct {
		alice          bool
		session, block int64
		gate           int64
		stream         string // of the 8 gates from gate on
		bases, bits    string
	}{
		{true, 1, 1, 0, "20e559f2230003013e0938de65881bdb", "ZZXXXZXZ", "01110011"},
		{false, 1, 1, 0, "7ba3f86e283ab250eda1b5a94322c69a", "XXXXXXXX", "10001110"},
		{true, 2, 1, 0, "76b1d20064d13646bb03b84ead981022", "ZXZXXXXX", "00001010"},
		{true, 1, 2, 0, "169cfbd8bd58a1bfb8f8e861aec4dc08", "XZXZZXZX", "01110000"},
		{true, 1, 1, 1 << 40, "c008438ebf1707a7f7164ae8b1f6459a", "XXXXXZZX", "01111011"},
	} {
		c := choices(t, tc.alice, testSeed(0), tc.session, tc.block, 2./3)
		var bases, bits bytes.Buffer
		for g := tc.gate; g < tc.gate+8; g++ {
			basis, bit := c.At(g)
			bases.WriteString(basis.String())
			bits.WriteByte('0' + bit)
		}
		stream := hex.EncodeToString(c.window[:16])
		if stream != tc.stream || bases.String() != tc.bases || bits.String() != tc.bits {
			t.Errorf("alice %v, session %d, block %d, gate %d: {%q, %q, %q}", tc.alice, tc.session, tc.block, tc.gate, stream, &bases, &bits)
		}
	}
}

// What a gate's choices are does not depend on what was asked before.
func TestChoicesAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := testSeed(byte(rapid.Uint8().Draw(t, "seed")))
		fresh := func() *Choices {
			c, err := AliceChoices(seed, 3, 4, 2./3)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		c := fresh()
		step := rapid.SampledFrom([]int64{3, 40, 3000, 1 << 40}).Draw(t, "step")
		gate := int64(0)
		for _, d := range rapid.SliceOfN(rapid.Int64Range(-step/2, step), 1, 60).Draw(t, "steps") {
			gate = max(0, min(gate+d, MaxGates))
			basis, bit := c.At(gate)
			if b, v := fresh().At(gate); b != basis || v != bit {
				t.Fatalf("gate %d: %v %d after other gates, %v %d alone", gate, basis, bit, b, v)
			}
			if rapid.IntRange(0, 9).Draw(t, "wipe") == 0 {
				c.Wipe()
			}
		}
	})
}

func TestChoicesBias(t *testing.T) {
	const gates = 1 << 18
	for _, px := range []float64{.5, 2. / 3, .9} {
		c := choices(t, true, testSeed(7), 1, 1, px)
		var x, ones, both int
		for g := range int64(gates) {
			basis, bit := c.At(g)
			ones += int(bit)
			if basis == X {
				x++
				both += int(bit)
			}
		}
		within(t, "basis X", x, gates, px)
		within(t, "ones", ones, gates, .5)
		within(t, "ones in basis X", both, x, .5)
	}
}

// within checks a count against a binomial at 4 standard deviations.
func within(t *testing.T, what string, count, of int, p float64) {
	t.Helper()
	n := float64(of)
	if sigma := math.Sqrt(n * p * (1 - p)); math.Abs(float64(count)-n*p) > 4*sigma {
		t.Errorf("%s: %d of %d is %.5f, want %.5f within 4 sigma (%.5f)", what, count, of, float64(count)/n, p, 4*sigma/n)
	}
}
