package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/failpoint"
)

// Node is a kmed of a site, with a folder of its own: configuration, data,
// certificate and log.
type Node struct {
	site  *Site
	Name  string // km1-a, km1-b ...
	index int    // among the site's nodes
	env   []string
	kmed  *process

	Proxy *Proxy // with Config.Proxy
}

func (n *Node) path(parts ...string) string {
	return n.site.path(append([]string{n.Name}, parts...)...)
}

// LogFile is what the node has written.
func (n *Node) LogFile() string { return n.path("log") }

func (n *Node) url(door int) string {
	return fmt.Sprintf("https://localhost:%d", n.site.lab.Ports.of(n.site.Name)[n.index][door])
}

// URL is the base URL of the node's SAE door.
func (n *Node) URL() string { return n.url(0) }

// OperatorURL is the base URL of the node's operator door.
func (n *Node) OperatorURL() string { return n.url(3) }

// Start writes the node's configuration and starts it.
func (n *Node) Start(ctx context.Context) error {
	l := n.site.lab
	if err := os.MkdirAll(n.path(), 0o755); err != nil {
		return err
	}
	if err := n.writeConfig(ctx); err != nil {
		return err
	}
	half := max(1, runtime.NumCPU()/2) // of this machine's processors: the other half is the other site's
	env := append([]string{fmt.Sprintf("GOMAXPROCS=%d", half), "SOFTHSM2_CONF=" + n.site.path("hsm", "softhsm2.conf"), failpoint.FaultsFile + "=" + n.path("faults")}, n.env...)
	var err error
	n.kmed, err = l.nursery.start("kmed "+n.Name, l.path("qlink"), n.LogFile(), env, filepath.Join(l.Bin, "kmed"), "serve", "--config", n.path("kmed.yaml"))
	return err
}

// Await returns when the node answers alice's or bob's Get status.
func (n *Node) Await(ctx context.Context) error {
	return n.kmed.await(ctx, func() error {
		me, other := "alice", "bob"
		if n.site.Name == "km2" {
			me, other = other, me
		}
		c, err := n.site.lab.SAEAt(me, n.Name)
		if err != nil {
			return err
		}
		defer c.HTTP.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = c.Client.Status(ctx, SAEID(other))
		return err
	})
}

// Stop ends the node with SIGTERM.
func (n *Node) Stop() error { return n.kmed.stop() }

// Kill ends the node with SIGKILL.
func (n *Node) Kill() { n.kmed.kill() }

// Signal sends the node a signal.
func (n *Node) Signal(s os.Signal) error { return n.kmed.signal(s) }

// Faults says what is wrong with the node from now on (package failpoint): "hsm 300ms",
// "clock -40s". None: nothing is. Only a kmed with the build tag failpoint listens.
func (n *Node) Faults(lines ...string) error {
	file := n.path("faults")
	if err := os.WriteFile(file+".new", []byte(strings.Join(lines, "\n")), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Recover runs kmed recover with the node's configuration, and returns what it says.
func (n *Node) Recover(ctx context.Context, flags ...string) (string, error) {
	out := n.path("recover")
	if err := os.RemoveAll(out); err != nil {
		return "", err
	}
	env := []string{"SOFTHSM2_CONF=" + n.site.path("hsm", "softhsm2.conf")}
	args := append([]string{"recover", "--config", n.path("kmed.yaml")}, flags...)
	p, err := n.site.lab.nursery.start("kmed recover of "+n.Name, n.path(), out, env, filepath.Join(n.site.lab.Bin, "kmed"), args...)
	if err != nil {
		return "", err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		p.kill()
	}
	text, err := os.ReadFile(out)
	return string(text), errors.Join(p.err, err)
}

// Running says whether the node runs.
func (n *Node) Running() bool { return n.kmed.running() }

// Fenced says whether the node has ended because it was taken over.
func (n *Node) Fenced() bool {
	exit, ok := errors.AsType[*exec.ExitError](n.kmed.err)
	return !n.Running() && ok && exit.ExitCode() == 3
}

// Exited is closed when the node has ended.
func (n *Node) Exited() <-chan struct{} { return n.kmed.exited }

// Restart starts the node again, with env added to its environment, and waits until
// it answers.
func (n *Node) Restart(ctx context.Context, env ...string) error {
	if n.Running() {
		return errors.New(n.Name + " is still running")
	}
	n.env = slices.Clone(env)
	if err := n.Start(ctx); err != nil {
		return err
	}
	return n.Await(ctx)
}
