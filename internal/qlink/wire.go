package qlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/handover"
)

// A frame is a 4-byte big-endian length, a kind, and a body; the length counts the
// kind and the body. One request of a Box is answered by one frame before the next.
const (
	maxFrame = 32 << 20 // bytes, the largest list of detections
	maxHello = 2 << 10  // bytes, before the secret is known to be right
	maxList  = 2 * maxDetections
)

// The kinds of frames.
const (
	kindHello      = 0x01 // version, end, secret
	kindSeed       = 0x02 // session, seed
	kindFire       = 0x03 // session, block, gates
	kindSent       = 0x04 // session, block, list of gates
	kindDetections = 0x05 // session, block

	kindDone       = 0x80 // nothing to tell
	kindRefused    = 0x81 // reason
	kindCut        = 0x82
	kindLost       = 0x83
	kindChoices    = 0x84 // number of gates, what was sent
	kindDetectedAt = 0x85 // number of detections, list
)

const wireVersion = 2

var errMalformed = errors.New("malformed message")

// readFrame reads one frame of at most limit bytes.
func readFrame(r io.Reader, limit int) (kind byte, body []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || int64(n) > int64(limit) {
		return 0, nil, fmt.Errorf("a frame of %d bytes: want 1 to %d", n, limit)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return b[0], b[1:], nil
}

// writeFrame writes one frame and wipes body, which may be secret.
func writeFrame(w io.Writer, kind byte, body []byte) error {
	defer clear(body)
	if len(body)+1 > maxFrame {
		return fmt.Errorf("a frame of %d bytes: want at most %d", len(body)+1, maxFrame)
	}
	b := make([]byte, 0, 5+len(body))
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)+1))
	b = append(append(b, kind), body...)
	defer clear(b)
	_, err := w.Write(b)
	return err
}

// hello is the first message of a Box.
type hello struct {
	end    handover.End
	secret []byte
}

func (h hello) encode() []byte {
	return append([]byte{wireVersion, byte(h.end)}, h.secret...)
}

func parseHello(body []byte) (hello, error) {
	if len(body) < 2 || body[0] != wireVersion {
		return hello{}, errMalformed
	}
	return hello{end: handover.End(body[1]), secret: body[2:]}, nil
}

// blockName names a block: the session and the number that Alice gave it.
type blockName struct {
	session, block int64
}

// put8 appends numbers, which are not negative, as 8 bytes each.
func put8(b []byte, numbers ...int64) []byte {
	for _, v := range numbers {
		b = binary.BigEndian.AppendUint64(b, uint64(v))
	}
	return b
}

// take8 reads as many numbers as it is given places and returns what follows.
func take8(b []byte, places ...*int64) ([]byte, error) {
	for _, p := range places {
		if len(b) < 8 || b[0] > 0x7f {
			return nil, errMalformed
		}
		*p = int64(binary.BigEndian.Uint64(b))
		b = b[8:]
	}
	return b, nil
}

func encodeSeed(session int64, seed *[bb84.SeedSize]byte) []byte {
	return append(put8(nil, session), seed[:]...)
}

func parseSeed(body []byte) (session int64, seed *[bb84.SeedSize]byte, err error) {
	rest, err := take8(body, &session)
	if err != nil || len(rest) != bb84.SeedSize {
		return 0, nil, errMalformed
	}
	return session, (*[bb84.SeedSize]byte)(rest), nil
}

func encodeFire(n blockName, gates int64) []byte { return put8(nil, n.session, n.block, gates) }

func parseFire(body []byte) (n blockName, gates int64, err error) {
	rest, err := take8(body, &n.session, &n.block, &gates)
	if err != nil || len(rest) != 0 {
		return blockName{}, 0, errMalformed
	}
	return n, gates, nil
}

func encodeName(n blockName) []byte { return put8(nil, n.session, n.block) }

func parseName(body []byte) (n blockName, err error) {
	rest, err := take8(body, &n.session, &n.block)
	if err != nil || len(rest) != 0 {
		return blockName{}, errMalformed
	}
	return n, nil
}

// encodeSent makes the question for gates, which must ascend strictly from 0 or above.
func encodeSent(n blockName, gates []int64) ([]byte, error) {
	b := put8(make([]byte, 0, 24+2*len(gates)), n.session, n.block, int64(len(gates)))
	next := int64(0)
	for _, g := range gates {
		if g < next || g == math.MaxInt64 {
			return nil, fmt.Errorf("gate %d is not above the one before it", g)
		}
		b = binary.AppendUvarint(b, uint64(g-next))
		next = g + 1
	}
	return b, nil
}

