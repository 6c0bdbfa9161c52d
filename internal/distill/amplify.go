package distill

import (
	"crypto/subtle"
	"encoding/binary"
)

// chunkBytes is how much of the key is multiplied at a time: long enough for vector
// instructions, short enough for the table of multiples to stay in a core's cache.
const chunkBytes = 512

// amplify hashes a key to length bits with the modified Toeplitz matrix (I|T): the
// first length bits of the key, plus T times the rest, over GF(2). The family is
// universal_2 with seeds of one bit less than the key (Hayashi and Tsurumaru, IEEE
// Trans. Inf. Theory 62, 2016). T has seed bit i-j+r-1 in row i and column j, where
// r is how many bits the rest has, so that T times the rest is the middle of the
// carry-less product of seed and rest.
//
// The seed is public and the key is not: memory is touched where the seed says.
func amplify(key []byte, keyBits int, seed []byte, length int) []byte {
	out := make([]byte, packedBytes(length))
	copyBits(out, key, 0, length)
	r := keyBits - length
	if r == 0 {
		return out
	}
	rest := make([]byte, packedBytes(r))
	copyBits(rest, key, length, r)
	product := middle(rest, seed, (r-1)/8, (keyBits-2)/8+1) // coefficients r-1 to keyBits-2
	hashed := make([]byte, len(out))
	copyBits(hashed, product, (r-1)%8, length)
	subtle.XORBytes(out, out, hashed)
	clear(rest)
	clear(product)
	clear(hashed)
	return out
}

// middle returns bytes from to to-1 of the carry-less product of x and s. It takes
// x in chunks, makes the 256 multiples of a chunk by polynomials of 8 coefficients,
// and adds for each byte of s the multiple it names at the place where it stands
// (the "four Russians" way, with long rows instead of long tables).
func middle(x, s []byte, from, to int) []byte {
	const row = chunkBytes + 8 // a multiple outgrows its chunk by 7 bits; rows are whole words
	product := make([]byte, len(x)+len(s)+row)
	table := make([]byte, 256*row)
	multiple := func(v int) []byte { return table[v*row : (v+1)*row] }
	for at := 0; at < len(x); at += chunkBytes {
		clear(multiple(1))
		copy(multiple(1), x[at:min(at+chunkBytes, len(x))])
		for v := 2; v < 256; v += 2 {
			double(multiple(v), multiple(v/2))
			subtle.XORBytes(multiple(v+1), multiple(v), multiple(1))
		}
		for i := max(0, from-at-row+1); i < min(len(s), to-at); i++ {
			sum := product[at+i : at+i+row]
			subtle.XORBytes(sum, sum, multiple(int(s[i])))
		}
	}
	clear(table)
	return product[from:to]
}

// double sets dst to src times the polynomial z: shifted by a bit. Both are as long,
// a multiple of 8 bytes.
func double(dst, src []byte) {
	var carry uint64
	for i := 0; i+8 <= len(src); i += 8 {
		w := binary.LittleEndian.Uint64(src[i:])
		binary.LittleEndian.PutUint64(dst[i:], w<<1|carry)
		carry = w >> 63
	}
}

// copyBits sets dst to the n bits of src from bit first on, and the bits behind them
// in dst's last byte to 0. dst has packedBytes(n) bytes.
func copyBits(dst, src []byte, first, n int) {
	shift := first % 8
	src = src[first/8:]
	for i := range dst {
		v := src[i] >> shift
		if shift > 0 && i+1 < len(src) {
			v |= src[i+1] << (8 - shift)
		}
		dst[i] = v
	}
	if n%8 != 0 {
		dst[len(dst)-1] &= 1<<(n%8) - 1
	}
}
