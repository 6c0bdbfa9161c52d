package store

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// KEK is the register's entry of a key-encryption key in the HSM.
type KEK struct {
	ID         int64 // stands in each row that it wraps
	Epoch      key.Epoch
	Label      string
	PKCS11ID   []byte // CKA_ID
	CheckValue []byte
	State      KEKState
	Wraps      int64 // as far as they have been counted: AddWraps
}

// KEKState is how far a KEK has come.
type KEKState string

// The states of a KEK.
const (
	KEKPlanned   KEKState = "planned"   // written down, and perhaps in the token: only its label is known
	KEKOpen      KEKState = "open"      // seals what belongs to its epoch; an epoch has one at most
	KEKSealed    KEKState = "sealed"    // opens only: another one has taken its place, or its epoch is sealed
	KEKDestroyed KEKState = "destroyed" // not in the token any more
)

const kekColumns = "id, epoch, label, pkcs11_id, check_value, state, wraps"

func scanKEK(row pgx.CollectableRow) (k KEK, err error) {
	return k, row.Scan(&k.ID, &k.Epoch, &k.Label, &k.PKCS11ID, &k.CheckValue, &k.State, &k.Wraps)
}

// PlanKEK writes down that a KEK is about to be made for an epoch, under a label that
// is used once, and returns its ID.
func (db *DB) PlanKEK(ctx context.Context, e key.Epoch, label string) (id int64, err error) {
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		return a.conn.QueryRow(ctx, "INSERT INTO kek (epoch, label, pkcs11_id, check_value, state) VALUES ($1, $2, '', '', 'planned') RETURNING id", e, label).Scan(&id)
	}), nil)
	if err != nil {
		return 0, fmt.Errorf("planning a KEK of epoch %d: %w", e, err)
	}
	return id, nil
}

// OpenKEK registers k, which was planned and is in the token now, as the one that
// seals from now on, and records event. If its epoch has such a KEK already, other than
// the one that it is to replace (0 for none), that one is returned, and nothing is
// written: the caller's own is superfluous. With ErrExpired the epoch is sealed.
func (db *DB) OpenKEK(ctx context.Context, k KEK, replaces int64, event audit.Event) (KEK, error) {
	var got KEK
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		// One at a time, and not while the epoch is being sealed.
		if _, err := a.conn.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtextextended('kme kek of an epoch', $1))", int64(k.Epoch)); err != nil {
			return err
		}
		rows, _ := a.conn.Query(ctx, "SELECT "+kekColumns+" FROM kek WHERE epoch = $1 AND state = 'open' AND id <> $2", k.Epoch, replaces)
		open, err := pgx.CollectRows(rows, scanKEK)
		if err != nil {
			return err
		}
		if len(open) > 0 {
			got = open[0]
			return nil
		}
		if _, err := a.conn.Exec(ctx, "UPDATE kek SET state = 'sealed' WHERE id = $1 AND state = 'open'", replaces); err != nil {
			return err
		}
		rows, _ = a.conn.Query(ctx, `UPDATE kek SET pkcs11_id = $2, check_value = $3, state = 'open' WHERE id = $1 AND state = 'planned'
			AND EXISTS (SELECT FROM epoch WHERE epoch.epoch = kek.epoch AND epoch.state = 'open') RETURNING `+kekColumns, k.ID, k.PKCS11ID, k.CheckValue)
		made, err := pgx.CollectRows(rows, scanKEK)
		if err != nil {
			return err
		}
		if len(made) == 0 {
			return refuse(ErrExpired)
		}
		got = made[0]
		a.record(event)
		return nil
	}), nil)
	if err != nil {
		return KEK{}, fmt.Errorf("registering a KEK of epoch %d: %w", k.Epoch, err)
	}
	return got, nil
}