func parseSent(body []byte) (n blockName, gates []int64, err error) {
	var count int64
	rest, err := take8(body, &n.session, &n.block, &count)
	if err != nil || count > int64(len(rest)) || count > maxList { // a gate takes a byte or more
		return blockName{}, nil, errMalformed
	}
	gates = make([]int64, count)
	next := int64(0)
	for i := range gates {
		var skipped uint64
		if skipped, rest, err = takeUvarint(rest); err != nil || skipped >= uint64(math.MaxInt64-next) {
			return blockName{}, nil, errMalformed
		}
		gates[i] = next + int64(skipped)
		next = gates[i] + 1
	}
	if len(rest) != 0 {
		return blockName{}, nil, errMalformed
	}
	return n, gates, nil
}

// takeUvarint reads a number in its shortest form.
func takeUvarint(b []byte) (uint64, []byte, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || n != max(1, (bits.Len64(v)+6)/7) {
		return 0, nil, errMalformed
	}
	return v, b[n:], nil
}

// encodeChoices answers encodeSent: half a byte a gate, the first in the lower half, with
// the bit, the basis (set: Z) and two bits of the intensity.
func encodeChoices(sent []bb84.Sent) []byte {
	b := put8(make([]byte, 0, 8+(len(sent)+1)/2), int64(len(sent)))
	list := b[8 : 8+(len(sent)+1)/2]
	for i, s := range sent {
		list[i/2] |= nibble(s) << (4 * (i % 2))
	}
	return b[:8+len(list)]
}

func nibble(s bb84.Sent) byte { return s.Bit&1 | byte(s.Basis)&1<<1 | s.Intensity&3<<2 }

func fromNibble(v byte) bb84.Sent {
	return bb84.Sent{Bit: v & 1, Basis: bb84.Basis(v >> 1 & 1), Intensity: v >> 2 & 3}
}

func parseChoices(body []byte, count int) ([]bb84.Sent, error) {
	var said int64
	rest, err := take8(body, &said)
	if err != nil || said != int64(count) || len(rest) != (count+1)/2 || count%2 == 1 && rest[count/2]>>4 != 0 {
		return nil, errMalformed
	}
	sent := make([]bb84.Sent, count)
	for i := range sent {
		sent[i] = fromNibble(rest[i/2] >> (4 * (i % 2)) & 15)
	}
	return sent, nil
}

// gateList is a growing list of gates with four bits each, in wire form: for each one
// number, the gates skipped since the one before, times 16, plus its bits. The bits may be
// secret.
type gateList struct {
	list  []byte
	count int64
	next  int64
}

func (l *gateList) add(gate int64, low byte) {
	if cap(l.list)-len(l.list) < binary.MaxVarintLen64 { // append would leave a copy behind
		grown := make([]byte, len(l.list), 2*cap(l.list)+4096)
		copy(grown, l.list)
		clear(l.list)
		l.list = grown
	}
	l.list = binary.AppendUvarint(l.list, uint64(gate-l.next)<<4|uint64(low&15))
	l.count, l.next = l.count+1, gate+1
}

// addDetection adds what the receiver saw: basis, bit and double click.
func (l *gateList) addDetection(d bb84.Detection) {
	low := byte(d.Basis)<<2 | d.Bit<<1
	if d.Double {
		low |= 1
	}
	l.add(d.Gate, low)
}

func (l *gateList) encode() []byte {
	return append(put8(make([]byte, 0, 8+len(l.list)), l.count), l.list...)
}

func (l *gateList) wipe() {
	clear(l.list)
	*l = gateList{}
}

// gateReader reads a gateList that was made here, from its beginning.
type gateReader struct {
	rest []byte
	gate int64 // of the entry that was read last
	low  byte
}

// read goes on to the next entry, if there is one.
func (r *gateReader) read() bool {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 {
		return false
	}
	r.rest = r.rest[n:]
	r.gate, r.low = r.gate+1+int64(v>>4), byte(v&15)
	return true
}

func parseDetections(body []byte) ([]bb84.Detection, error) {
	var count int64
	rest, err := take8(body, &count)
	if err != nil || count > int64(len(rest)) || count > maxList {
		return nil, errMalformed
	}
	list := make([]bb84.Detection, count)
	next := int64(0)
	for i := range list {
		var v uint64
		if v, rest, err = takeUvarint(rest); err != nil || int64(v>>4) > bb84.MaxGates-next || v&8 != 0 {
			clear(list)
			return nil, errMalformed
		}
		gate := next + int64(v>>4)
		list[i] = bb84.Detection{Gate: gate, Basis: bb84.Basis(v >> 2 & 1), Bit: byte(v >> 1 & 1), Double: v&1 != 0}
		next = gate + 1
	}
	if len(rest) != 0 {
		clear(list)
		return nil, errMalformed
	}
	return list, nil
}
