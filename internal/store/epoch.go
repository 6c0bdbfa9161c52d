package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// epochSet remembers which epochs have partitions, since statements name them. It
// may be behind the database: a name too few is refreshed, one too many is an
// error of the statement, after which it is refreshed too.
type epochSet struct {
	mu      sync.RWMutex
	open    map[key.Epoch]bool
	drained map[key.Epoch]bool // passed, and nothing in its due partition is live
}

func (s *epochSet) refresh(ctx context.Context, pool *pgxpool.Pool) error {
	rows, _ := pool.Query(ctx, "SELECT epoch FROM epoch WHERE state <> 'dropped'")
	epochs, err := pgx.CollectRows(rows, pgx.RowTo[key.Epoch])
	if err != nil {
		return fmt.Errorf("reading the epochs: %w", err)
	}
	open := make(map[key.Epoch]bool, len(epochs))
	for _, e := range epochs {
		open[e] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open, s.drained = open, make(map[key.Epoch]bool)
	return nil
}

func (s *epochSet) has(e key.Epoch) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.open[e]
}

func (s *epochSet) add(e key.Epoch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[e] = true
}

// upTo lists the open epochs that are not after last, in order.
func (s *epochSet) upTo(last key.Epoch) []key.Epoch {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var epochs []key.Epoch
	for e := range s.open {
		if e <= last {
			epochs = append(epochs, e)
		}
	}
	slices.Sort(epochs)
	return epochs
}

func (s *epochSet) isDrained(e key.Epoch) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.drained[e]
}

func (s *epochSet) drain(e key.Epoch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drained[e] = true
}

// refill undoes drain: a row has come after all.
func (s *epochSet) refill(e key.Epoch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.drained, e)
}

// learn makes sure that the set knows the epochs that exist: it asks the database
// if one of those is not in it.
func (db *DB) learn(ctx context.Context, epochs ...key.Epoch) error {
	for _, e := range epochs {
		if !db.epochs.has(e) {
			return db.epochs.refresh(ctx, db.pool)
		}
	}
	return nil
}

// epochOf is the epoch of a key in the pool: its partition.
func (db *DB) epochOf(id key.ID) key.Epoch { return key.EpochAt(id.EpochStart(), db.cfg.EpochLength) }

// byEpoch sorts atoms by their partitions.
func (db *DB) byEpoch(ids []key.ID) map[key.Epoch][]key.ID {
	parts := make(map[key.Epoch][]key.ID)
	for _, id := range ids {
		e := db.epochOf(id)
		parts[e] = append(parts[e], id)
	}
	return parts
}

func keyTable(e key.Epoch) string { return "key_e" + strconv.FormatInt(int64(e), 10) }
func dueTable(e key.Epoch) string { return "due_e" + strconv.FormatInt(int64(e), 10) }

// EnsureEpoch makes the partitions of e, and says whether it was this call that did.
func (db *DB) EnsureEpoch(ctx context.Context, e key.Epoch) (created bool, err error) {
	if err := db.pool.QueryRow(ctx, "SELECT open_epoch($1)", int64(e)).Scan(&created); err != nil {
		return false, away(fmt.Sprintf("opening epoch %d", e), err)
	}
	if !created { // by another node, or by a call whose answer was lost
		return false, db.learn(ctx, e)
	}
	db.epochs.add(e)
	return true, nil
}

// DropEpoch drops the partitions of e. It refuses while one of its keys is in the
// pool, or one that expires in it is waiting to be taken.
func (db *DB) DropEpoch(ctx context.Context, e key.Epoch) error {
	if _, err := db.pool.Exec(ctx, "SELECT drop_epoch($1)", int64(e)); err != nil {
		return fmt.Errorf("dropping epoch %d: %w", e, err)
	}
	return db.epochs.refresh(ctx, db.pool)
}

// KEK is the register's entry of a key-encryption key in the HSM.
type KEK struct {
	ID         int64 // stands in each row that it wraps
	Epoch      key.Epoch
	Label      string
	PKCS11ID   []byte // CKA_ID
	CheckValue []byte
	State      string // of the KEK; one of an epoch may be "open"
	Wraps      int64  // as far as they have been counted: AddWraps
}

const kekColumns = "id, epoch, label, pkcs11_id, check_value, state, wraps"

func scanKEK(row pgx.CollectableRow) (k KEK, err error) {
	return k, row.Scan(&k.ID, &k.Epoch, &k.Label, &k.PKCS11ID, &k.CheckValue, &k.State, &k.Wraps)
}

// AddKEK registers k and records event. If the epoch has an open KEK already, that
// one is returned, and nothing is written: the caller's own is superfluous.
func (db *DB) AddKEK(ctx context.Context, k KEK, event audit.Event) (KEK, error) {
	var got KEK
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		rows, _ := a.conn.Query(ctx, `INSERT INTO kek (epoch, label, pkcs11_id, check_value, state, wraps) VALUES ($1, $2, $3, $4, $5, $6)
			ON CONFLICT (epoch) WHERE state = 'open' DO NOTHING RETURNING `+kekColumns, k.Epoch, k.Label, k.PKCS11ID, k.CheckValue, k.State, k.Wraps)
		made, err := pgx.CollectRows(rows, scanKEK)
		if err != nil {
			return err
		}
		if len(made) == 1 {
			got = made[0]
			a.record(event)
			return nil
		}
		rows, _ = a.conn.Query(ctx, "SELECT "+kekColumns+" FROM kek WHERE epoch = $1 AND state = 'open'", k.Epoch)
		got, err = pgx.CollectExactlyOneRow(rows, scanKEK)
		return err
	}), nil)
	if err != nil {
		return KEK{}, fmt.Errorf("registering a KEK of epoch %d: %w", k.Epoch, err)
	}
	return got, nil
}

// KEKs lists the register, oldest first.
func (db *DB) KEKs(ctx context.Context) ([]KEK, error) {
	rows, _ := db.pool.Query(ctx, "SELECT "+kekColumns+" FROM kek ORDER BY id")
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
