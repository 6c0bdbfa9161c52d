package store

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// BurnJob deletes keys for ever without handing them out.
type BurnJob struct {
	Atoms []key.ID
	Void  *handover.Void // to be told to Peer until it acknowledges; nil if nothing was assigned
	Peer  identity.KME
	Event func(burned []key.ID) audit.Event // burned: those of Atoms that were still there
}

// Burn deletes what is there of the atoms, unparks them, and leaves the void to be
// told, in one transaction. It may be repeated.
func (db *DB) Burn(ctx context.Context, j BurnJob) error {
	if err := db.learn(ctx, slices.Collect(maps.Keys(db.byEpoch(j.Atoms)))...); err != nil {
		return away("burning", err)
	}
	if err := db.do(ctx, &burn{j, db}, nil); err != nil {
		return fmt.Errorf("burning %d atoms: %w", len(j.Atoms), err)
	}
	return nil
}

type burn struct {
	BurnJob
	db *DB
}

func (b *burn) claims(claimed func(claim)) {
	for _, id := range b.Atoms {
		claimed(claim{id: id})
	}
}

func (b *burn) weight() int { return 1 + len(b.Atoms) }

func (b *burn) ask(a *attempt) error {
	for _, id := range b.Atoms {
		if b.db.epochs.has(b.db.epochOf(id)) { // otherwise it is gone
			a.take(id, Place{})
		}
	}
	return nil
}

func (b *burn) settle(_ context.Context, a *attempt) error {
	a.record(b.Event(a.left(b.Atoms)))
	a.writes.Queue("DELETE FROM parked WHERE key_id = ANY($1::uuid[])", uuids(b.Atoms))
	if v := b.Void; v != nil {
		a.writes.Queue("INSERT INTO void_out (peer, node, run, batch, key_ids) VALUES ($1, $2, $3, $4, $5)",
			b.Peer.String(), v.Node, v.Run, v.Batch, uuids(v.Keys))
	}
	return nil
}

// Park keeps keys whose announce is in doubt from being leased or burned by
// another node's takeover until their batch is answered.
func (db *DB) Park(ctx context.Context, keys []key.ID, batch int64) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		_, err := a.conn.Exec(ctx, `INSERT INTO parked (key_id, node, run, batch, since)
			SELECT id, $2, $3, $4, $5 FROM unnest($1::uuid[]) AS k (id) ON CONFLICT DO NOTHING`,
			uuids(keys), db.cfg.Node, a.c.run, batch, a.now)
		return err
	}), nil)
	if err != nil {
		return fmt.Errorf("parking %d keys: %w", len(keys), err)
	}
	return nil
}

// Unpark ends the parking of keys that go back to the lease.
func (db *DB) Unpark(ctx context.Context, keys []key.ID) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		_, err := a.conn.Exec(ctx, "DELETE FROM parked WHERE key_id = ANY($1::uuid[])", uuids(keys))
		return err
	}), nil)
	if err != nil {
		return fmt.Errorf("unparking %d keys: %w", len(keys), err)
	}
	return nil
}

// PendingVoid is a void that its peer has not acknowledged.
type PendingVoid struct {
	ID   int64
	Peer identity.KME
	handover.Void
}

// Voids lists what is still to be told, oldest first. Any node may tell it.
func (db *DB) Voids(ctx context.Context) ([]PendingVoid, error) {
	rows, _ := db.pool.Query(ctx, "SELECT id, peer, node, run, batch, key_ids FROM void_out WHERE acked_at IS NULL ORDER BY id")
	voids, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (v PendingVoid, err error) {
		var peer string
		var keys [][16]byte
		if err := row.Scan(&v.ID, &peer, &v.Node, &v.Run, &v.Batch, &keys); err != nil {
			return v, err
		}
		v.Keys = keyIDs(keys)
		v.Peer, err = identity.ParseKME(peer)
		return v, err
	})
	if err != nil {
		return nil, away("listing voids", err)
	}
	return voids, nil
}

// AckVoid notes that the peer has acknowledged v.
func (db *DB) AckVoid(ctx context.Context, v PendingVoid) error {
	if _, err := db.pool.Exec(ctx, "UPDATE void_out SET acked_at = $2 WHERE id = $1 AND acked_at IS NULL", v.ID, db.now()); err != nil {
		return away("acknowledging a void", err)
	}
	return nil
}

func keyIDs(us [][16]byte) []key.ID {
	ids := make([]key.ID, len(us))
	for i, u := range us {
		ids[i] = u
	}
	return ids
}
