package distill

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
)

// MaxGates is the most gates that a block may have.
const MaxGates = 1 << 48

// Gates is a list of gates of a block, ascending, in the form in which it travels: of
// every gate, how many lie between it and the one before, in a byte where it is less than
// 255; else in a byte of 255 and what it is more than that, as a uvarint. The zero Gates is
// empty. What is said about gates lies beside them in packed strings, bit i for gate i, so
// that a million of them are handed on, and compared, a word at a time.
type Gates struct {
	gaps []byte
	n    int
	end  int64
}

// wideGap is the byte that begins a gap of so many gates, or more.
const wideGap = 255

// NewGates is an empty list with room for so many gates, if most of them are near each other.
func NewGates(room int) Gates { return Gates{gaps: make([]byte, 0, room+room/8)} }

// Add appends a gate, which must lie behind all others and below MaxGates.
func (g *Gates) Add(gate int64) {
	if gate < g.end || gate >= MaxGates {
		panic(fmt.Sprintf("distill: gate %d behind gate %d", gate, g.end-1))
	}
	if gap := uint64(gate - g.end); gap < wideGap {
		g.gaps = append(g.gaps, byte(gap))
	} else {
		g.gaps = binary.AppendUvarint(append(g.gaps, wideGap), gap-wideGap)
	}
	g.n++
	g.end = gate + 1
}

// Len is how many gates there are.
func (g Gates) Len() int { return g.n }

// End is one more than the last gate, or 0 if there is none.
func (g Gates) End() int64 { return g.end }

// Equal says whether both are the same gates. A list has one form only.
func (g Gates) Equal(h Gates) bool { return g.n == h.n && bytes.Equal(g.gaps, h.gaps) }

// All yields the gates with their places in the list.
func (g Gates) All() iter.Seq2[int, int64] {
	return func(yield func(int, int64) bool) {
		r := g.Reader()
		for r.Next() && yield(r.At, r.Gate) {
		}
	}
}

// Reader reads a list of gates from its beginning.
func (g Gates) Reader() GatesReader { return GatesReader{gates: g, rest: g.gaps, At: -1, Gate: -1} }

// GatesReader is where a reader stands: at no gate before the first Next.
type GatesReader struct {
	gates Gates
	rest  []byte // of its gaps
	At    int    // the place in the list
	Gate  int64  // and the gate there
}

// Next goes on to the next gate, if there is one.
func (r *GatesReader) Next() bool {
	if r.At+1 >= r.gates.n {
		return false
	}
	gap := uint64(r.rest[0])
	r.rest = r.rest[1:]
	if gap == wideGap {
		more, n := binary.Uvarint(r.rest)
		gap, r.rest = gap+more, r.rest[n:]
	}
	r.At++
	r.Gate += 1 + int64(gap)
	return true
}

// gatesHead is the size in bytes of what Append writes before the gaps: how many there are.
const gatesHead = 8

// Append appends g to b as ParseGates reads it.
func (g Gates) Append(b []byte) []byte {
	return append(binary.BigEndian.AppendUint64(b, uint64(g.n)), g.gaps...)
}

// Size is how many bytes Append appends.
func (g Gates) Size() int { return gatesHead + len(g.gaps) }

// Pieces are what Append appends, in two pieces. The second is g's own memory.
func (g Gates) Pieces() (count, gaps []byte) {
	return binary.BigEndian.AppendUint64(nil, uint64(g.n)), g.gaps
}

// Is says whether b is what Append appends. A list has one form only.
func (g Gates) Is(b []byte) bool {
	return len(b) == g.Size() && binary.BigEndian.Uint64(b) == uint64(g.n) && bytes.Equal(b[gatesHead:], g.gaps)
}

// ParseGates reads what Append wrote, all of whose gates must lie below limit, and
// returns what follows. The list shares the memory of b.
func ParseGates(b []byte, limit int64) (Gates, []byte, error) {
	r := reader{rest: b}
	n := r.number(8, uint64(len(b)))
	if r.err != nil {
		return Gates{}, nil, r.err
	}
	gaps, end := r.rest, uint64(0)
	for left := n; left > 0; {
		if left >= 8 && len(r.rest) >= 8 {
			near, sum := nearGaps(binary.LittleEndian.Uint64(r.rest))
			end += sum + uint64(near)
			left -= uint64(near)
			r.rest = r.rest[near:]
			if near == 8 {
				continue
			}
		}
		gap := r.number(1, wideGap)
		switch {
		case gap < wideGap:
		case len(r.rest) > 0 && r.rest[0] < 0x80: // as most are
			gap += uint64(r.rest[0])
			r.rest = r.rest[1:]
		default:
			gap += r.uvarint(uint64(limit))
		}
		end += gap + 1
		left--
		if r.err == nil && end > uint64(limit) {
			r.err = fmt.Errorf("gates beyond the last of %d", limit)
		}
		if r.err != nil {
			return Gates{}, nil, r.err
		}
	}
	if end > uint64(limit) {
		return Gates{}, nil, fmt.Errorf("gates beyond the last of %d", limit)
	}
	size := len(gaps) - len(r.rest)
	return Gates{gaps: gaps[:size:size], n: int(n), end: int64(end)}, r.rest, nil
}

// nearGaps is with how many gaps of one byte eight bytes begin, and their sum.
func nearGaps(w uint64) (n int, sum uint64) {
	const ones, halves = 0x0101010101010101, 0x00ff00ff00ff00ff
	wide := (^w - ones) & w & (ones << 7) // the lowest bit set is in the first byte of 255
	n = bits.TrailingZeros64(wide) / 8    // 8 if there is none
	w &= 1<<(8*n) - 1
	return n, (w&halves + w>>8&halves) * 0x0001000100010001 >> 48
}

// Detections is what Bob's detectors saw in a block.
type Detections struct {
	Gates   Gates  // at which they clicked
	Bases   []byte // packed: KeyBasis or TestBasis, Bob's choice
	Bits    []byte // packed, secret; of a double click, Bob's random bit
	Doubles []byte // packed: where both detectors clicked. It is not told to Alice
}

func (d Detections) validate(gates int64) error {
	n := d.Gates.Len()
	if d.Gates.End() > gates || !packed(d.Bases, n) || !packed(d.Bits, n) || !packed(d.Doubles, n) {
		return errors.New("detections that do not fit each other, or the block")
	}
	return nil
}

func (d Detections) wipe() {
	clear(d.Bases)
	clear(d.Bits)
}

// Sent is what Alice's transmitter did in some gates, in packed strings of a bit for each.
type Sent struct {
	Bits      []byte // secret
	Bases     []byte // KeyBasis or TestBasis; secret where Bob's is another
	Low, High []byte // the bits of the number of the intensity; secret likewise
}

func (s Sent) validate(n, intensities int) error {
	for _, column := range [][]byte{s.Bits, s.Bases, s.Low, s.High} {
		if !packed(column, n) {
			return fmt.Errorf("what was sent does not fit %d gates", n)
		}
	}
	for i, high := range s.High {
		if high&s.Low[i] != 0 || intensities == 2 && high != 0 {
			return fmt.Errorf("an intensity was sent that is none of %d", intensities)
		}
	}
	return nil
}

func (s Sent) wipe() {
	for _, column := range [][]byte{s.Bits, s.Bases, s.Low, s.High} {
		clear(column)
	}
}
