package distill

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// noisyPair is a random key and a copy with errors at the given rate.
func noisyPair(random *rand.Rand, n int, rate float64) (a, b frame, errors int) {
	a = newFrame(n)
	for i := range a {
		a[i] = random.Uint64()
	}
	b = slices.Clone(a)
	for i := range n {
		if random.Float64() < rate {
			b.flip(i)
			errors++
		}
	}
	return a, b, errors
}

// reconcileFrames runs Bob's search against Alice's view and counts what leaks.
func reconcileFrames(t testing.TB, a, b frame, rate float64, seed [32]byte) (s *search, revealed int) {
	t.Helper()
	n := 64 * len(a)
	alice := newView(newPasses(n, rate, seed), a)
	s = &search{view: newView(newPasses(n, rate, seed), b)}
	s.ask = func(questions []question) ([]byte, error) {
		revealed += count(questions)
		return alice.answer(questions), nil
	}
	if err := s.run(); err != nil {
		t.Fatalf("reconciling: %v", err)
	}
	return s, revealed
}

func seedOf(i int) (seed [32]byte) {
	binary.LittleEndian.PutUint64(seed[:], uint64(i))
	return seed
}

func TestCascadeLeavesNoError(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, rate := range []float64{0.01, 0.02, 0.03, 0.05} {
		for i := range 250 {
			a, b, errors := noisyPair(random, 1<<13, rate)
			s, revealed := reconcileFrames(t, a, b, rate, seedOf(i))
			if !slices.Equal(a, b) {
				t.Fatalf("rate %v, frame %d: the keys differ", rate, i)
			}
			if s.corrected != errors {
				t.Fatalf("rate %v, frame %d: corrected %d of %d errors", rate, i, s.corrected, errors)
			}
			if s.leak != revealed {
				t.Fatalf("rate %v, frame %d: counted %d bits, revealed %d", rate, i, s.leak, revealed)
			}
		}
	}
}

func TestCascadeEfficiency(t *testing.T) {
	const n = 1 << 18
	random := rand.New(rand.NewPCG(3, 4))
	for _, rate := range []float64{0.005, 0.01, 0.02, 0.03, 0.05} {
		a, b, errors := noisyPair(random, n, rate)
		s, _ := reconcileFrames(t, a, b, rate, seedOf(1))
		if !slices.Equal(a, b) {
			t.Fatalf("rate %v: the keys differ", rate)
		}
		f := float64(s.leak) / (n * entropy(float64(errors)/n))
		t.Logf("rate %v: f %.4f, %d rounds", rate, f, s.rounds)
		if f > 1.08 {
			t.Errorf("rate %v: f %.4f", rate, f)
		}
		if s.rounds > 350 {
			t.Errorf("rate %v: %d rounds", rate, s.rounds)
		}
	}
}

func BenchmarkCascade(b *testing.B) {
	const n = 1 << 18
	for _, percent := range []int{1, 2, 3, 5} {
		b.Run(fmt.Sprintf("qber=%d%%", percent), func(b *testing.B) {
			random := rand.New(rand.NewPCG(5, uint64(percent)))
			rate := float64(percent) / 100
			var alices, bobs [8]frame
			var errors [8]int
			for i := range alices {
				alices[i], bobs[i], errors[i] = noisyPair(random, n, rate)
			}
			var f, rounds float64
			for i := 0; b.Loop(); i++ {
				s, _ := reconcileFrames(b, alices[i%8], slices.Clone(bobs[i%8]), rate, seedOf(i))
				f += float64(s.leak) / (n * entropy(float64(errors[i%8])/n))
				rounds += float64(s.rounds)
			}
			b.ReportMetric(f/float64(b.N), "f")
			b.ReportMetric(rounds/float64(b.N), "rounds")
			b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds()/1e6, "Mbit/s")
		})
	}
}
