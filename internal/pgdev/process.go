package pgdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// pidName is the file in the data folder that a server has while it runs, and keeps if
// it is killed.
const pidName = "postmaster.pid"

// killWait bounds the wait for processes that were sent SIGKILL.
const killWait = time.Minute

// clearAway ends what a killed owner left running in the data folder, and removes
// the lock files, which the server would believe if another process had been
// given the same number since. The caller holds the cluster's lock, so whatever
// runs there has no owner.
func clearAway(ctx context.Context, data string) error {
	pidFile := filepath.Join(data, pidName)
	text, err := os.ReadFile(pidFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	postmaster, _ := strconv.Atoi(string(line)) // 0 is nobody
	left := inFolder(data)
	if slices.Contains(left, postmaster) {
		_ = syscall.Kill(postmaster, syscall.SIGINT)
	} else {
		for _, pid := range left { // children whose postmaster, or initdb, is dead
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if err := awaitEmpty(ctx, data); err != nil {
		return err
	}
	run := filepath.Join(filepath.Dir(data), "run")
	for _, stale := range []string{pidFile, filepath.Join(run, socketName), filepath.Join(run, socketName+".lock")} {
		if err := os.Remove(stale); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// inFolder lists the processes whose working directory is data, or its name while
// initdb makes it: every process of a server has its data folder as that. A
// zombie has none.
func inFolder(data string) []int {
	links, _ := filepath.Glob("/proc/[0-9]*/cwd") // the pattern is good
	var pids []int
	for _, link := range links {
		cwd, err := os.Readlink(link)
		if err != nil || cwd != data && cwd != data+fresh {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// awaitEmpty waits until no process works in data.
func awaitEmpty(ctx context.Context, data string) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		left := inFolder(data)
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v still work in %s: %w", left, data, ctx.Err())
		case <-tick.C:
		}
	}
}
