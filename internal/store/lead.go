package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	leadEvery    = time.Second     // how often a candidate tries, and a leader makes sure
	leadPatience = 3 * time.Second // after which a leader that gets no answer leads no more
)

// Lead has one node of the site at a time do what needs no more than one. It waits
// until this node leads, calls do, whose ctx ends when it leads no more, and waits
// again; until ctx ends or do fails while it leads.
//
// It decides who is to do a thing, not who may: two leaders for a moment are
// possible, and what they do must be safe. A lock of the database's session decides:
// it is free again when the leader's connection ends.
func (db *DB) Lead(ctx context.Context, name string, do func(context.Context) error) error {
	for {
		conn, err := db.elect(ctx, name)
		if err != nil {
			return fmt.Errorf("leading %s: %w", name, err)
		}
		db.cfg.Log.Info("leading", "node", db.cfg.Node, "what", name)
		err = db.whileLeading(ctx, conn, do)
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		_ = conn.Close(closing) // and with it the lock goes
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		db.cfg.Log.Warn("leading no more", "node", db.cfg.Node, "what", name)
	}
}

// elect returns a connection that has the lock.
func (db *DB) elect(ctx context.Context, name string) (*pgx.Conn, error) {
	t := time.NewTicker(leadEvery)
	defer t.Stop()
	var conn *pgx.Conn
	for {
		won, err := false, error(nil)
		if conn == nil {
			config := db.committer.config.Copy()
			neverCancel(config)
			conn, err = pgx.ConnectConfig(ctx, config)
		}
		if err == nil {
			err = conn.QueryRow(ctx, "SELECT pg_try_advisory_lock(hashtextextended('kme lead ' || $1, 0))", name).Scan(&won)
		}
		if won {
			return conn, nil
		}
		if err != nil && conn != nil {
			_ = conn.Close(ctx) // it is broken: another one is made
			conn = nil
		}
		select {
		case <-ctx.Done():
			if conn != nil {
				_ = conn.Close(context.WithoutCancel(ctx))
			}
			return nil, ctx.Err()
		case <-t.C:
		}
	}
}

// whileLeading runs do until it returns, and ends its ctx when conn gives no answer.
func (db *DB) whileLeading(ctx context.Context, conn *pgx.Conn, do func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	t := time.NewTicker(leadEvery)
	defer t.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-t.C:
		}
		asking, stop := context.WithTimeout(ctx, leadPatience)
		if err := conn.Ping(asking); err != nil && ctx.Err() == nil {
			cancel()
		}
		stop()
		if ctx.Err() != nil {
			return <-done
		}
	}
}
