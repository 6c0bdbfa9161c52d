package distill

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// The messages of a block, in the order in which they are said. Every one has exactly
// one encoding: what a parser accepts encodes to the same bytes again. Numbers are
// big-endian, bit strings packed least significant bit first.
const (
	kindBegin      byte = iota + 1 // Alice: which block, under which profile, with which pad
	kindDetected                   // Bob: the gates that clicked, and his bases
	kindSifted                     // Alice: which of them count, their intensities, and her test bits
	kindTested                     // Bob: his test bits
	kindPasses                     // Alice: the seed of the passes
	kindQuestion                   // Bob: nodes; many times
	kindAnswer                     // Alice: their parities
	kindReconciled                 // Bob: done
	kindTag                        // Alice: point and value of the verification hash
	kindVerified                   // Bob: equal
	kindClosing                    // Alice: terms, and the seed of amplification
	kindConfirm                    // Bob, then Alice: tag over all of the above
	kindAbort                      // either, in the place of any but the first
)

// version is that of the messages.
const version = 4

// maxCount bounds numbers that have no better bound.
const maxCount = 1 << 48

type beginMessage struct {
	profile        [32]byte
	session, block int64
	pad            PadName
	link           string
}

func (m beginMessage) encode() []byte {
	b := append([]byte{version}, m.profile[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(m.session))
	b = binary.BigEndian.AppendUint64(b, uint64(m.block))
	b = binary.BigEndian.AppendUint64(b, uint64(m.pad.Session))
	b = binary.BigEndian.AppendUint64(b, uint64(m.pad.Block))
	b = binary.BigEndian.AppendUint16(b, uint16(m.pad.Index))
	return append(b, m.link...)
}

func parseBegin(body []byte) (m beginMessage, err error) {
	r := reader{rest: body}
	v := r.take(1)
	copy(m.profile[:], r.take(32))
	m.session = int64(r.number(8, 1<<63-1))
	m.block = int64(r.number(8, 1<<63-1))
	m.pad.Session = int64(r.number(8, 1<<63-1))
	m.pad.Block = int64(r.number(8, 1<<63-1))
	m.pad.Index = int(r.number(2, 1<<16-1))
	m.link = string(r.take(len(r.rest)))
	if r.err == nil && v[0] != version {
		r.err = fmt.Errorf("version %d of the messages, want %d", v[0], version)
	}
	if r.err == nil && len(m.link) > maxLink {
		r.err = errors.New("name of the link too long")
	}
	return m, r.err
}

// encodeDetected is Bob's list: the gates that clicked, and his bases, packed.
func encodeDetected(gates Gates, bases []byte) []byte {
	return append(gates.Append(make([]byte, 0, gates.Size()+len(bases))), bases...)
}

// parseDetected reads Bob's list in a block of so many gates. What it returns shares the
// memory of body.
func parseDetected(body []byte, gates int64) (at Gates, bases []byte, err error) {
	at, rest, err := ParseGates(body, gates)
	if err != nil {
		return Gates{}, nil, err
	}
	bases, err = parsePacked(rest, at.Len())
	return at, bases, err
}

type siftedMessage struct {
	seed        [32]byte // of the choice among the matches
	matches     []byte   // packed: at which of Bob's gates the bases are equal
	intensities []byte   // packed: of each of these the lower bit, then of each the upper; see planes
	test        []byte   // packed: Alice's test bits
}

func (m siftedMessage) encode() []byte {
	b := append(m.seed[:], m.matches...)
	b = append(b, m.intensities...)
	return append(b, m.test...)
}

func parseSifted(body []byte, detected int, p Params) (m siftedMessage, err error) {
	r := reader{rest: body}
	copy(m.seed[:], r.take(32))
	m.matches = r.packed(detected)
	matched := ones(m.matches)
	planes := r.take(0)
	for range planesOf(p.Intensities) {
		planes = append(planes, r.packed(matched)...)
	}
	m.intensities = planes
	m.test = r.packed(p.TestBits)
	if r.err == nil && p.Intensities == 3 {
		low, high := planes[:len(planes)/2], planes[len(planes)/2:]
		for i := range low {
			if low[i]&high[i] != 0 {
				r.err = errors.New("an intensity that no source has")
				break
			}
		}
	}
	return m, r.end()
}

// planesOf is how many bits say which of so many intensities it is.
func planesOf(intensities int) int { return intensities - 1 }

func parsePacked(body []byte, n int) ([]byte, error) {
	r := reader{rest: body}
	b := r.packed(n)
	return b, r.end()
}

// encodeQuestions writes, for each frame that asks, its number and how many passes; for
// each pass its number, how many nodes, and how many numbers lie between a node and the
// one before.
func encodeQuestions(frames []frameQuestions) []byte {
	var b []byte
	for _, f := range frames {
		b = binary.AppendUvarint(b, uint64(f.frame))
		b = append(b, byte(len(f.questions)))
		for _, q := range f.questions {
			b = append(b, byte(q.pass))
			b = binary.AppendUvarint(b, uint64(len(q.nodes)))
			next := uint32(1)
			for _, node := range q.nodes {
				b = binary.AppendUvarint(b, uint64(node-next))
				next = node + 1
			}
		}
	}
	return b
}

// parseQuestions reads questions about frames of 1<<log bits: frames ascending strictly,
// in each at least one pass, ascending strictly, and in each of these at least one node.
func parseQuestions(body []byte, frames, log int) ([]frameQuestions, error) {
	r := reader{rest: body}
	var list []frameQuestions
	last := -1
	for len(r.rest) > 0 && r.err == nil {
		f := frameQuestions{frame: int(r.uvarint(uint64(frames - 1)))}
		passes := int(r.number(1, allPasses))
		if r.err == nil && (f.frame <= last || passes == 0) {
			r.err = errors.New("frames out of order, or one without passes")
		}
		last = f.frame
		f.questions = r.questions(passes, log)
		list = append(list, f)
	}
	if r.err == nil && len(list) == 0 {
		r.err = errors.New("no question")
	}
	if r.err != nil {
		return nil, r.err
	}
	return list, nil
}

// questions reads those about one frame.
func (r *reader) questions(passes, log int) []question {
	var questions []question
	last := -1
	for range passes {
		pass := int(r.number(1, allPasses-1))
		n := r.uvarint(uint64(len(r.rest)))
		if r.err == nil && (pass <= last || n == 0) {
			r.err = errors.New("passes out of order, or one without nodes")
		}
		if r.err != nil {
			break
		}
		last = pass
		q := question{pass: pass, nodes: make([]uint32, 0, n)}
		next := uint64(1)
		for range n {
			node := next + r.uvarint(2<<log-1)
			if r.err == nil && node >= 2<<log {
				r.err = fmt.Errorf("node %d of a frame of 2^%d bits", node, log)
			}
			if r.err != nil {
				break
			}
			q.nodes = append(q.nodes, uint32(node))
			next = node + 1
		}
		questions = append(questions, q)
	}
	return questions
}

// reconciledMessage has what was revealed, and the errors put right, by intensity.
type reconciledMessage struct {
	corrected ByIntensity
	leak      int
}

func (m reconciledMessage) encode() []byte {
	var b []byte
	for _, n := range m.corrected {
		b = binary.BigEndian.AppendUint32(b, uint32(n))
	}
	return binary.BigEndian.AppendUint32(b, uint32(m.leak))
}

func parseReconciled(body []byte, keyBits int) (m reconciledMessage, err error) {
	r := reader{rest: body}
	for k := range m.corrected {
		m.corrected[k] = int(r.number(4, uint64(keyBits)))
	}
	m.leak = int(r.number(4, uint64(keyBits)))
	return m, r.end()
}

type tagMessage struct{ point, tag [16]byte }

func (m tagMessage) encode() []byte { return append(m.point[:], m.tag[:]...) }

func parseTag(body []byte) (m tagMessage, err error) {
	r := reader{rest: body}
	copy(m.point[:], r.take(16))
	copy(m.tag[:], r.take(16))
	return m, r.end()
}

// verifiedMessage carries how many atoms Bob's end has stored.
type verifiedMessage struct{ stored int }

func (m verifiedMessage) encode() []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(m.stored))
}

