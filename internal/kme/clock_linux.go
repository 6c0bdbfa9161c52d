package kme

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// clockQuality is what the kernel says of its clock.
func clockQuality() string {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return unsynchronised
	}
	return qualityOf(state, t)
}

const unsynchronised = "not synchronised"

// qualityOf says whether something keeps the clock right, and how far off it may be at
// most, to a power of two so that it changes seldom.
func qualityOf(state int, t unix.Timex) string {
	if state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 {
		return unsynchronised
	}
	within := time.Millisecond
	for within < time.Duration(t.Maxerror)*time.Microsecond {
		within *= 2
	}
	return fmt.Sprintf("synchronised, within %v", max(within, 128*time.Millisecond))
}
