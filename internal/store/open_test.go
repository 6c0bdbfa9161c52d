package store

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/pgdev"
)

// TestOpenRefuses every database that is not this program's to use.
func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.open("n1")
	for _, test := range []struct {
		name   string
		change func(*Config)
		spoil  string
		want   string
	}{
		{"another epoch length", func(c *Config) { c.EpochLength = 2 * hour }, "", "1h0m0s long, not 2h0m0s"},
		{"another site", func(c *Config) { c.Site = kme("KM2") }, "", "that of KME KM1, not of KM2"},
		{"no node", func(c *Config) { c.Node = "" }, "", "must be set"},
		{"no schema", func(c *Config) { c.DSN = s.cluster.DSN(AppRole, "postgres") }, "", "has to be migrated: it has no schema yet"},
		{"an older version", func(*Config) {}, fmt.Sprintf("UPDATE goose_db_version SET is_applied = false WHERE version_id = %d", schemaVersion), "has to be migrated: it has version"},
		{"a newer version", func(*Config) {}, "INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, true)", "schema version 999"},
	} {
		if test.spoil != "" {
			s.super(func(conn *pgx.Conn) error { _, err := conn.Exec(t.Context(), test.spoil); return err })
		}
		cfg := s.config("n2")
		test.change(&cfg)
		if db, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
			if err == nil {
				db.Close()
			}
		}
	}
}

func TestMigrateAgain(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, role := range []string{pgdev.Superuser, OwnerRole} {
		if err := Migrate(t.Context(), s.dsn(role), hour, quiet); err != nil {
			t.Errorf("as %s: %v", role, err)
		}
	}
	if err := Migrate(t.Context(), s.dsn(OwnerRole), 2*hour, quiet); err == nil {
		t.Error("another epoch length was accepted")
	}
	if err := Migrate(t.Context(), s.dsn(OwnerRole), time.Millisecond, quiet); err == nil {
		t.Error("epochs of a millisecond were accepted")
	}
}

// TestBeforeBeginAndAfterClose: without a run nothing is changed.
func TestBeforeBeginAndAfterClose(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db, err := Open(t.Context(), s.config("n1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Record(t.Context(), audit.Event{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("before Begin: %v, want ErrUnavailable", err)
	}
	if err := db.Begin(t.Context(), 1); !errors.Is(err, ErrFenced) {
		t.Errorf("a node that was never given a run: %v, want ErrFenced", err)
	}
	run, err := db.BumpRun(t.Context(), "n1", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Begin(t.Context(), run); err != nil {
		t.Fatal(err)
	}
	if err := db.Begin(t.Context(), run); err == nil {
		t.Error("a second Begin was accepted")
	}
	if err := db.Healthy(); err != nil {
		t.Error(err)
	}
	db.Close()
	if err := db.Record(t.Context(), audit.Event{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after Close: %v, want ErrUnavailable", err)
	}
}

// TestLeastPrivilege: the daemon's role may do what its verbs do, and no more; the
// auditor reads everything but blobs.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.fill(db, 64, mine)
	const denied = "42501"
	for _, test := range []struct{ role, sql, want string }{
		{AppRole, "SELECT FROM audit", denied},
		{AppRole, "UPDATE audit SET body = ''", denied},
		{AppRole, "DELETE FROM audit", denied},
		{AppRole, "TRUNCATE audit", denied},
		{AppRole, "UPDATE audit_d20260301 SET body = ''", denied},
		{AppRole, "DELETE FROM audit_d20260301", denied},
		{AppRole, "TRUNCATE audit_d20260301", denied},
		{AppRole, "DROP TABLE audit_d20260301", denied},
		{AppRole, "ALTER TABLE audit DETACH PARTITION audit_d20260301", denied},
		{AppRole, "CREATE TABLE mine (x int)", denied},
		{AppRole, "CREATE TABLE public.mine (x int)", denied},
		{AppRole, "DROP TABLE key", denied},
		{AppRole, "UPDATE key SET ct = ''", denied},
		{AppRole, "DELETE FROM due", denied},
		{AppRole, "DELETE FROM block", denied},
		{AppRole, "DELETE FROM node_run", denied},
		{AppRole, "UPDATE settings SET epoch_ms = 1", denied},
		{AppRole, "UPDATE epoch SET state = 'open'", denied},
		{AppRole, "UPDATE goose_db_version SET version_id = 1", denied},
		{AppRole, "SET ROLE " + OwnerRole, denied},
		{AppRole, "SET session_replication_role = replica", denied},
		{AppRole, "CREATE FUNCTION kme.open_epoch(text) RETURNS int LANGUAGE sql AS 'SELECT 1'", denied},
		{AuditorRole, "SELECT body FROM audit", ""},
		{AuditorRole, "SELECT count(*) FROM key", ""},
		{AuditorRole, "SELECT chunk, gone_how FROM key, due", ""},
		{AuditorRole, "SELECT ct FROM key", denied},
		{AuditorRole, "SELECT ct FROM due", denied},
		{AuditorRole, "DELETE FROM audit", denied},
		{AuditorRole, "SELECT kme.open_epoch(1)", denied},
	} {
		conn, err := pgx.Connect(t.Context(), s.dsn(test.role)+" search_path=kme")
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.Exec(t.Context(), test.sql)
		if got := sqlState(err); got != test.want {
			t.Errorf("%s: %s: SQLSTATE %q (%v), want %q", test.role, test.sql, got, err, test.want)
		}
		conn.Close(t.Context())
	}
	var pg *pgconn.PgError
	if _, err := db.pool.Exec(t.Context(), "SELECT open_epoch(-1)"); !errors.As(err, &pg) {
		t.Errorf("an epoch before time: %v", err)
	}
}
