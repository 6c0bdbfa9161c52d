package store

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/identity"
)

// pair is a slave and the master whose keys it is to take.
type pair struct{ slave, master identity.SAE }

// untaken is what this node believes of the table of that name: its own rows as of
// its last commit, the others' as of the last look at them.
type untaken struct {
	mu          sync.RWMutex
	own, others map[pair]int64
}

// Untaken is how many keys of master wait here for slave: exact for what this node
// has committed, a look old (LookAtUntaken) for what other nodes have.
func (db *DB) Untaken(slave, master identity.SAE) int {
	db.untaken.mu.RLock()
	defer db.untaken.mu.RUnlock()
	p := pair{slave, master}
	return int(max(0, db.untaken.own[p]+db.untaken.others[p]))
}

// LookAtUntaken reads what the other nodes of the site have counted.
func (db *DB) LookAtUntaken(ctx context.Context) error {
	others, err := readUntaken(ctx, db.pool, "node <> $1", db.cfg.Node)
	if err != nil {
		return away("reading how many keys wait", err)
	}
	db.untaken.mu.Lock()
	defer db.untaken.mu.Unlock()
	db.untaken.others = others
	return nil
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func readUntaken(ctx context.Context, from querier, where, node string) (map[pair]int64, error) {
	rows, _ := from.Query(ctx, "SELECT slave, master, sum(n)::bigint FROM untaken WHERE "+where+" GROUP BY slave, master", node)
	counts := make(map[pair]int64)
	var slave, master string
	var n int64
	_, err := pgx.ForEachRow(rows, []any{&slave, &master, &n}, func() error {
		p, err := pairOf(slave, master)
		counts[p] = n
		return err
	})
	return counts, err
}

func pairOf(slave, master string) (p pair, err error) {
	if p.slave, err = identity.ParseSAE(slave); err == nil {
		p.master, err = identity.ParseSAE(master)
	}
	return p, err
}

// add counts what was committed.
func (u *untaken) add(changes map[pair]int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for p, n := range changes {
		u.own[p] += n
	}
}

// queueUntaken writes what the attempt has changed, in the order that every attempt has.
func (a *attempt) queueUntaken(b *pgx.Batch) {
	maps.DeleteFunc(a.untaken, func(_ pair, n int64) bool { return n == 0 })
	if len(a.untaken) == 0 {
		return
	}
	pairs := slices.SortedFunc(maps.Keys(a.untaken), func(x, y pair) int {
		return cmp.Or(cmp.Compare(x.slave.String(), y.slave.String()), cmp.Compare(x.master.String(), y.master.String()))
	})
	slaves, masters, counts := make([]string, len(pairs)), make([]string, len(pairs)), make([]int64, len(pairs))
	for i, p := range pairs {
		slaves[i], masters[i], counts[i] = p.slave.String(), p.master.String(), a.untaken[p]
	}
	b.Queue(`INSERT INTO untaken (slave, master, node, n) SELECT slave, master, $1, n FROM unnest($2::text[], $3::text[], $4::bigint[]) AS w (slave, master, n)
		ON CONFLICT (slave, master, node) DO UPDATE SET n = untaken.n + excluded.n`, a.c.db.cfg.Node, slaves, masters, counts)
}
