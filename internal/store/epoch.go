package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/qutemail/kme/internal/key"
)

// epochSet remembers which epochs have partitions, since statements name them. It
// may be behind the database: a name too few is refreshed, one too many is an
// error of the statement, after which it is refreshed too.
type epochSet struct {
	mu      sync.RWMutex
	open    map[key.Epoch]bool // those that have partitions; true if nothing has sealed them
	drained map[key.Epoch]bool // passed, and nothing in its due partition is live
}

func (s *epochSet) refresh(ctx context.Context, pool *pgxpool.Pool) error {
	rows, _ := pool.Query(ctx, "SELECT epoch, state = 'open' FROM epoch WHERE state <> 'dropped'")
	open := make(map[key.Epoch]bool)
	var e key.Epoch
	var unsealed bool
	_, err := pgx.ForEachRow(rows, []any{&e, &unsealed}, func() error {
		open[e] = unsealed
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the epochs: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open, s.drained = open, make(map[key.Epoch]bool)
	return nil
}

func (s *epochSet) has(e key.Epoch) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.open[e]
	return ok
}

// fillable says whether rows may still come into the partitions of e.
func (s *epochSet) fillable(e key.Epoch) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.open[e]
}

func (s *epochSet) add(e key.Epoch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[e] = true
}

// upTo lists the epochs with partitions that are not after last, in order.
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
