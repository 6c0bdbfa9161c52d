package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/pgdev"
)

// await waits until a condition holds.
func (s *site) await(what string, holds func() bool) {
	s.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !holds() {
		select {
		case <-deadline:
			s.t.Fatalf("waited in vain for %s", what)
		case <-tick.C:
		}
	}
}

// lockNode keeps the row of a node locked, so that its commits wait, until the
// returned function runs its statements and lets go.
func (s *site) lockNode(node string) (release func(statements ...string)) {
	s.t.Helper()
	return s.lock("SELECT FROM node_run WHERE node = $1 FOR UPDATE", node)
}

// lock keeps what a statement locks in the same way.
func (s *site) lock(sql string, args ...any) (release func(statements ...string)) {
	s.t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser)+" search_path=kme")
	if err != nil {
		s.t.Fatal(err)
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, sql, args...); err != nil {
		s.t.Fatal(err)
	}
	return func(statements ...string) {
		s.t.Helper()
		for _, sql := range statements {
			if _, err := tx.Exec(ctx, sql); err != nil {
				s.t.Error(err)
			}
		}
		if err := tx.Commit(ctx); err != nil {
			s.t.Error(err)
		}
		if err := conn.Close(ctx); err != nil {
			s.t.Error(err)
		}
	}
}

// awaitLock waits until a commit of the site stands before a locked row.
func (s *site) awaitLock() {
	s.t.Helper()
	s.await("a commit to wait for a lock", func() bool {
		return ask[int](s, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()") > 0
	})
}

// holdUp has the committer busy with a batch until release: what comes meanwhile
// waits, and shares the next batch.
func (s *site) holdUp(db *DB) (release func()) {
	s.t.Helper()
	unlock := s.lockNode(db.cfg.Node)
	done := make(chan error, 1)
	go func() {
		done <- db.Record(context.Background(), audit.Event{Action: audit.Status, Outcome: audit.Done})
	}()
	s.awaitLock()
	return func() {
		s.t.Helper()
		unlock()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	}
}
