//go:build !linux

package siem

import "syscall"

// limitUnacknowledged does nothing here: the system's own limit holds.
func limitUnacknowledged(_, _ string, _ syscall.RawConn) error { return nil }
