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

// times is the product of two elements, in time that does not depend on them.
func (e element) times(f element) element {
	var p element
	for _, w := range [2]uint64{f.hi, f.lo} {
		for i := 63; i >= 0; i-- {
			over := -(p.hi >> 63)
			p.hi = p.hi<<1 | p.lo>>63
			p.lo = p.lo<<1 ^ over&0x87
			take := -(w >> i & 1)
			p.lo ^= e.lo & take
			p.hi ^= e.hi & take
		}
	}
	return p
}

// tag is the value of the polynomial whose coefficients are the key in pieces of 128
// bits, none of them the constant one, at a point. Two keys of n bits that differ have
// the same tag at no more than n/128 of the 2^128 points, so the point must be drawn
// after both keys are final.
func tag(key frame, point [16]byte) [16]byte {
	at := elementFrom(point)
	var sum element
	for i := 0; i+1 < len(key); i += 2 {
		sum.lo ^= key[i]
		sum.hi ^= key[i+1]
		sum = sum.times(at)
	}
	return sum.bytes()
}
