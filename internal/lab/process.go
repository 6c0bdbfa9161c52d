package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// nursery starts processes that die with this one. The kernel ties a child to the
// thread that forked it, so one goroutine keeps one thread for that.
type nursery struct {
	jobs chan func()
}

func newNursery() *nursery {
	n := &nursery{jobs: make(chan func())}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread lives as long as this goroutine
		for job := range n.jobs {
			job()
		}
	}()
	return n
}

func (n *nursery) close() { close(n.jobs) }

// process is a child of the lab. A nil process is one that was never started.
type process struct {
	name    string
	logFile string
	cmd     *exec.Cmd
	exited  chan struct{}
	err     error // how it exited; read after exited is closed
}

// start runs a program with its output appended to logFile.
func (n *nursery) start(name, dir, logFile string, env []string, program string, args ...string) (*process, error) {
	if err := os.MkdirAll(filepath.Dir(logFile), 0o755); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	defer out.Close()
	p := &process{name: name, logFile: logFile, exited: make(chan struct{}), cmd: exec.Command(program, args...)}
	p.cmd.Dir, p.cmd.Env = dir, append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true} // Ctrl-C is for the lab, which stops them in order
	started := make(chan error)
	n.jobs <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// running says whether the process has not exited.
func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// await asks ready again and again until it is, the process exits, or ctx or a minute ends.
func (p *process) await(ctx context.Context, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return fmt.Errorf("%s ended (%v); its last words:\n%s", p.name, p.err, p.lastWords())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its last words:\n%s", p.name, err, p.lastWords())
		case <-tick.C:
		}
	}
}

// lastWords are the last lines of the process's log.
func (p *process) lastWords() string {
	text, _ := os.ReadFile(p.logFile)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "    " + strings.Join(lines[max(0, len(lines)-6):], "\n    ")
}

// stop ends the process with SIGTERM, and with SIGKILL if it has not gone after 30 s.
func (p *process) stop() error {
	if !p.running() {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		return nil
	case <-time.After(30 * time.Second):
		p.kill()
		return fmt.Errorf("%s did not stop within 30 s and was killed", p.name)
	}
}

// kill ends the process with SIGKILL and waits for it.
func (p *process) kill() {
	if p.running() {
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// signal sends a signal to the process.
func (p *process) signal(s os.Signal) error {
	if !p.running() {
		return errors.New(p.name + " is not running")
	}
	return p.cmd.Process.Signal(s)
}
