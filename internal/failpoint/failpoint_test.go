//go:build failpoint

package failpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asVictim is set in a process that is there to die.
const asVictim = "KME_FAILPOINT_TEST_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(asVictim) != "" {
		victim()
		return
	}
	os.Exit(m.Run())
}

// victim passes two failpoints, three times each, and says so.
func victim() {
	for range 3 {
		for _, name := range []string{EncLeased, EncCommitted} {
			Hit(name)
			fmt.Print(name, " ")
		}
	}
}

// TestHit: a process dies by SIGKILL at the n-th hit of the failpoint that was
// named, before anything that follows, and at no other.
func TestHit(t *testing.T) {
	t.Parallel()
	const all = "enc-leased enc-committed enc-leased enc-committed enc-leased enc-committed "
	for _, tt := range []struct {
		spec string
		said string
		dies bool
	}{
		{"enc-leased", "", true},
		{"enc-committed", "enc-leased ", true},
		{"enc-committed:1", "enc-leased ", true},
		{"enc-leased:2", "enc-leased enc-committed ", true},
		{"enc-committed:3", "enc-leased enc-committed enc-leased enc-committed enc-leased ", true},
		{"enc-committed:4", all, false},
		{"dec-committed", all, false},
		{"", all, false},
	} {
		said, err := run(t, tt.spec)
		if said != tt.said {
			t.Errorf("%q: said %q, want %q", tt.spec, said, tt.said)
		}
		if dies := killed(err); dies != tt.dies || !dies && err != nil {
			t.Errorf("%q: ended with %v, want it killed: %t", tt.spec, err, tt.dies)
		}
	}
}

// TestMisspelt: a failpoint that does not exist, or a count that is none, ends the
// process at once: a test that armed it would show nothing.
func TestMisspelt(t *testing.T) {
	t.Parallel()
	for _, spec := range []string{"enc-leasd", "enc-leased:", "enc-leased:0", "enc-leased:-1", "enc-leased:x", ":1"} {
		if said, err := run(t, spec); err == nil || killed(err) || said != "" {
			t.Errorf("%q: said %q and ended with %v", spec, said, err)
		}
	}
}

func run(t *testing.T, spec string) (said string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asVictim+"=1", "KME_FAILPOINT="+spec)
	out, err := cmd.Output()
	return string(out), err
}

func killed(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status := exit.Sys().(syscall.WaitStatus)
	return status.Signaled() && status.Signal() == syscall.SIGKILL
}

// TestFaults: what the file says is so soon after it says it, and no longer than that.
func TestFaults(t *testing.T) {
	file := filepath.Join(t.TempDir(), "faults")
	faultsFile = file
	t.Cleanup(func() { faultsFile = ""; lastFaults.Store(nil) })
	say := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
		lastFaults.Store(nil) // as if its age had passed
	}
	Hit(EncLeased)
	if err := Fault(t.Context(), HSM); err != nil || Now().Sub(time.Now()).Abs() > 15*time.Second {
		t.Errorf("without a file: %v", err)
	}
	say("clock 40s\n" + EncLeased + " 20ms\n\nhsm 30ms\n")
	if ahead := time.Until(Now()); (ahead - 40*time.Second).Abs() > 15*time.Second {
		t.Errorf("the clock is ahead by %v, want 40s", ahead)
	}
	began := time.Now()
	Hit(EncLeased)
	if took := time.Since(began); took < 20*time.Millisecond {
		t.Errorf("waited %v at the failpoint, want 20ms", took)
	}
	began = time.Now()
	if err := Fault(t.Context(), HSM); err != nil || time.Since(began) < 30*time.Millisecond {
		t.Errorf("the HSM answered %v after %v, want 30ms", err, time.Since(began))
	}
	say("hsm error\nclock -40s")
	if err := Fault(t.Context(), HSM); err == nil || time.Until(Now()) > -25*time.Second {
		t.Errorf("the HSM answered %v, and the clock is ahead by %v", err, time.Until(Now()))
	}
	if Unaudited() {
		t.Error("nothing is audited, and the file does not say so")
	}
	say("audit off\n")
	if !Unaudited() {
		t.Error("the file says that nothing is audited")
	}
	say("hsm 1h")
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := Fault(ctx, HSM); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a wait beyond its time ended with %v", err)
	}
}

// TestMisspeltFaults end the process.
func TestMisspeltFaults(t *testing.T) {
	t.Parallel()
	for _, line := range []string{"enc-leasd 1s", "clock", "clock soon", "hsm 1s 2s", "enc-leased error", "dsm error", "audit 1s", "audit on", "audit"} {
		if err := (&faults{waits: make(map[string]time.Duration)}).add(strings.Fields(line)); err == nil {
			t.Errorf("%q is taken", line)
		}
	}
}
