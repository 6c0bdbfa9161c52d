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
// behind the last is of no meaning. The matrix is cut into squares, whose products with
// their parts of x are middle products of the seed.
func toeplitzTimes(out, x, seed frame, length, rest int) {
	squares := cut(length, rest)
	most := 0
	for _, q := range squares {
		most = max(most, q.words)
	}
	w := newWorkspace(most)
	defer w.wipe()
	part, product, stretch := make(frame, most), make(frame, most), make(frame, 2*most)
	for _, q := range squares {
		part, product, stretch := part[:q.words], product[:q.words], stretch[:2*q.words]
		clear(part[copy(part, x[q.column:]):])
		window(stretch, seed, 64*(q.row-q.column-q.words)+rest-1)
		w.middle(product, stretch, part)
		to := out[q.row:]
		to = to[:min(len(to), q.words)]
		xor(to, to, product)
	}
	clear(part)
	clear(product)
}

// square is one of a matrix of bits: its first row and column, and how many of each it has,
// in words. The last ones may stand out over the edge.
type square struct{ row, column, words int }

// cut cuts a matrix into the squares that are the least work.
func cut(rows, columns int) []square {
	rows, columns = (rows+63)/64, (columns+63)/64
	size := kernelWords
	for size < min(max(rows, columns), 1<<16) {
		size *= 2
	}
	squares, _ := cover(rows, columns, size, max(kernelWords, size/64))
	return squares
}

// cover covers so many rows and columns of words with squares of a size, or with as many as
// lie in it whole and, to the right of them and below, with smaller ones, down to the finest.
// The work is that of the smallest product: three times as much for a square twice as large,
// besides fetching the seed for it.
func cover(rows, columns, size, finest int) (squares []square, work int) {
	if rows <= 0 || columns <= 0 {
		return nil, 0
	}
	each := 1
	for words := kernelWords; words < size; words *= 2 {
		each *= 3
	}
	each += 2 * size / kernelWords
	down, across := (rows+size-1)/size, (columns+size-1)/size
	work = down * across * each
	if size > finest {
		whole, wide := rows/size, columns/size
		right, more := cover(whole*size, columns-wide*size, size/2, finest)
		below, most := cover(rows-whole*size, columns, size/2, finest)
		if some := whole*wide*each + more + most; some < work {
			for _, q := range right {
				squares = append(squares, square{q.row, q.column + wide*size, q.words})
			}
			for _, q := range below {
				squares = append(squares, square{q.row + whole*size, q.column, q.words})
			}
			down, across, work = whole, wide, some
		}
	}
	for i := range down {
		for j := range across {
			squares = append(squares, square{i * size, j * size, size})
		}
	}
	return squares, work
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
	if n == 2*kernelWords && hasWide {
		kernelTwice(&out[:n][0], &s[:2*n][0], &x[0])
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
