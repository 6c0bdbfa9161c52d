package main

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// tellSystemd says that the doors are open, then that the node lives for as long as it
// does, and at the end that it stops. Where no systemd listens it says nothing. A node
// that is stuck says nothing either, and is started again by the watchdog.
func (n *node) tellSystemd(ctx context.Context, alive func() error) error {
	n.notify(daemon.SdNotifyReady)
	defer n.notify(daemon.SdNotifyStopping)
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn("systemd's watchdog", "err", err)
	}
	if every == 0 {
		<-ctx.Done()
		return nil
	}
	t := time.NewTicker(every / 3)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := alive(); err != nil {
			n.log.Error("systemd's watchdog is not told that the node lives", "err", err)
			continue
		}
		n.notify(daemon.SdNotifyWatchdog)
	}
}

func (n *node) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("telling systemd", "state", state, "err", err)
	}
}
