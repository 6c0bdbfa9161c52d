package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// ErrUsed: an approval was used before.
var ErrUsed = errors.New("an approval was used before")

// UseApprovals uses approvals up, by their nonces, all of them or none. They are good
// until expires.
func (db *DB) UseApprovals(ctx context.Context, nonces [][]byte, expires time.Time) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		if _, err := a.conn.Exec(ctx, "DELETE FROM approval_used WHERE expires < $1", a.now); err != nil {
			return err
		}
		rows, _ := a.conn.Query(ctx, "SELECT 1 FROM approval_used WHERE nonce = ANY($1::bytea[])", nonces)
		used, err := pgx.CollectRows(rows, pgx.RowTo[int])
		if err != nil {
			return err
		}
		if len(used) > 0 {
			return refuse(ErrUsed)
		}
		_, err = a.conn.Exec(ctx, "INSERT INTO approval_used (nonce, expires) SELECT n, $2 FROM unnest($1::bytea[]) AS w (n)", nonces, expires)
		return err
	}), nil)
	if err != nil {
		return fmt.Errorf("using approvals: %w", err)
	}
	return nil
}
