package distill

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

// MaxGates is the most gates that a block may have.
const MaxGates = 1 << 48

// Gates is a list of gates of a block, ascending, in the form in which it travels: of
// every gate, how many lie between it and the one before, in as few bytes as the largest
// of these numbers needs. The zero Gates is empty. What is said about gates lies beside
// them in packed strings, bit i for gate i, so that a million of them are handed on, and
// compared, a word at a time.
type Gates struct {
	gaps []byte // little-endian, 1<<log bytes each
	log  int    // 0 to 3
	end  int64
}

// NewGates is an empty list with room for so many gates, if gaps take two bytes.
func NewGates(room int) Gates { return Gates{gaps: make([]byte, 0, 2*room)} }

// Add appends a gate, which must lie behind all others and below MaxGates.
func (g *Gates) Add(gate int64) {
	if gate < g.end || gate >= MaxGates {
		panic(fmt.Sprintf("distill: gate %d behind gate %d", gate, g.end-1))
	}
	gap := uint64(gate - g.end)
	for gap>>(8<<g.log) != 0 {
		g.widen()
	}
	g.append(gap)
	g.end = gate + 1
}

func (g *Gates) append(gap uint64) {
	switch g.log {
	case 0:
		g.gaps = append(g.gaps, byte(gap))
	case 1:
		g.gaps = binary.LittleEndian.AppendUint16(g.gaps, uint16(gap))
	case 2:
		g.gaps = binary.LittleEndian.AppendUint32(g.gaps, uint32(gap))
	default:
		g.gaps = binary.LittleEndian.AppendUint64(g.gaps, gap)
	}
}

// widen gives every gap twice the bytes, in place, from the last to the first.
func (g *Gates) widen() {
	n, size := g.Len(), 1<<g.log
	g.gaps = slices.Grow(g.gaps, n*size)[:2*n*size]
	for i := n - 1; i >= 0; i-- {
		wide := g.gaps[2*i*size:][:2*size]
		copy(wide, g.gaps[i*size:][:size])
		clear(wide[size:])
	}
	g.log++
}

func (g Gates) gap(i int) uint64 {
	switch g.log {
	case 0:
		return uint64(g.gaps[i])
	case 1:
		return uint64(binary.LittleEndian.Uint16(g.gaps[2*i:]))
	case 2:
		return uint64(binary.LittleEndian.Uint32(g.gaps[4*i:]))
	}
	return binary.LittleEndian.Uint64(g.gaps[8*i:])
}

// Len is how many gates there are.
func (g Gates) Len() int { return len(g.gaps) >> g.log }

// End is one more than the last gate, or 0 if there is none.
func (g Gates) End() int64 { return g.end }

// Equal says whether both are the same gates. A list has one form only.
func (g Gates) Equal(h Gates) bool { return g.log == h.log && bytes.Equal(g.gaps, h.gaps) }

// All yields the gates with their places in the list.
func (g Gates) All() iter.Seq2[int, int64] {
	return func(yield func(int, int64) bool) {
		r := g.Reader()
		for r.Next() && yield(r.At, r.Gate) {
		}
	}
}

// Reader reads a list of gates from its beginning.
func (g Gates) Reader() GatesReader { return GatesReader{gates: g, At: -1, Gate: -1} }

// GatesReader is where a reader stands: at no gate before the first Next.
type GatesReader struct {
	gates Gates
	At    int   // the place in the list
	Gate  int64 // and the gate there
}

// Next goes on to the next gate, if there is one.
func (r *GatesReader) Next() bool {
	if r.At+1 >= r.gates.Len() {
		return false
	}
	r.At++
	r.Gate += 1 + int64(r.gates.gap(r.At))
	return true
}

// gatesHead is the size in bytes of what Append writes before the gaps: how many there
// are, and the logarithm of their size in bytes.
const gatesHead = 9

// Append appends g to b as ParseGates reads it.
func (g Gates) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(g.Len()))
	return append(append(b, byte(g.log)), g.gaps...)
}

// Size is how many bytes Append appends.
func (g Gates) Size() int { return gatesHead + len(g.gaps) }

// ParseGates reads what Append wrote, all of whose gates must lie below limit, and
// returns what follows. The list shares the memory of b.
func ParseGates(b []byte, limit int64) (Gates, []byte, error) {
	r := reader{rest: b}
	n := r.number(8, uint64(len(b)))
	log := int(r.number(1, 3))
	gaps := r.take(int(n) << log)
	if r.err != nil {
		return Gates{}, nil, r.err
	}
	g := Gates{gaps: gaps, log: log}
	high, low, all := g.sum()
	low, carry := bits.Add64(low, n, 0)
	if high+carry > 0 || low > uint64(limit) {
		return Gates{}, nil, fmt.Errorf("gates beyond the last of %d", limit)
	}
	if log > 0 && all>>(4<<log) == 0 {
		return Gates{}, nil, errors.New("gates written in more bytes than they need")
	}
	g.end = int64(low)
	return g, r.rest, nil
}

// sum is that of all gaps, as a number of 128 bits, and the bits that any of them has.
func (g Gates) sum() (high, low, all uint64) {
	switch g.log {
	case 0:
		for _, gap := range g.gaps {
			low, all = low+uint64(gap), all|uint64(gap)
		}
	case 1:
		for b := g.gaps; len(b) >= 2; b = b[2:] {
			gap := uint64(binary.LittleEndian.Uint16(b))
			low, all = low+gap, all|gap
		}
	default:
		for i := range g.Len() {
			var carry uint64
			gap := g.gap(i)
			low, carry = bits.Add64(low, gap, 0)
			high, all = high+carry, all|gap
		}
	}
	return high, low, all
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
