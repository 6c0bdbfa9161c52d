package distill

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
)

// What the theorem takes for granted about the detectors shows in what they saw: that a
// detection does not depend on the bases, nor a bit on those before it. Both are looked at,
// and no honest block in 10^9 is given up for it.

// anomaly is how many standard deviations a count may be off: a chance of 10^-9.
const anomaly = 6.1

// maxChiSquare is what the chi square of four cells, which are known in advance but for
// their sum, exceeds with the same chance.
const maxChiSquare = 44.9

// proportion says whether the bases of the ends at n detected gates, packed, are not as
// often X and Z, together, as both ends choose them.
func proportion(mine, theirs []byte, n int, px float64) error {
	var cells [4]int // mine X or Z, theirs X or Z
	for i := range mine {
		cells[1] += bits.OnesCount8(theirs[i] &^ mine[i])
		cells[2] += bits.OnesCount8(mine[i] &^ theirs[i])
		cells[3] += bits.OnesCount8(mine[i] & theirs[i])
	}
	cells[0] = n - cells[1] - cells[2] - cells[3]
	chi := 0.
	for i, p := range [4]float64{px * px, px * (1 - px), (1 - px) * px, (1 - px) * (1 - px)} {
		want := p * float64(n)
		chi += (float64(cells[i]) - want) * (float64(cells[i]) - want) / want
	}
	if n > 0 && !(chi <= maxChiSquare) {
		return fmt.Errorf("of %d detections %d were in XX, %d in XZ, %d in ZX and %d in ZZ: chi square %.1f", n, cells[0], cells[1], cells[2], cells[3], chi)
	}
	return nil
}

// maxLag is how far apart bits are compared.
const maxLag = 4

// runs says whether bits of n, packed, are like those shortly before them more often, or
// less often, than half the time.
func runs(packed []byte, n int) error {
	words := (n + 63) / 64
	word := func(i int) uint64 {
		if tail := packed[8*i:]; len(tail) >= 8 {
			return binary.LittleEndian.Uint64(tail)
		}
		var last [8]byte
		copy(last[:], packed[8*i:])
		return binary.LittleEndian.Uint64(last[:])
	}
	var unlike [maxLag + 1]int
	for i := range words {
		w, next := word(i), uint64(0)
		if i+1 < words {
			next = word(i + 1)
		}
		for lag := 1; lag <= maxLag; lag++ {
			pairs := uint64(math.MaxUint64)
			if left := n - lag - 64*i; left < 64 {
				pairs = 1<<max(0, left) - 1
			}
			unlike[lag] += bits.OnesCount64((w ^ (w>>lag | next<<(64-lag))) & pairs)
		}
	}
	for lag := 1; lag <= maxLag; lag++ {
		pairs := float64(n - lag)
		if off := float64(unlike[lag]) - pairs/2; math.Abs(off) > anomaly*math.Sqrt(max(1, pairs))/2 {
			return fmt.Errorf("of %d pairs of bits %d detections apart %d are unlike", n-lag, lag, unlike[lag])
		}
	}
	return nil
}
