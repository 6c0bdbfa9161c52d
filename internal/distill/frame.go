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

// ones counts the bits that are set.
func (f frame) ones() (n int) {
	for _, w := range f {
		n += bits.OnesCount64(w)
	}
	return n
}

// truncate sets the bits from n on to 0.
func (f frame) truncate(n int) {
	for i := n / 64; i < len(f); i++ {
		f[i] &= 1<<max(0, n-64*i) - 1
	}
}

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

// frameFrom is the frame of packed bits, with zeros up to a whole word.
func frameFrom(b []byte) frame {
	f := make(frame, (len(b)+7)/8)
	for i := range len(b) / 8 {
		f[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	for i := len(b) &^ 7; i < len(b); i++ {
		f[i/8] |= uint64(b[i]) << (8 * (i % 8))
	}
	return f
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
