package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/admin"
)

// On a terminal, each frame is drawn over the one before.
func TestScreen(t *testing.T) {
	var got strings.Builder
	s := &screen{w: &got, width: func() int { return 10 }}
	for _, frame := range [][]string{{"one", "twö und noch mehr"}, {"three"}} {
		if err := s.show(frame); err != nil {
			t.Fatal(err)
		}
	}
	want := "one\x1b[K\ntwö und no\x1b[K\n\x1b[J" + "\x1b[2Athree\x1b[K\n\x1b[J"
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("frames (-want +got):\n%s", diff)
	}
}

// The journal writes what is new, and only that.
func TestJournal(t *testing.T) {
	var got strings.Builder
	j := &journal{w: &got, seen: make(map[string]string)}
	down := admin.Link{ID: "km1-km2", State: admin.LinkDown, Why: "cut\x1b[2J\nnow"}
	aborted := exampleLink(2)
	aborted.Last = &admin.Block{Block: 2, QBER: 0.25, Aborted: "too many errors"}
	for _, l := range []admin.Link{down, down, exampleLink(1), exampleLink(1), aborted} {
		if err := j.show([]admin.Link{l}); err != nil {
			t.Fatal(err)
		}
	}
	lines := strings.Split(strings.TrimSpace(got.String()), "\n")
	if len(lines) != 3 || lines[0] != "km1-km2 down (cut [2J now)" || !strings.Contains(lines[1], "block 1") ||
		!strings.Contains(lines[2], "QBER 25.00 %, GIVEN UP: too many errors") {
		t.Errorf("journal: got %q", lines)
	}
}

func TestDescribeNothing(t *testing.T) {
	if got := describe(nil); !slices.Equal(got, []string{"no links"}) {
		t.Errorf("describe(nil): got %q", got)
	}
	want := []string{"x  down", "  stored  0 keys to assign here, 0 at ", "  last    -", "  now     -"}
	if got := describe([]admin.Link{{ID: "x", State: admin.LinkDown}}); !slices.Equal(got, want) {
		t.Errorf("describe of a new link: got %q, want %q", got, want)
	}
}

func TestAdvice(t *testing.T) {
	cause := errors.New("cause")
	err := advise(cause, "do %s", "this")
	a, ok := errors.AsType[*advised](err)
	if !ok || !errors.Is(err, cause) || err.Error() != "cause" || a.next != "do this" {
		t.Errorf("advise: got %#v", err)
	}
}
