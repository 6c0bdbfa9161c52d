package audit

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit/audittest"
)

func TestArchived(t *testing.T) {
	t.Parallel()
	a := Archived{Day: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC), First: 6, Last: 10, Log: "qutemail.example/km1/audit/1", File: "km1-1-2026-03-01.bundle", Sum: [32]byte{1, 2, 0xff}}
	text := a.String()
	if got, err := ParseArchived(text); err != nil || got != a {
		t.Errorf("%q is read as %+v, error %v", text, got, err)
	}
	for _, wrong := range []string{"", text + " ", text[:len(text)-2], strings.Replace(text, "6 to", "06 to", 1), strings.Replace(text, "-01,", "-41,", 1), strings.Replace(text, "of ", "of the ", 1)} {
		if got, err := ParseArchived(wrong); err == nil {
			t.Errorf("%q is read as %+v", wrong, got)
		}
	}
}

// A bundle whose checkpoint the witness has not signed yet has an earlier one that it has:
// of the same tree, or the log was forked.
func TestBundleCosigned(t *testing.T) {
	t.Parallel()
	l := newMemoryLog(t, 300)
	w, err := NewCosigner("witness.example", audittest.KeyOf(9))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := NewWitness(w.VerifierKey())
	if err != nil {
		t.Fatal(err)
	}
	cosigned := func(of *memoryLog) []byte {
		line, err := w.Cosign(t.Context(), of.c, time.UnixMilli(0))
		if err != nil {
			t.Fatal(err)
		}
		return append(bytes.Clone(of.note), line...)
	}
	other := make([]Event, 200)
	for i := range other {
		other[i] = Event{Action: Alarm, Outcome: Done, Reason: "another"}
	}
	for _, test := range []struct {
		name    string
		earlier []byte
		signed  int64 // leaves that the witness has signed for; 0: none
		bad     int64 // the first bad leaf; -1: none is
	}{
		{"no earlier checkpoint", nil, 0, -1},
		{"one of 200 leaves", cosigned(newMemoryLog(t, 200)), 200, -1},
		{"one of 256", cosigned(newMemoryLog(t, 256)), 256, -1},
		{"one that it has not signed", newMemoryLog(t, 200).note, 0, -1},
		{"one of another tree", cosigned(newMemoryLogOf(t, 1, other...)), 0, 199},
		{"one of more leaves", cosigned(newMemoryLog(t, 301)), 0, 300},
	} {
		var text bytes.Buffer
		err := WriteBundle(t.Context(), &text, BundleSpec{Key: "k", Signed: l.note, Checkpoint: l.c, Cosigned: test.earlier, End: l.c.Size}, l)
		if err != nil {
			t.Fatal(err)
		}
		b, err := OpenBundle(bytes.NewReader(text.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		r, _, names, err := VerifyBundle(t.Context(), l.key, []Witness{pub}, Known{}, true, b)
		var bad *BadLeaf
		switch {
		case test.bad >= 0:
			if !errors.As(err, &bad) || bad.Leaf != test.bad {
				t.Errorf("%s: %v, want leaf %d", test.name, err, test.bad)
			}
		case err != nil || (len(names) == 1) != (test.signed > 0) || test.signed > 0 && r.Cosigned != test.signed:
			t.Errorf("%s: signed by %q for %d leaves, error %v", test.name, names, r.Cosigned, err)
		}
	}
}
