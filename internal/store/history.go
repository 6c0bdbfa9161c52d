package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// HistoryKept is how long a link's history is kept.
const HistoryKept = 31 * 24 * time.Hour

// LinkMinute is how a link did in a span of time: a minute when it is added, or as
// long as History was asked for.
type LinkMinute struct {
	At      time.Time // its beginning
	Blocks  int       // distilled
	Aborts  int       // given up
	Unrated int       // of both, those whose error rate was not found
	QBER    float64   // the sum over the others, each 0 to 1
	Bits    int64     // of secret
	Here    int       // 256-bit keys that this end may assign, at the end of the minute (History: the least)
	There   int       // those that the other end may
}

// AddHistory adds to what is known of a link's minute. It is for pictures: a sum whose
// commit is in doubt may be added twice.
func (db *DB) AddHistory(ctx context.Context, link string, m LinkMinute) error {
	_, err := db.pool.Exec(ctx, `INSERT INTO link_history AS h (link, minute, blocks, aborts, unrated, qber, bits, here, there)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (link, minute) DO UPDATE SET
		blocks = h.blocks + excluded.blocks, aborts = h.aborts + excluded.aborts, unrated = h.unrated + excluded.unrated, qber = h.qber + excluded.qber,
		bits = h.bits + excluded.bits, here = excluded.here, there = excluded.there`,
		link, m.At.UTC().Truncate(time.Minute), m.Blocks, m.Aborts, m.Unrated, m.QBER, m.Bits, m.Here, m.There)
	if err != nil {
		return away("adding to a link's history", err)
	}
	return nil
}

// History is how a link did from a moment on, in spans of the given length (at least
// a minute), oldest first. Spans of which nothing is known are not there.
func (db *DB) History(ctx context.Context, link string, from time.Time, span time.Duration) ([]LinkMinute, error) {
	rows, _ := db.pool.Query(ctx, `SELECT date_bin($3, minute, timestamptz 'epoch') AS at, sum(blocks)::int, sum(aborts)::int, sum(unrated)::int, sum(qber), sum(bits)::bigint, min(here), min(there)
		FROM link_history WHERE link = $1 AND minute >= $2 GROUP BY at ORDER BY at`, link, from, max(span, time.Minute))
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[LinkMinute])
	if err != nil {
		return nil, away("reading a link's history", err)
	}
	return list, nil
}

// EndHistory deletes what is older than HistoryKept.
func (db *DB) EndHistory(ctx context.Context) error {
	_, err := db.pool.Exec(ctx, "DELETE FROM link_history WHERE minute < $1", db.now().Add(-HistoryKept))
	if err != nil {
		return away("ending old history", err)
	}
	return nil
}
