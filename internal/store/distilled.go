package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// Distilled is what was seen of a block that was distilled or given up. Slices are by
// intensity, the brightest first.
type Distilled struct {
	Session, Block         int64
	At                     time.Time
	Took                   time.Duration
	Aborted                string // why it was given up; "" if it was not
	Gates                  int64
	Detected, Doubles      int
	SiftedKey, SiftedTest  int
	Key, Test              []int // bits used
	TestErrors, KeyErrors  []int
	Rated                  bool    // the error rate of the test bits was found
	TestQBER, KeyQBER      float64 // the former 0 if it was not
	Leak                   int     // bits
	Efficiency             float64
	Rounds                 int
	SecretBits             int
	EpsSecrecy, EpsCorrect float64 // what the block adds to the year's; not kept in its own row
}

// keepDistilled is for how long the figures of a block are kept.
const keepDistilled = 7 * 24 * time.Hour

// NoteDistilled keeps the figures of a block, once, and adds its epsilons to the year's.
// Figures older than a week go.
func (db *DB) NoteDistilled(ctx context.Context, link string, d Distilled) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		tag, err := a.conn.Exec(ctx, `INSERT INTO distilled (link, session, block, at, took_ms, aborted, gates, detected, doubles, sifted_key, sifted_test,
			key_bits, test_bits, test_errors, key_errors, qber_test, qber_key, leak, efficiency, rounds, secret_bits)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21) ON CONFLICT DO NOTHING`,
			link, d.Session, d.Block, d.At, d.Took.Milliseconds(), d.Aborted, d.Gates, d.Detected, d.Doubles, d.SiftedKey, d.SiftedTest,
			d.Key, d.Test, d.TestErrors, d.KeyErrors, pgtype.Float8{Float64: d.TestQBER, Valid: d.Rated}, d.KeyQBER, d.Leak, d.Efficiency, d.Rounds, d.SecretBits)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		if d.Aborted == "" {
			a.writes.Queue(`INSERT INTO epsilon AS e (link, year, blocks, secrecy, correct) VALUES ($1, $2, 1, $3, $4)
				ON CONFLICT (link, year) DO UPDATE SET blocks = e.blocks + 1, secrecy = e.secrecy + $3, correct = e.correct + $4`,
				link, d.At.UTC().Year(), d.EpsSecrecy, d.EpsCorrect)
		}
		if d.Block%64 == 0 {
			a.writes.Queue("DELETE FROM distilled WHERE link = $1 AND at < $2", link, d.At.Add(-keepDistilled))
		}
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("keeping the figures of block %d of link %s: %w", d.Block, link, err)
	}
	return nil
}

// Epsilon is what the blocks of a link have added up to in the year of t (UTC).
func (db *DB) Epsilon(ctx context.Context, link string, t time.Time) (secrecy, correct float64, err error) {
	err = db.pool.QueryRow(ctx, "SELECT secrecy, correct FROM epsilon WHERE link = $1 AND year = $2", link, t.UTC().Year()).Scan(&secrecy, &correct)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, 0, away("reading the year's epsilon of link "+link, err)
	}
	return secrecy, correct, nil
}

// LastDistilled is the figures of the last blocks of a link, the newest first.
func (db *DB) LastDistilled(ctx context.Context, link string, limit int) ([]Distilled, error) {
	rows, _ := db.pool.Query(ctx, `SELECT session, block, at, took_ms, aborted, gates, detected, doubles, sifted_key, sifted_test,
		key_bits, test_bits, test_errors, key_errors, qber_test, qber_key, leak, efficiency, rounds, secret_bits
		FROM distilled WHERE link = $1 ORDER BY at DESC, session DESC, block DESC LIMIT $2`, link, limit)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d Distilled, err error) {
		var took int64
		var qber pgtype.Float8
		err = row.Scan(&d.Session, &d.Block, &d.At, &took, &d.Aborted, &d.Gates, &d.Detected, &d.Doubles, &d.SiftedKey, &d.SiftedTest,
			&d.Key, &d.Test, &d.TestErrors, &d.KeyErrors, &qber, &d.KeyQBER, &d.Leak, &d.Efficiency, &d.Rounds, &d.SecretBits)
		d.At, d.Took = d.At.UTC(), time.Duration(took)*time.Millisecond
		d.Rated, d.TestQBER = qber.Valid, qber.Float64
		return d, err
	})
	if err != nil {
		return nil, away("reading the history of link "+link, err)
	}
	return list, nil
}
