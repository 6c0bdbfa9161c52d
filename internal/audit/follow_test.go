package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"
)

// A log that a recovery has begun names the last checkpoints of the logs before it. They
// must be those logs' own, and no witness have seen more of them.
func TestLogFollows(t *testing.T) {
	t.Parallel()
	first, second := newMemoryLog(t, 7), newMemoryLogOf(t, 2, Event{Action: Alarm}, Event{Action: Alarm})
	shorter := newMemoryLog(t, 5)
	fork := newMemoryLogOf(t, 1, slices.Repeat([]Event{{Action: Alarm, Reason: "other"}}, 7)...)
	foreign, err := NewLogSigner(LogName("qutemail.example", "km1", 1), softKey{ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, ed25519.SeedSize))})
	if err != nil {
		t.Fatal(err)
	}
	forged, err := note.Sign(&note.Note{Text: Checkpoint{Origin: foreign.Name(), Size: 99}.Text()}, foreign)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		follows []string
		count   int // of the recovery: the origin that it began
		earlier []Checkpoint
		named   []Checkpoint
		bad     string // part of what is wrong with it; "" if nothing is
	}{
		"what the witness has seen":     {[]string{string(first.note)}, 3, []Checkpoint{first.c}, []Checkpoint{first.c}, ""},
		"all that there were":           {[]string{string(first.note), string(second.note)}, 3, []Checkpoint{second.c, first.c}, []Checkpoint{first.c, second.c}, ""},
		"more than another witness saw": {[]string{string(first.note)}, 3, []Checkpoint{shorter.c}, []Checkpoint{first.c}, ""},
		"nobody was asked":              {[]string{string(first.note)}, 3, nil, []Checkpoint{first.c}, ""},
		"nothing":                       {nil, 3, []Checkpoint{first.c}, nil, ""},
		"of an earlier recovery":        {[]string{string(shorter.note)}, 2, []Checkpoint{first.c}, nil, ""},
		"less than the witness has":     {[]string{string(shorter.note)}, 3, []Checkpoint{first.c}, nil, "follows 5 leaves of qutemail.example/km1/audit/1, and a witness has seen 7"},
		"another tree":                  {[]string{string(fork.note)}, 3, []Checkpoint{first.c}, nil, "a witness has seen 7, or others"},
		"signed with another key":       {[]string{string(forged)}, 3, nil, nil, "what it says that the log follows is not so"},
		"itself":                        {[]string{string(newMemoryLogOf(t, 3, Event{Action: Alarm}).note)}, 3, nil, nil, "is not before"},
		"what is no checkpoint":         {[]string{"?"}, 3, nil, nil, "is no log of qutemail.example/km1/audit"},
	} {
		recovery := Event{Action: Recover, Outcome: Done, Count: test.count, Follows: test.follows}
		l := newMemoryLogOf(t, 3, Event{Action: Alarm}, Event{Action: Start}, recovery, Event{Action: Alarm})
		r, err := Verify(context.Background(), l.key, l.c, 0, Known{Earlier: test.earlier}, l)
		var bad *BadLeaf
		switch {
		case test.bad == "" && (err != nil || !slices.Equal(r.Follows, test.named)):
			t.Errorf("%s: it follows %v, error %v", name, r.Follows, err)
		case test.bad != "" && (!errors.As(err, &bad) || bad.Leaf != 2 || !strings.Contains(bad.Why, test.bad)):
			t.Errorf("%s: %v, want %q", name, err, test.bad)
		}
	}
}
