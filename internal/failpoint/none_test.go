//go:build !failpoint

package failpoint

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestNone: in a build without failpoints, as every one that is delivered, nothing of
// what a test may say does anything.
func TestNone(t *testing.T) {
	if os.Getenv(FaultsFile) == "" {
		file := filepath.Join(t.TempDir(), "faults")
		if err := os.WriteFile(file, []byte("audit off\nhsm error\nclock 1h\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNone$")
		cmd.Env = append(os.Environ(), FaultsFile+"="+file, "KME_FAILPOINT="+EncLeased)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	Hit(EncLeased)
	if err := Fault(t.Context(), HSM); err != nil || On || Unaudited() || time.Until(Now()) > time.Minute {
		t.Errorf("the HSM fails: %v; failpoints: %v; nothing is audited: %v; it is %v", err, On, Unaudited(), Now())
	}
}
