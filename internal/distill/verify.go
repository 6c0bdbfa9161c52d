package distill

import "encoding/binary"

// element is an element of GF(2^128) = GF(2)[z]/(z^128+z^7+z^2+z+1); coefficient i
// of z is bit i of lo, or bit i-64 of hi.
type element struct{ lo, hi uint64 }

func elementFrom(b [16]byte) element {
	return element{binary.LittleEndian.Uint64(b[:8]), binary.LittleEndian.Uint64(b[8:])}
}

func (e element) bytes() [16]byte {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:8], e.lo)
	binary.LittleEndian.PutUint64(b[8:], e.hi)
	return b
}

func (e element) plus(f element) element { return element{e.lo ^ f.lo, e.hi ^ f.hi} }

// times is the product of two elements, in time that does not depend on them.
func (e element) times(f element) element {
	// Words p0 to p3 of the product of polynomials; what lies beyond z^127 comes back
	// as its multiple by z^7+z^2+z+1.
	p1, p0 := product(e.lo, f.lo)
	p3, p2 := product(e.hi, f.hi)
	m1, m0 := product(e.lo^e.hi, f.lo^f.hi)
	m0, m1 = m0^p0^p2, m1^p1^p3
	p1, p2 = p1^m0, p2^m1
	p2 ^= p3>>63 ^ p3>>62 ^ p3>>57
	return element{
		lo: p0 ^ p2 ^ p2<<1 ^ p2<<2 ^ p2<<7,
		hi: p1 ^ p3 ^ p3<<1 ^ p2>>63 ^ p3<<2 ^ p2>>62 ^ p3<<7 ^ p2>>57,
	}
}

// tag is the value of the polynomial whose coefficients are the key in pieces of 128
// bits, none of them the constant one, at a point. Two keys of n bits that differ have
// the same tag at no more than n/128 of the 2^128 points, so the point must be drawn
// after both keys are final.
func tag(key frame, point [16]byte) [16]byte {
	at := elementFrom(point)
	var sum element
	for i := 0; i+1 < len(key); i += 2 {
		sum = sum.plus(element{key[i], key[i+1]}).times(at)
	}
	return sum.bytes()
}
