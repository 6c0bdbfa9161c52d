//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/qutemail/kme/hsm/hsmtest"
)

// workers is how many there are of all tokens of the process.
func workers() int {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	return strings.Count(string(stacks), "hsm.(*Token).serve(")
}

// TestStuckWorker: a call that nobody waits for any more keeps its worker as it keeps its
// turn; the others serve on; a Close waits for it, and fails if it does not return; and when
// it has, nothing of the token is left running.
func TestStuckWorker(t *testing.T) {
	before := workers()
	b := newBench(t)
	b.cfg.MaxConcurrent = 2
	f := newFaults(t, b)
	token := b.open(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	if workers() == before {
		t.Error("the test does not see the workers")
	}
	f.Hold(hsmtest.Decrypt, true)
	ctx, cancel := context.WithCancel(t.Context())
	var caller sync.WaitGroup
	caller.Go(func() {
		_, err := k.Unwrap(ctx, s.iv, s.ct, s.aad)
		wantErr(t, "Unwrap", err, ErrUnavailable)
	})
	until(t, "the call is in the module", func() bool { return f.Inside(hsmtest.Decrypt) == 1 })
	cancel()
	caller.Wait()
	for range 3 {
		wrap(t, k)
	}
	if err := token.close(ctx); err == nil || !strings.Contains(err.Error(), "stuck in the module") {
		t.Errorf("closing with a call in the module: %v", err)
	}
	wrap(t, k) // it is as it was
	closed := make(chan error, 1)
	go func() { closed <- token.Close() }()
	until(t, "Close waits", func() bool { return token.gate.waiting() == 1 })
	f.Hold(hsmtest.Decrypt, false)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	if n := workers() - before; n != 0 {
		t.Errorf("%d workers are left", n)
	}
	if err := errors.Join(k.Close(), token.Close()); err != nil { // without workers
		t.Error(err)
	}
	wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
}

// TestAnswersAreOnesOwn: whoever waits gets the answer to what he asked, however many
// others leave, at any moment.
func TestAnswersAreOnesOwn(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	f.Slow(hsmtest.Decrypt, 100*time.Microsecond)
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			plain := bytes.Repeat([]byte{byte(i + 1)}, 32)
			iv, ct, err := k.Wrap(t.Context(), plain, plain)
			if err != nil {
				t.Error(err)
				return
			}
			for n := range 120 {
				ctx, cancel := context.WithCancel(t.Context())
				var leaver sync.WaitGroup
				if n%3 > 0 {
					leaver.Go(func() {
						for range n % 40 {
							runtime.Gosched()
						}
						cancel()
					})
				}
				got, err := k.Unwrap(ctx, iv, ct, plain)
				switch {
				case err == nil && !bytes.Equal(got, plain):
					t.Errorf("got %x, want %x", got, plain)
				case err != nil && (n%3 == 0 || !errors.Is(err, context.Canceled)):
					t.Error(err)
				}
				leaver.Wait()
				cancel()
			}
		})
	}
	callers.Wait()
	until(t, "what was left is over", func() bool { return token.stuck.Load() == 0 })
	if token.count.abandoned.Load() == 0 {
		t.Error("nobody has left a call in the module: the test shows nothing")
	}
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Error(err)
	}
}
