//go:build failpoint

// Package failpoint names the places where a test kills the process, or holds it up,
// to show that nothing is lost or handed out twice whatever dies. It does something
// only in a binary built with the tag failpoint; otherwise Hit and Fault are empty,
// every event is recorded, and Now is the machine's clock.
package failpoint

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// On says that this build has failpoints.
const On = true

// target and left come from KME_FAILPOINT=name or name:n (die at the n-th hit).
var (
	target string
	left   atomic.Int64
)

// init is the only way in for a process that is started by a test. It refuses a
// name or a count that is none: with it armed, the test would show nothing.
func init() {
	spec := os.Getenv("KME_FAILPOINT")
	if spec == "" {
		return
	}
	name, count, counted := strings.Cut(spec, ":")
	n := 1
	var err error
	if counted {
		n, err = strconv.Atoi(count)
	}
	if err != nil || n < 1 || !slices.Contains(Names, name) {
		fmt.Fprintf(os.Stderr, "KME_FAILPOINT=%s is not a failpoint, or not NAME:COUNT with a count from 1\n", spec)
		os.Exit(2)
	}
	target = name
	left.Store(int64(n))
}

// Hit kills the process with SIGKILL if name is the failpoint that was asked for
// and this is its turn. Before that it waits if the file of faults says so.
func Hit(name string) {
	_ = current().wait(context.Background(), name) // it never ends early
	if target == "" || name != target || left.Add(-1) != 0 {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal arrives before this goroutine runs on
}
