//go:build failpoint

package failpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// faults is what the file of faults said when it was last read.
type faults struct {
	until time.Time // when it is to be read again
	clock time.Duration
	waits map[string]time.Duration
	fails map[string]bool

	unaudited bool
}

const auditing = "audit" // see Unaudited

// faultsAge is how old a reading may be.
const faultsAge = 50 * time.Millisecond

var (
	faultsFile = os.Getenv(FaultsFile)
	lastFaults atomic.Pointer[faults]
)

// current reads the file if that is due. One that makes no sense ends the process: with
// it, the test would show nothing.
func current() *faults {
	if f := lastFaults.Load(); f != nil && (faultsFile == "" || time.Now().Before(f.until)) {
		return f
	}
	f := &faults{until: time.Now().Add(faultsAge), waits: make(map[string]time.Duration), fails: make(map[string]bool)}
	text, err := os.ReadFile(faultsFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		misspelt(err)
	}
	for line := range strings.Lines(string(text)) {
		if err := f.add(strings.Fields(line)); err != nil {
			misspelt(fmt.Errorf("%q: %w", line, err))
		}
	}
	lastFaults.Store(f)
	return f
}

func (f *faults) add(words []string) (err error) {
	switch {
	case len(words) == 0:
		return nil
	case len(words) == 2 && words[0] == auditing && words[1] == "off":
		f.unaudited = true
		return nil
	case len(words) != 2 || words[0] != "clock" && words[0] != HSM && !slices.Contains(Names, words[0]):
		return errors.New("want the name of a failpoint, of an organ or clock, and one word more, or audit off")
	case words[0] == HSM && words[1] == "error":
		f.fails[HSM] = true
		return nil
	}
	d, err := time.ParseDuration(words[1])
	if words[0] == "clock" {
		f.clock = d
	} else {
		f.waits[words[0]] = d
	}
	return err
}

func misspelt(err error) {
	fmt.Fprintf(os.Stderr, "%s=%s: %v\n", FaultsFile, faultsFile, err)
	os.Exit(2)
}

// Now is the time, by a clock that tests can step.
func Now() time.Time { return time.Now().Add(current().clock) }

// Fault waits or fails as the file of faults says of an organ that is about to be
// asked. The wait ends with ctx, as the organ's own answer would.
func Fault(ctx context.Context, organ string) error {
	f := current()
	if f.fails[organ] {
		return errors.New("the file of faults says so")
	}
	return f.wait(ctx, organ)
}

// Unaudited says whether the file of faults has no event recorded.
func Unaudited() bool { return current().unaudited }

func (f *faults) wait(ctx context.Context, name string) error {
	d := f.waits[name]
	if d == 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
