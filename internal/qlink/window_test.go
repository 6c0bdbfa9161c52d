package qlink

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A window opens as far as the distance makes necessary: a block that is at work for 100 ms
// and travels for so long.
func TestWindow(t *testing.T) {
	for _, tc := range []struct {
		base   int
		travel time.Duration
		want   int
	}{
		{1, 0, 1},
		{1, 15 * time.Millisecond, 1}, // which costs less than a fifth
		{1, 30 * time.Millisecond, 4},
		{1, 100 * time.Millisecond, 6},
		{1, 550 * time.Millisecond, 20},
		{1, 1250 * time.Millisecond, MaxInFlight},
		{1, 10 * time.Second, MaxInFlight},
		{3, 0, 3},
		{3, 100 * time.Millisecond, 18},
	} {
		t.Run(fmt.Sprintf("base=%d/travel=%v", tc.base, tc.travel), func(t *testing.T) {
			w := window{base: tc.base}
			if w.most() != tc.base {
				t.Errorf("before the first block: %d", w.most())
			}
			w.ended(100*time.Millisecond+tc.travel, tc.travel, 0)
			if w.most() != tc.want {
				t.Errorf("%d under way, want %d", w.most(), tc.want)
			}
		})
	}
	slow := window{base: 1}
	slow.ended(200*time.Millisecond, 100*time.Millisecond, 200*time.Millisecond)
	if n := slow.most(); n != 12 {
		t.Errorf("with as long a wait for the block before, %d under way, want 12", n)
	}
	near := window{base: 3}
	near.ended(100*time.Millisecond, 10*time.Millisecond, 200*time.Millisecond)
	if n := near.most(); n != 3 {
		t.Errorf("beside each other, with a wait for the block before, %d under way, want 3", n)
	}
	w := window{base: 1}
	w.ended(time.Second, 950*time.Millisecond, 0)
	w.ended(time.Second, 0, 0) // an odd one
	if w.most() < 8 {
		t.Errorf("one block of many that stood still makes it %d under way", w.most())
	}
	rapid.Check(t, func(t *rapid.T) {
		w := window{base: rapid.IntRange(1, MaxInFlight).Draw(t, "base")}
		w.ended(time.Duration(rapid.Int64().Draw(t, "took")), time.Duration(rapid.Int64().Draw(t, "away")), 0)
		if n := w.most(); n < w.base || n > MaxInFlight {
			t.Fatalf("%d of %d", n, w.base)
		}
	})
}
