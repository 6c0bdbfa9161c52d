package kme

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// clockQuality is what the kernel says of its clock: whether something keeps it right,
// and how far off it may be at most, to a power of two so that it changes seldom.
func clockQuality() string {
	var t unix.Timex
	if state, err := unix.Adjtimex(&t); err != nil || state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 {
		return "not synchronised"
	}
	within := time.Millisecond
	for within < time.Duration(t.Maxerror)*time.Microsecond {
		within *= 2
	}
	return fmt.Sprintf("synchronised, within %v", max(within, 128*time.Millisecond))
}
