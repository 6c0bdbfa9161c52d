//go:build !purego

package distill

import "golang.org/x/sys/cpu"

var hasProduct = cpu.ARM64.HasPMULL

// kernel sets out to words 8 to 15 of the carry-less product of s and x.
func kernel(out *[kernelWords]uint64, s *[2 * kernelWords]uint64, x *[kernelWords]uint64) {
	if !hasProduct {
		kernelPortable(out, s, x)
		return
	}
	kernelAsm(out, s, x)
}

// xor sets dst to the sum of a and b, which are at least as long.
func xor(dst, a, b frame) { xorPortable(dst, a, b) }

// There is no assembly for these.
const (
	hasWide  = false
	hasFours = false
)

func kernelTwice(_, _, _ *uint64) { panic("not here") }

func addFoursAsm(_ *element, _ *[4]element, _ *byte, _ int) { panic("not here") }
