package qlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

func frame(t testing.TB, kind byte, body []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := writeFrame(&b, kind, bytes.Clone(body)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestFrameLimits(t *testing.T) {
	for _, tc := range []struct {
		name  string
		bytes []byte
		want  error // nil: any
	}{
		{"nothing", nil, io.EOF},
		{"half a length", []byte{0, 0}, io.ErrUnexpectedEOF},
		{"no kind", []byte{0, 0, 0, 0}, nil},
		{"over the limit", []byte{0, 0, 0, 101, 1}, nil},
		{"four gigabytes", []byte{0xff, 0xff, 0xff, 0xff, 1}, nil},
		{"short body", []byte{0, 0, 0, 5, 1, 2}, io.ErrUnexpectedEOF},
		{"no body at all", []byte{0, 0, 0, 5}, io.ErrUnexpectedEOF},
	} {
		if _, _, err := readFrame(bytes.NewReader(tc.bytes), 100); err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: got error %v, want %v", tc.name, err, tc.want)
		}
	}
	if err := writeFrame(io.Discard, 1, make([]byte, maxFrame)); err == nil {
		t.Error("a frame above the limit was written")
	}
}

// What was written is wiped: it may have been secret.
func TestWriteFrameWipes(t *testing.T) {
	body := []byte("secret")
	if err := writeFrame(io.Discard, 1, body); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(body, make([]byte, 6)) {
		t.Errorf("body after writing: %q", body)
	}
}

func TestListsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		scale := rapid.SampledFrom([]int64{2, 100, 1 << 12, 1 << 40}).Draw(t, "scale")
		var gates distill.Gates
		var want []bb84.Detection
		var sent []bb84.Sent
		var seenCodes, sentCodes []byte
		for _, gap := range rapid.SliceOfN(rapid.Int64Range(0, scale), 0, 200).Draw(t, "gaps") {
			d := bb84.Detection{
				Gate: gates.End() + gap, Basis: bb84.Basis(rapid.IntRange(0, 1).Draw(t, "basis")),
				Bit: byte(rapid.IntRange(0, 1).Draw(t, "bit")), Double: rapid.Bool().Draw(t, "double"),
			}
			s := bb84.Sent{Bit: byte(rapid.IntRange(0, 1).Draw(t, "sent")), Basis: d.Basis ^ 1, Intensity: byte(rapid.IntRange(0, 2).Draw(t, "intensity"))}
			gates.Add(d.Gate)
			want, sent = append(want, d), append(sent, s)
			seenCodes, sentCodes = append(seenCodes, seenCode(d)), append(sentCodes, sentCode(s))
		}
		got, err := parseDetections(detectionsBody(gates, seenCodes))
		if err != nil || !slices.Equal(listOf(got), want) {
			t.Fatalf("detections: got %v, %v", listOf(got), err)
		}
		did, err := parseChoices(encodeChoices(sentCodes), len(sent))
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range sent {
			if bit(did.Bits, i) != s.Bit || bit(did.Bases, i) != byte(s.Basis) || bit(did.Low, i)|bit(did.High, i)<<1 != s.Intensity {
				t.Fatalf("what was sent at gate %d is not %v", i, s)
			}
		}
		name, question, err := parseSent(slices.Concat(encodeSent(blockName{5, 6}, gates)...))
		if err != nil || name != (blockName{5, 6}) {
			t.Fatalf("question: got %v, %v", name, err)
		}
		for _, clicked := range []distill.Gates{gates, {}, gatesOf(0, 3)} { // whichever are likely to be named
			asked, err := parseAsked(question, clicked)
			if err != nil || asked.Len() != len(want) || asked.End() != gates.End() {
				t.Fatalf("gates: got %d, %v", asked.Len(), err)
			}
			for i, gate := range asked.All() {
				if gate != want[i].Gate {
					t.Fatalf("gate %d: got %d, want %d", i, gate, want[i].Gate)
				}
			}
		}
	})
}

// detectionsBody is what encodeDetections makes, in one piece.
func detectionsBody(gates distill.Gates, codes []byte) []byte {
	open, secret := encodeDetections(gates, codes)
	return append(slices.Concat(open...), secret...)
}

// A body that any parser takes is the one that its encoder makes, so nothing can be
// hidden in it; and no body of a few bytes makes a list of millions.
func FuzzBodies(f *testing.F) {
	var seed [bb84.SeedSize]byte
	f.Add(byte(kindHello), hello{end: 'a', secret: []byte("0123456789abcdef")}.encode())
	f.Add(byte(kindSeed), encodeSeed(3, &seed))
	f.Add(byte(kindFire), encodeFire(blockName{1, 2}, 5_200_000))
	f.Add(byte(kindSent), slices.Concat(encodeSent(blockName{1, 2}, gatesOf(0, 1, 300, 301))...))
	f.Add(byte(kindDetections), encodeName(blockName{1, 2}))
	f.Add(byte(kindChoices), encodeChoices([]byte{9, 2, 0, 0, 0, 0, 0, 0, 4}))
	f.Add(byte(kindDetectedAt), detectionsBody(gatesOf(0, 1, 7, 5000), []byte{3, 3, 7, 3}))
	f.Add(byte(kindSent), append(put8(nil, 1, 1, math.MaxInt64), 0))
	f.Add(byte(kindDetectedAt), append(put8(nil, 1), 1, 7, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, kind byte, body []byte) {
		again, err := reencode(kind, body)
		if err == nil && !bytes.Equal(again, body) {
			t.Errorf("kind %#x: took %x for %x", kind, body, again)
		}
	})
}

func reencode(kind byte, body []byte) ([]byte, error) {
	switch kind {
	case kindHello:
		h, err := parseHello(body)
		return h.encode(), err
	case kindSeed:
		session, seed, err := parseSeed(body)
		if err != nil {
			return nil, err
		}
		return encodeSeed(session, seed), nil
	case kindFire:
		n, gates, err := parseFire(body)
		return encodeFire(n, gates), err
	case kindSent:
		n, question, err := parseSent(body)
		if err != nil {
			return nil, err
		}
		gates, err := parseAsked(question, distill.Gates{})
		return slices.Concat(encodeSent(n, gates)...), err
	case kindDetections:
		n, err := parseName(body)
		return encodeName(n), err
	case kindChoices:
		const count = 9
		s, err := parseChoices(body, count)
		return slices.Concat(put8(nil, count), s.Bits, s.Bases, s.Low, s.High), err
	case kindDetectedAt:
		d, err := parseDetections(body)
		return slices.Concat(d.Gates.Append(nil), d.Bases, d.Bits, d.Doubles), err
	}
	return nil, errMalformed
}

func FuzzFrame(f *testing.F) {
	f.Add(frame(f, kindHello, []byte("hello")))
	f.Add([]byte{0, 0, 1, 0, 7})
	f.Add(binary.BigEndian.AppendUint32(nil, math.MaxUint32))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 16
		r := bytes.NewReader(b)
		kind, body, err := readFrame(r, limit)
		if err != nil {
			return
		}
		if used := b[:len(b)-r.Len()]; !bytes.Equal(frame(t, kind, body), used) {
			t.Errorf("took %x for kind %#x, body %x", used, kind, body)
		}
	})
}
