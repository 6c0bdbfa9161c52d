package distill

import "math/bits"

// amplify hashes a key of keyBits bits to length bits with the modified Toeplitz matrix
// (I|T): the first length bits of the key, plus T times the rest, over GF(2). The family
// is universal_2 with seeds of one bit less than the key (Hayashi and Tsurumaru, IEEE
// Trans. Inf. Theory 62, 2016). T has seed bit i-j+r-1 in row i and column j, where r is
// how many bits the rest has. Key and seed are packed; so is the answer, which belongs
// to the caller, like the secrets in it.
func amplify(key frame, keyBits int, seed []byte, length int) []byte {
	out := make(frame, (length+63)/64)
	window(out, key, 0)
	if rest := keyBits - length; rest > 0 {
		x := make(frame, (rest+63)/64)
		window(x, key, length)
		toeplitzTimes(out, x, frameFrom(seed), length, rest)
		clear(x)
	}
	if tail := length % 64; tail != 0 {
		out[len(out)-1] &= 1<<tail - 1
	}
	b := out.bytes()
	clear(out)
	return b[:packedBytes(length)]
}

// toeplitzTimes adds T times x, of rest bits, to out, of length bits; what it adds
// behind the last is of no meaning. Matrix and vectors are cut into squares of
// one size, whose products are middle products of the seed.
func toeplitzTimes(out, x, seed frame, length, rest int) {
	size := squareSize(length, rest)
	words := size / 64
	w := newWorkspace(words)
	defer w.wipe()
	part, product, stretch := make(frame, words), make(frame, words), make(frame, 2*words)
	for row := 0; row*size < length; row++ {
		for column := 0; column*size < rest; column++ {
			clear(part)
			copy(part, x[min(column*words, len(x)):])
			window(stretch, seed, (row-column)*size+rest-1-size)
			w.middle(product, stretch, part)
			to := out[row*words:]
			for i := range min(len(to), words) {
				to[i] ^= product[i]
			}
		}
	}
	clear(part)
	clear(product)
}

// squareSize is the size in bits of the squares for which the work is least: a square
// twice as large takes three times as long.
func squareSize(length, rest int) int {
	const smallest = 64 * kernelWords
	best, least := smallest, 0
	for size, work := smallest, 1; size <= 1<<22; size, work = 2*size, 3*work {
		squares := ((length + size - 1) / size) * ((rest + size - 1) / size)
		if total := squares * work; least == 0 || total < least {
			best, least = size, total
		}
		if size >= length && size >= rest {
			break
		}
	}
	return best
}

// window sets dst to the bits of src from bit first on, which may lie before its
// beginning or run over its end: there is nothing but zeros.
func window(dst, src frame, first int) {
	word, shift := first>>6, uint(first&63)
	at := func(i int) uint64 {
		if uint(i) < uint(len(src)) {
			return src[i]
		}
		return 0
	}
	low := at(word)
	for i := range dst {
		high := at(word + i + 1)
		dst[i] = low>>shift | high<<1<<(63-shift)
		low = high
	}
}

// workspace holds what the levels of a middle product need.
type workspace struct{ levels []level }

type level struct{ s, x, p, q frame }

// newWorkspace makes room for products of that many words, a power of two.
func newWorkspace(words int) *workspace {
	w := &workspace{levels: make([]level, bits.Len(uint(words)))}
	for half := words / 2; half >= kernelWords; half /= 2 {
		w.levels[bits.Len(uint(half))] = level{s: make(frame, 2*half), x: make(frame, half), p: make(frame, half), q: make(frame, half)}
	}
	return w
}

func (w *workspace) wipe() {
	for _, l := range w.levels {
		clear(l.x)
		clear(l.p)
		clear(l.q)
	}
}

// middle sets out, of n words, to words n to 2n-1 of the carry-less product of s, of 2n
// words, and x, of n. Karatsuba's trick transposed makes it of three products of half the
// size (Hanrot, Quercia and Zimmermann, AAECC 14, 2004). The middle product is, for
// halves x0 and x1 and stretches A, B and C of s, each beginning half as far behind the
// one before,
//
//	A x1 + B x0 = (A+B) x1 + B (x0+x1)
//	B x1 + C x0 = (B+C) x0 + B (x0+x1)
func (w *workspace) middle(out, s, x frame) {
	n := len(x)
	if n == kernelWords {
		kernel((*[kernelWords]uint64)(out), (*[2 * kernelWords]uint64)(s), (*[kernelWords]uint64)(x))
		return
	}
	h := n / 2
	l := &w.levels[bits.Len(uint(h))]
	x0, x1 := x[:h], x[h:]
	xor(l.x, x0, x1)
	w.middle(l.p, s[h:3*h], l.x)
	xor(l.s, s[:2*h], s[h:3*h])
	w.middle(l.q, l.s, x1)
	xor(out[:h], l.p, l.q)
	xor(l.s, s[h:3*h], s[2*h:])
	w.middle(l.q, l.s, x0)
	xor(out[h:], l.p, l.q)
}

func xorPortable(dst, a, b frame) {
	a, b = a[:len(dst)], b[:len(dst)]
	for i := range dst {
		dst[i] = a[i] ^ b[i]
	}
}
