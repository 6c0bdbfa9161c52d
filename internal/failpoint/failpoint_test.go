//go:build failpoint

package failpoint

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
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
