package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// BumpRun gives node a new run, higher than atLeast and than any that it had. From
// then on no transaction of its lower runs commits. It is a transaction of its own.
func (db *DB) BumpRun(ctx context.Context, node string, atLeast int64) (run int64, err error) {
	err = db.pool.QueryRow(ctx, `INSERT INTO node_run (node, run, mark, seq, head) VALUES ($1, $2::bigint + 1, 0, 0, $3)
		ON CONFLICT (node) DO UPDATE SET run = greatest(node_run.run, $2::bigint) + 1 RETURNING run`,
		node, atLeast, make([]byte, 32)).Scan(&run)
	if err != nil {
		return 0, away("bumping the run of "+node, err)
	}
	return run, nil
}

// Begin starts the committer of this node's run, which BumpRun made. It is called
// once in the life of a DB.
func (db *DB) Begin(ctx context.Context, run int64) error {
	c := db.committer
	if !c.begun.CompareAndSwap(false, true) {
		return errors.New("a run has begun already")
	}
	c.run = run
	err := c.load(ctx)
	if err != nil {
		c.begun.Store(false)
		return fmt.Errorf("beginning run %d of %s: %w", run, db.cfg.Node, err)
	}
	c.setUp()
	c.ended.Go(c.loop)
	return nil
}

// load connects and reads where the node's chain stands.
func (c *committer) load(ctx context.Context) error {
	if err := c.connect(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	var run int64
	var head []byte
	err := c.conn.QueryRow(ctx, "SELECT run, mark, seq, head FROM node_run WHERE node = $1", c.db.cfg.Node).Scan(&run, &c.mark, &c.head.Seq, &head)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && run != c.run {
		return ErrFenced
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	c.marks = c.mark
	copy(c.head.Hash[:], head)
	if c.db.untaken.own, err = readUntaken(ctx, c.conn, "node = $1", c.db.cfg.Node); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// EndTakeover ends the takeover that made n.Run for links that lead to one peer: chunks of
// them that lower runs of the node had leased are free again, and what those had parked
// is not parked any more. The caller has burned and voided what they had announced there.
func (db *DB) EndTakeover(ctx context.Context, n NodeRun, links []string, events ...audit.Event) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		var is int64
		err := a.conn.QueryRow(ctx, "SELECT run FROM node_run WHERE node = $1 FOR UPDATE", n.Node).Scan(&is)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && is != n.Run {
			return refuse(ErrOvertaken)
		}
		if err != nil {
			return err
		}
		a.record(events...)
		a.writes.Queue("UPDATE chunk SET node = NULL, run = NULL WHERE node = $1 AND run < $2 AND remaining > 0 AND link = ANY($3::text[])", n.Node, n.Run, links)
		// With it whatever is parked and not in the pool any more, since its block was lost.
		a.writes.Queue(`DELETE FROM parked WHERE node = $1 AND run < $2 AND NOT EXISTS (
			SELECT FROM key k JOIN chunk c ON c.id = k.chunk WHERE k.id = key_id AND c.node = $1 AND c.run < $2)`, n.Node, n.Run)
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("ending the takeover of %s: %w", n.Node, err)
	}
	return nil
}

// PeerRun is what is known of a node of a peer: zero if nothing is.
func (db *DB) PeerRun(ctx context.Context, peer identity.KME, node string) (handover.PeerRun, error) {
	var p handover.PeerRun
	err := db.pool.QueryRow(ctx, readPeerRun, peer.String(), node).Scan(&p.Run, &p.Last, &p.Anew)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return p, away("reading a peer's run", err)
	}
	return p, nil
}

// PeerRuns is what is known for sure of the nodes of a peer that are named, by their names:
// see proven. Of those that are missing nothing is known.
func (db *DB) PeerRuns(ctx context.Context, peer identity.KME, nodes []string) (map[string]handover.PeerRun, error) {
	known := make(map[string]handover.PeerRun)
	err := db.proven(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "SELECT node, run, last, anew FROM peer_run WHERE peer = $1 AND node = ANY($2::text[])", peer.String(), nodes)
		var node string
		var p handover.PeerRun
		_, err := pgx.ForEachRow(rows, []any{&node, &p.Run, &p.Last, &p.Anew}, func() error {
			known[node] = p
			return nil
		})
		return err
	})
	if err != nil {
		return nil, away("reading a peer's runs", err)
	}
	return known, nil
}

// HearRun notes durably that a peer's node has begun a run: announces of lower ones
// are refused from then on. ok is false if a higher run is known; otherwise the answer has
// the next keys that were assigned here for lower runs and may still be in the peer's pool:
// one that was taken or consumed had been served there before, and one that was voided had
// been burned. They are looked for beside the committer, since that may take long.
func (db *DB) HearRun(ctx context.Context, peer identity.KME, r handover.RunStarted) (answer handover.RunAnswer, ok bool, err error) {
	known, err := db.PeerRuns(ctx, peer, []string{r.Node})
	ok = known[r.Node].Run == r.Run // a question that was asked before, or goes on
	if err == nil && !ok {
		ok, err = db.beginPeerRun(ctx, peer, r)
	}
	if err == nil && ok {
		// It is committed that the run is the node's, for which whoever assigns for a lower one
		// locks the row: this read sees all that there will ever be.
		err = db.proven(ctx, func(tx pgx.Tx) (err error) {
			answer, err = assigned(ctx, tx, peer, r)
			return err
		})
		if err != nil {
			err = away("reading what was assigned", err)
		}
	}
	if err != nil {
		return handover.RunAnswer{}, false, fmt.Errorf("hearing of run %d of %s: %w", r.Run, r.Node, err)
	}
	return answer, ok, nil
}

