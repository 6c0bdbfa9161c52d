//go:build !purego

package distill

import (
	"runtime"
	"testing"

	"golang.org/x/sys/cpu"
)

// The assembly is what the tests run through, where there is PMULL: on every processor of
// a server, and in the emulation of make test-arm64.
func TestAssemblyRuns(t *testing.T) {
	if hasProduct != cpu.ARM64.HasPMULL || !hasProduct && runtime.GOOS == "linux" {
		t.Error("this processor has no PMULL: its assembly was not tested")
	}
}