func parseVerified(body []byte) (m verifiedMessage, err error) {
	r := reader{rest: body}
	m.stored = int(r.number(8, maxCount))
	return m, r.end()
}

type closingMessage struct {
	terms Terms
	seed  []byte // packed: one bit less than the key has
}

func (m closingMessage) encode() []byte {
	b := make([]byte, 0, 10+len(m.terms.Owners)+len(m.seed))
	b = binary.BigEndian.AppendUint64(b, uint64(m.terms.Epoch))
	b = binary.BigEndian.AppendUint16(b, uint16(len(m.terms.Owners)))
	b = append(b, m.terms.Owners...)
	return append(b, m.seed...)
}

func parseClosing(body []byte, keyBits int) (m closingMessage, err error) {
	r := reader{rest: body}
	m.terms.Epoch = int64(r.number(8, 1<<64-1))
	m.terms.Owners = string(r.take(int(r.number(2, MaxOwners))))
	m.seed = r.packed(keyBits - 1)
	return m, r.end()
}

func parseConfirm(body []byte) (tag [16]byte, err error) {
	r := reader{rest: body}
	copy(tag[:], r.take(16))
	return tag, r.end()
}

// abortReasons numbers the reasons on the wire; 0 is none.
var abortReasons = [...]string{
	"", ReasonPad, ReasonDoubles, ReasonCounts, ReasonGains, ReasonQBER, ReasonLeak, ReasonErrors, ReasonVerify, ReasonTerms,
	ReasonBases, ReasonRuns,
}

