package distill

import (
	"math/rand/v2"
	"testing"
)

// Bases as the ends choose them pass; those of detectors that see one basis, or one pair of
// bases, worse do not.
func TestProportion(t *testing.T) {
	const n, px = 100_001, .78
	random := rand.New(rand.NewPCG(1, 1))
	for name, tc := range map[string]struct {
		seen  func(mine, theirs byte) float64 // how often such a gate is seen
		fails bool
	}{
		"as chosen":            {func(_, _ byte) float64 { return 1 }, false},
		"Bob sees Z worse":     {func(_, theirs byte) float64 { return 1 - .06*float64(theirs) }, true},
		"Alice's X is dimmer":  {func(mine, _ byte) float64 { return .94 + .06*float64(mine) }, true},
		"equal bases see more": {func(mine, theirs byte) float64 { return 1 - .06*float64(mine^theirs) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			mine, theirs := make([]byte, packedBytes(n)), make([]byte, packedBytes(n))
			for i := 0; i < n; {
				a, b := byte(0), byte(0)
				if random.Float64() > px {
					a = 1
				}
				if random.Float64() > px {
					b = 1
				}
				if random.Float64() < tc.seen(a, b) {
					setBit(mine, i, a)
					setBit(theirs, i, b)
					i++
				}
			}
			if err := proportion(mine, theirs, n, px); (err != nil) != tc.fails {
				t.Errorf("%v", err)
			}
		})
	}
	if err := proportion(nil, nil, 0, px); err != nil {
		t.Errorf("no detections: %v", err)
	}
}

// Bits that have nothing to do with each other pass; those that follow one shortly before
// more often or less often than half the time do not.
func TestRuns(t *testing.T) {
	random := rand.New(rand.NewPCG(2, 2))
	for _, n := range []int{0, 1, 3, 64, 65, 1000, 99_999} {
		if err := runs(randomBits(random, n), n); err != nil {
			t.Errorf("%d bits: %v", n, err)
		}
		for lag := 1; lag <= maxLag && n > 90_000; lag++ {
			for _, alike := range []float64{.52, .48} {
				bits := make([]byte, packedBytes(n))
				for i := range n {
					v := byte(random.Uint32() & 1)
					if i >= lag {
						v = bitAt(bits, i-lag)
						if random.Float64() > alike {
							v ^= 1
						}
					}
					setBit(bits, i, v)
				}
				if runs(bits, n) == nil {
					t.Errorf("%d bits of which %v are like that %d before: passed", n, alike, lag)
				}
			}
		}
	}
}
