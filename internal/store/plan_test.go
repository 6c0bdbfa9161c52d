package store

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// TestHotStatementsReadFewRows runs the verbs of a key's way against tables of
// some 10^5 rows, of which the planner has no statistics, and has the server count
// the rows that they read.
func TestHotStatementsReadFewRows(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const atoms = 16384
	var peers Block
	filler := s.open("filler")
	for range 5 {
		s.fill(filler, atoms, mine)
		peers = s.fill(filler, atoms, theirs)
	}
	hear(t, filler, 1) // this one may read all of due
	filler.Close()
	s.super(func(conn *pgx.Conn) error {
		for e := s.epoch(); e < s.epoch()+3; e++ {
			_, err := conn.Exec(t.Context(), `INSERT INTO due (key_id, sae, expiry_epoch, master, bits, provenance, kek, iv, ct, peer, node, run, batch, expires_at, reread)
				SELECT gen_random_uuid(), 'bob', $1::bigint, 'alice', 256, 'simulated', 1, '\x00', '\x00', 'KM2', 'p0', 1, 1,
				to_timestamp($1::bigint * 3600 + 1800), false FROM generate_series(1, 50000)`, int64(e))
			if err != nil {
				return err
			}
		}
		_, err := conn.Exec(t.Context(), "INSERT INTO untaken (slave, master, node, n) VALUES ('bob', 'alice', 'n0', 150000)")
		return err
	})
	before := s.rowsRead()

	db := s.open("n1")
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	leases, err := db.Lease(ctx, linkName, 4)
	must(err)
	a := leases[0].Atoms
	const times = 8 // more often than a plan is made anew
	for i := range times {
		due := s.due(a[i].ID, "bob", "alice")
		must(db.Serve(ctx, ServeJob{Atoms: ids(a[i : i+1]), Places: places(a[i : i+1]), Due: []Due{due}, Events: []audit.Event{served("r", leases[0].BlockRef, a[i])}}))
		_, _, err := db.FindDue(ctx, sae("bob"), []key.ID{due.Key, key.NewLocalID(s.now())})
		must(err)
		must(db.Take(ctx, TakeJob{SAE: sae("bob"), Rows: []DueRef{due.ref()}, How: GoneTaken}))
		must(db.Burn(ctx, BurnJob{Atoms: ids(a[20+i : 21+i]), Event: func([]key.ID) audit.Event {
			return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: rangeOf(leases[0].BlockRef, a[20+i].Index, 1)}
		}}))
		request := request(fmt.Sprint(i), peers.BlockRef, peers.Atoms[i])
		_, err = db.PoolAtoms(ctx, request.Keys, linkName)
		must(err)
		var many []handover.Key // of as many chunks as a batch may well touch
		for at := i; at < atoms; at += atoms / 64 {
			many = append(many, handover.Key{Atoms: []key.ID{peers.Atoms[at].ID}})
		}
		_, err = db.PoolAtoms(ctx, many, linkName)
		must(err)
		whole := handover.Key{Session: peers.Session, Block: peers.Block, First: peers.Atoms[atoms-64].Index, Atoms: ids(peers.Atoms[atoms-64:])}
		if got, err := db.PoolAtoms(ctx, []handover.Key{whole}, linkName); err != nil || len(got) != 64 {
			t.Errorf("of a chunk's 64 atoms %d are found: %v", len(got), err)
		}
		for range 2 { // fresh and repeated
			_, err = db.Assign(ctx, s.assignJob(1, int64(i+1), request))
			must(err)
		}
		must(db.Void(ctx, kme("KM2"), handover.Void{Node: "p1", Run: 1, Batch: int64(i + 1), Keys: ids(peers.Atoms[i : i+1])}, func([]key.ID) audit.Event {
			return audit.Event{Action: audit.VoidKeys}
		}))
	}
	if plannedOnce(t, db.committer.conn) == 0 {
		t.Error("the committer has executed nothing")
	}
	all := 0
	for _, c := range db.pool.AcquireAllIdle(ctx) {
		all += plannedOnce(t, c.Conn())
		c.Release()
	}
	if all == 0 {
		t.Error("the pool has executed nothing")
	}
	db.Close()
	after := s.rowsRead()
	for table, n := range after {
		if read := n - before[table]; read > 1500 { // 64 of them by each PoolAtoms of many, and of a chunk
			t.Errorf("%d verbs read %d rows of %s", 9*times, read, table)
		} else {
			t.Logf("%s: %d rows read", table, read)
		}
	}
	s.check()
}

// plannedOnce has the server say that it planned no statement of a connection for each of
// its executions, and returns how many of these there were.
func plannedOnce(t *testing.T, conn *pgx.Conn) (all int) {
	t.Helper()
	rows, _ := conn.Query(t.Context(), "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements")
	var statement string
	var once, anew int
	_, err := pgx.ForEachRow(rows, []any{&statement, &once, &anew}, func() error {
		if all += once; anew > 0 {
			t.Errorf("planned %d times: %s", anew, statement)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// rowsRead is how many rows of each table that grows were ever read, by whatever
// way, as soon as all nodes have closed: a connection tells when it ends.
func (s *site) rowsRead() map[string]int64 {
	s.t.Helper()
	s.await("the nodes' connections to end", func() bool {
		return ask[int](s, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'kmed %'") == 0
	})
	counts := make(map[string]int64)
	s.super(func(conn *pgx.Conn) error {
		rows, _ := conn.Query(context.Background(), `SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables
			WHERE relname ~ '^(key|due)_e|^(chunk|block|parked|void_out)$'`)
		var table string
		var n int64
		_, err := pgx.ForEachRow(rows, []any{&table, &n}, func() error {
			counts[table] = n
			return nil
		})
		return err
	})
	return counts
}