// AbandonKEK gives up a KEK that was planned: from then on OpenKEK refuses it, and so
// nothing is ever sealed under what there is of it in the token, or comes to be. It says
// whether it is given up, by this call or before: one that was registered is not.
func (db *DB) AbandonKEK(ctx context.Context, id int64) (given bool, err error) {
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		if _, err := a.conn.Exec(ctx, "UPDATE kek SET state = 'destroyed' WHERE id = $1 AND state = 'planned'", id); err != nil {
			return err
		}
		return a.conn.QueryRow(ctx, "SELECT "+givenUp+" FROM kek WHERE id = $1", id).Scan(&given)
	}), nil)
	if err != nil {
		return false, fmt.Errorf("abandoning KEK %d: %w", id, err)
	}
	return given, nil
}

// givenUp is what a KEK's row shows that was planned and never registered.
const givenUp = "state = 'destroyed' AND check_value = ''"

// AbandonedKEKs lists those that were planned under one of the labels and given up.
func (db *DB) AbandonedKEKs(ctx context.Context, labels []string) ([]KEK, error) {
	return db.keks(ctx, givenUp+" AND label = ANY($1)", labels)
}

// EndKEK notes that a KEK is destroyed in the token, and records event, once.
func (db *DB) EndKEK(ctx context.Context, id int64, event audit.Event) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		tag, err := a.conn.Exec(ctx, "UPDATE kek SET state = 'destroyed' WHERE id = $1 AND state <> 'destroyed'", id)
		if err == nil && tag.RowsAffected() > 0 {
			a.record(event)
		}
		return err
	}), nil)
	if err != nil {
		return fmt.Errorf("ending KEK %d: %w", id, err)
	}
	return nil
}

// HoldKEK notes that this run is about to copy a KEK into its session. With ErrExpired
// it may not: the KEK's epoch is over, and its copies are being given up.
func (db *DB) HoldKEK(ctx context.Context, id int64) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		var may bool
		if err := a.conn.QueryRow(ctx, "SELECT hold_kek($1, $2, $3)", id, db.cfg.Node, a.c.run).Scan(&may); err != nil {
			return err
		}
		if !may {
			return refuse(ErrExpired)
		}
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("holding KEK %d: %w", id, err)
	}
	return nil
}

// GiveUpKEK notes that this run has no copy of a KEK any more, and records event.
func (db *DB) GiveUpKEK(ctx context.Context, id int64, event audit.Event) error {
	err := db.do(ctx, solo(func(_ context.Context, a *attempt) error {
		a.record(event)
		a.writes.Queue("DELETE FROM kek_copy WHERE kek = $1 AND node = $2 AND run <= $3", id, db.cfg.Node, a.c.run)
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("giving up KEK %d: %w", id, err)
	}
	return nil
}

// KEKs lists those of the register that are not destroyed, oldest first.
func (db *DB) KEKs(ctx context.Context) ([]KEK, error) {
	return db.keks(ctx, "state <> 'destroyed'")
}

// DestroyedKEKs lists those that are destroyed and had one of the check values, oldest
// first: of all that there ever were, as many as are asked about, and hardly more.
func (db *DB) DestroyedKEKs(ctx context.Context, checkValues [][]byte) ([]KEK, error) {
	return db.keks(ctx, "state = 'destroyed' AND check_value = ANY($1)", checkValues)
}

func (db *DB) keks(ctx context.Context, which string, args ...any) ([]KEK, error) {
	rows, _ := db.pool.Query(ctx, "SELECT "+kekColumns+" FROM kek WHERE "+which+" ORDER BY id", args...)
	keks, err := pgx.CollectRows(rows, scanKEK)
	if err != nil {
		return nil, away("listing KEKs", err)
	}
	return keks, nil
}

// AddWraps adds to the counts of wraps, by KEK ID.
func (db *DB) AddWraps(ctx context.Context, wraps map[int64]int64) error {
	var ids, counts []int64
	for id, n := range wraps {
		ids, counts = append(ids, id), append(counts, n)
	}
	_, err := db.pool.Exec(ctx, "UPDATE kek SET wraps = wraps + n FROM unnest($1::bigint[], $2::bigint[]) AS more (id, n) WHERE kek.id = more.id", ids, counts)
	if err != nil {
		return away("counting wraps", err)
	}
	return nil
}
