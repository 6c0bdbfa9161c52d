package distill

import (
	"encoding/binary"
	"math/bits"
)

// frame is a string of bits whose number is a multiple of 64. Bit i is bit i%64 of
// word i/64, so that a frame's little-endian bytes are the packed form, least
// significant bit first, that all of this package's messages use.
type frame []uint64

func newFrame(bits int) frame { return make(frame, bits/64) }

func (f frame) get(i int) byte { return byte(f[i>>6]>>(i&63)) & 1 }

func (f frame) flip(i int) { f[i>>6] ^= 1 << (i & 63) }

// put sets bit i, which must be 0 so far, to b.
func (f frame) put(i int, b byte) { f[i>>6] |= uint64(b&1) << (i & 63) }

// parity is the parity of the 1<<size bits from bit lo, a multiple of 1<<size.
func (f frame) parity(lo, size int) byte {
	if size < 6 {
		w := f[lo>>6] >> (lo & 63) & (1<<(1<<size) - 1)
		return byte(bits.OnesCount64(w) & 1)
	}
	var x uint64
	for _, w := range f[lo>>6 : (lo+1<<size)>>6] {
		x ^= w
	}
	return byte(bits.OnesCount64(x) & 1)
}

// maskedParity is the parity of those of the same bits that are set in mask.
func (f frame) maskedParity(mask frame, lo, size int) byte {
	if size < 6 {
		w := f[lo>>6] & mask[lo>>6] >> (lo & 63) & (1<<(1<<size) - 1)
		return byte(bits.OnesCount64(w) & 1)
	}
	mask = mask[lo>>6 : (lo+1<<size)>>6]
	var x uint64
	for i, w := range f[lo>>6 : (lo+1<<size)>>6] {
		x ^= w & mask[i]
	}
	return byte(bits.OnesCount64(x) & 1)
}

// bytes is the packed form of f.
func (f frame) bytes() []byte {
	b := make([]byte, 8*len(f))
	for i, w := range f {
		binary.LittleEndian.PutUint64(b[8*i:], w)
	}
	return b
}

// packedBytes is how many bytes n packed bits take.
func packedBytes(n int) int { return (n + 7) / 8 }

// bitAt is bit i of a packed string.
func bitAt(b []byte, i int) byte { return b[i>>3] >> (i & 7) & 1 }

// setBit sets bit i of a packed string, which must be 0 so far, to v.
func setBit(b []byte, i int, v byte) { b[i>>3] |= (v & 1) << (i & 7) }

// packed says whether b is the one packed form of n bits: of their length, with
// nothing set behind the last.
func packed(b []byte, n int) bool {
	return len(b) == packedBytes(n) && (n%8 == 0 || b[len(b)-1]>>(n%8) == 0)
}

// equalBits says, packed, where the first n bits of two packed strings are equal.
func equalBits(a, b []byte, n int) []byte {
	equal := make([]byte, packedBytes(n))
	for i := range equal {
		equal[i] = ^(a[i] ^ b[i])
	}
	if n%8 != 0 {
		equal[len(equal)-1] &= 1<<(n%8) - 1
	}
	return equal
}
