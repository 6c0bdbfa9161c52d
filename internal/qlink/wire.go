package qlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
)

// A frame is a 4-byte big-endian length, a kind, and a body; the length counts the
// kind and the body. One request of a Box is answered by one frame before the next.
const (
	maxFrame = 48 << 20 // bytes, the largest list of detections
	maxHello = 2 << 10  // bytes, before the secret is known to be right
	maxList  = 2 * maxDetections
)

// The kinds of frames.
const (
	kindHello      = 0x01 // version, end, secret
	kindSeed       = 0x02 // session, seed
	kindFire       = 0x03 // session, block, gates
	kindSent       = 0x04 // session, block, gates
	kindDetections = 0x05 // session, block

	kindDone       = 0x80 // nothing to tell
	kindRefused    = 0x81 // reason
	kindCut        = 0x82
	kindLost       = 0x83
	kindChoices    = 0x84 // number of gates, what was sent
	kindDetectedAt = 0x85 // gates, what was seen
)

const wireVersion = 4

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

// writeFrame writes one frame and wipes its body, which may be secret, but for what is open
// in it and comes first.
func writeFrame(w io.Writer, kind byte, body []byte, open ...[]byte) error {
	defer clear(body)
	size := 1 + len(body)
	for _, b := range open {
		size += len(b)
	}
	if size > maxFrame {
		return fmt.Errorf("a frame of %d bytes: want at most %d", size, maxFrame)
	}
	head := append(binary.BigEndian.AppendUint32(make([]byte, 0, 5), uint32(size)), kind)
	parts := append(append(net.Buffers{head}, open...), body)
	_, err := parts.WriteTo(w) // one system call, if w is a connection
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

// encodeSent makes the question for gates, in pieces.
func encodeSent(n blockName, gates distill.Gates) [][]byte {
	count, gaps := gates.Pieces()
	return [][]byte{put8(nil, n.session, n.block), count, gaps}
}

// parseSent takes the gates as they are: see parseAsked.
func parseSent(body []byte) (n blockName, asked []byte, err error) {
	asked, err = take8(body, &n.session, &n.block)
	if err != nil {
		return blockName{}, nil, errMalformed
	}
	return n, asked, nil
}

// parseAsked reads the gates of a question. clicked are those that it is likely to name, and
// then they need not be read.
func parseAsked(asked []byte, clicked distill.Gates) (distill.Gates, error) {
	if clicked.Is(asked) {
		return clicked, nil
	}
	gates, rest, err := distill.ParseGates(asked, distill.MaxGates)
	if err != nil || len(rest) != 0 || gates.Len() > maxList {
		return distill.Gates{}, errMalformed
	}
	return gates, nil
}

// What an end's device did in a gate is a byte here, and on the wire a bit in each of some
// packed strings.

// sentCode has the bit, the basis, and the two bits of the intensity.
func sentCode(s bb84.Sent) byte { return s.Bit&1 | byte(s.Basis)&1<<1 | s.Intensity&3<<2 }

// seenCode has the basis, the bit and the double click.
func seenCode(d bb84.Detection) byte {
	code := byte(d.Basis)&1 | d.Bit&1<<1
	if d.Double {
		code |= 1 << 2
	}
	return code
}

const (
	sentBits = 4
	seenBits = 3
)

// appendColumns appends, for each of the lower bits of the codes, that bit of all of them,
// packed.
func appendColumns(b, codes []byte, columns int) []byte {
	size := (len(codes) + 7) / 8
	b = slices.Grow(b, columns*size)
	list := b[len(b) : len(b)+columns*size]
	for i := range size {
		var eight uint64
		if tail := codes[8*i:]; len(tail) >= 8 {
			eight = binary.LittleEndian.Uint64(tail)
		} else {
			for k, code := range tail {
				eight |= uint64(code) << (8 * k)
			}
		}
		eight = transpose(eight)
		for c := range columns {
			list[c*size+i] = byte(eight >> (8 * c))
		}
	}
	return b[:len(b)+len(list)]
}

// transpose makes bit i of byte k bit k of byte i (Warren, Hacker's Delight, 7-3).
func transpose(x uint64) uint64 {
	t := (x ^ x>>7) & 0x00aa00aa00aa00aa
	x ^= t ^ t<<7
	t = (x ^ x>>14) & 0x0000cccc0000cccc
	x ^= t ^ t<<14
	t = (x ^ x>>28) & 0x00000000f0f0f0f0
	return x ^ t ^ t<<28
}

// takeColumns takes packed strings of n bits off b, of which nothing must be left.
func takeColumns(b []byte, n int, columns ...*[]byte) error {
	size := (n + 7) / 8
	if len(b) != len(columns)*size {
		return errMalformed
	}
	for _, column := range columns {
		*column, b = b[:size:size], b[size:]
		if n%8 != 0 && (*column)[size-1]>>(n%8) != 0 {
			return errMalformed
		}
	}
	return nil
}

// encodeChoices answers encodeSent.
func encodeChoices(codes []byte) []byte {
	b := put8(make([]byte, 0, 8+sentBits*(len(codes)/8+1)), int64(len(codes)))
	return appendColumns(b, codes, sentBits)
}

// parseChoices reads the answer for so many gates. What it returns shares the memory of body.
func parseChoices(body []byte, count int) (s distill.Sent, err error) {
	var said int64
	rest, err := take8(body, &said)
	if err != nil || said != int64(count) || takeColumns(rest, count, &s.Bits, &s.Bases, &s.Low, &s.High) != nil {
		return distill.Sent{}, errMalformed
	}
	return s, nil
}

// encodeDetections gives the gates in pieces, and what is secret.
func encodeDetections(gates distill.Gates, codes []byte) (open [][]byte, secret []byte) {
	count, gaps := gates.Pieces()
	return [][]byte{count, gaps}, appendColumns(nil, codes, seenBits)
}

// parseDetections reads what encodeDetections made. What it returns shares the memory of body.
func parseDetections(body []byte) (d distill.Detections, err error) {
	gates, rest, err := distill.ParseGates(body, distill.MaxGates)
	if err != nil || gates.Len() > maxList || takeColumns(rest, gates.Len(), &d.Bases, &d.Bits, &d.Doubles) != nil {
		return distill.Detections{}, errMalformed
	}
	d.Gates = gates
	return d, nil
}
