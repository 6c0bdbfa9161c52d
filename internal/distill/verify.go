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
	var p wide
	p.add(e, f)
	return p.element()
}

// wide is a sum of products of two polynomials each, by Karatsuba's trick and without the
// reduction, which one is enough for.
type wide struct{ l0, l1, m0, m1, h0, h1 uint64 }

func (p *wide) add(e, f element) {
	hi, lo := product(e.lo, f.lo)
	p.l0, p.l1 = p.l0^lo, p.l1^hi
	hi, lo = product(e.hi, f.hi)
	p.h0, p.h1 = p.h0^lo, p.h1^hi
	hi, lo = product(e.lo^e.hi, f.lo^f.hi)
	p.m0, p.m1 = p.m0^lo, p.m1^hi
}

// element is the sum in the field: what lies beyond z^127 comes back as its multiple by
// z^7+z^2+z+1.
func (p *wide) element() element {
	m0, m1 := p.m0^p.l0^p.h0, p.m1^p.l1^p.h1
	p0, p1, p2, p3 := p.l0, p.l1^m0, p.h0^m1, p.h1
	p2 ^= p3>>63 ^ p3>>62 ^ p3>>57
	return element{
		lo: p0 ^ p2 ^ p2<<1 ^ p2<<2 ^ p2<<7,
		hi: p1 ^ p3 ^ p3<<1 ^ p2>>63 ^ p3<<2 ^ p2>>62 ^ p3<<7 ^ p2>>57,
	}
}

// polynomial is the value at a point of a polynomial whose coefficients come one after the
// other, none of them the constant one.
type polynomial struct {
	powers [4]element // of the point, from the first
	sum    element
}

func newPolynomial(point [16]byte) polynomial {
	var p polynomial
	p.powers[0] = elementFrom(point)
	for i := 1; i < len(p.powers); i++ {
		p.powers[i] = p.powers[i-1].times(p.powers[0])
	}
	return p
}

func (p *polynomial) add(e element) { p.sum = p.sum.plus(e).times(p.powers[0]) }

// add4 adds four coefficients, whose products need not wait for each other.
func (p *polynomial) add4(a, b, c, d element) {
	var w wide
	w.add(p.sum.plus(a), p.powers[3])
	w.add(b, p.powers[2])
	w.add(c, p.powers[1])
	w.add(d, p.powers[0])
	p.sum = w.element()
}

// tag is the value of the polynomial whose coefficients are the key in pieces of 128
// bits, none of them the constant one, at a point. Two keys of n bits that differ have
// the same tag at no more than n/128 of the 2^128 points, so the point must be drawn
// after both keys are final.
func tag(key frame, point [16]byte) [16]byte {
	p := newPolynomial(point)
	for ; len(key) >= 8; key = key[8:] {
		p.add4(element{key[0], key[1]}, element{key[2], key[3]}, element{key[4], key[5]}, element{key[6], key[7]})
	}
	for ; len(key) >= 2; key = key[2:] {
		p.add(element{key[0], key[1]})
	}
	return p.sum.bytes()
}
