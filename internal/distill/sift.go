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

// ones counts the bits of b that are set.
func ones(b []byte) (n int) {
	for _, v := range b {
		n += bits.OnesCount8(v)
	}
	return n
}

// sifted is what a block uses of its sifted events, at one end.
type sifted struct {
	key      frame  // secret
	test     []byte // packed: the test bits
	keyFrom  []byte // intensity of every key bit
	testFrom []byte // and of every test bit
	used     struct{ key, test ByIntensity }
}

// sift picks the profile's numbers of key bits and of test bits out of the bits of the
// detected gates; tally must have found enough of each. Every choice of so many is equally
// likely. Bit i of values is that of detection i; intensities are planes of the matches.
//
// The choice expands a public seed of 32 bytes, which Alice draws when Bob's list is
// complete. That is fine: when the seed is drawn, every bit is measured and whatever
// Eve did to the light is done, so the choice cannot depend on her nor she on it. The
// theorem needs the bits that are used to be a fair sample of those that might have
// been, in the sense that errors do not gather in one part; a sample for which that
// fails more often than for a truly uniform one would be a test that tells ChaCha8 from
// randomness without its key. And it must fail there and then: nobody who breaks the
// cipher later learns anything, since the seed is public anyway.
func sift(p Params, seed [32]byte, matches, bases, values, intensities []byte) *sifted {
	s := &sifted{
		key: newFrame(p.KeyBits), test: make([]byte, packedBytes(p.TestBits)),
		keyFrom: make([]byte, p.KeyBits), testFrom: make([]byte, p.TestBits),
	}
	keyLeft, testLeft := tally(matches, bases)
	keyAt, testAt := 0, 0
	random := rand.NewChaCha8(seed)
	high := intensities[len(intensities)/2:]
	if planesOf(p.Intensities) == 1 {
		high = make([]byte, len(intensities))
	}
	matched := 0
	for i, m := range matches {
		for ; m != 0; m &= m - 1 {
			j := bits.TrailingZeros8(m)
			from := bitAt(intensities, matched) | bitAt(high, matched)<<1
			matched++
			v := values[i] >> j & 1
			if bases[i]>>j&1 == TestBasis {
				if uniform(random, testLeft) < p.TestBits-testAt {
					setBit(s.test, testAt, v)
					s.testFrom[testAt] = from
					s.used.test[from]++
					testAt++
				}
				testLeft--
				continue
			}
			if uniform(random, keyLeft) < p.KeyBits-keyAt {
				s.key.put(keyAt, v)
				s.keyFrom[keyAt] = from
				s.used.key[from]++
				keyAt++
			}
			keyLeft--
		}
	}
	return s
}

// planes packs the intensities of the matches, at each of which Alice sent what she says.
func planes(p Params, matches []byte, sent []Sent) []byte {
	matched := ones(matches)
	size := packedBytes(matched)
	b := make([]byte, planesOf(p.Intensities)*size)
	at := 0
	for i, m := range matches {
		for ; m != 0; m &= m - 1 {
			v := sent[8*i+bits.TrailingZeros8(m)].intensity()
			setBit(b, at, v&1)
			if v > 1 {
				setBit(b[size:], at, 1)
			}
			at++
		}
	}
	return b
}

// wrong counts the test bits in which the ends differ, by intensity.
func (s *sifted) wrong(theirs []byte) (n ByIntensity) {
	for i := range s.test {
		for d := s.test[i] ^ theirs[i]; d != 0; d &= d - 1 {
			n[s.testFrom[8*i+bits.TrailingZeros8(d)]]++
		}
	}
	return n
}

// corrected counts the key bits that differ from what they were before, by intensity.
func (s *sifted) corrected(before frame) (n ByIntensity) {
	for i := range s.key {
		for d := s.key[i] ^ before[i]; d != 0; d &= d - 1 {
			n[s.keyFrom[64*i+bits.TrailingZeros64(d)]]++
		}
	}
	return n
}

// frames cuts the key. They are of one memory with it.
func (s *sifted) frames(bits int) []frame {
	var list []frame
	for rest := s.key; len(rest) > 0; rest = rest[bits/64:] {
		list = append(list, rest[:bits/64:bits/64])
	}
	return list
}
