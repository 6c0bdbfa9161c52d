//go:build failpoint

// Package failpoint names the places where a test kills the process to show that
// nothing is lost or handed out twice whatever dies. It does something only in a
// binary built with the tag failpoint; otherwise Hit is empty.
package failpoint

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// target and left come from KME_FAILPOINT=name or name:n (die at the n-th hit).
var (
	target string
	left   atomic.Int64
)

func init() { // the only way in for a process that is started by a test
	spec := os.Getenv("KME_FAILPOINT")
	name, n, found := strings.Cut(spec, ":")
	target = name
	left.Store(1)
	if v, err := strconv.Atoi(n); found && err == nil {
		left.Store(int64(v))
	}
}

// Hit kills the process with SIGKILL if name is the failpoint that was asked for
// and this is its turn.
func Hit(name string) {
	if name != target || left.Add(-1) != 0 {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal arrives before this goroutine runs on
}
