package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
)

// Standing is how the site's database stands as a whole.
type Standing struct {
	handover.Figures
	Suspended string // why nothing may be served; "" while it may
}

// Run is the run of a node: 0 if the database does not know it.
func (s Standing) Run(node string) int64 {
	for _, n := range s.Nodes {
		if n.Node == node {
			return n.Run
		}
	}
	return 0
}

// proven runs a read and returns when what it has read cannot be taken back by a
// failover any more: the transaction writes something, if nothing of meaning, and its
// commit waits for that and for all before it. An old primary cannot end it.
func (db *DB) proven(ctx context.Context, read func(pgx.Tx) error) error {
	return pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
		if err := read(tx); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "SELECT pg_logical_emit_message(true, 'kme', '')")
		return err
	})
}

// Standing reads it, in one snapshot, and for sure: see proven.
func (db *DB) Standing(ctx context.Context) (s Standing, err error) {
	err = db.proven(ctx, func(tx pgx.Tx) error {
		s, err = readStanding(ctx, tx)
		return err
	})
	if err != nil {
		return Standing{}, away("reading how the database stands", err)
	}
	return s, nil
}

func readStanding(ctx context.Context, tx pgx.Tx) (s Standing, err error) {
	rows, _ := tx.Query(ctx, `SELECT origin, coalesce(suspended, ''), coalesce(node, ''), coalesce(run, 0), coalesce(seq, 0), coalesce(head, '')
		FROM settings LEFT JOIN node_run ON true ORDER BY node`)
	var n handover.NodeFigures
	var head []byte
	_, err = pgx.ForEachRow(rows, []any{&s.Origin, &s.Suspended, &n.Node, &n.Run, &n.Seq, &head}, func() error {
		if n.Node != "" {
			copy(n.Head[:], head)
			s.Nodes = append(s.Nodes, n)
		}
		return nil
	})
	return s, err
}

// Suspend says for all nodes of the site that nothing may be served any more, and
// why. The first reason stays.
func (db *DB) Suspend(ctx context.Context, why string) error {
	if _, err := db.pool.Exec(ctx, "UPDATE settings SET suspended = $1 WHERE suspended IS NULL", why); err != nil {
		return away("suspending the site", err)
	}
	return nil
}

// Figures are the highest that a peer has said of itself.
func (db *DB) Figures(ctx context.Context, peer identity.KME) (f handover.Figures, err error) {
	rows, _ := db.pool.Query(ctx, `SELECT origin, node, run, seq, head FROM peer_node
		WHERE peer = $1 AND origin = (SELECT max(origin) FROM peer_node WHERE peer = $1) ORDER BY node`, peer.String())
	var n handover.NodeFigures
	var head []byte
	_, err = pgx.ForEachRow(rows, []any{&f.Origin, &n.Node, &n.Run, &n.Seq, &head}, func() error {
		copy(n.Head[:], head)
		f.Nodes = append(f.Nodes, n)
		return nil
	})
	if err != nil {
		return handover.Figures{}, away("reading a peer's figures", err)
	}
	return f, nil
}

// HearFigures keeps what a peer says of itself, where it is more than before.
func (db *DB) HearFigures(ctx context.Context, peer identity.KME, f handover.Figures) error {
	var nodes []string
	var runs, seqs []int64
	var heads [][]byte
	for _, n := range f.Nodes {
		nodes, runs, seqs, heads = append(nodes, n.Node), append(runs, n.Run), append(seqs, n.Seq), append(heads, n.Head[:])
	}
	_, err := db.pool.Exec(ctx, `INSERT INTO peer_node AS was (peer, node, origin, run, seq, head)
		SELECT $1, node, $2, run, seq, head FROM unnest($3::text[], $4::bigint[], $5::bigint[], $6::bytea[]) AS f (node, run, seq, head) ORDER BY node
		ON CONFLICT (peer, node) DO UPDATE SET origin = excluded.origin,
			run = CASE WHEN excluded.origin > was.origin THEN excluded.run ELSE greatest(excluded.run, was.run) END,
			seq = CASE WHEN excluded.origin > was.origin THEN excluded.seq ELSE greatest(excluded.seq, was.seq) END,
			head = CASE WHEN excluded.origin > was.origin OR excluded.seq > was.seq THEN excluded.head ELSE was.head END
		WHERE excluded.origin > was.origin OR excluded.origin = was.origin AND (excluded.run > was.run OR excluded.seq > was.seq)`,
		peer.String(), f.Origin, nodes, runs, seqs, heads)
	if err != nil {
		return away("keeping a peer's figures", err)
	}
	return nil
}

// errSetBack: the database has less than this committer has committed.
var errSetBack = errors.New("the database was set back to the past")

// SetBack says, once Fenced is closed, how the database falls short of what this
// node had committed; "" if the run was only taken over.
func (db *DB) SetBack() string { return db.committer.back }

// Witness is what Config named.
func (db *DB) Witness() *Witness { return db.cfg.Witness }

// Key is what Config named: the node's signature over its audit chain.
func (db *DB) Key() *audit.NodeKey { return db.cfg.Key }

// checkPast says, after a new connection was made or the node was fenced, whether
// the node's row has fallen below this process's last commit.
func (c *committer) checkPast(ctx context.Context) error {
	var run, mark int64
	err := c.conn.QueryRow(ctx, "SELECT run, mark FROM node_run WHERE node = $1", c.db.cfg.Node).Scan(&run, &mark)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		c.back = fmt.Sprintf("it does not know node %s, which was in run %d", c.db.cfg.Node, c.run)
	case err != nil:
		return err
	case run < c.run || mark < c.mark:
		c.back = fmt.Sprintf("node %s stands at run %d and commit %d, and was at run %d and commit %d", c.db.cfg.Node, run, mark, c.run, c.mark)
	}
	if c.back != "" {
		return fmt.Errorf("%w: %s", errSetBack, c.back)
	}
	return nil
}
