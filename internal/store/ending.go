package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// EpochState is how far an epoch has come towards its end. The states follow one
// another, none is left out, and none comes back.
type EpochState string

// The states of an epoch.
const (
	EpochOpen      EpochState = "open"      // keys come into it
	EpochSealed    EpochState = "sealed"    // none does any more; those in it live on
	EpochDraining  EpochState = "draining"  // none in it lives: the nodes give up their copies of its KEKs
	EpochDestroyed EpochState = "destroyed" // its KEKs are not in the token any more
	EpochDropped   EpochState = "dropped"   // its partitions are gone too
)

// Epoch is an epoch with its KEKs, the abandoned ones left out.
type Epoch struct {
	Epoch    key.Epoch
	StartsAt time.Time
	EndsAt   time.Time
	State    EpochState
	KEKs     []HeldKEK
}

// HeldKEK is a KEK and the runs that have, or may have, copies of it. Those of runs
// that have been taken over are left out.
type HeldKEK struct {
	KEK
	Copies []NodeRun
}

// Epochs lists the epochs that are not dropped, oldest first.
func (db *DB) Epochs(ctx context.Context) (epochs []Epoch, err error) {
	// One statement: an epoch is never shown draining with the copies of before.
	rows, _ := db.pool.Query(ctx, `SELECT e.epoch, e.starts_at, e.ends_at, e.state,
			k.id, k.label, k.pkcs11_id, k.check_value, k.state, k.wraps, r.node, r.run
		FROM epoch e LEFT JOIN kek k ON k.epoch = e.epoch AND k.state <> 'planned' AND k.pkcs11_id <> ''
		LEFT JOIN (kek_copy c JOIN node_run r ON r.node = c.node AND r.run <= c.run) ON c.kek = k.id
		WHERE e.state <> 'dropped' ORDER BY e.epoch, k.id, r.node`)
	var e Epoch
	var kek *int64
	var label, state, node *string
	var ckaID, check []byte
	var wraps, run *int64
	_, err = pgx.ForEachRow(rows, []any{&e.Epoch, &e.StartsAt, &e.EndsAt, &e.State, &kek, &label, &ckaID, &check, &state, &wraps, &node, &run}, func() error {
		if n := len(epochs); n == 0 || epochs[n-1].Epoch != e.Epoch {
			epochs = append(epochs, Epoch{Epoch: e.Epoch, StartsAt: e.StartsAt, EndsAt: e.EndsAt, State: e.State})
		}
		last := &epochs[len(epochs)-1]
		if kek == nil {
			return nil
		}
		if n := len(last.KEKs); n == 0 || last.KEKs[n-1].ID != *kek {
			last.KEKs = append(last.KEKs, HeldKEK{KEK: KEK{
				ID: *kek, Epoch: e.Epoch, Label: *label, PKCS11ID: append([]byte(nil), ckaID...), CheckValue: append([]byte(nil), check...), State: KEKState(*state), Wraps: *wraps,
			}})
		}
		if k := &last.KEKs[len(last.KEKs)-1]; node != nil {
			k.Copies = append(k.Copies, NodeRun{Node: *node, Run: *run})
		}
		return nil
	})
	if err != nil {
		return nil, away("listing the epochs", err)
	}
	return epochs, nil
}

// CountEpochs counts what lives in each epoch.
func (db *DB) CountEpochs(ctx context.Context) (map[key.Epoch]Holdings, error) {
	held := make(map[key.Epoch]Holdings)
	var e key.Epoch
	var n int
	err := db.scan(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "SELECT epoch, sum(remaining) FROM chunk GROUP BY epoch")
		_, err := pgx.ForEachRow(rows, []any{&e, &n}, func() error {
			held[e] = Holdings{Pool: n}
			return nil
		})
		if err != nil {
			return err
		}
		rows, _ = tx.Query(ctx, "SELECT expiry_epoch, count(*) FROM due WHERE ct IS NOT NULL GROUP BY expiry_epoch")
		_, err = pgx.ForEachRow(rows, []any{&e, &n}, func() error {
			held[e] = Holdings{Pool: held[e].Pool, Due: n}
			return nil
		})
		return err
	})
	if err != nil {
		return nil, away("counting the keys of epochs", err)
	}
	return held, nil
}

