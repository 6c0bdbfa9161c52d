package distill

import (
	"crypto/aes"
	"crypto/cipher"
	"math"
	"math/bits"
	"math/rand/v2"
)

// The passes of reconciliation, the same at both ends. The first looks at the key
// as it is, the second at a shuffled key in longer blocks, and each of the rest at
// the bits that a random mask selects, as one block. A mask shows an error pattern
// that the passes before it miss with probability 1/2, for one bit of leak, and
// needs no shuffle of its own.
const (
	shufflePass = 1
	firstMask   = 2
	maskPasses  = 24
	allPasses   = firstMask + maskPasses
)

// secondBlock is how many errors a block of the second pass is expected to have at
// first. Blocks twice or four times as long leak less (measured at n = 2^18 and 2 %:
// f of 1.031 and 1.029 instead of 1.037), but the two passes then send each other back
// and forth for 560 and 1140 rounds instead of 200: every error found in one makes a
// block of the other odd again, and the longer the blocks, the longer such a chain.
// The length of the secret is fixed by LeakLimit, so that a leak within it costs
// nothing, and a round costs a journey.
const secondBlock = 3

// passes says which key bits each block of each pass is made of. A block is halved
// down to single bits. Node 1 is the whole key in the order of the pass, nodes 2i and
// 2i+1 are the halves of node i, and nodes n to 2n-1 are single bits.
type passes struct {
	rate  float64           // of errors, expected
	log   int               // of the key's length
	top   [allPasses]int    // log of the length of a block
	masks [maskPasses]frame // of the third pass and on

	// The second pass's order, see place.
	deal, back   []uint32 // a permutation of its blocks, and the inverse
	shift, flips []uint32 // of each run: how far it is rotated before, flipped after
	flipped      []frame  // of each bit of a block's number: the runs in which it is flipped
}

// newPasses makes the passes for frames of n bits, a power of two, in which errors are
// expected at the given rate. The seed must be drawn after the last bit was measured.
// It is public, and so is all that is made of it: every parity that goes over the
// channel is counted, whichever bits are in it, so a poor choice leaks more or fails
// verification, and gives nothing away uncounted.
func newPasses(n int, rate float64, seed [32]byte) *passes {
	p := &passes{rate: rate, log: bits.Len(uint(n)) - 1}
	p.top[0] = max(2, min(int(math.Round(-math.Log2(rate))), p.log-6))
	p.top[shufflePass] = max(p.top[0]+1, min(int(math.Round(math.Log2(secondBlock/rate))), p.log-4))
	for i := firstMask; i < allPasses; i++ {
		p.top[i] = p.log
	}
	random := rand.NewChaCha8(seed)
	p.shuffle(random)
	p.drawMasks(n, seed)
	return p
}

// drawMasks expands the seed into the masks: they are the key stream of AES-256 in counter
// mode, which is ten times as fast as ChaCha8.
func (p *passes) drawMasks(n int, seed [32]byte) {
	c, err := aes.NewCipher(seed[:])
	if err != nil {
		panic(err) // the key has a size that AES has
	}
	stream, words := cipher.NewCTR(c, make([]byte, aes.BlockSize)), make([]byte, n/8)
	for i := range p.masks {
		clear(words)
		stream.XORKeyStream(words, words)
		p.masks[i] = frameFrom(words)
	}
}

// shuffle prepares place: a random permutation of the second pass's blocks, and for
// each run of the key a random rotation before it and a random flip after it.
func (p *passes) shuffle(random *rand.ChaCha8) {
	blocks := 1 << (p.log - p.top[shufflePass])
	runs := 1 << p.top[shufflePass]
	p.deal = make([]uint32, blocks)
	p.back = make([]uint32, blocks)
	for i := range p.deal {
		j := uniform(random, i+1)
		p.deal[i] = p.deal[j]
		p.deal[j] = uint32(i)
	}
	for i, block := range p.deal {
		p.back[block] = uint32(i)
	}
	p.shift = make([]uint32, runs)
	p.flips = make([]uint32, runs)
	p.flipped = make([]frame, p.log-p.top[shufflePass])
	for i := range p.flipped {
		p.flipped[i] = make(frame, (runs+63)/64)
	}
	for run := range runs {
		p.shift[run] = uint32(uniform(random, blocks))
		p.flips[run] = uint32(uniform(random, blocks))
		for i, in := range p.flipped {
			in[run>>6] |= uint64(p.flips[run]>>i&1) << (run & 63)
		}
	}
}

