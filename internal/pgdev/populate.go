package pgdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// fresh ends the data folder's name until it is whole.
const fresh = ".new"

// populate makes the data folder, unless it is there, by initdb or as a copy of a
// template's. It does so under another name and moves it into place, so that a folder
// of the right name is always whole.
func (c *Cluster) populate(ctx context.Context, template, bin string, cred *syscall.Credential) error {
	if _, err := os.Stat(c.data()); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	dir := c.data() + fresh
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := makePrivate(dir, cred); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", dir, "-U", Superuser, "-A", "trust",
		"--locale=C", "-E", "UTF8", "--data-checksums", "--no-sync", "--no-instructions")
	if template != "" {
		data, unlock, err := stopped(template, cred)
		if err != nil {
			return fmt.Errorf("copying the cluster in %s: %w", template, err)
		}
		defer unlock()
		cmd = exec.CommandContext(ctx, "/bin/cp", "-a", "--reflink=auto", data+"/.", ".")
	}
	cmd.Dir, cmd.Env = dir, environment() // where clearAway looks for it
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, tail(out))
	}
	return os.Rename(dir, c.data())
}

// stopped is the data folder of the cluster in dir, which nobody starts before unlock.
// Only a server that has ended in good order leaves a folder that is whole without
// its recovery.
func stopped(dir string, cred *syscall.Credential) (data string, unlock func(), err error) {
	lock, err := os.Open(filepath.Join(dir, lockName))
	if err != nil {
		return "", nil, err
	}
	unlock = func() { _ = lock.Close() } // nothing was written
	home, err := filepath.EvalSymlinks(filepath.Join(dir, "cluster"))
	if err == nil {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	}
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = errors.New("a process runs it")
	}
	if err == nil {
		err = checkPrivate(home, cred)
	}
	if err == nil {
		data = filepath.Join(home, "data")
		if _, there := os.Lstat(filepath.Join(data, pidName)); !errors.Is(there, os.ErrNotExist) {
			err = errors.New("it was not stopped in good order")
		}
	}
	if err != nil {
		unlock()
		return "", nil, err
	}
	return data, unlock, nil
}
