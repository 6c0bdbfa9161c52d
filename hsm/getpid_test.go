//go:build cgo && linux

package hsm

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestGetpid: a module gets the process's ID from us instead of from the kernel, and a child
// that it forks its own. That a child of a bare clone gets its parent's shows that the kernel
// is not asked.
func TestGetpid(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "pid.so")
	if out, err := exec.Command("cc", "-shared", "-fPIC", "-o", path, filepath.Join("testdata", "pid.c")).CombinedOutput(); err != nil {
		t.Fatalf("building the module: %v\n%s", err, out)
	}
	m, err := load(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer m.unload()
	var told [6 * 4]byte
	if err := m.random(0, told[:]); err != nil {
		t.Fatal(err)
	}
	at := func(i int) int { return int(binary.NativeEndian.Uint32(told[4*i:])) }
	if at(0) != os.Getpid() || at(1) != os.Getpid() {
		t.Errorf("getpid says %d and the kernel %d in process %d", at(0), at(1), os.Getpid())
	}
	if at(2) != at(3) || at(2) == os.Getpid() {
		t.Errorf("getpid says %d and the kernel %d in a child of process %d", at(2), at(3), os.Getpid())
	}
	if at(4) != os.Getpid() || at(5) == os.Getpid() {
		t.Errorf("getpid says %d in a child of process %d that the C library does not know: the kernel was asked", at(4), os.Getpid())
	}
}
