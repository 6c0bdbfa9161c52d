package store

import (
	"context"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// TestDatabaseThatCannot: one that answers and cannot commit, as with a full disk, is
// not well from the first batch that it fails: keys are refused before anything is done
// for them. Events alone are tried all the same, and the first that is committed makes
// it well.
func TestDatabaseThatCannot(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	b := s.fill(db, 64, mine)
	leases, err := db.Lease(ctx, linkName, 1)
	if err != nil {
		t.Fatal(err)
	}
	atoms := leases[0].Atoms
	serve := func(i int) error {
		return db.Serve(ctx, ServeJob{Atoms: ids(atoms[i : i+1]), Events: []audit.Event{served("r", b.BlockRef, atoms[i])}})
	}
	event := audit.Event{Action: audit.Status, Outcome: audit.Done}
	exec := func(statement string) {
		s.super(func(conn *pgx.Conn) error { _, err := conn.Exec(context.Background(), statement); return err })
	}
	day := "audit_d" + s.now().UTC().Format("20060102")
	exec(`CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;
		CREATE TRIGGER full_disk BEFORE INSERT ON ` + day + ` FOR EACH STATEMENT EXECUTE FUNCTION full_disk()`)
	for i := range 2 {
		if err := serve(i); !errors.Is(err, ErrUnavailable) {
			t.Errorf("serving: %v, want ErrUnavailable", err)
		}
		if err := db.Healthy(); !errors.Is(err, ErrUnavailable) {
			t.Errorf("a database with a full disk is well: %v", err)
		}
		if err := db.Record(ctx, event); !errors.Is(err, ErrUnavailable) {
			t.Errorf("recording: %v, want ErrUnavailable", err)
		}
	}
	exec("DROP TRIGGER full_disk ON " + day)
	before := ask[int64](s, "SELECT mark FROM node_run WHERE node = 'n1'")
	if err := serve(2); !errors.Is(err, ErrUnavailable) || ask[int64](s, "SELECT mark FROM node_run WHERE node = 'n1'") != before {
		t.Errorf("a key was tried before an event: %v", err)
	}
	s.await("the database to be well", func() bool { return db.Record(ctx, event) == nil && db.Healthy() == nil })
	if err := serve(0); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	s.check()
}
