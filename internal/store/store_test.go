package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

const (
	hour     = time.Hour
	template = "kme_template" // a migrated database that the tests' own are copies of
	linkName = "fibre"
)

// cluster is the server that all tests of the package share, but for those that
// kill theirs.
var cluster *pgdev.Cluster

var databases atomic.Int64

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kme-store-test-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	c, err := startCluster(context.Background(), dir)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	cluster = c
	code := m.Run()
	if err := errors.Join(c.Kill(), c.Remove(), goleak.Find()); err != nil {
		fmt.Println(err)
		return 1
	}
	return code
}

// startCluster starts a cluster with the template in it.
func startCluster(ctx context.Context, dir string) (*pgdev.Cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	c, err := pgdev.Start(ctx, pgdev.Config{Dir: dir})
	if err != nil {
		return nil, err
	}
	if err := c.EnsureDatabase(ctx, template); err != nil {
		return nil, err
	}
	return c, Migrate(ctx, c.DSN(pgdev.Superuser, template), hour, quiet)
}

// site is one KME's database under test, and a clock.
type site struct {
	t       testing.TB
	cluster *pgdev.Cluster
	name    string
	clock   atomic.Int64 // Unix milliseconds
	blocks  atomic.Int64
}

// start0 is when the tests' clocks begin: in the middle of an epoch.
var start0 = time.Date(2026, 3, 1, 12, 30, 0, 0, time.UTC)

func newSite(t testing.TB) *site {
	t.Helper()
	return newSiteOn(t, cluster)
}

func newSiteOn(t testing.TB, c *pgdev.Cluster) *site {
	t.Helper()
	s := &site{t: t, cluster: c, name: fmt.Sprintf("site%d", databases.Add(1))}
	s.clock.Store(start0.UnixMilli())
	conn, err := pgx.Connect(t.Context(), c.DSN(pgdev.Superuser, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "CREATE DATABASE "+s.name+" TEMPLATE "+template); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) now() time.Time         { return time.UnixMilli(s.clock.Load()) }
func (s *site) step(d time.Duration)   { s.clock.Add(d.Milliseconds()) }
func (s *site) epoch() key.Epoch       { return key.EpochAt(s.now(), hour) }
func (s *site) dsn(role string) string { return s.cluster.DSN(role, s.name) }

func (s *site) config(node string) Config {
	return Config{DSN: s.dsn(AppRole), Site: kme("KM1"), Node: node, EpochLength: hour, Now: s.now, Log: quiet}
}

// open is a node of the site whose run has begun, with the link and the epochs of
// the next hours.
func (s *site) open(node string) *DB {
	s.t.Helper()
	return s.openWith(s.config(node))
}

func (s *site) openWith(cfg Config) *DB {
	s.t.Helper()
	ctx := s.t.Context()
	db, err := Open(ctx, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(db.Close)
	run, err := db.BumpRun(ctx, cfg.Node, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := db.Begin(ctx, run); err != nil {
		s.t.Fatal(err)
	}
	if err := db.EnsureLink(ctx, linkName, kme("KM2"), handover.Alice); err != nil {
		s.t.Fatal(err)
	}
	for e := s.epoch(); e < s.epoch()+3; e++ {
		if _, err := db.EnsureEpoch(ctx, e); err != nil {
			s.t.Fatal(err)
		}
	}
	return db
}

// super runs a query of one value as the superuser.
func ask[T any](s *site, sql string, args ...any) T {
	s.t.Helper()
	var v T
	s.super(func(conn *pgx.Conn) error { return conn.QueryRow(context.Background(), sql, args...).Scan(&v) })
	return v
}

func (s *site) super(do func(*pgx.Conn) error) {
	s.t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser)+" search_path=kme")
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(ctx)
	if err := do(conn); err != nil {
		s.t.Fatal(err)
	}
}

// block makes a block of the current epoch, of the session.
func (s *site) block(session int64, atoms int, owners func(i int) handover.End) Block {
	return s.blockOf(s.epoch(), session, atoms, owners)
}

func (s *site) blockOf(e key.Epoch, session int64, atoms int, owners func(i int) handover.End) Block {
	b := Block{
		BlockRef: handover.BlockRef{Link: linkName, Session: session, Block: s.blocks.Add(1)},
		Epoch:    e, Mine: handover.Alice, Provenance: key.Simulated, Atoms: make([]Atom, atoms),
	}
	var salt [32]byte
	_, _ = rand.Read(salt[:])
	ids := make([]key.ID, atoms)
	for i := range b.Atoms {
		ids[i] = key.Name{Link: linkName, Session: session, Block: b.Block, Transcript: salt}.ID(e.Start(hour), i)
		b.Atoms[i] = Atom{ID: ids[i], Index: i, KEK: 1, CT: make([]byte, 48)}
		_, _ = rand.Read(b.Atoms[i].IV[:])
		_, _ = rand.Read(b.Atoms[i].CT)
	}
	for i := range handover.Chunks(atoms) {
		b.Owners += handover.Owners(owners(i))
	}
	b.Digest = handover.DigestOf(ids, b.Owners)
	return b
}

func mine(int) handover.End   { return handover.Alice }
func theirs(int) handover.End { return handover.Bob }

// fill holds a block and makes it READY.
func (s *site) fill(db *DB, atoms int, owners func(i int) handover.End) Block {
	s.t.Helper()
	return s.fillLink(db, linkName, atoms, owners)
}

func (s *site) fillLink(db *DB, link string, atoms int, owners func(i int) handover.End) Block {
	s.t.Helper()
	ctx := context.Background()
	session, err := db.Session(ctx, link)
	if err != nil {
		s.t.Fatal(err)
	}
	if session == 0 {
		session = 1
		if err := db.OpenSession(ctx, link, session, audit.Event{Action: audit.LinkOpen}); err != nil {
			s.t.Fatal(err)
		}
	}
	b := s.block(session, atoms, owners)
	b.Link = link
	if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
		s.t.Fatal(err)
	}
	if err := db.HeardHeldAnswer(ctx, b.BlockRef, handover.Equal, blockEvents(b.BlockRef)); err != nil {
		s.t.Fatal(err)
	}
	return b
}

