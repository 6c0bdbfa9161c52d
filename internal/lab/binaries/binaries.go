// Package binaries builds the commands of this module for end-to-end tests, which
// run real processes. It must be used by tests only.
//
// Linking takes much longer than finding out that nothing has changed, so what was
// built is kept in the user's cache folder, and the go command decides whether it
// is still good. Each caller gets copies of its own: what another test, or another
// checkout, builds meanwhile never changes them.
package binaries

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

const module = "github.com/qutemail/kme"

// Build puts the named commands, as the sources are now, into a new folder, which
// the caller removes. tags are build tags, separated by commas. The working folder
// must lie in the module.
func Build(tags string, commands ...string) (dir string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("building %v: %w", commands, err)
	}
	cache = filepath.Join(cache, "kme", "test-binaries", tags)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("building %v: %w", commands, err)
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("building %v: %w", commands, err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("waiting for another build: %w", err)
	}
	args := []string{"build", "-buildvcs=false", "-tags", tags, "-o", cache + string(filepath.Separator)}
	for _, c := range commands {
		args = append(args, module+"/cmd/"+c)
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %v: %w\n%s", commands, err, out)
	}
	dir, err = os.MkdirTemp("", "kme-bin-")
	if err != nil {
		return "", fmt.Errorf("building %v: %w", commands, err)
	}
	for _, c := range commands {
		if err := copyFile(filepath.Join(cache, c), filepath.Join(dir, c)); err != nil {
			return "", errors.Join(fmt.Errorf("copying what was built: %w", err), os.RemoveAll(dir))
		}
	}
	return dir, nil
}

// copyFile links a program under another name, or copies it if that cannot be.
// The go command replaces a program and never writes into it, so a link stays what
// it was.
func copyFile(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