// Fillable says whether keys may still come into an epoch, as far as this node knows:
// what it believes wrongly its statements find out.
func (db *DB) Fillable(e key.Epoch) bool { return db.epochs.fillable(e) }

// errNotNow: a step of an epoch's end is not to be done, or cannot be at once.
var errNotNow = errors.New("not now")

// SealEpoch lets no more keys into an open epoch, and records event. It says whether
// it did: it does not wait for long for what is being written.
func (db *DB) SealEpoch(ctx context.Context, e key.Epoch, event audit.Event) (bool, error) {
	done, err := db.step(ctx, "sealing", e, event, "SELECT seal_epoch($1)", int64(e))
	if !done || err != nil {
		return done, err
	}
	return true, db.refreshEpochs(ctx)
}

// DrainEpoch has the nodes give up their copies of the KEKs of a sealed epoch, if
// nothing in it is alive any more, and records event. It says whether it did.
func (db *DB) DrainEpoch(ctx context.Context, e key.Epoch, event audit.Event) (bool, error) {
	return db.step(ctx, "draining", e, event, "SELECT drain_epoch($1)", int64(e))
}

// EndEpoch notes that the KEKs of a draining epoch are destroyed in the token, each of
// which EndKEK has recorded. It says whether it did, and fails while a node has a copy.
func (db *DB) EndEpoch(ctx context.Context, e key.Epoch) (bool, error) {
	var done bool
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		return ended(a.conn.QueryRow(ctx, "SELECT destroy_epoch($1)", int64(e)), &done)
	}), nil)
	return done, notNow(fmt.Sprintf("ending epoch %d", e), err)
}

// DropEpoch drops the partitions of an epoch whose KEKs are destroyed, and records
// event, whose Count it sets to the rows of assigned keys that go. It says whether it
// did: it does not wait for long for whoever reads.
func (db *DB) DropEpoch(ctx context.Context, e key.Epoch, event audit.Event) (bool, error) {
	if err := db.learn(ctx, e); err != nil {
		return false, away("dropping an epoch", err)
	}
	if !db.epochs.has(e) {
		return false, nil
	}
	var rows int64
	err := db.scan(ctx, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, "SELECT count(*) FROM "+dueTable(e)).Scan(&rows)
	})
	if missingTable(err) {
		return false, db.refreshEpochs(ctx)
	}
	if err != nil {
		return false, away("counting what goes with an epoch", err)
	}
	event.Count = int(rows)
	done, err := db.step(ctx, "dropping", e, event, "SELECT drop_epoch($1, $2)", int64(e), rows)
	if !done || err != nil {
		return done, err
	}
	return true, db.refreshEpochs(ctx)
}

// step is a transaction that calls the function of a step and records event if it has
// been done.
func (db *DB) step(ctx context.Context, doing string, e key.Epoch, event audit.Event, sql string, args ...any) (done bool, err error) {
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		a.record(event)
		return ended(a.conn.QueryRow(ctx, sql, args...), &done)
	}), nil)
	return done, notNow(fmt.Sprintf("%s epoch %d", doing, e), err)
}

// ended reads what a step's function says; one that was not done is rolled back.
func ended(row pgx.Row, done *bool) error {
	if err := row.Scan(done); err != nil {
		return err
	}
	if !*done {
		return refuse(errNotNow)
	}
	return nil
}

func notNow(doing string, err error) error {
	if err == nil || errors.Is(err, errNotNow) {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func (db *DB) refreshEpochs(ctx context.Context) error {
	if err := db.epochs.refresh(ctx, db.pool); err != nil {
		return away("reading the epochs", err)
	}
	return nil
}
