package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// NodeRun is a run of a node of this site.
type NodeRun struct {
	Node string
	Run  int64
}

// Beat shows the site's other nodes that this node's run lives. It returns ErrFenced
// if the run has been taken over.
func (db *DB) Beat(ctx context.Context) error {
	tag, err := db.pool.Exec(ctx, `INSERT INTO node_beat (node, run, beat) SELECT node, run, 1 FROM node_run WHERE node = $1 AND run = $2
		ON CONFLICT (node) DO UPDATE SET run = excluded.run, beat = node_beat.beat + 1 WHERE node_beat.run <= excluded.run`,
		db.cfg.Node, db.committer.run)
	if err != nil {
		return away("showing a sign of life", err)
	}
	if tag.RowsAffected() == 0 {
		return ErrFenced
	}
	return nil
}

// NodeBeat is a node of the site and its last sign of life.
type NodeBeat struct {
	NodeRun
	Beat int64 // of this run; 0 if it has not shown one yet, or has stopped in order
}

// Nodes lists the nodes that the site has ever had.
func (db *DB) Nodes(ctx context.Context) ([]NodeBeat, error) {
	rows, _ := db.pool.Query(ctx, `SELECT n.node, n.run, COALESCE(b.beat, 0) FROM node_run n LEFT JOIN node_beat b ON b.node = n.node AND b.run = n.run ORDER BY n.node`)
	beats, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (b NodeBeat, err error) {
		return b, row.Scan(&b.Node, &b.Run, &b.Beat)
	})
	if err != nil {
		return nil, away("looking at the site's nodes", err)
	}
	return beats, nil
}

// Left is what a node has that only its own process may touch, or a takeover: of which
// links, by ID and in order, it has leased chunks. A parked key is of such a chunk.
type Left struct {
	Now     []string // in its current run
	Earlier []string // in lower ones: a takeover has begun, and not ended
}

// LeftBy says what n has left, n.Run being its current run.
func (db *DB) LeftBy(ctx context.Context, n NodeRun) (left Left, err error) {
	err = db.pool.QueryRow(ctx, `SELECT array_agg(DISTINCT link ORDER BY link) FILTER (WHERE run >= $2), array_agg(DISTINCT link ORDER BY link) FILTER (WHERE run < $2)
		FROM chunk WHERE node = $1 AND remaining > 0`, n.Node, n.Run).Scan(&left.Now, &left.Earlier)
	if err != nil {
		return left, away("looking at what "+n.Node+" has left", err)
	}
	return left, nil
}

// ForgetParked ends the parking of keys by a node that has leased none of them any more:
// their block was lost since, or they were burned. They are no takeover's to settle.
func (db *DB) ForgetParked(ctx context.Context, node string) error {
	_, err := db.pool.Exec(ctx, "DELETE FROM parked WHERE node = $1 AND NOT EXISTS (SELECT FROM key k JOIN chunk c ON c.id = k.chunk WHERE k.id = key_id AND c.node = $1)", node)
	if err != nil {
		return away("forgetting what "+node+" has parked", err)
	}
	return nil
}

// Depose begins a takeover of a node that seems dead: it ends run n.Run, records event, and
// returns the run that it makes. From then on nothing of a lower run commits. Of two that
// depose one run, and of one that is late and a node that has started again, one
// gets ErrOvertaken.
func (db *DB) Depose(ctx context.Context, n NodeRun, event audit.Event) (heir NodeRun, err error) {
	heir.Node = n.Node
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		err := a.conn.QueryRow(ctx, "UPDATE node_run SET run = run + 1 WHERE node = $1 AND run = $2 RETURNING run", n.Node, n.Run).Scan(&heir.Run)
		if errors.Is(err, pgx.ErrNoRows) {
			return refuse(ErrOvertaken)
		}
		a.record(event)
		return err
	}), nil)
	if err != nil {
		return heir, fmt.Errorf("deposing run %d of %s: %w", n.Run, n.Node, err)
	}
	return heir, nil
}