// place is where the second pass has key bit i. The key is cut into runs of as many
// bits as there are blocks, and each run gives one bit to each block. So two errors
// that one block of the first pass holds, and hides from it, fall into two blocks of
// the second.
func (p *passes) place(i int) int {
	blocks := len(p.deal)
	run := i >> (p.log - p.top[shufflePass])
	block := p.deal[(i+int(p.shift[run]))&(blocks-1)] ^ p.flips[run]
	return int(block)*len(p.shift) + run
}

// index is the key bit that the second pass has at a place.
func (p *passes) index(place int) int {
	blocks := len(p.deal)
	run, block := place&(len(p.shift)-1), uint32(place>>p.top[shufflePass])
	return run*blocks + (int(p.back[block^p.flips[run]])-int(p.shift[run]))&(blocks-1)
}

// uniform draws a number from 0 to n-1, each with the same probability (Lemire, ACM
// TOMACS 29, 2019). It is written out here because both ends must draw the same,
// whatever version of the standard library each was built with.
func uniform(random *rand.ChaCha8, n int) int {
	hi, lo := bits.Mul64(random.Uint64(), uint64(n))
	if lo < uint64(n) {
		for least := -uint64(n) % uint64(n); lo < least; {
			hi, lo = bits.Mul64(random.Uint64(), uint64(n))
		}
	}
	return int(hi)
}

// view is a key with what the passes need to take parities of it.
type view struct {
	*passes
	key   frame
	mixed frame // the key in the order of the second pass
}

func newView(p *passes, key frame) *view {
	v := &view{passes: p, key: key, mixed: newFrame(1 << p.log)}
	if len(p.deal) < 64 || len(p.shift) < 64 {
		p.mixBits(v.mixed, key)
	} else {
		p.mix(v.mixed, key)
	}
	return v
}

// mixBits sets mixed, which is all zeros, to the key in the order of the second pass.
func (p *passes) mixBits(mixed, key frame) {
	for i := range 1 << p.log {
		at := p.place(i)
		mixed[at>>6] |= uint64(key.get(i)) << (at & 63)
	}
}

// mix does the same, where no block and no run is less than a word: it takes the key for a
// matrix with a row for each run, rotates the rows, transposes it, so that there is a row for
// each block, deals these out, and in the columns of the runs that are flipped exchanges
// the rows whose numbers differ in one bit, for one bit after the other.
func (p *passes) mix(mixed, key frame) {
	words, width := len(p.deal)/64, len(p.shift)/64 // of a row before, and after
	var square [64]uint64
	defer clear(square[:])
	for column := range width {
		for w := range words {
			for i := range square {
				run := 64*column + i
				row := key[run*words : (run+1)*words : (run+1)*words]
				by := p.shift[run]
				from := w - int(by>>6)
				square[i] = row[from&(words-1)]<<(by&63) | row[(from-1)&(words-1)]>>(64-by&63)
			}
			transpose(&square)
			for i, block := range p.deal[64*w : 64*w+64] {
				mixed[int(block)*width+column] = square[i]
			}
		}
	}
	for bit, in := range p.flipped {
		for block := range p.deal {
			if block>>bit&1 == 1 {
				continue
			}
			a := mixed[block*width : (block+1)*width]
			b := mixed[(block|1<<bit)*width:][:width]
			for i, runs := range in {
				t := (a[i] ^ b[i]) & runs
				a[i] ^= t
				b[i] ^= t
			}
		}
	}
}

// transpose makes bit i of word k bit k of word i (Warren, Hacker's Delight, 2nd edition, 7-3).
func transpose(square *[64]uint64) {
	for half, low := 32, uint64(1<<32-1); half > 0; half, low = half/2, low^low<<(half/2) {
		for i := range 64 {
			if i&half != 0 {
				continue
			}
			t := (square[i]>>half ^ square[i|half]) & low
			square[i] ^= t << half
			square[i|half] ^= t
		}
	}
}

// parity is the parity of a node.
func (v *view) parity(pass int, node uint32) byte {
	depth := bits.Len32(node) - 1
	size := v.log - depth
	first := int(node-1<<depth) << size
	switch pass {
	case 0:
		return v.key.parity(first, size)
	case shufflePass:
		return v.mixed.parity(first, size)
	}
	return v.key.maskedParity(v.masks[pass-firstMask], first, size)
}

// flip changes key bit i.
func (v *view) flip(i int) {
	v.key.flip(i)
	v.mixed.flip(v.place(i))
}
