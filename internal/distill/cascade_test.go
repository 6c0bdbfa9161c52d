package distill

import (
	"encoding/binary"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"
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

// reconciled runs Bob's search against Alice's view and counts what leaks.
func reconciled(t testing.TB, p *passes, a, b frame, h haste) (s *search, revealed, rounds int) {
	t.Helper()
	alice := newView(p, a)
	searches, err := reconcile(p, []frame{b}, h, func(round []frameQuestions) ([]byte, error) {
		rounds++
		n := countAll(round)
		revealed += n
		answers := make([]byte, packedBytes(n))
		alice.answer(round[0].questions, answers, 0)
		return answers, nil
	})
	if err != nil {
		t.Fatalf("reconciling: %v", err)
	}
	return searches[0], revealed, rounds
}

func seedOf(i int) (seed [32]byte) {
	binary.LittleEndian.PutUint64(seed[:], uint64(i))
	return seed
}

// How much is reconciled to see that no error is left.
var (
	manyFrames = flag.Int("frames", 2000, "of each error rate")
	frameLog   = flag.Int("frame-log", 13, "log2 of the bits of a frame; the lab's have 18")
)

// 10 000 frames in all: a frame error rate of 1e-4 would leave one.
//
//	go test ./internal/distill -run TestCascadeLeavesNoError -timeout 1h -v -frames 10000 -frame-log 18
//
// has as many of each rate, and of the lab's size: five times 10 000 frames left no error (in
// twenty minutes of a processor).
func TestCascadeLeavesNoError(t *testing.T) { leavesNoError(t, *manyFrames, *frameLog, 0) }

// Nor do the questions of a block that has bits to spare leave one, as a link's blocks have:
// they go after the same errors in several passes, and do not leak more than they may. With
// -frames 10000 -frame-log 18, 150 000 frames left no error (in twenty minutes, too).
func TestHurriedCascadeLeavesNoError(t *testing.T) {
	for _, more := range []float64{.1, .2, .4} {
		leavesNoError(t, *manyFrames, *frameLog, more)
	}
}

// leavesNoError reconciles frames of each error rate that may leak so much more than they must.
func leavesNoError(t *testing.T, frames, log int, more float64) {
	random := rand.New(rand.NewPCG(1, 2))
	n := 1 << log
	for _, rate := range []float64{0.01, 0.02, 0.03, 0.05, 0.08} {
		var p *passes
		var h haste
		if more > 0 {
			errors := rate * float64(n)
			h.must = int(1.1 * float64(n) * entropy((errors+4*math.Sqrt(errors))/float64(n)))
			h.may = int((1 + more) * float64(h.must))
		}
		most, rounds := 0, 0
		for i := range frames {
			if i%8 == 0 { // the frames of a block share their passes
				p = newPasses(n, rate, seedOf(i))
			}
			a, b, errors := noisyPair(random, n, rate)
			s, revealed, _ := reconciled(t, p, a, b, h)
			if !slices.Equal(a, b) {
				t.Fatalf("rate %v, frame %d: the keys differ", rate, i)
			}
			if s.corrected != errors {
				t.Fatalf("rate %v, frame %d: corrected %d of %d errors", rate, i, s.corrected, errors)
			}
			if s.leak != revealed {
				t.Fatalf("rate %v, frame %d: counted %d bits, revealed %d", rate, i, s.leak, revealed)
			}
			most, rounds = max(most, s.leak), rounds+s.rounds
		}
		if more > 0 && most > h.may {
			t.Errorf("rate %v: a frame leaked %d bits, where %d may", rate, most, h.may)
		}
		t.Logf("rate %v: %d frames of 2^%d bits: %d leaked at most, haste %+v, %d rounds", rate, frames, log, most, h, rounds/frames)
	}
}

func TestCascadeEfficiency(t *testing.T) {
	const n = 1 << 18
	random := rand.New(rand.NewPCG(3, 4))
	for _, rate := range []float64{0.005, 0.01, 0.02, 0.03, 0.05} {
		a, b, errors := noisyPair(random, n, rate)
		p := newPasses(n, rate, seedOf(1))
		before := slices.Clone(b)
		s, _, _ := reconciled(t, p, a, b, haste{})
		if !slices.Equal(a, b) {
			t.Fatalf("rate %v: the keys differ", rate)
		}
		h := haste{must: s.leak, may: s.leak * 5 / 4}
		hurried, _, _ := reconciled(t, p, a, before, h)
		if !slices.Equal(a, before) || hurried.rounds*3 > s.rounds || hurried.leak > h.may {
			t.Errorf("rate %v: in a hurry %d rounds and %d bits, %d and %d without", rate, hurried.rounds, hurried.leak, s.rounds, s.leak)
		}
		t.Logf("rate %v: in a hurry %d rounds, %.3f of the bits", rate, hurried.rounds, float64(hurried.leak)/float64(s.leak))
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

// BenchmarkCascade reconciles with as few bits as it can, and with three tenths more, as a
// block of the lab.
func BenchmarkCascade(b *testing.B) {
	const n = 1 << 18
	for _, bench := range []struct {
		percent int
		spare   float64 // of the bits that it leaks otherwise
	}{{1, 0}, {2, 0}, {3, 0}, {5, 0}, {2, .3}} {
		percent, name := bench.percent, fmt.Sprintf("qber=%d%%", bench.percent)
		if bench.spare > 0 {
			name += fmt.Sprintf("/spare=%v", bench.spare)
		}
		b.Run(name, func(b *testing.B) {
			random := rand.New(rand.NewPCG(5, uint64(percent)))
			rate := float64(percent) / 100
			var alices, bobs [8]frame
			var errors [8]int
			for i := range alices {
				alices[i], bobs[i], errors[i] = noisyPair(random, n, rate)
			}
			var h haste
			if bench.spare > 0 {
				h.must = int(1.05 * n * entropy(rate))
				h.may = int(float64(h.must) * (1 + bench.spare))
			}
			var f, rounds float64
			var p *passes
			begun := cpuTime()
			for i := 0; b.Loop(); i++ {
				if i%2 == 0 { // a block of the lab has two frames
					p = newPasses(n, rate, seedOf(i))
				}
				s, _, _ := reconciled(b, p, alices[i%8], slices.Clone(bobs[i%8]), h)
				f += float64(s.leak) / (n * entropy(float64(errors[i%8])/n))
				rounds += float64(s.rounds)
			}
			b.ReportMetric(f/float64(b.N), "f")
			b.ReportMetric(rounds/float64(b.N), "rounds")
			b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds()/1e6, "Mbit/s")
			b.ReportMetric(n*float64(b.N)/(cpuTime()-begun).Seconds()/1e6, "Mbit/cpu-s")
		})
	}
}

// cpuTime is what this process has used of all processors: what is left to measure on a
// machine that others use too.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
