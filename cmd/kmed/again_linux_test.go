package main

import (
	"fmt"
	"log"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestBeginAgain: a process begins again with the settings, once, and with the slack of
// timers, unless it was given one of its own.
func TestBeginAgain(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread() // and it ends with us: a child has its parent's slack
	for given, want := range map[uintptr]int{usualSlack: timerSlack, 1000: 1000} {
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, given, 0, 0, 0); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "beginner", "an argument")
		cmd.Env = append(os.Environ(), "GODEBUG=", "GLIBC_TUNABLES=")
		out, err := cmd.CombinedOutput()
		if got, want := strings.TrimSpace(string(out)), fmt.Sprintf("[beginner an argument] clobberfree=1 glibc.malloc.tcache_count=200 %d", want); err != nil || got != want {
			t.Errorf("%d ns: %q, %v; want %q", given, got, err, want)
		}
	}
}

// beginner is the process of TestBeginAgain: it says with what it has begun.
func beginner() {
	if err := beginAgain(); err != nil {
		log.Fatal(err)
	}
	runtime.LockOSThread()
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(os.Args, os.Getenv("GODEBUG"), os.Getenv("GLIBC_TUNABLES"), slack)
}
