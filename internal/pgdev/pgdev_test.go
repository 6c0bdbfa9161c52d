package pgdev

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// ownerDir, in the environment, makes the test binary start a cluster there and
// wait to be killed.
const ownerDir = "PGDEV_TEST_OWNER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(ownerDir); dir != "" {
		c, err := Start(context.Background(), Config{Dir: dir})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("ready", c.Pid())
		_, _ = io.Copy(io.Discard, os.Stdin) // until we are killed
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start starts a cluster in dir that ends with the test.
func start(t *testing.T, dir string) *Cluster {
	t.Helper()
	return startAs(t, Config{Dir: dir})
}

func startAs(t *testing.T, cfg Config) *Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	c, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("started in %v", time.Since(began))
	t.Cleanup(func() {
		if err := c.Kill(); err != nil {
			t.Error(err)
		}
		if err := c.Remove(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// ask runs a query that returns one text.
func ask(t *testing.T, c *Cluster, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.DSN(Superuser, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var s string
	if err := conn.QueryRow(t.Context(), sql).Scan(&s); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return s
}

func do(t *testing.T, c *Cluster, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.DSN(Superuser, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func TestSettings(t *testing.T) {
	c := start(t, t.TempDir())
	for setting, want := range map[string]string{
		"fsync": "on", "synchronous_commit": "on", "data_checksums": "on", "listen_addresses": "",
		"server_encoding": "UTF8", "lc_collate": "C", "unix_socket_permissions": "0700",
	} {
		if got := ask(t, c, "SELECT current_setting('"+setting+"')"); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	info, err := os.Stat(filepath.Dir(c.Socket()))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the socket's folder: %v, %v, want mode 0700", info.Mode(), err)
	}
}

func TestRestartKeepsData(t *testing.T) {
	dir := t.TempDir()
	c := start(t, dir)
	if err := c.EnsureDatabase(t.Context(), "a b'c"); err != nil {
		t.Fatal(err)
	}
	if err := c.EnsureDatabase(t.Context(), "a b'c"); err != nil {
		t.Fatal("again:", err)
	}
	do(t, c, "CREATE TABLE kept AS SELECT 'yes' AS v")
	dsn := c.DSN("u", "d")
	if _, err := Start(t.Context(), Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a second owner: %v, want a refusal", err)
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	c = start(t, dir)
	if got := ask(t, c, "SELECT v FROM kept"); got != "yes" {
		t.Errorf("after Stop and Start: %q", got)
	}
	if c.DSN("u", "d") != dsn {
		t.Errorf("the DSN changed from %s to %s", dsn, c.DSN("u", "d"))
	}
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	c = start(t, dir)
	if got := ask(t, c, "SELECT v FROM kept"); got != "yes" {
		t.Errorf("after Kill and Start: %q", got)
	}
}

func TestStopsWhenContextEnds(t *testing.T) {
	c := start(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Stop(ctx); err == nil {
		select {
		case <-c.Exited():
		default:
			t.Error("Stop returned nil, and the server runs")
		}
	}
	<-c.Exited()
	if left := inFolder(c.data()); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
}

func TestLongPathFallsBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long-", 30))
	c := start(t, dir)
	if n := len(c.Socket()); n > maxSocketPath {
		t.Errorf("socket path of %d bytes", n)
	}
	if !isLink(filepath.Join(dir, "cluster")) {
		t.Error("the cluster's folder is not linked from Dir")
	}
}

// TestTemplate: clusters begin as copies of one that was stopped, each for itself, and
// are as safe as it: none is made of one that runs or was killed.
func TestTemplate(t *testing.T) {
	dir := t.TempDir()
	c := start(t, dir)
	do(t, c, "CREATE ROLE somebody")
	do(t, c, "CREATE TABLE copied AS SELECT 'yes' AS v")
	refused := func(why string) {
		t.Helper()
		_, err := Start(t.Context(), Config{Dir: t.TempDir(), Template: dir})
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("a copy was answered %v, want %q", err, why)
		}
	}
	refused("a process runs it")
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	refused("not stopped in good order")
	c = start(t, dir)
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	own := t.TempDir()
	one, two := startAs(t, Config{Dir: own, Template: dir}), startAs(t, Config{Dir: t.TempDir(), Template: dir})
	do(t, one, "UPDATE copied SET v = 'changed'")
	for _, c := range []*Cluster{one, two} {
		if got := ask(t, c, "SELECT rolname FROM pg_roles WHERE rolname = 'somebody'"); got != "somebody" {
			t.Errorf("the role is %q", got)
		}
		if got := ask(t, c, "SELECT current_setting('data_checksums')"); got != "on" {
			t.Errorf("data_checksums is %q", got)
		}
	}
	if got := ask(t, two, "SELECT v FROM copied"); got != "yes" {
		t.Errorf("a copy holds %q after a change in another", got)
	}
	if err := one.Kill(); err != nil {
		t.Fatal(err)
	}
	one = startAs(t, Config{Dir: own, Template: dir})
	if got := ask(t, one, "SELECT v FROM copied"); got != "changed" {
		t.Errorf("after Kill and Start a copy holds %q: it was copied again, or has lost a commit", got)
	}
}

// TestSweep: a cluster whose folder was deleted under it does not stay for ever,
// one whose folder is there does.
func TestSweep(t *testing.T) {
	deep := filepath.Join(t.TempDir(), strings.Repeat("long-", 30))
	c := start(t, deep)
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	cred, err := serverUser()
	if err != nil {
		t.Fatal(err)
	}
	sweep(cred)
	if _, err := os.Stat(c.data()); err != nil {
		t.Fatalf("a cluster in use was swept away: %v", err)
	}
	if err := os.RemoveAll(deep); err != nil {
		t.Fatal(err)
	}
	sweep(cred)
	if _, err := os.Stat(c.home); !os.IsNotExist(err) {
		t.Errorf("the cluster of a deleted folder is still there: %v", err)
	}
}

// TestOwnerKilled kills the process that started a cluster, and the number in the
// lock file is then another process's.
func TestOwnerKilled(t *testing.T) {
	dir := t.TempDir()
	owner := exec.Command(os.Args[0])
	owner.Env = append(os.Environ(), ownerDir+"="+dir)
	in, err := owner.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready ") {
		t.Fatalf("the owner said %q, %v", line, err)
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait() // killed

	c := start(t, dir) // while the old server shuts down
	if got := ask(t, c, "SELECT 'alive'"); got != "alive" {
		t.Errorf("got %q", got)
	}

	pidFile := filepath.Join(c.data(), "postmaster.pid")
	text, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n")
	sleeper := exec.Command("sleep", "60")
	sleeper.SysProcAttr = &syscall.SysProcAttr{}
	if cred, err := serverUser(); err == nil {
		sleeper.SysProcAttr.Credential = cred
	}
	sleeper.Dir = "/"
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = sleeper.Process.Kill()
		_ = sleeper.Wait()
	}()
	if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n%s", sleeper.Process.Pid, rest), 0o600); err != nil {
		t.Fatal(err)
	}
	c = start(t, dir)
	if got := ask(t, c, "SELECT 'alive'"); got != "alive" {
		t.Errorf("got %q", got)
	}
}
