package store

import (
	"context"
	"time"
)

// QuotaWindow is a stretch of time in which a subject may have so much.
type QuotaWindow struct {
	Subject string
	Length  time.Duration // whole seconds
	Start   time.Time     // whole multiples of Length since 1970
	Limit   int64
}

// LeaseQuota leases a slice of what the site's nodes together may use in a window: most
// of it at the most, and need at the least, or nothing. A window that is over at
// another node, whose clock is ahead, is charged to the next one.
func (db *DB) LeaseQuota(ctx context.Context, w QuotaWindow, need, most int64) (granted int64, err error) {
	err = db.pool.QueryRow(ctx, `INSERT INTO quota_use AS q (subject, seconds, start, used, granted)
			SELECT $1, $2, $3, g, g FROM (SELECT CASE WHEN $6::bigint >= $4::bigint THEN LEAST($5::bigint, $6) ELSE 0 END AS g) AS first
		ON CONFLICT (subject, seconds) DO UPDATE SET (start, used, granted) = (
			SELECT GREATEST(q.start, excluded.start), before + g, g FROM (
				SELECT before, CASE WHEN $6 - before >= $4 THEN LEAST($5, $6 - before) ELSE 0 END AS g
				FROM (SELECT CASE WHEN q.start < excluded.start THEN 0 ELSE q.used END AS before) AS a) AS b)
		RETURNING granted`,
		w.Subject, int64(w.Length/time.Second), w.Start.Unix(), need, most, w.Limit).Scan(&granted)
	if err != nil {
		return 0, away("leasing a slice of a quota", err)
	}
	return granted, nil
}
