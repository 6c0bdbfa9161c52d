package peer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
)

// reparse reads a message and, if it is one, writes and reads it again: what is
// accepted is kept whole. It returns whether it was accepted.
func reparse[M message](t *testing.T, body []byte) bool {
	t.Helper()
	m, err := parse[M](body)
	if err != nil {
		return false
	}
	text, err := format(m)
	if err != nil {
		t.Fatalf("accepted, but not written: %v", err)
	}
	again, err := parse[M](text)
	if err != nil {
		t.Fatalf("what was written is refused: %v\n%s", err, text)
	}
	if diff := cmp.Diff(m, again, unexported); diff != "" {
		t.Fatalf("a message changed on the way (-first +second):\n%s", diff)
	}
	return true
}

// parsers are all messages and answers by name.
var parsers = map[string]func(*testing.T, []byte) bool{
	"hello":           reparse[handover.Hello],
	"held":            reparse[handover.Held],
	"held-answer":     reparse[heldAnswer],
	"announce":        reparse[handover.Announce],
	"announce-answer": reparse[handover.AnnounceAnswer],
	"void":            reparse[handover.Void],
	"compromise":      reparse[handover.Compromise],
	"sample":          reparse[handover.Sample],
	"sample-answer":   reparse[handover.SampleAnswer],
	"burned":          reparse[handover.Burned],
	"burned-answer":   reparse[handover.BurnedAnswer],
	"submission":      reparse[audit.Submission],
	"cosigned":        reparse[audit.Cosigned],
	"witnessed":       reparse[audit.Witnessed],
	"grant":           reparse[handover.Grant],
	"grant-answer":    reparse[handover.GrantAnswer],
	"run":             reparse[handover.RunStarted],
	"run-answer":      reparse[handover.RunAnswer],
}

// vector is one line of testdata/peer/messages.txt.
type vector struct {
	line   int
	parser string
	accept bool
	body   []byte
}

func vectors(t testing.TB) []vector {
	t.Helper()
	text, err := os.ReadFile("../../testdata/peer/messages.txt")
	if err != nil {
		t.Fatal(err)
	}
	var vs []vector
	for i, line := range strings.Split(string(text), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.SplitN(line, " ", 3)
		if len(f) != 3 || parsers[f[0]] == nil || (f[1] != "accept" && f[1] != "refuse") {
			t.Fatalf("line %d: %q", i+1, line)
		}
		vs = append(vs, vector{i + 1, f[0], f[1] == "accept", []byte(f[2])})
	}
	return vs
}

func TestMessageVectors(t *testing.T) {
	for _, v := range vectors(t) {
		if got := parsers[v.parser](t, v.body); got != v.accept {
			t.Errorf("line %d: accepted %v, want %v: %s", v.line, got, v.accept, v.body)
		}
	}
}

func fuzz(f *testing.F, name string) {
	for _, v := range vectors(f) {
		if v.parser == name {
			f.Add(v.body)
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) { parsers[name](t, body) })
}

func FuzzHello(f *testing.F)          { fuzz(f, "hello") }
func FuzzHeld(f *testing.F)           { fuzz(f, "held") }
func FuzzHeldAnswer(f *testing.F)     { fuzz(f, "held-answer") }
func FuzzAnnounce(f *testing.F)       { fuzz(f, "announce") }
func FuzzAnnounceAnswer(f *testing.F) { fuzz(f, "announce-answer") }
func FuzzVoid(f *testing.F)           { fuzz(f, "void") }
func FuzzCompromise(f *testing.F)     { fuzz(f, "compromise") }
func FuzzBurned(f *testing.F)         { fuzz(f, "burned") }
func FuzzSubmission(f *testing.F)     { fuzz(f, "submission") }
func FuzzBurnedAnswer(f *testing.F)   { fuzz(f, "burned-answer") }
func FuzzGrant(f *testing.F)          { fuzz(f, "grant") }
func FuzzGrantAnswer(f *testing.F)    { fuzz(f, "grant-answer") }
func FuzzRun(f *testing.F)            { fuzz(f, "run") }
func FuzzRunAnswer(f *testing.F)      { fuzz(f, "run-answer") }

// FuzzFrames: whatever arrives is a sequence of frames up to an error; written
// again, the frames are what was read, less the beats.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 1, 9})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 3, 9, 1, 2, 0, 0, 0, 1, 0})
	f.Add([]byte{0, 0, 0, 3, 9, 1})
	f.Add([]byte{0, 255, 255, 255, 9})
	f.Add([]byte{1, 0, 0, 1, 9})
	f.Add([]byte{255, 255, 255, 255, 9})
	f.Fuzz(func(t *testing.T, wire []byte) {
		in := bytes.NewReader(wire)
		var again bytes.Buffer
		out := bufio.NewWriter(&again)
		for {
			kind, body, err := readFrame(in, MaxFrame)
			if errors.Is(err, io.EOF) && in.Len() != 0 {
				t.Fatal("EOF before the end")
			}
			if err != nil {
				break
			}
			if err := writeFrame(out, kind, [][]byte{body[:len(body)/2], body[len(body)/2:]}); err != nil {
				t.Fatalf("a frame that was read cannot be written: %v", err)
			}
		}
		if want := withoutBeats(wire); !bytes.Equal(again.Bytes(), want) {
			t.Fatalf("read %x, want %x", again.Bytes(), want)
		}
	})
}

// withoutBeats is the whole frames of wire that are not beats, written by hand.
func withoutBeats(wire []byte) []byte {
	var out []byte
	for len(wire) >= 4 {
		n := int(binary.BigEndian.Uint32(wire))
		if n > MaxFrame || len(wire) < 4+n {
			break
		}
		if n > 0 {
			out = append(out, wire[:4+n]...)
		}
		wire = wire[4+n:]
	}
	return out
}
