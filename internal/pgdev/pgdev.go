// Package pgdev runs a private PostgreSQL cluster from the binaries that are
// installed on this machine: for the lab and for tests.
//
// It promises a cluster with fsync and data checksums on, locale C and UTF-8,
// that listens on one unix socket in a folder of mode 0700 and on no network
// address, and that ends when the process that started it ends, however that
// happens. A second Start on the same folder finds the same data.
//
// Everybody who can enter the socket's folder is trusted with every role: the
// owner of the server process and root. Peer authentication cannot be used, since
// under root the server runs as another user than its clients. It is therefore
// nothing for production, which has its own cluster, roles and pg_hba.conf.
package pgdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Superuser is the name of the role that initdb makes.
const Superuser = "postgres"

// lockName is the file in a cluster's folder that its owner holds locked.
const lockName = "lock"

// Config says where the cluster lies.
type Config struct {
	// Dir is the cluster's folder; it is made if missing. The data lie in
	// Dir/cluster, which is a link to a folder under the system's temporary
	// directory if the server's user cannot reach Dir or if the path would be too
	// long for a unix socket.
	Dir string

	// Template, if set, is the Dir of another cluster, which has been stopped. A new
	// cluster begins as a copy of it, with its roles and databases, which takes a
	// small part of what initdb does. It has the system identifier of its template.
	Template string

	Log *slog.Logger // nil discards
}

// Cluster is a running server. Its methods may be called by one goroutine at a time.
type Cluster struct {
	dir, home string // home is Dir/cluster with its links resolved
	log       *slog.Logger
	lock      *os.File // flock on Dir/lock: this process owns the cluster
	pid       int
	exited    chan struct{} // closed when the postmaster has been waited for
}

// Start starts the cluster in cfg.Dir, after initdb or a copy of the template if it is
// new, and returns when it takes connections. What a killed owner left running or
// locked is cleaned up first; a cluster that a living process owns is an error.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	c := &Cluster{log: cfg.Log}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if err := c.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("starting postgres in %s: %w", cfg.Dir, err), c.release())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context, cfg Config) (err error) {
	began := time.Now()
	if c.dir, err = filepath.Abs(cfg.Dir); err != nil {
		return err
	}
	bin, err := binaries(ctx)
	if err != nil {
		return err
	}
	cred, err := serverUser()
	if err != nil {
		return err
	}
	if err := c.own(cred); err != nil {
		return err
	}
	if c.home, err = place(c.dir, bin, cred); err != nil {
		return err
	}
	if err := clearAway(ctx, c.data()); err != nil {
		return err
	}
	if err := c.populate(ctx, cfg.Template, bin, cred); err != nil {
		return err
	}
	if err := c.launch(bin, cred); err != nil {
		return err
	}
	if err := c.ready(ctx); err != nil {
		return errors.Join(err, c.Kill())
	}
	c.log.Debug("postgres started", "dir", c.dir, "pid", c.pid, "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// own takes the lock that says which process owns the cluster.
func (c *Cluster) own(cred *syscall.Credential) error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	if cred != nil { // the server passes through on the way to its own folder
		if err := os.Chmod(c.dir, 0o711); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(filepath.Join(c.dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return errors.Join(fmt.Errorf("another process runs the cluster: %w", err), f.Close())
	}
	c.lock = f
	return nil
}

func (c *Cluster) release() error {
	if c.lock == nil {
		return nil
	}
	f := c.lock
	c.lock = nil
	return f.Close()
}

func (c *Cluster) data() string    { return filepath.Join(c.home, "data") }
func (c *Cluster) run() string     { return filepath.Join(c.home, "run") }
func (c *Cluster) logFile() string { return filepath.Join(c.home, "postgres.log") }

// launch starts the postmaster as a child that dies with this process. The signal
// of a parent's death comes when the thread that forked ends, so one goroutine
// keeps its thread until the child has ended.
func (c *Cluster) launch(bin string, cred *syscall.Credential) error {
	logFile, err := os.OpenFile(c.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", c.data(),
		"-c", "listen_addresses=", "-c", "unix_socket_directories="+c.run(), "-c", "unix_socket_permissions=0700",
		"-c", "fsync=on", "-c", "full_page_writes=on", "-c", "synchronous_commit=on",
		"-c", "timezone=UTC", "-c", "log_timezone=UTC", "-c", "log_parameter_max_length=0")
	cmd.Dir, cmd.Env = c.home, environment()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Pdeathsig: syscall.SIGINT, Setpgid: true}
	started := make(chan error)
	c.exited = make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(c.exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended stands in its log
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("running postgres: %w", err)
	}
	c.pid = cmd.Process.Pid
	return nil
}

// ready waits until the server takes connections, which it says in its lock file: to
// try would cost it more than the waiting.
func (c *Cluster) ready(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		const status = 7 // its line, as pg_ctl reads it
		text, err := os.ReadFile(filepath.Join(c.data(), pidName))
		if lines := strings.Split(string(text), "\n"); len(lines) > status && strings.TrimSpace(lines[status]) == "ready" {
			return nil
		}
		select {
		case <-c.exited:
			out, _ := os.ReadFile(c.logFile())
			return fmt.Errorf("postgres ended at once: %s", tail(out))
		case <-ctx.Done():
			return fmt.Errorf("postgres is not ready: %w (%q, %v)", ctx.Err(), text, err)
		case <-tick.C:
		}
	}
}

