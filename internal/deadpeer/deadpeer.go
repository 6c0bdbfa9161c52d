// Package deadpeer has a TCP connection notice that its other side has gone without a
// word: a machine that lost its power, a network that swallows what is sent.
package deadpeer

import (
	"net"
	"time"
)

// Silence is how long bytes may wait for their acknowledgement.
const Silence = 10 * time.Second

// KeepAlive has an idle connection asked whether the other side is there.
var KeepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}

// Notice asks the kernel to do both for a connection, if it is TCP: whatever waits on it
// then fails within some ten seconds. Where the first cannot be had, it may take a
// quarter of an hour, and deadlines alone notice.
func Notice(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetKeepAliveConfig(KeepAlive)
		_ = setUserTimeout(t, Silence)
	}
}
