//go:build !purego

package distill

import "golang.org/x/sys/cpu"

var (
	hasProduct = cpu.X86.HasPCLMULQDQ
	hasWide    = cpu.X86.HasAVX512F && cpu.X86.HasAVX512VPCLMULQDQ // four products at a time
)

// kernel sets out to words 8 to 15 of the carry-less product of s and x.
func kernel(out *[kernelWords]uint64, s *[2 * kernelWords]uint64, x *[kernelWords]uint64) {
	switch {
	case hasWide:
		kernelWide(out, s, x)
	case hasProduct:
		kernelAsm(out, s, x)
	default:
		kernelPortable(out, s, x)
	}
}

// xor sets dst to the sum of a and b, which are at least as long.
func xor(dst, a, b frame) {
	a, b = a[:len(dst)], b[:len(dst)]
	if eights := len(dst) / 8; hasWide && eights > 0 {
		xorWide(&dst[0], &a[0], &b[0], eights)
		dst, a, b = dst[8*eights:], a[8*eights:], b[8*eights:]
	}
	xorPortable(dst, a, b)
}

//go:noescape
func kernelWide(out *[kernelWords]uint64, s *[2 * kernelWords]uint64, x *[kernelWords]uint64)

// hasFours says that there is assembly for add4.
var hasFours = hasProduct

// addFoursAsm is add4 of so many times four coefficients, of 16 bytes each.
//
//go:noescape
func addFoursAsm(sum *element, powers *[4]element, coefficients *byte, fours int)

// kernelTwice is kernelWide for twice as many words of everything.
//
//go:noescape
func kernelTwice(out, s, x *uint64)

//go:noescape
func xorWide(dst, a, b *uint64, eights int)
