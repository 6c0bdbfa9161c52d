//go:build cgo

package hsm

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The benchmarks run ours and a bare loop in C over the same module (testdata/bare.c,
// a process of its own) in turns of one slice each, on the same key, so that both see
// the same machine. of-bare is the median over slices of the bare loop's CPU time for
// one operation divided by ours, all of ours: IV from the machine's generator, turn,
// session, context, buffers that are wiped. The rates are medians of wall clock.
//
// Like is held against like:
//   - The bare loop has a thread for each worker and nothing else; so ours has as many
//     processors (GOMAXPROCS) as workers, as far as the machine has them. With more, the
//     idle ones are woken at each turn to look for work that is not there, which costs as
//     much as half an operation.
//   - A slice is long. Go's runtime looks at every processor each 20 us for some
//     milliseconds after a pause, and where a look costs microseconds a short slice would
//     measure that.
//   - Our workers yield after each call, as a server's goroutines do, who come from the
//     network: one that runs on for 10 ms has its processor taken from it in the module.
//
// We use session copies. key=token shows what they are good for.

const slice = 4096 // operations of each worker, 50 ms or more

// atOnce are how many of them are asked for in one call: of one key in a request, or of
// those of a batch.
var atOnce = []int{1, turnItems}

func BenchmarkWrap(b *testing.B) {
	against(b, "wrap", func(b *testing.B, k *KEK, n int) func() error {
		plains, aads := make([][]byte, n), make([][]byte, n)
		for i := range n {
			plains[i], aads[i] = make([]byte, 32), make([]byte, 150)
		}
		return func() error {
			_, err := k.WrapAll(b.Context(), plains, aads)
			return err
		}
	})
}

func BenchmarkUnwrap(b *testing.B) {
	against(b, "unwrap", func(b *testing.B, k *KEK, n int) func() error {
		sealed := make([]Sealed, n)
		for i := range sealed {
			aad := make([]byte, 150)
			iv, ct, err := k.Wrap(b.Context(), make([]byte, 32), aad)
			if err != nil {
				b.Fatal(err)
			}
			sealed[i] = Sealed{iv, ct, aad}
		}
		return func() error {
			plains, err := k.UnwrapAll(b.Context(), sealed)
			wipe(plains)
			return err
		}
	})
}

// against measures one kind of call on both kinds of key and several workers.
func against(b *testing.B, op string, ours func(b *testing.B, k *KEK, n int) func() error) {
	for _, kind := range []string{"session", "token"} {
		for _, workers := range []int{1, 2, 4} {
			for _, n := range atOnce {
				b.Run(fmt.Sprintf("key=%s/workers=%d/at-once=%d", kind, workers, n), func(b *testing.B) {
					env, token := newToken(b)
					k := newKEK(b, token, "bench")
					bare := startBare(b, env, "bench")
					if kind == "token" {
						copied := k.copy
						k.copy = k.object
						defer func() { k.copy = copied }()
					}
					compare(b, op+"s/s", workers, n, ours(b, k, n), func(n int) (wall, cpu time.Duration) {
						return bare(op, kind, workers, n)
					})
				})
			}
		}
	}
}

// compare does b.N operations of ours, so many a call, in slices, with as many of bare
// in between.
func compare(b *testing.B, unit string, workers, atOnce int, ours func() error, bare func(n int) (wall, cpu time.Duration)) {
	var ratios, rates, bareRates []float64
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(min(workers, runtime.NumCPU())))
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= slice * workers {
		n := min(max(left/workers/atOnce, 1)*atOnce, slice)
		b.StopTimer()
		bareWall, bareCPU := bare(n)
		b.StartTimer()
		wall, cpu := time.Now(), cpuTime()
		var all sync.WaitGroup
		for range workers {
			all.Go(func() {
				for range n / atOnce {
					if err := ours(); err != nil {
						b.Error(err)
						return
					}
					runtime.Gosched()
				}
			})
		}
		all.Wait()
		ourWall, ourCPU := time.Since(wall), cpuTime()-cpu
		if n < slice && len(ratios) > 0 {
			continue // too short to say much
		}
		ratios = append(ratios, float64(bareCPU)/float64(ourCPU))
		rates = append(rates, float64(n*workers)/ourWall.Seconds())
		bareRates = append(bareRates, float64(n*workers)/bareWall.Seconds())
	}
	b.StopTimer()
	b.ReportMetric(median(ratios), "of-bare")
	b.ReportMetric(median(rates), unit)
	b.ReportMetric(median(bareRates), "bare-"+unit)
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// startBare builds and starts the bare loop on the key of that label.
func startBare(b *testing.B, env *bench, label string) func(op, kind string, workers, n int) (wall, cpu time.Duration) {
	b.Helper()
	program := filepath.Join(env.dir, "bare")
	if out, err := exec.Command("cc", "-O2", "-o", program, filepath.Join("testdata", "bare.c"), "-ldl", "-lpthread").CombinedOutput(); err != nil {
		b.Fatalf("building the bare loop: %v\n%s", err, out)
	}
	cmd := exec.Command(program, env.cfg.Module, env.cfg.TokenLabel, env.cfg.PINFile, label)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			b.Errorf("the bare loop: %v", err)
		}
	})
	answers := bufio.NewReader(out)
	return func(op, kind string, workers, n int) (wall, cpu time.Duration) {
		if _, err := io.WriteString(in, fmt.Sprintln(op, kind, workers, n)); err != nil {
			b.Fatal(err)
		}
		if _, err := fmt.Fscan(answers, &wall, &cpu); err != nil {
			b.Fatal(err)
		}
		return wall, cpu
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
