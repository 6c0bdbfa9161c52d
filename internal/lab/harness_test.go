package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	programs "github.com/qutemail/kme/internal/lab/binaries"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

func TestMain(m *testing.M) {
	code := m.Run()
	for _, remove := range leftovers.removes {
		_ = remove() // what is left lies in the temporary folder
	}
	os.Exit(code)
}

// leftovers is what all tests share, to be removed at the end.
var leftovers struct {
	sync.Mutex
	removes []func() error
}

func removeAtEnd(remove func() error) {
	leftovers.Lock()
	defer leftovers.Unlock()
	leftovers.removes = append(leftovers.removes, remove)
}

// migrated is the folder of a stopped Postgres with the schema in it, of which the
// databases of the tests' labs begin as copies: to make each anew took longer than all
// else that a lab's start does. Labs that begin with nothing are in cmd/kmelab.
var migrated = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "kme-lab-template-")
	if err != nil {
		return "", err
	}
	removeAtEnd(func() error { return os.RemoveAll(dir) })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c, err := pgdev.Start(ctx, pgdev.Config{Dir: dir})
	if err != nil {
		return "", err
	}
	removeAtEnd(c.Remove)
	err = c.EnsureDatabase(ctx, "kme")
	if err == nil {
		err = store.Migrate(ctx, c.DSN(pgdev.Superuser, "kme"), defaultEpoch, nil)
	}
	return dir, errors.Join(err, c.Stop(ctx))
})

// places keeps the number of labs at once to what a small machine runs well: a lab
// is nine processes. A test holds at most one.
var places = make(chan struct{}, 2)

// binaries is a folder with kmed, kme-ca, qlink, kmelab and kmectl as they are now,
// built once for all tests. With failpoint, kmed is one that dies where the
// environment says (package failpoint).
func binaries(t testing.TB, failpoint bool) string {
	t.Helper()
	build := buildPlain
	if failpoint {
		build = buildFailpoint
	}
	dir, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var buildPlain = sync.OnceValues(func() (string, error) {
	dir, err := programs.Build("noyubikey", "kmed", "kme-ca", "qlink", "kmelab", "kmectl")
	removeAtEnd(func() error { return os.RemoveAll(dir) })
	return dir, err
})

var buildFailpoint = sync.OnceValues(func() (string, error) {
	plain, err := buildPlain()
	if err != nil {
		return "", err
	}
	dir, err := programs.Build("noyubikey,failpoint", "kmed")
	if err != nil {
		return "", err
	}
	removeAtEnd(func() error { return os.RemoveAll(dir) })
	for _, name := range []string{"kme-ca", "qlink", "kmelab", "kmectl"} {
		if err := os.Symlink(filepath.Join(plain, name), filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	return dir, nil
})

// start brings up a lab of its own for the test, on free ports, after change has
// had its say about the configuration. At the end of the test the invariants are
// held against the lab, and it is stopped.
func start(t testing.TB, change func(*Config)) *Lab {
	t.Helper()
	l := startUnchecked(t, change)
	t.Cleanup(func() { check(t, l, l.Check) })
	return l
}

// startUnchecked is start for a lab that will not be held against the invariants.
func startUnchecked(t testing.TB, change func(*Config)) *Lab {
	t.Helper()
	cfg := Config{
		Dir: shortDir(t), Bin: binaries(t, false), Nodes: 1,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if cfg.Epoch == 0 && cfg.Database == nil {
		if cfg.Template, err = migrated(); err != nil {
			t.Fatalf("making the template of databases: %v", err)
		}
	}
	if cfg.Ports, err = FreePorts(cfg.Nodes); err != nil {
		t.Fatal(err)
	}
	places <- struct{}{}
	t.Cleanup(func() { <-places })
	l, err := Up(t.Context(), cfg)
	if err != nil {
		t.Fatalf("starting the lab: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Errorf("stopping the lab: %v", err)
		}
		if t.Failed() {
			lastWords(t, l)
		}
	})
	return l
}

// shortDir is a folder that the user postgres may enter, with a name that is short
// enough for sockets in it, so that a lab lies in it as a whole. t.TempDir is neither.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kme-lab-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// check holds the invariants against the lab now: all of them, or those of the tables.
func check(t testing.TB, l *Lab, invariants func(context.Context) (Report, error)) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	for _, s := range []*Site{l.KM1, l.KM2} {
		if err := s.attach(ctx); err != nil { // the test may have stopped it
			t.Errorf("starting the database of %s: %v", s.Name, err)
			return Report{}
		}
	}
	r, err := invariants(ctx)
	if err != nil {
		t.Errorf("checking the invariants: %v", err)
	}
	for _, v := range r.Violations {
		t.Error(v)
	}
	t.Log(r.Summary())
	return r
}

// lastWords shows how the logs of the lab's processes end, and what went wrong before.
func lastWords(t testing.TB, l *Lab) {
	const most = 40 // lines of each kind
	files := []string{l.path("qlink", "log")}
	for _, n := range l.nodes() {
		files = append(files, n.LogFile())
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Log(err)
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		end := max(0, len(lines)-most)
		wrong := slices.DeleteFunc(slices.Clone(lines[:end]), func(line string) bool {
			return !strings.Contains(line, "level=ERROR") && !strings.Contains(line, "level=WARN")
		})
		t.Logf("%s ends, after its last errors:\n%s", file, strings.Join(slices.Concat(wrong[max(0, len(wrong)-most):], lines[end:]), "\n"))
	}
}

// eventually asks ready again and again until it returns nil; after the deadline,
// which is for a machine that is busy with other things, the test ends.
func eventually(t testing.TB, what string, ready func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var last error // but not that the time was over
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := ready(ctx)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-time.After(pause): // who asks takes time from those that are asked
		case <-ctx.Done():
			t.Fatalf("%s: not within a minute: %v", what, last)
		}
	}
}

// keysStored returns when each site has at least n keys for its own SAEs to ask for,
// and gives them out.
func keysStored(t testing.TB, l *Lab, n int) {
	t.Helper()
	for _, s := range []*Site{l.KM1, l.KM2} {
		op := operator(t, s)
		eventually(t, fmt.Sprintf("%d keys at %s", n, s.Name), func(ctx context.Context) error {
			if err := Ready(ctx, op); err != nil {
				return err
			}
			now, err := link(ctx, op)
			if err == nil && now.Stored < n {
				err = fmt.Errorf("%d keys; the link is %s (%s)", now.Stored, now.State, now.Why)
			}
			return err
		})
	}
}

// sae is an SAE of the lab, speaking to its home.
func sae(t testing.TB, l *Lab, name string) *Person { return saeAt(t, l, name, people[name]) }

// saeAt is an SAE of the lab, speaking to a node or to the first of a site.
func saeAt(t testing.TB, l *Lab, name, where string) *Person {
	t.Helper()
	p, err := l.SAEAt(name, where)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.HTTP.CloseIdleConnections)
	return p
}
