package audit

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit/audittest"
)

// A log that a recovery has begun names the last checkpoints of the logs before it. They
// must be those logs' own, and no witness have seen more of them.
func TestLogFollows(t *testing.T) {
	t.Parallel()
	first, second := newMemoryLog(t, 7), newMemoryLogOf(t, 2, Event{Action: Alarm}, Event{Action: Alarm})
	shorter := newMemoryLog(t, 5)
	fork := newMemoryLogOf(t, 1, slices.Repeat([]Event{{Action: Alarm, Reason: "other"}}, 7)...)
	foreign, err := NewLogSigner(LogName("qutemail.example", "km1", 1), audittest.KeyOf(8))
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
		last := Event{Action: Alarm}
		if test.count != 3 {
			last = Event{Action: Recover, Outcome: Done, Count: 3}
		}
		l := newMemoryLogOf(t, 3, Event{Action: Alarm}, Event{Action: Start}, recovery, last)
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

// A log of a later origin that no recovery has begun is whoever's that has changed the number
// in the database: what the log before had at its end is nowhere.
func TestLogBegunByNobody(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		origin int64
		event  Event
		good   bool
	}{
		"the first":                {1, Event{Action: Alarm}, true},
		"by a recovery":            {2, Event{Action: Recover, Outcome: Done, Count: 2}, true},
		"by nobody":                {2, Event{Action: Alarm}, false},
		"by one of another origin": {3, Event{Action: Recover, Outcome: Done, Count: 2}, false},
	} {
		l := newMemoryLogOf(t, test.origin, Event{Action: Alarm}, test.event)
		_, err := Verify(t.Context(), l.key, l.c, 0, Known{}, l)
		var bad *BadLeaf
		if is := errors.As(err, &bad) && bad.Leaf == 0 && strings.Contains(bad.Why, "recovery"); is == test.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What a witness has seen is compared with the tree also where its first leaves are in
// bundles, and so is what somebody shows to accuse a log.
func TestForkedBeforeWhatIsKept(t *testing.T) {
	t.Parallel()
	l := newMemoryLog(t, 600)
	other := newMemoryLogOf(t, 1, slices.Repeat([]Event{{Action: Alarm, Outcome: Done, Reason: "another"}}, 550)...)
	for name, test := range map[string]struct {
		seen Checkpoint
		bad  int64 // -1: none is
	}{
		"its own":         {newMemoryLog(t, 550).c, -1},
		"nothing":         {newMemoryLog(t, 0).c, -1},
		"all of it":       {l.c, -1},
		"of another tree": {other.c, 549},
		"more of it":      {newMemoryLog(t, 601).c, 600},
	} {
		_, err := Verify(t.Context(), l.key, l.c, 300, Known{Checkpoints: []Checkpoint{test.seen}}, l)
		for _, err := range []error{err, Follows(l.c, test.seen, l)} {
			var bad *BadLeaf
			if errors.As(err, &bad) != (test.bad >= 0) || bad != nil && bad.Leaf != test.bad || bad == nil && err != nil {
				t.Errorf("%s: %v, want leaf %d", name, err, test.bad)
			}
		}
	}
}

// What goes on to others is what the log has signed.
func TestProved(t *testing.T) {
	t.Parallel()
	read := func(l *memoryLog, first, end int64) (n int64, err error) {
		return n, Proved(t.Context(), l.c, first, end, l, func(r Row) error {
			if r.Leaf != first+n {
				t.Errorf("leaf %d came after %d others from %d on", r.Leaf, n, first)
			}
			n++
			return nil
		})
	}
	l := newMemoryLog(t, 600)
	for _, at := range [][2]int64{{0, 600}, {255, 257}, {599, 600}, {7, 7}} {
		if n, err := read(l, at[0], at[1]); err != nil || n != at[1]-at[0] {
			t.Errorf("leaves %v: %d, %v", at, n, err)
		}
	}
	l.rows[300].Body = bytes.Replace(l.rows[300].Body, []byte(`"r"`), []byte(`"s"`), 1)
	n, err := read(l, 290, 310)
	var bad *BadLeaf
	if !errors.As(err, &bad) || bad.Leaf != 300 || n != 10 {
		t.Errorf("leaf 300 was changed: %d were read, %v", n, err)
	}
	tile := l.tiles[[2]int64{0, 1}]
	h := tlog.RecordHash(l.rows[300].Body)
	copy(tile[(300-256)*tlog.HashSize:], h[:])
	if n, err := read(l, 290, 310); err == nil || n != 0 {
		t.Errorf("leaf 300 was changed, and its tile: %d were read, %v", n, err)
	}
	l = newMemoryLog(t, 600)
	l.rows = slices.Delete(l.rows, 300, 301)
	if n, err := read(l, 290, 310); !errors.As(err, &bad) || bad.Leaf != 300 || n != 10 {
		t.Errorf("leaf 300 was deleted: %d were read, %v", n, err)
	}
}
