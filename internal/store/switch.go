package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// Switch is a caller that is switched off besides what the policies' files say.
type Switch struct {
	Principal string // role/id
	Reason    string
	By        string // the operator
	Since     time.Time
}

// SwitchOff shuts a caller out at every node of the site. One that is off already
// stays off for its first reason.
func (db *DB) SwitchOff(ctx context.Context, s Switch, late func(committed bool), events ...audit.Event) error {
	return db.turn(ctx, late, events, `INSERT INTO switched_off (principal, reason, by_whom, since) VALUES ($1, $2, $3, $4)
		ON CONFLICT (principal) DO NOTHING`, s.Principal, s.Reason, s.By, s.Since)
}

// SwitchOn takes back what SwitchOff did, if it did: it does not overrule the files.
func (db *DB) SwitchOn(ctx context.Context, principal string, late func(committed bool), events ...audit.Event) error {
	return db.turn(ctx, late, events, "DELETE FROM switched_off WHERE principal = $1", principal)
}

func (db *DB) turn(ctx context.Context, late func(committed bool), events []audit.Event, sql string, args ...any) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		a.record(events...)
		_, err := a.conn.Exec(ctx, sql, args...)
		return err
	}), late)
	if err != nil {
		return fmt.Errorf("switching a caller: %w", err)
	}
	return nil
}

// SwitchedOff lists the callers that are switched off. After a failover it may be the
// list of before: it may add, and let nobody in again.
func (db *DB) SwitchedOff(ctx context.Context) ([]Switch, error) {
	rows, _ := db.pool.Query(ctx, readSwitches)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Switch])
	if err != nil {
		return nil, away("reading who is switched off", err)
	}
	return list, nil
}

// SurelySwitchedOff is SwitchedOff as it stands: see proven.
func (db *DB) SurelySwitchedOff(ctx context.Context) (list []Switch, err error) {
	err = db.proven(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, readSwitches)
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Switch])
		return err
	})
	if err != nil {
		return nil, away("reading who is switched off", err)
	}
	return list, nil
}

const readSwitches = "SELECT principal, reason, by_whom, since FROM switched_off ORDER BY principal"