type abortMessage struct {
	reason int // an index of abortReasons
	errors int // among the test bits
}

func (m abortMessage) encode() []byte {
	return binary.BigEndian.AppendUint32([]byte{byte(m.reason)}, uint32(m.errors))
}

func parseAbort(body []byte, testBits int) (m abortMessage, err error) {
	r := reader{rest: body}
	m.reason = int(r.number(1, uint64(len(abortReasons)-1)))
	m.errors = int(r.number(4, uint64(testBits)))
	if r.err == nil && m.reason == 0 {
		r.err = errors.New("abort without a reason")
	}
	return m, r.end()
}

// reader takes a body apart. After the first error it gives zeros.
type reader struct {
	rest []byte
	err  error
}

var errShort = errors.New("message too short")

// take returns the next n bytes.
func (r *reader) take(n int) []byte {
	if r.err == nil && n > len(r.rest) {
		r.err = errShort
	}
	if r.err != nil {
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

// number returns the next size bytes as a number that is not above limit.
func (r *reader) number(size int, limit uint64) uint64 {
	var v uint64
	for _, c := range r.take(size) {
		v = v<<8 | uint64(c)
	}
	if v > limit {
		r.err = fmt.Errorf("number %d above its limit %d", v, limit)
		return 0
	}
	return v
}

// uvarint returns the next variable-length number, written as briefly as it can be
// and not above limit.
func (r *reader) uvarint(limit uint64) uint64 {
	if r.err != nil {
		return 0
	}
	v, n := binary.Uvarint(r.rest)
	if n <= 0 || n != max(1, (bits.Len64(v)+6)/7) || v > limit {
		r.err = errors.New("bad or too large number")
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

// packed returns the next n bits.
func (r *reader) packed(n int) []byte {
	b := r.take(packedBytes(n))
	if r.err == nil && !packed(b, n) {
		r.err = errors.New("bits set behind the last one")
	}
	return b
}

// end is the error of the whole message: the first one, or that something is left.
func (r *reader) end() error {
	if r.err == nil && len(r.rest) > 0 {
		r.err = fmt.Errorf("%d bytes too many", len(r.rest))
	}
	return r.err
}
