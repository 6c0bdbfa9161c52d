//go:build !failpoint

// Package failpoint names the places where a test kills the process, or holds it up,
// to show that nothing is lost or handed out twice whatever dies. It does something
// only in a binary built with the tag failpoint; otherwise Hit and Fault are empty,
// every event is recorded, and Now is the machine's clock.
package failpoint

import (
	"context"
	"time"
)

// On says that this build has failpoints.
const On = false

// Hit does nothing in this build.
func Hit(string) {}

// Fault finds nothing wrong in this build.
func Fault(context.Context, string) error { return nil }

// Now is the time.
func Now() time.Time { return time.Now() }

// Unaudited is false: every event is recorded.
func Unaudited() bool { return false }
