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

func TestSentRefusesDisorder(t *testing.T) {
	for name, gates := range map[string][]int64{
		"negative": {-1}, "twice": {3, 3}, "descending": {5, 4}, "the last number": {math.MaxInt64},
	} {
		if _, err := encodeSent(blockName{1, 1}, gates); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestListsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		scale := rapid.SampledFrom([]int64{2, 100, 1 << 40}).Draw(t, "scale")
		var gates []int64
		var list gateList
		var want []bb84.Detection
		next := int64(0)
		for _, gap := range rapid.SliceOfN(rapid.Int64Range(0, scale), 0, 200).Draw(t, "gaps") {
			d := bb84.Detection{
				Gate: next + gap, Basis: bb84.Basis(rapid.IntRange(0, 1).Draw(t, "basis")),
				Bit: byte(rapid.IntRange(0, 1).Draw(t, "bit")), Double: rapid.Bool().Draw(t, "double"),
			}
			next = d.Gate + 1
			gates, want = append(gates, d.Gate), append(want, d)
			list.addDetection(d)
		}
		got, err := parseDetections(list.encode())
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("detections: got %v, %v", got, err)
		}
		body, err := encodeSent(blockName{5, 6}, gates)
		if err != nil {
			t.Fatal(err)
		}
		name, asked, err := parseSent(body)
		if err != nil || name != (blockName{5, 6}) || !slices.Equal(asked, gates) {
			t.Fatalf("gates: got %v %v, %v", name, asked, err)
		}
	})
}

// A body that any parser takes is the one that its encoder makes, so nothing can be
// hidden in it; and no body of a few bytes makes a list of millions.
func FuzzBodies(f *testing.F) {
	var list gateList
	for _, g := range []int64{0, 1, 7, 5000} {
		list.addDetection(bb84.Detection{Gate: g, Basis: bb84.Z, Bit: 1, Double: g == 7})
	}
	sent, err := encodeSent(blockName{1, 2}, []int64{0, 1, 300, 301})
	if err != nil {
		f.Fatal(err)
	}
	var seed [bb84.SeedSize]byte
	f.Add(byte(kindHello), hello{end: 'a', secret: []byte("0123456789abcdef")}.encode())
	f.Add(byte(kindSeed), encodeSeed(3, &seed))
	f.Add(byte(kindFire), encodeFire(blockName{1, 2}, 5_200_000))
	f.Add(byte(kindSent), sent)
	f.Add(byte(kindDetections), encodeName(blockName{1, 2}))
	f.Add(byte(kindChoices), encodeChoices([]bb84.Sent{{Bit: 1, Intensity: 2}, {Basis: bb84.Z}, {}, {}, {}, {}, {}, {}, {Intensity: 1}}))
	f.Add(byte(kindDetectedAt), list.encode())
	f.Add(byte(kindSent), put8(nil, 1, 1, math.MaxInt64))
	f.Add(byte(kindDetectedAt), append(put8(nil, 1), 0x80, 0))
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
		n, gates, err := parseSent(body)
		if err != nil {
			return nil, err
		}
		return encodeSent(n, gates)
	case kindDetections:
		n, err := parseName(body)
		return encodeName(n), err
	case kindChoices:
		const count = 9
		sent, err := parseChoices(body, count)
		return encodeChoices(sent), err
	case kindDetectedAt:
		got, err := parseDetections(body)
		var list gateList
		for _, d := range got {
			list.addDetection(d)
		}
		return list.encode(), err
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