func holdEvent(b Block) audit.Event {
	return audit.Event{Action: audit.Hold, Outcome: audit.Done, Link: b.Link, Atoms: rangeOf(b.BlockRef, 0, len(b.Atoms))}
}

func blockEvents(ref handover.BlockRef) BlockEvents {
	return func(before, after handover.BlockState, lost int) []audit.Event {
		switch {
		case before == after:
			return nil
		case after == handover.Lost:
			return []audit.Event{{Action: audit.DropBlock, Outcome: audit.Failed, Atoms: rangeOf(ref, 0, lost)}}
		}
		return []audit.Event{{Action: audit.Ready, Outcome: audit.Done, Link: ref.Link}}
	}
}

func rangeOf(ref handover.BlockRef, first, count int) []audit.Atoms {
	return []audit.Atoms{{Link: ref.Link, Session: ref.Session, Block: ref.Block, First: first, Count: count}}
}

// served is the event of a request that got atoms of a block.
func served(request string, b handover.BlockRef, atoms ...Atom) audit.Event {
	ev := audit.Event{Action: audit.EncKeys, Outcome: audit.Done, Request: request}
	for _, a := range atoms {
		ev.Keys = append(ev.Keys, a.ID)
		ev.Atoms = append(ev.Atoms, rangeOf(b, a.Index, 1)...)
	}
	return ev
}

// due is a live row for an SAE, with an hour to live.
func (s *site) due(id key.ID, to, master string) Due {
	expires := s.now().Add(hour)
	d := Due{
		Key: id, SAE: sae(to), Master: sae(master), Bits: 256, Provenance: key.Simulated, KEK: 1, CT: make([]byte, 48),
		ExpiresAt: expires, ExpiryEpoch: key.EpochAt(expires, hour),
	}
	_, _ = rand.Read(d.CT)
	return d
}

func (d Due) ref() DueRef { return DueRef{d.Key, d.ExpiryEpoch} }

func ids(atoms []Atom) []key.ID {
	var all []key.ID
	for _, a := range atoms {
		all = append(all, a.ID)
	}
	return all
}

func sae(s string) identity.SAE { v, _ := identity.ParseSAE(s); return v }
func kme(s string) identity.KME { v, _ := identity.ParseKME(s); return v }

// recorded is what the tests read of an event's text.
type recorded struct {
	Node    string
	Run     int64
	Action  audit.Action
	Outcome audit.Outcome
	Request string
	Keys    []key.ID
	Atoms   []struct {
		Link                         string
		Session, Block, First, Count int64
	}
}

