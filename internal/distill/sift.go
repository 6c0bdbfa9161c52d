package distill

import (
	"math/bits"
	"math/rand/v2"
)

// tally counts the gates at which both ends chose the key basis, and the test basis.
// matches and bases are packed, a bit a detected gate.
func tally(matches, bases []byte) (key, test int) {
	for i, m := range matches {
		test += bits.OnesCount8(m & bases[i])
		key += bits.OnesCount8(m &^ bases[i])
	}
	return key, test
}

// sift picks the profile's numbers of key bits and of test bits out of the bits of the
// detected gates, all three strings packed; tally must have found enough of each.
// Every choice of so many is equally likely.
//
// The choice expands a public seed of 32 bytes, which Alice draws when Bob's list is
// complete. That is fine: when the seed is drawn, every bit is measured and whatever
// Eve did to the light is done, so the choice cannot depend on her nor she on it. The
// theorem needs the bits that are used to be a fair sample of those that might have
// been, in the sense that errors do not gather in one part; a sample for which that
// fails more often than for a truly uniform one would be a test that tells ChaCha8 from
// randomness without its key. And it must fail there and then: nobody who breaks the
// cipher later learns anything, since the seed is public anyway.
func sift(p Params, seed [32]byte, matches, bases, values []byte) (key frame, test []byte) {
	key, test = newFrame(p.KeyBits), make([]byte, packedBytes(p.TestBits))
	keyLeft, testLeft := tally(matches, bases)
	keyNeed, testNeed := p.KeyBits, p.TestBits
	random := rand.NewChaCha8(seed)
	for i := range 8 * len(matches) {
		if bitAt(matches, i) == 0 {
			continue
		}
		if bitAt(bases, i) == TestBasis {
			if uniform(random, testLeft) < testNeed {
				setBit(test, p.TestBits-testNeed, bitAt(values, i))
				testNeed--
			}
			testLeft--
			continue
		}
		if uniform(random, keyLeft) < keyNeed {
			key.put(p.KeyBits-keyNeed, bitAt(values, i))
			keyNeed--
		}
		keyLeft--
	}
	return key, test
}

// differences counts the bits in which two strings of equal length differ.
func differences(a, b []byte) int {
	n := 0
	for i := range a {
		n += bits.OnesCount8(a[i] ^ b[i])
	}
	return n
}
