package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/qutemail/kme/internal/failpoint"
)

// harden keeps this process's memory where it is: no core image, no other process of the
// same user that looks into it, and, where the limit for locked memory allows it
// (LimitMEMLOCK=infinity), no page of it in the swap. It returns what could not be done
// though it matters. A build for tests lets itself be looked into: that is how they see
// what is left in it.
func harden() error {
	errs := []error{unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})}
	if !failpoint.On {
		errs = append(errs, unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("keeping core images from being made: %w", err)
	}
	return nil
}

// lockMemory keeps all memory of this process, that of the HSM's library included, out
// of the swap. With a limit below infinity it does nothing: the process would end when
// it meets it.
func lockMemory() error {
	infinite := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &infinite) // if we may
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &now); err != nil {
		return err
	}
	if now.Cur != unix.RLIM_INFINITY {
		return fmt.Errorf("%d bytes may be locked, not all", now.Cur)
	}
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}
