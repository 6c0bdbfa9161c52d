package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// setStandby has commits wait for the standby of that name; for none if it is "".
func (s *site) setStandby(name string) {
	s.t.Helper()
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(context.Background(), "ALTER SYSTEM SET synchronous_standby_names = '"+name+"'")
		return err
	})
	ask[bool](s, "SELECT pg_reload_conf()")
}

// awaitStandbyWait waits until a server process other than not waits for a standby
// with its commit, and returns it.
func (s *site) awaitStandbyWait(not int) (pid int) {
	s.t.Helper()
	s.await("a commit to wait for a standby", func() bool {
		pid = ask[int](s, "SELECT COALESCE(max(pid), 0) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND pid <> $1", not)
		return pid != 0
	})
	return pid
}

// TestNoStandby takes the standby away from under a commit. The wait goes on,
// whatever happens to its connections and even if somebody ends it at the server;
// meanwhile everything else is refused; and it comes back by itself.
func TestNoStandby(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "kme-standby-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	server, err := startCluster(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(server.Kill(), server.Remove()); err != nil {
			t.Error(err)
		}
	}()
	s := newSiteOn(t, server)
	p, dsn := newProxy(t, s)
	cfg := s.config("n1")
	cfg.DSN = dsn
	db := s.openWith(cfg)
	defer db.Close()
	b := s.fill(db, 1024, mine)

	s.setStandby("nobody")
	ctx, leave := context.WithCancel(t.Context())
	done, got, late := 0, make(chan error, 1), make(chan bool, 1)
	go func() { // the server takes note of the setting after a while
		for i := 0; ; i++ {
			err := db.Serve(ctx, ServeJob{
				Atoms: ids(b.Atoms[i : i+1]), Events: []audit.Event{served("r", b.BlockRef, b.Atoms[i])}, Late: func(committed bool) { late <- committed },
			})
			if err != nil {
				got <- err
				return
			}
			done++
		}
	}()
	first := s.awaitStandbyWait(0)
	began := time.Now()
	s.await("the node to say so", func() bool { return db.Healthy() != nil })
	if waited := time.Since(began); waited > 3*hangTime {
		t.Errorf("it said so after %v", waited)
	}
	if err := db.Record(t.Context(), audit.Event{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a job that comes meanwhile: %v, want ErrUnavailable", err)
	}
	leave()
	if err := <-got; !errors.Is(err, ErrDoubt) {
		t.Errorf("Serve: %v, want ErrDoubt", err)
	}

	// The server says that the commit is done, with a warning. It may not be.
	ask[bool](s, "SELECT pg_cancel_backend($1)", first)
	second := s.awaitStandbyWait(first)
	// That was the question, and now it has lost its connection.
	p.cut()
	s.awaitLock()
	if !ask[bool](s, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep')", second) {
		t.Error("a commit's wait was ended with its connection")
	}
	if len(late) > 0 {
		t.Error("an outcome was told that no standby has")
	}
	s.setStandby("")
	if !<-late {
		t.Error("the request is said not to be committed")
	}
	if err := db.Record(t.Context(), audit.Event{Action: audit.Status, Outcome: audit.Done}); err != nil {
		t.Errorf("when the standby is back: %v", err)
	}
	if n := countOf(s.check(), audit.EncKeys); n != done+1 {
		t.Errorf("%d requests were recorded, want %d", n, done+1)
	}
	if p.cancels > 0 {
		t.Errorf("the server was asked %d times to cancel", p.cancels)
	}
}

// TestNeverCancels: nor is a read cancelled that its caller gave up. It ends, and
// with it its hold on the tables, when its connection does.
func TestNeverCancels(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	p, dsn := newProxy(t, s)
	cfg := s.config("n1")
	cfg.DSN = dsn
	db := s.openWith(cfg)
	unlock := s.lock("LOCK TABLE chunk")
	ctx, leave := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() {
		_, err := db.Stored(ctx, linkName)
		got <- err
	}()
	s.awaitLock()
	leave()
	if err := <-got; !errors.Is(err, ErrUnavailable) {
		t.Errorf("Stored: %v, want ErrUnavailable", err)
	}
	// pgx says farewell after it would have asked.
	s.await("the connection to be given up", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.farewells > 0
	})
	if p.cancels > 0 {
		t.Errorf("the server was asked %d times to cancel", p.cancels)
	}
	p.cut()
	s.await("the server to give up", func() bool {
		return ask[int](s, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()") == 0
	})
	unlock()
	if _, err := db.Stored(t.Context(), linkName); err != nil {
		t.Error(err)
	}
}

// TestManyHosts: of the hosts of a DSN one is gone and one does not answer.
func TestManyHosts(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	gone, silent := t.TempDir(), t.TempDir()
	ln, err := net.Listen("unix", filepath.Join(silent, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := s.config("n1")
	cfg.DSN = fmt.Sprintf("host=%s,%s,%s port=5432 user=%s dbname=%s", gone, silent, filepath.Dir(s.cluster.Socket()), AppRole, s.name)
	began := time.Now()
	db := s.openWith(cfg)
	if err := db.Record(t.Context(), audit.Event{Action: audit.Status, Outcome: audit.Done}); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 10*hostTime {
		t.Errorf("it took %v to find the host that answers", took)
	}
}
