package auditlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/audit/audittest"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

const template = "kme_template" // a migrated database that the tests' own are copies of

var (
	cluster   *pgdev.Cluster
	databases atomic.Int64
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kme-auditlog-test-")
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
	err = cluster.EnsureDatabase(ctx, template)
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

// site is km1's database, its log's key and a clock.
type site struct {
	t     testing.TB
	name  string
	dir   string
	key   audittest.Key
	clock atomic.Int64 // Unix milliseconds
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{t: t, name: fmt.Sprintf("site%d", databases.Add(1)), dir: t.TempDir(), key: audittest.NewKey(t)}
	s.clock.Store(time.Date(2026, 3, 1, 12, 30, 0, 0, time.UTC).UnixMilli())
	s.exec("postgres", "CREATE DATABASE "+s.name+" TEMPLATE "+template)
	return s
}

func (s *site) now() time.Time { return time.UnixMilli(s.clock.Load()).UTC() }

func (s *site) dsn(role string) string { return cluster.DSN(role, s.name) }

func (s *site) exec(database, sql string, args ...any) {
	s.t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, cluster.DSN(pgdev.Superuser, database))
	if err == nil {
		defer conn.Close(ctx)
		_, err = conn.Exec(ctx, "SET session_replication_role = replica") // past triggers
	}
	if err == nil {
		_, err = conn.Exec(ctx, sql, args...)
	}
	if err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
}

// forge does what a superuser can.
func (s *site) forge(sql string, args ...any) {
	s.t.Helper()
	s.exec(s.name, sql, args...)
}

func (s *site) logName() string { return audit.LogName("qutemail.example", "km1", 1) }

func (s *site) signer() *audit.LogSigner {
	s.t.Helper()
	signer, err := audit.NewLogSigner(s.logName(), s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	return signer
}

// logKey is what an auditor was given.
func (s *site) logKey() audit.LogKey {
	s.t.Helper()
	key, err := audit.ParseLogKey(s.signer().VerifierKey())
	if err != nil {
		s.t.Fatal(err)
	}
	return key
}

// node is a node of the site that records events.
type node struct {
	*store.DB
	name    string
	witness *store.Witness
}

// node opens a node and records its start.
func (s *site) node(name string) *node {
	s.t.Helper()
	ctx := context.Background()
	self, err := identity.ParseKME("km1")
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := audit.OpenNodeKey(filepath.Join(s.dir, name+".key"))
	if err != nil {
		s.t.Fatal(err)
	}
	n := &node{name: name}
	if n.witness, err = store.OpenWitness(filepath.Join(s.dir, name+".witness"), name); err != nil {
		s.t.Fatal(err)
	}
	n.DB, err = store.Open(ctx, store.Config{
		DSN: s.dsn(store.AppRole), Site: self, Node: name, EpochLength: time.Hour, Now: s.now, Witness: n.witness, Key: key,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { n.Close(); _ = n.witness.Close() })
	run, err := n.BumpRun(ctx, name, 0)
	if err == nil {
		n.witness.Start(1)
		err = n.Begin(ctx, run)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	voucher, err := audit.NewLogSigner(audit.VouchName(s.logName()), s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	vouched, err := audit.SignNodeKey(voucher, name, key.Public())
	if err != nil {
		s.t.Fatal(err)
	}
	n.record(s, audit.Event{Action: audit.Start, Outcome: audit.Done, Facts: audit.Facts{Build: "test", Key: vouched}})
	return n
}

func (n *node) record(s *site, events ...audit.Event) {
	s.t.Helper()
	if err := n.Record(context.Background(), events...); err != nil {
		s.t.Fatal(err)
	}
}

// requests are events as those of requests are, count of them in one commit.
func (n *node) requests(s *site, count int) {
	s.t.Helper()
	events := make([]audit.Event, count)
	for i := range events {
		events[i] = audit.Event{
			Action: audit.Status, Outcome: audit.Done, Request: fmt.Sprintf("%s-%d", n.name, i), Route: "GET /api/v1/keys/{slave}/status",
			Actor: audit.Actor{Role: "sae", ID: "alice", Rule: "sae-uri", Serial: "1234", Fingerprint: "abcd", Remote: "127.0.0.1:4000"}, Peer: "bob",
		}
	}
	n.record(s, events...)
}

func (s *site) sequencer() *Sequencer {
	s.t.Helper()
	q, err := NewSequencer(Config{DSN: s.dsn(store.SequencerRole), TrustDomain: "qutemail.example", Site: "km1", Key: s.key, Now: s.now})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(q.Close)
	return q
}

// step folds all there is.
func (s *site) step(q *Sequencer) Folded {
	s.t.Helper()
	var all Folded
	for {
		f, err := q.Step(context.Background())
		if err != nil {
			s.t.Fatal(err)
		}
		f.Events += all.Events
		if f.Note == nil {
			f.Note = all.Note
		}
		if all = f; !f.More {
			return all
		}
	}
}

func (s *site) reader() *Reader {
	s.t.Helper()
	r, err := NewReader(context.Background(), s.dsn(store.AuditorRole)+" target_session_attrs=read-write") // as deploy/patroni has it
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(r.Close)
	return r
}

// verify does what an auditor does who has only the log's key, and what the nodes'
// witness files say.
func (s *site) verify(r *Reader, expect map[string]audit.Head) (report audit.Report, err error) {
	s.t.Helper()
	ctx := context.Background()
	err = r.Snapshot(ctx, 0, func(l *Snapshot) error {
		signed, err := l.Checkpoint(ctx, 0)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, s.logKey())
		if err != nil {
			return err
		}
		report, err = audit.Verify(ctx, s.logKey(), c, 0, audit.Known{Heads: expect}, l)
		return err
	})
	return report, err
}
