//go:build (amd64 || arm64) && !purego

package distill

// product is the carry-less product of x and y.
func product(x, y uint64) (hi, lo uint64) {
	if !hasProduct {
		return productPortable(x, y)
	}
	return productAsm(x, y)
}

//go:noescape
func productAsm(x, y uint64) (hi, lo uint64)

//go:noescape
func kernelAsm(out *[kernelWords]uint64, s *[2 * kernelWords]uint64, x *[kernelWords]uint64)