// beginPeerRun makes a run of a peer's node the one whose announces are taken. It says false
// if a higher one is known.
func (db *DB) beginPeerRun(ctx context.Context, peer identity.KME, r handover.RunStarted) (ok bool, err error) {
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		_, err := a.conn.Exec(ctx, "INSERT INTO peer_run (peer, node, run, last, anew) SELECT $1, $2, 0, 0, origin > 1 FROM settings ON CONFLICT DO NOTHING", peer.String(), r.Node)
		if err != nil {
			return err
		}
		var p handover.PeerRun
		if err := a.conn.QueryRow(ctx, readPeerRun+" FOR UPDATE", peer.String(), r.Node).Scan(&p.Run, &p.Last, &p.Anew); err != nil {
			return err
		}
		if p, ok = p.Hear(r.Run); ok {
			a.writes.Queue("UPDATE peer_run SET run = $3, last = $4 WHERE peer = $1 AND node = $2", peer.String(), r.Node, p.Run, p.Last)
		}
		return nil
	}), nil)
	return ok, err
}

// maxLooked is how many rows of keys are looked through for one answer, of whatever peers
// and however they have ended: an answer has to come while the peer waits for it.
const maxLooked = 1 << 15

// assigned reads the next page. No index tells a key that waits from one that was taken: it
// would cost each take more than it costs to look through the tables here, now and then. So
// it is found by the index of key IDs where the page ends, and the planner has the choice of
// how to look through it: nearly all may have been taken, or nearly none.
func assigned(ctx context.Context, tx pgx.Tx, peer identity.KME, r handover.RunStarted) (a handover.RunAnswer, err error) {
	end := key.ID(bytes.Repeat([]byte{0xff}, 16))
	err = tx.QueryRow(ctx, fmt.Sprintf("SELECT key_id FROM due WHERE key_id > $1 ORDER BY key_id OFFSET %d LIMIT 1", maxLooked-1), [16]byte(r.After)).Scan((*[16]byte)(&end))
	if more := err == nil; more {
		a.UpTo = end
	} else if !errors.Is(err, pgx.ErrNoRows) {
		return a, err
	}
	if _, err := tx.Exec(ctx, wholeTables); err != nil {
		return a, err
	}
	rows, _ := tx.Query(ctx, `SELECT DISTINCT ON (key_id) run, batch, key_id, COALESCE(atoms, ARRAY[key_id]) FROM due
		WHERE peer = $1 AND node = $2 AND run < $3 AND key_id > $4 AND key_id <= $5 AND (gone_how IS NULL OR gone_how = 'expired')
		ORDER BY key_id LIMIT $6`, peer.String(), r.Node, r.Run, [16]byte(r.After), [16]byte(end), handover.MaxAssigned)
	a.Assigned, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (g handover.Assigned, err error) {
		var atoms [][16]byte
		err = row.Scan(&g.Run, &g.Batch, (*[16]byte)(&g.Key), &atoms)
		g.Atoms = keyIDs(atoms)
		return g, err
	})
	if n := len(a.Assigned); n == handover.MaxAssigned {
		a.UpTo = a.Assigned[n-1].Key
	}
	return a, err
}

// Void takes back keys that the peer's node had announced and may not have served:
// those still live end. It is idempotent: event makes the event, and is called
// only if a key ended now.
func (db *DB) Void(ctx context.Context, from identity.KME, v handover.Void, event func(voided []key.ID) audit.Event) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		rows, _ := a.conn.Query(ctx, `UPDATE due SET ct = NULL, iv = NULL, gone_at = $6, gone_how = 'void'
			WHERE key_id = ANY($1::uuid[]) AND peer = $2 AND node = $3 AND run = $4 AND batch = $5 AND ct IS NOT NULL RETURNING key_id, sae, master`,
			uuids(v.Keys), from.String(), v.Node, v.Run, v.Batch, a.now)
		if err := a.readEmptied(rows); err != nil {
			return err
		}
		voided := make(map[key.ID]bool)
		for row := range a.emptied {
			voided[row.id] = true
		}
		var ids []key.ID // in the void's order, each once
		for _, id := range v.Keys {
			if voided[id] {
				delete(voided, id)
				ids = append(ids, id)
			}
		}
		if len(ids) > 0 {
			a.record(event(ids))
		}
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("voiding %d keys of %s: %w", len(v.Keys), v.Node, err)
	}
	return nil
}
