//go:build !failpoint

// Package failpoint names the places where a test kills the process to show that
// nothing is lost or handed out twice whatever dies. It does something only in a
// binary built with the tag failpoint; otherwise Hit is empty.
package failpoint

// Hit does nothing in this build.
func Hit(string) {}
