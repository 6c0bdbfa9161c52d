package distill

import "math/bits"

// The carry-less products that amplification and the hashes are made of. Where the
// processor has an instruction for them (PCLMULQDQ on amd64, PMULL on arm64) it is used,
// from assembly, and where it has one for four of them at once (VPCLMULQDQ with AVX-512),
// that; the portable functions here do the same without, in a time that depends on no
// operand. The tag purego leaves the assembly out.

// kernelWords is the size of the middle product that the assembly computes.
const kernelWords = 8

// holes has every fourth bit set: a product of two numbers with such holes has no
// carry that reaches the next bit that counts.
const holes = 0x1111111111111111

// lowProduct is the lower half of the carry-less product of x and y (after Thomas
// Pornin's BearSSL: the product by integer multiplication of numbers with holes).
func lowProduct(x, y uint64) uint64 {
	x0, x1, x2, x3 := x&holes, x&(holes<<1), x&(holes<<2), x&(holes<<3)
	y0, y1, y2, y3 := y&holes, y&(holes<<1), y&(holes<<2), y&(holes<<3)
	z0 := x0*y0 ^ x1*y3 ^ x2*y2 ^ x3*y1
	z1 := x0*y1 ^ x1*y0 ^ x2*y3 ^ x3*y2
	z2 := x0*y2 ^ x1*y1 ^ x2*y0 ^ x3*y3
	z3 := x0*y3 ^ x1*y2 ^ x2*y1 ^ x3*y0
	return z0&holes | z1&(holes<<1) | z2&(holes<<2) | z3&(holes<<3)
}

// productPortable is the carry-less product of x and y. The upper half is the lower one
// of the mirrored numbers, mirrored.
func productPortable(x, y uint64) (hi, lo uint64) {
	return bits.Reverse64(lowProduct(bits.Reverse64(x), bits.Reverse64(y))) >> 1, lowProduct(x, y)
}

// kernelPortable sets out to words 8 to 15 of the carry-less product of s, 16 words, and
// x, 8 words.
func kernelPortable(out *[kernelWords]uint64, s *[2 * kernelWords]uint64, x *[kernelWords]uint64) {
	*out = [kernelWords]uint64{}
	for b, w := range x {
		for k := range out {
			hi, lo := productPortable(s[kernelWords+k-b], w)
			out[k] ^= lo
			if k+1 < kernelWords {
				out[k+1] ^= hi
			}
		}
		hi, _ := productPortable(s[kernelWords-1-b], w)
		out[0] ^= hi
	}
}
