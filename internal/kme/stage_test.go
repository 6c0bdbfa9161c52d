package kme

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

const template = "kme_template" // a migrated database that the tests' own are copies of

// cluster is the Postgres that all tests of the package share.
var (
	cluster   *pgdev.Cluster
	databases atomic.Int64
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kme-core-test-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if cluster, err = pgdev.Start(ctx, pgdev.Config{Dir: dir}); err != nil {
		fmt.Println(err)
		return 1
	}
	code := 1
	if err = neverSync(ctx); err == nil {
		err = cluster.EnsureDatabase(ctx, template)
	}
	if err == nil {
		err = store.Migrate(ctx, cluster.DSN(pgdev.Superuser, template), time.Hour, nil)
	}
	if err == nil {
		code = m.Run()
	}
	if err := errors.Join(err, cluster.Kill(), cluster.Remove(), goleak.Find()); err != nil {
		fmt.Println(err)
		return 1
	}
	return code
}

// neverSync has the cluster write to the disk when the system likes to: it is killed here, and
// no machine loses its power.
func neverSync(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, cluster.DSN(pgdev.Superuser, "postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, sql := range []string{"ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// clock is one that only moves when it is stepped.
type clock struct{ ms atomic.Int64 }

func newClock() *clock {
	c := new(clock)
	c.ms.Store(time.Date(2026, 3, 1, 12, 30, 0, 0, time.UTC).UnixMilli())
	return c
}

func (c *clock) now() time.Time       { return time.UnixMilli(c.ms.Load()).UTC() }
func (c *clock) step(d time.Duration) { c.ms.Add(d.Milliseconds()) }

// site is the database of a KME, km1 if nothing else is said, and a clock.
type site struct {
	t       testing.TB
	self    string
	cluster *pgdev.Cluster
	name    string
	data    string // folder of the node's files
	*clock
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{t: t, self: "km1", cluster: cluster, name: fmt.Sprintf("site%d", databases.Add(1)), data: t.TempDir(), clock: newClock()}
	s.exec("postgres", "CREATE DATABASE "+s.name+" TEMPLATE "+template)
	return s
}

func (s *site) exec(database, sql string) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.cluster.DSN(pgdev.Superuser, database))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(s.t.Context(), sql); err != nil {
		s.t.Fatal(err)
	}
}

// connect opens the store of node a. No run has begun.
func (s *site) connect() *store.DB { return s.connectAs("a", s.data) }

// connectAs opens the store of a node whose files lie in the folder data.
func (s *site) connectAs(node, data string) *store.DB {
	s.t.Helper()
	w, err := store.OpenWitness(filepath.Join(data, "witness"), node)
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := audit.OpenNodeKey(filepath.Join(data, "audit.key"))
	if err != nil {
		s.t.Fatal(err)
	}
	db, err := store.Open(s.t.Context(), store.Config{
		DSN: s.cluster.DSN(store.AppRole, s.name), Site: kmeID(s.t, s.self), Node: node, EpochLength: time.Hour, Now: s.now, Witness: w, Key: key,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		db.Close()
		if err := w.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return db
}

// open connects the node's store, in a new run.
func (s *site) open() *store.DB {
	s.t.Helper()
	db := s.connect()
	run, err := db.BumpRun(s.t.Context(), "a", 0)
	if err == nil {
		err = db.Begin(s.t.Context(), run)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return db
}

// node is a KME with a database and nothing else.
func (s *site) node() *KME {
	s.t.Helper()
	k := &KME{metrics: newMetrics(), Config: Config{
		Self: kmeID(s.t, "km1"), Node: "a", Store: s.open(), Now: s.now, Log: slog.New(slog.DiscardHandler), DataDir: s.data,
	}}
	var err error
	if k.outage, k.overflow, err = openTallies(s.data); err != nil {
		s.t.Fatal(err)
	}
	return k
}

// told is an event as far as these tests look at it.
type told struct {
	Action, Outcome, Reason string
	Count                   int
}

// audit lists what was recorded, in order.
func (s *site) audit() []told {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, _ := conn.Query(s.t.Context(), `SELECT body::json->>'action', body::json->>'outcome', coalesce(body::json->>'reason', ''),
		coalesce((body::json->>'count')::int, 0) FROM kme.audit ORDER BY seq`)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[told])
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

func kmeID(t testing.TB, s string) identity.KME {
	t.Helper()
	id, err := identity.ParseKME(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func saeID(t testing.TB, s string) identity.SAE {
	t.Helper()
	id, err := identity.ParseSAE(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}