// check is the invariants: the audit chains verify up to the heads, every chunk
// counts its rows, every pair its untaken ones, every block's atoms are in the pool or in one event that says
// how they left, and every assigned row is live or gone by such an event. It
// returns the events in each node's order.
func (s *site) check() []recorded {
	s.t.Helper()
	events := s.checkChains()
	left := make(map[handover.BlockRef]map[int64]bool) // atoms that left, by index
	for _, e := range events {
		leaving := e.Outcome == audit.Done && (e.Action == audit.EncKeys || e.Action == audit.Assign || e.Action == audit.Burn || e.Action == audit.Expire)
		if !leaving && e.Action != audit.DropBlock {
			continue
		}
		for _, r := range e.Atoms {
			ref := handover.BlockRef{Link: r.Link, Session: r.Session, Block: r.Block}
			if left[ref] == nil {
				left[ref] = make(map[int64]bool)
			}
			for i := r.First; i < r.First+r.Count; i++ {
				if left[ref][i] {
					s.t.Errorf("atom %d of block %s left twice", i, ref)
				}
				left[ref][i] = true
			}
		}
	}
	s.super(func(conn *pgx.Conn) error {
		rows, _ := conn.Query(context.Background(), `SELECT b.link, b.session, b.id, b.atoms, sum(c.remaining), sum(n.keys)
			FROM block b JOIN chunk c ON (c.link, c.session, c.block) = (b.link, b.session, b.id)
			CROSS JOIN LATERAL (SELECT count(*) AS keys FROM key k WHERE k.chunk = c.id) n GROUP BY b.link, b.session, b.id`)
		var ref handover.BlockRef
		var atoms, remaining, keys int
		_, err := pgx.ForEachRow(rows, []any{&ref.Link, &ref.Session, &ref.Block, &atoms, &remaining, &keys}, func() error {
			if remaining != keys {
				s.t.Errorf("block %s: chunks count %d atoms, and key has %d", ref, remaining, keys)
			}
			if atoms != keys+len(left[ref]) {
				s.t.Errorf("block %s: %d atoms, but %d are in the pool and %d left by an event", ref, atoms, keys, len(left[ref]))
			}
			return nil
		})
		return err
	})
	if n := ask[int](s, wrongCounts); n != 0 {
		s.t.Errorf("untaken counts wrong for %d pairs", n)
	}
	return events
}

// wrongCounts counts the pairs whose rows of untaken do not add up to their live rows.
const wrongCounts = `SELECT count(*) FROM (SELECT slave, master, sum(n) AS n FROM untaken GROUP BY 1, 2) u
	FULL JOIN (SELECT sae AS slave, master, count(*) AS n FROM due WHERE ct IS NOT NULL GROUP BY 1, 2) d USING (slave, master)
	WHERE COALESCE(u.n, 0) <> COALESCE(d.n, 0)`

func (s *site) checkChains() (events []recorded) {
	s.t.Helper()
	s.super(func(conn *pgx.Conn) error {
		ctx := context.Background()
		heads := make(map[string]audit.Head)
		rows, _ := conn.Query(ctx, "SELECT node, seq, prev, body FROM audit ORDER BY node, seq")
		var node, body string
		var seq int64
		var prev []byte
		_, err := pgx.ForEachRow(rows, []any{&node, &seq, &prev, &body}, func() (err error) {
			var e recorded
			if err := json.Unmarshal([]byte(body), &e); err != nil {
				return err
			}
			events = append(events, e)
			heads[node], err = heads[node].Next(seq, prev, []byte(body))
			return err
		})
		if err != nil {
			return err
		}
		rows, _ = conn.Query(ctx, "SELECT node, seq, head FROM node_run")
		_, err = pgx.ForEachRow(rows, []any{&node, &seq, &prev}, func() error {
			if h := heads[node]; h.Seq != seq || h.Hash != [32]byte(prev) {
				s.t.Errorf("the chain of %s ends at %d, and its head is %d", node, h.Seq, seq)
			}
			return nil
		})
		return err
	})
	return events
}

// cmpOpts compares IDs by their unexported fields and times by the moment.
var cmpOpts = cmp.Options{cmp.AllowUnexported(identity.SAE{}, identity.KME{})}

var quiet = slog.New(slog.DiscardHandler)