// DSN is the connection string for a role and a database of the cluster. It is the
// same after a restart.
func (c *Cluster) DSN(user, db string) string {
	quote := func(s string) string {
		return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
	}
	return fmt.Sprintf("host=%s port=5432 user=%s dbname=%s sslmode=disable", quote(c.run()), quote(user), quote(db))
}

// Socket is the path of the unix socket.
func (c *Cluster) Socket() string { return filepath.Join(c.run(), socketName) }

// EnsureDatabase creates the database db if it is missing.
func (c *Cluster) EnsureDatabase(ctx context.Context, db string) error {
	conn, err := pgx.Connect(ctx, c.DSN(Superuser, "postgres"))
	if err != nil {
		return fmt.Errorf("creating database %s: %w", db, err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var there bool
	err = conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", db).Scan(&there)
	if err == nil && !there {
		_, err = conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{db}.Sanitize())
	}
	if err != nil {
		return fmt.Errorf("creating database %s: %w", db, err)
	}
	return nil
}

// Pid is the process ID of the postmaster.
func (c *Cluster) Pid() int { return c.pid }

// Exited is closed when the server has ended, whoever ended it.
func (c *Cluster) Exited() <-chan struct{} { return c.exited }

// Stop ends the server in good order, disconnecting its clients. If ctx ends
// first, it is killed.
func (c *Cluster) Stop(ctx context.Context) error {
	_ = syscall.Kill(c.pid, syscall.SIGINT) // fast shutdown; no such process: it has ended
	select {
	case <-c.exited:
		return c.release()
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("stopping postgres: %w", ctx.Err()), c.Kill())
	}
}

// Kill ends the server and all its processes with SIGKILL, as a power cut would
// but for what the operating system has cached.
func (c *Cluster) Kill() error {
	select {
	case <-c.exited:
	default:
		_ = syscall.Kill(c.pid, syscall.SIGSTOP) // no new children from here on
		family := inFolder(c.data())
		_ = syscall.Kill(c.pid, syscall.SIGKILL)
		for _, pid := range family {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		<-c.exited
	}
	ctx, cancel := context.WithTimeout(context.Background(), killWait)
	defer cancel()
	return errors.Join(awaitEmpty(ctx, c.data()), c.release())
}

// Remove deletes the cluster's folder and its data. The server must have ended.
func (c *Cluster) Remove() error {
	return errors.Join(os.RemoveAll(c.home), os.RemoveAll(c.dir))
}
