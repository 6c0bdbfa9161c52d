// Package binaries builds the programs that end-to-end tests run: the commands of
// this module, and the stock step CLI. It must be used by tests only.
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
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const module = "github.com/qutemail/kme"

// Version is the release that the programs say they are (package release).
const Version = "0~test"

// Build puts the named commands, as the sources are now, into a new folder, which
// the caller removes. tags are build tags, separated by commas. The working folder
// must lie in the module.
func Build(tags string, commands ...string) (dir string, err error) {
	root, err := moduleRoot()
	if err == nil {
		err = consult(root)
	}
	if err != nil {
		return "", fmt.Errorf("building %v: %w", commands, err)
	}
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
	args := []string{"build", "-buildvcs=false", "-ldflags=-X=" + module + "/internal/release.version=" + Version, "-tags", tags, "-o", cache + string(filepath.Separator)}
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

// moduleRoot is the folder of go.mod.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("asking for the module's folder: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// consult looks at every source file. The go command remembers which files a test
// has looked at, and repeats the test, rather than its last result, when one of
// them has changed; of what a build reads it knows nothing.
func consult(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
			return filepath.SkipDir
		}
		if filepath.Ext(name) == ".go" && !strings.HasSuffix(name, "_test.go") || name == "go.mod" {
			_, err = os.Stat(path)
		}
		return err
	})
}

// step is the stock CLI at the version that the Makefile pins.
const step = "github.com/smallstep/cli/cmd/step@v0.30.2"

// Step is the folder of the stock step CLI: that of the file that $STEP names, or
// bin/ of the repository (make tools), or else a cache where it is built now, which
// takes a minute. The working folder must lie in the module.
func Step() (dir string, err error) {
	if file := os.Getenv("STEP"); file != "" {
		return filepath.Dir(file), nil
	}
	root, err := moduleRoot()
	if err != nil {
		return "", fmt.Errorf("looking for step: %w", err)
	}
	bin := filepath.Join(root, "bin")
	if _, err := os.Stat(filepath.Join(bin, "step")); err == nil {
		return bin, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("looking for step: %w", err)
	}
	dir = filepath.Join(cache, "kme", filepath.Base(step))
	if _, err := os.Stat(filepath.Join(dir, "step")); err == nil {
		return dir, nil
	}
	cmd := exec.Command("go", "install", "-tags", "noyubikey", step)
	cmd.Env = append(os.Environ(), "GOBIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building step: %w\n%s", err, out)
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