// Disconnect ends what sessions a node that has been dead for so long has left at the
// server, which still have its locks if it is paused, and returns how many there are: 0
// once it has none any more. Younger ones are those of its next process. One that is at
// work is left alone: it might be committing, and a commit that waits for a standby must
// not be cut short. So are all of a node that has shown a sign of life in the meantime,
// and of one whose role the schema's owner is not a member of, as checkSchema demands.
func (db *DB) Disconnect(ctx context.Context, node string, dead time.Duration) (left int, err error) {
	if err := db.pool.QueryRow(ctx, "SELECT disconnect($1, $2)", node, dead.Milliseconds()).Scan(&left); err != nil {
		return 0, away("disconnecting "+node, err)
	}
	return left, nil
}

// appName is how a node's sessions are called at the server, which cuts longer names. The
// function disconnect knows them by it.
func appName(node string) string {
	name := "kmed " + node
	return name[:min(len(name), 63)]
}

// Leased is a chunk that this run has leased and how many of its atoms the caller
// holds back from everybody, itself included.
type Leased struct {
	Chunk int64
	Atoms int
}

// GiveBack ends the lease of chunks, partly used ones too, of which the caller has
// all the atoms that are left: none is announced, in doubt or owed. It returns those
// that are free again; the others stay leased. After ErrDoubt nothing of them may be
// used any more.
func (db *DB) GiveBack(ctx context.Context, leased []Leased) (freed []int64, err error) {
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		freed, err = giveBack(ctx, a, leased)
		return err
	}), nil)
	if err != nil {
		return nil, fmt.Errorf("giving back %d chunks: %w", len(leased), err)
	}
	return freed, nil
}

func giveBack(ctx context.Context, a *attempt, leased []Leased) ([]int64, error) {
	var ids, atoms []int64
	for _, l := range leased {
		ids, atoms = append(ids, l.Chunk), append(atoms, int64(l.Atoms))
	}
	rows, _ := a.conn.Query(ctx, `UPDATE chunk SET node = NULL, run = NULL FROM unnest($1::bigint[], $2::bigint[]) AS l (id, atoms)
		WHERE chunk.id = l.id AND chunk.node = $3 AND chunk.run = $4 AND remaining = l.atoms RETURNING chunk.id`,
		ids, atoms, a.c.db.cfg.Node, a.c.run)
	return pgx.CollectRows(rows, pgx.RowTo[int64])
}

// Stop is the last transaction of a run that ends in order: it gives back what it
// can of the leased chunks, as GiveBack does, and says that nobody need wait for a
// sign of life; nor, with noCopies, for copies of KEKs, of which it has none any more.
func (db *DB) Stop(ctx context.Context, leased []Leased, noCopies bool, events ...audit.Event) error {
	db.mu.Lock()
	var unclaimed []int64
	for _, chunks := range db.unclaimed {
		unclaimed = append(unclaimed, chunks...)
	}
	db.mu.Unlock()
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		if _, err := giveBack(ctx, a, leased); err != nil {
			return err
		}
		a.record(events...)
		a.writes.Queue("UPDATE chunk SET node = NULL, run = NULL WHERE id = ANY($1::bigint[]) AND node = $2 AND run = $3", unclaimed, db.cfg.Node, a.c.run)
		a.writes.Queue("UPDATE node_beat SET beat = 0 WHERE node = $1 AND run = $2", db.cfg.Node, a.c.run)
		if noCopies {
			a.writes.Queue("DELETE FROM kek_copy WHERE node = $1 AND run <= $2", db.cfg.Node, a.c.run)
		}
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("stopping run %d of %s: %w", db.committer.run, db.cfg.Node, err)
	}
	return nil
}

// Alone does what no two nodes of the site may do at a time. It is for rare things: it
// keeps a connection for as long. If the lock is lost on
// the way, which takes a broken connection or very long, do goes on: what it does must
// be safe then, too.
func (db *DB) Alone(ctx context.Context, name string, do func(context.Context) error) error {
	tx, err := db.pool.Begin(ctx)
	if err == nil {
		defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // it has changed nothing
		_, err = tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtextextended('kme alone ' || $1, 0))", name)
	}
	if err != nil {
		return away("waiting for the site's other nodes", err)
	}
	return do(ctx)
}
