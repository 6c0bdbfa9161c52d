package distill

import (
	"encoding/binary"
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
	for ; len(b) >= 8; b = b[8:] {
		n += bits.OnesCount64(binary.LittleEndian.Uint64(b))
	}
	for _, v := range b {
		n += bits.OnesCount8(v)
	}
	return n
}

// sifted is what a block uses of its sifted events, at one end.
type sifted struct {
	key      frame    // secret
	test     []byte   // packed: the test bits
	keyFrom  [2]frame // lower and upper bit of the intensity of every key bit
	testFrom [2]frame // and of every test bit
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
	matched := ones(matches)
	low := frameFrom(intensities[:packedBytes(matched)])
	high := make(frame, len(low))
	if planesOf(p.Intensities) > 1 {
		high = frameFrom(intensities[packedBytes(matched):])
	}
	all := frameFrom(values)
	defer clear(all)
	columns := pick(frameFrom(matches), frameFrom(bases), all)
	test, value := columns[0], columns[1]
	defer clear(value)
	key := make(frame, len(test))
	for i, w := range test {
		key[i] = ^w
	}
	key.truncate(matched)

	random := rand.NewChaCha8(seed)
	thin(random, key, matched, p.KeyBits)
	thin(random, test, matched, p.TestBits)
	s := new(sifted)
	columns = pick(key, value, low, high)
	s.key, s.keyFrom = columns[0], [2]frame(columns[1:])
	columns = pick(test, value, low, high)
	s.test, s.testFrom = columns[0].bytes()[:packedBytes(p.TestBits)], [2]frame(columns[1:])
	s.used.key, s.used.test = used(s.keyFrom, p.KeyBits), used(s.testFrom, p.TestBits)
	return s
}

// thin takes bits of the first n out of set until k are left, each with the same chance.
func thin(random *rand.ChaCha8, set frame, n, k int) {
	for left := set.ones(); left > k; {
		if i := uniform(random, n); set.get(i) == 1 {
			set.flip(i)
			left--
		}
	}
}

// pick takes from each of the columns the bits at which mask has one, and puts them side
// by side. They may be secret, and belong to the caller.
func pick(mask frame, columns ...frame) []frame {
	picked, words := make([]frame, len(columns)), (mask.ones()+63)/64
	for c := range picked {
		picked[c] = make(frame, words+1)[:words] // pickAsm may write a word more
	}
	if len(mask) == 0 || !hasPick {
		pickPortable(picked, mask, columns)
		return picked
	}
	for c, column := range columns {
		pickAsm(&picked[c][:words+1][0], &column[:len(mask)][0], &mask[0], len(mask))
	}
	return picked
}

// pickPortable is pick without the instruction that some processors have for it. It finds
// picked all zeros.
func pickPortable(picked []frame, mask frame, columns []frame) {
	at := 0
	for i, m := range mask {
		p := newPicker(m)
		n := bits.OnesCount64(m)
		word, shift := at>>6, at&63
		for c, column := range columns {
			w := p.pick(column[i])
			if n > 0 {
				picked[c][word] |= w << shift
			}
			if shift+n > 64 {
				picked[c][word+1] = w >> (64 - shift)
			}
		}
		at += n
	}
}

// picker moves the bits of a word at which a mask has one to its lower end, their order
// kept, in a time that depends on neither (Warren, Hacker's Delight, 2nd edition, 7-4).
type picker struct {
	mask  uint64
	moves [6]uint64 // the bits that go down by 1<<i
}

func newPicker(mask uint64) picker {
	p := picker{mask: mask}
	zeros := ^mask << 1 // bits with a zero of mask right below
	for i := range p.moves {
		odd := zeros // bits with an odd number of zeros below
		for by := 1; by < 64; by *= 2 {
			odd ^= odd << by
		}
		move := odd & mask
		p.moves[i] = move
		mask = mask ^ move | move>>(1<<i)
		zeros &^= odd
	}
	return p
}

func (p *picker) pick(x uint64) uint64 {
	x &= p.mask
	for i, move := range p.moves {
		t := x & move
		x = x ^ t | t>>(1<<i)
	}
	return x
}

// planes packs the intensities of the matches, at each of which Alice sent what she says.
func planes(p Params, matches []byte, sent Sent) []byte {
	size := packedBytes(ones(matches))
	b := make([]byte, 0, 2*size)
	for _, plane := range pick(frameFrom(matches), frameFrom(sent.Low), frameFrom(sent.High))[:planesOf(p.Intensities)] {
		b = append(b, plane.bytes()[:size]...)
	}
	return b
}

// used counts n bits by intensity.
func used(from [2]frame, n int) ByIntensity {
	low, high := from[0].ones(), from[1].ones()
	return ByIntensity{n - low - high, low, high}
}

// byIntensity counts those of the bits that are in set.
func byIntensity(set frame, from [2]frame) (count ByIntensity) {
	for i, w := range set {
		low, high := from[0][i], from[1][i]
		count[0] += bits.OnesCount64(w &^ low &^ high)
		count[1] += bits.OnesCount64(w & low)
		count[2] += bits.OnesCount64(w & high)
	}
	return count
}

// wrong counts the test bits in which the ends differ, by intensity.
func (s *sifted) wrong(theirs []byte) ByIntensity {
	differ := frameFrom(theirs)
	xor(differ, differ, frameFrom(s.test))
	return byIntensity(differ, s.testFrom)
}

// corrected counts the key bits that differ from what they were before, by intensity.
func (s *sifted) corrected(before frame) ByIntensity {
	differ := make(frame, len(before))
	xor(differ, before, s.key)
	return byIntensity(differ, s.keyFrom)
}

// frames cuts the key. They are of one memory with it.
func (s *sifted) frames(bits int) []frame {
	var list []frame
	for rest := s.key; len(rest) > 0; rest = rest[bits/64:] {
		list = append(list, rest[:bits/64:bits/64])
	}
	return list
}
