package distill

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// parsers are all parsers of messages: each returns the encoding of what it accepted.
var parsers = map[string]func(body []byte) ([]byte, error){
	"begin": func(body []byte) ([]byte, error) {
		m, err := parseBegin(body)
		return m.encode(), err
	},
	"detected": func(body []byte) ([]byte, error) {
		gates, bases, err := parseDetected(body, 1<<40)
		return encodeDetected(gates, bases), err
	},
	"sifted": func(body []byte) ([]byte, error) {
		m, err := parseSifted(body, 21, Params{TestBits: 13, Intensities: 3})
		return m.encode(), err
	},
	"packed": func(body []byte) ([]byte, error) { return parsePacked(body, 13) },
	"questions": func(body []byte) ([]byte, error) {
		questions, err := parseQuestions(body, 5, 10)
		return encodeQuestions(questions), err
	},
	"reconciled": func(body []byte) ([]byte, error) {
		m, err := parseReconciled(body, 1<<18)
		return m.encode(), err
	},
	"tag": func(body []byte) ([]byte, error) {
		m, err := parseTag(body)
		return m.encode(), err
	},
	"verified": func(body []byte) ([]byte, error) {
		m, err := parseVerified(body)
		return m.encode(), err
	},
	"closing": func(body []byte) ([]byte, error) {
		m, err := parseClosing(body, 64)
		return m.encode(), err
	},
	"confirm": func(body []byte) ([]byte, error) {
		tag, err := parseConfirm(body)
		return tag[:], err
	},
	"abort": func(body []byte) ([]byte, error) {
		m, err := parseAbort(body, 1<<16)
		return m.encode(), err
	},
}

// roundTrip checks that a parser accepts only what it encodes.
func roundTrip(f *testing.F, name string, seeds ...[]byte) {
	f.Helper()
	for _, seed := range seeds {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		again, err := parsers[name](bytes.Clone(body))
		if err == nil && !bytes.Equal(again, body) {
			t.Errorf("accepted %x, which encodes to %x", body, again)
		}
	})
}

func FuzzBegin(f *testing.F) {
	roundTrip(f, "begin", beginMessage{session: 1, block: 2, pad: PadName{3, 4, 5}, link: "a-b"}.encode())
}

func FuzzDetected(f *testing.F) {
	roundTrip(f, "detected", encodeDetected(gatesOf(0, 1, 1<<39), []byte{1}), encodeDetected(gatesOf(0, 300, 301), []byte{2}),
		encodeDetected(gatesOf(3, 4, 9, 300, 301, 302, 303, 310, 320, 330, 340), []byte{2, 7}), []byte{0, 0, 0, 0, 0, 0, 0, 1, 255, 0, 1})
}

func gatesOf(list ...int64) (g Gates) {
	for _, gate := range list {
		g.Add(gate)
	}
	return g
}

func FuzzSifted(f *testing.F) {
	roundTrip(f, "sifted", siftedMessage{matches: []byte{7, 0, 1}, intensities: []byte{9, 2}, test: make([]byte, 2)}.encode(),
		siftedMessage{matches: []byte{7, 0, 1}, intensities: []byte{1, 1}, test: make([]byte, 2)}.encode())
}

func FuzzPacked(f *testing.F) { roundTrip(f, "packed", []byte{1, 0x1f}, []byte{1, 0x20}) }

func FuzzQuestions(f *testing.F) {
	roundTrip(f, "questions", encodeQuestions([]frameQuestions{{0, []question{{0, []uint32{1, 2, 9}}, {25, []uint32{2047}}}}, {4, []question{{1, []uint32{7}}}}}))
}

func FuzzReconciled(f *testing.F) {
	roundTrip(f, "reconciled", reconciledMessage{ByIntensity{1, 2, 3}, 4}.encode())
}

func FuzzTag(f *testing.F) { roundTrip(f, "tag", tagMessage{}.encode()) }

func FuzzVerified(f *testing.F) { roundTrip(f, "verified", verifiedMessage{608}.encode()) }

func FuzzClosing(f *testing.F) {
	roundTrip(f, "closing", closingMessage{Terms{-1, "ab"}, make([]byte, 8)}.encode())
}

func FuzzConfirm(f *testing.F) { roundTrip(f, "confirm", make([]byte, 16)) }

func FuzzAbort(f *testing.F) { roundTrip(f, "abort", abortMessage{2, 99}.encode()) }

// TestParsersRefuse feeds every parser with noise, and with what others accept.
func TestParsersRefuse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		body := rapid.SliceOf(rapid.Byte()).Draw(t, "body")
		for name, parse := range parsers {
			again, err := parse(bytes.Clone(body))
			if err == nil && !bytes.Equal(again, body) {
				t.Errorf("%s accepted %x, which encodes to %x", name, body, again)
			}
		}
	})
}

func TestDetectedRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dark := rapid.SampledFrom([]int64{0, 1, 200, 254, 255, 256, 300, 1<<16 - 1, 1 << 16, 1 << 32, 1 << 40}).Draw(t, "dark")
		want := []int64{}
		for range rapid.IntRange(0, 50).Draw(t, "count") {
			next := int64(0)
			if n := len(want); n > 0 {
				next = want[n-1] + 1
			}
			want = append(want, next+rapid.Int64Range(0, dark).Draw(t, "gap"))
		}
		said := gatesOf(want...)
		bases := make([]byte, packedBytes(len(want)))
		for i := range want {
			setBit(bases, i, rapid.ByteRange(0, 1).Draw(t, "basis"))
		}
		body := encodeDetected(said, bases)
		gates, got, err := parseDetected(body, said.End())
		if err != nil || !bytes.Equal(got, bases) || gates.Len() != len(want) || gates.End() != said.End() {
			t.Fatalf("%d gates up to %d, bases %x: %v", gates.Len(), gates.End(), got, err)
		}
		for i, gate := range gates.All() {
			if gate != want[i] {
				t.Fatalf("gate %d: %d, want %d", i, gate, want[i])
			}
		}
		if _, _, err := parseDetected(body, said.End()-1); err == nil && len(want) > 0 {
			t.Fatal("a gate beyond the block's last was accepted")
		}
	})
}

func TestGatesRefused(t *testing.T) {
	head := func(count uint64, gaps ...byte) []byte {
		return append(binary.BigEndian.AppendUint64(nil, count), gaps...)
	}
	if g, rest, err := ParseGates(head(2, 7, 255, 1, 9), 1000); err != nil || g.Len() != 2 || g.End() != 265 || len(rest) != 1 {
		t.Fatalf("a good list: %d gates up to %d, %v", g.Len(), g.End(), err)
	}
	for name, body := range map[string][]byte{
		"nothing":                  nil,
		"no count":                 head(1, 0)[:7],
		"fewer than said":          head(2, 1),
		"half a gap":               head(1, 255),
		"half a number":            head(1, 255, 0x80),
		"more than there is space": head(1<<61, make([]byte, 8)...),
		"two bytes for one":        head(1, 255, 0x80, 0),
		"beyond the last":          head(2, 255, 1, 255, 0xe9, 3), // 256, then 744 more
		"beyond, in one word":      head(8, 125, 125, 125, 125, 125, 125, 125, 118),
		"beyond any number":        head(2, append(bytes.Repeat([]byte{0xff}, 10), 1, 0)...),
	} {
		if g, _, err := ParseGates(body, 1000); err == nil {
			t.Errorf("%s: accepted as %d gates up to %d", name, g.Len(), g.End())
		}
	}
}

func TestQuestionsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var want []frameQuestions
		for frame := range 5 {
			f := frameQuestions{frame: frame}
			for pass := range allPasses {
				nodes := rapid.SliceOfNDistinct(rapid.Uint32Range(1, 2047), 0, 20, rapid.ID).Draw(t, "nodes")
				if len(nodes) > 0 {
					f.questions = append(f.questions, question{pass, sorted(nodes)})
				}
			}
			if len(f.questions) > 0 && rapid.Bool().Draw(t, "asks") {
				want = append(want, f)
			}
		}
		got, err := parseQuestions(encodeQuestions(want), 5, 10)
		if len(want) == 0 {
			if err == nil {
				t.Fatal("no question was accepted")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(question{}, frameQuestions{})); diff != "" {
			t.Fatal(diff)
		}
		last := want[len(want)-1]
		if _, err := parseQuestions(encodeQuestions(want), last.frame, 10); err == nil && last.frame > 0 {
			t.Fatal("a frame beyond the key was accepted")
		}
		if _, err := parseQuestions(encodeQuestions(want), 5, 9); err == nil && last.questions[len(last.questions)-1].nodes[0] > 1023 {
			t.Fatal("a node beyond the frame was accepted")
		}
	})
}

func TestQuestionsRefused(t *testing.T) {
	for name, body := range map[string][]byte{
		"empty":                 {},
		"no passes":             {0, 0},
		"no nodes":              {0, 1, 0, 0},
		"pass repeated":         {0, 2, 0, 1, 0, 0, 1, 0},
		"pass out of order":     {0, 2, 1, 1, 0, 0, 1, 0},
		"frame repeated":        {1, 1, 0, 1, 0, 1, 1, 0, 1, 0},
		"unknown frame":         {5, 1, 0, 1, 0},
		"unknown pass":          {0, 1, allPasses, 1, 0},
		"more passes than are":  {0, allPasses + 1, 0, 1, 0},
		"fewer than said":       {0, 1, 0, 2, 0},
		"fewer passes":          {0, 2, 0, 1, 0},
		"long number":           {0, 1, 0, 1, 0x80, 0},
		"node beyond the frame": {0, 1, 0, 1, 0xff, 0x0f},
		"huge number":           append([]byte{0, 1, 0, 1}, bytes.Repeat([]byte{0xff}, 9)...),
	} {
		if got, err := parseQuestions(body, 5, 10); err == nil {
			t.Errorf("%s: accepted as %v", name, got)
		}
	}
}

func TestAbortFigures(t *testing.T) {
	if _, err := parseAbort(abortMessage{0, 0}.encode(), 10); err == nil {
		t.Error("an abort without a reason was accepted")
	}
	if _, err := parseAbort(abortMessage{1, 11}.encode(), 10); err == nil {
		t.Error("more errors than test bits were accepted")
	}
	if _, err := parseVerified(verifiedMessage{math.MaxInt64}.encode()); err == nil {
		t.Error("an absurd pool was accepted")
	}
}
