package distill

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// original is Cascade as it was published (Brassard and Salvail, 1993), written without
// regard to anything but its text: four passes, blocks of 0.73/Q bits and twice as long in
// each pass, every pass but the first over a shuffled key, every parity asked for anew. It
// shares nothing with the product's, and counts what leaks as the published figures do.
func original(random *rand.Rand, alice, bob []byte, rate float64) (leak int) {
	n := len(alice)
	type block struct {
		bits []int // key bits, in the order of the pass
		odd  bool
	}
	member := make([][]*block, n) // blocks that hold a bit
	var odd []*block
	toggle := func(b *block) {
		if b.odd = !b.odd; b.odd {
			odd = append(odd, b)
		}
	}
	differ := func(bits []int) (d byte) {
		leak++
		for _, i := range bits {
			d ^= alice[i] ^ bob[i]
		}
		return d
	}
	size := int(math.Ceil(.73 / rate))
	for pass := range 4 {
		order := make([]int, n)
		for i := range order {
			order[i] = i
		}
		first := true
		if pass > 0 {
			random.Shuffle(n, func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		for rest := order; len(rest) > 0; {
			b := &block{bits: rest[:min(size, len(rest))]}
			rest = rest[len(b.bits):]
			for _, i := range b.bits {
				member[i] = append(member[i], b)
			}
			if differ(b.bits) == 1 {
				toggle(b)
			}
		}
		for len(odd) > 0 { // all odd blocks of the smallest size are searched at a time
			size := len(slices.MinFunc(odd, func(a, b *block) int { return len(a.bits) - len(b.bits) }).bits)
			if first {
				size = n // as the pass begins its own blocks are all that is odd
			}
			first = false
			now := slices.Clone(odd)
			for _, b := range now {
				if !b.odd || len(b.bits) > size {
					continue
				}
				bits := b.bits
				for len(bits) > 1 {
					half := (len(bits) + 1) / 2
					if differ(bits[:half]) == 1 {
						bits = bits[:half]
					} else {
						bits = bits[half:]
					}
				}
				bob[bits[0]] ^= 1
				for _, b := range member[bits[0]] {
					toggle(b)
				}
			}
			odd = slices.DeleteFunc(odd, func(b *block) bool { return !b.odd })
		}
		size *= 2
	}
	return leak
}

// The original's efficiency is that of 10 000 published runs at n = 10 000 (B. Rijsman,
// cascade-cpp), and the product's is better.
func TestOriginalCascade(t *testing.T) {
	const n, runs = 10_000, 60
	for rate, want := range map[float64]float64{.01: 1.1430, .02: 1.1594, .03: 1.1736, .05: 1.1846, .08: 1.2171} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(21, math.Float64bits(rate)))
			leak, shannon := 0., 0.
			for range runs {
				alice, bob := make([]byte, n), make([]byte, n)
				errors := 0
				for i := range alice {
					alice[i] = byte(random.Uint32() & 1)
					bob[i] = alice[i]
				}
				for _, i := range random.Perm(n)[:int(rate*n)] {
					bob[i] ^= 1
					errors++
				}
				leak += float64(original(random, alice, bob, rate))
				shannon += n * entropy(float64(errors)/n)
			}
			f := leak / shannon
			t.Logf("f %.4f, published %.4f", f, want)
			if math.Abs(f-want) > .01 {
				t.Errorf("f %.4f, published %.4f", f, want)
			}
		})
	}
}
