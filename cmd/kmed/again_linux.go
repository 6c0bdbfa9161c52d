package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The kernel may put off a thread's timers by its timer slack, to serve several at one
// waking. Go's runtime has a thread that, under load, sleeps for 20 us and looks at every
// processor, again and again; with the kernel's usual slack it wakes two or three thousand
// times a second, and where waking costs much (a virtual machine) that is a tenth of what a
// busy node spends. With ours it wakes a third as often. What it costs: a call of an HSM
// that takes longer than this keeps its processor from other goroutines for so long, instead
// of for 0.1 ms.
const (
	usualSlack = 50_000  // ns, the kernel's
	timerSlack = 500_000 // ns, ours
)

// beginAgain runs this program in place of itself, with what it has to be begun with: the
// settings of the environment, and timerSlack unless another one than the usual was given
// to it (systemd's TimerSlackNSec=). It returns only if there is no need to, or on an error.
func beginAgain() error {
	env := withSettings(os.Environ())
	if env == nil {
		return nil
	}
	self, err := os.Executable() // not /proc/self/exe: the process would be called exe
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the slack is a thread's; the one that calls Exec hands it on to all
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err == nil && slack == usualSlack {
		err = unix.Prctl(unix.PR_SET_TIMERSLACK, timerSlack, 0, 0, 0)
	}
	if err != nil {
		return fmt.Errorf("the slack of timers: %w", err)
	}
	return unix.Exec(self, os.Args, env)
}
