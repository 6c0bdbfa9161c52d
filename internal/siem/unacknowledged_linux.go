package siem

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// limitUnacknowledged has a connection end whose other end acknowledges nothing for
// deadTime, which TCP would otherwise wait for up to 15 minutes.
func limitUnacknowledged(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadTime.Milliseconds()))
	})
	if cerr != nil {
		return cerr
	}
	return err
}
