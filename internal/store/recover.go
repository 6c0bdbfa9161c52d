package store

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Connected lists the other nodes of the site that have connections to the database.
func (db *DB) Connected(ctx context.Context) ([]string, error) {
	rows, _ := db.pool.Query(ctx, `SELECT DISTINCT substr(application_name, 6) FROM pg_stat_activity WHERE datname = current_database()
		AND application_name LIKE 'kmed %' AND application_name <> current_setting('application_name') ORDER BY 1`)
	nodes, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, away("looking for other nodes", err)
	}
	return nodes, nil
}

// Holdings are what the site's database holds.
type Holdings struct {
	Pool int // atoms
	Due  int // assigned keys that wait for their SAEs
}

// Holdings counts them.
func (db *DB) Holdings(ctx context.Context) (h Holdings, err error) {
	err = db.scan(ctx, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, "SELECT (SELECT count(*) FROM key), (SELECT count(*) FROM due WHERE ct IS NOT NULL)").Scan(&h.Pool, &h.Due)
	})
	if err != nil {
		return h, away("counting keys", err)
	}
	return h, nil
}

// EndKEKs notes that the KEKs of the register are destroyed, and records events.
func (db *DB) EndKEKs(ctx context.Context, events ...audit.Event) error {
	err := db.do(ctx, solo(func(_ context.Context, a *attempt) error {
		a.record(events...)
		a.writes.Queue("UPDATE kek SET state = 'destroyed' WHERE state <> 'destroyed'")
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("ending the register of KEKs: %w", err)
	}
	return nil
}

// BurnPool deletes what is left of up to 256 chunks, whoever owns or leases them,
// and says how many atoms that were, and of how many chunks: 0 when the pool is
// empty. event makes the event of those of one link.
func (db *DB) BurnPool(ctx context.Context, event func(link string, atoms []audit.Atoms) audit.Event) (n, chunks int, err error) {
	if err := db.epochs.refresh(ctx, db.pool); err != nil {
		return 0, 0, away("burning the pool", err)
	}
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		old, err := lockChunks(ctx, a, "remaining > 0 ORDER BY epoch, id LIMIT $1 FOR UPDATE", expireChunks)
		if err != nil {
			return err
		}
		chunks = len(old)
		n, err = emptyOld(ctx, a, old, event)
		return err
	}), nil)
	if err != nil {
		return 0, 0, fmt.Errorf("burning the pool: %w", err)
	}
	return n, chunks, nil
}

// VoidDue ends up to limit assigned keys that wait, whatever their lifetime, and
// returns how many. event makes the one event of them.
func (db *DB) VoidDue(ctx context.Context, limit int, event func(rows []DueRef) audit.Event) (int, error) {
	w := &expire{event: event, how: GoneVoid}
	err := db.scan(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "SELECT key_id, sae, expiry_epoch FROM due WHERE ct IS NOT NULL LIMIT $1", limit)
		var r overdueRow
		var id [16]byte
		var name string
		_, err := pgx.ForEachRow(rows, []any{&id, &name, &r.epoch}, func() (err error) {
			r.id = id
			r.sae, err = identity.ParseSAE(name)
			w.rows = append(w.rows, r)
			return err
		})
		return err
	})
	if err != nil {
		return 0, away("looking for assigned keys", err)
	}
	if len(w.rows) == 0 {
		return 0, nil
	}
	if err := db.do(ctx, w, nil); err != nil {
		return 0, fmt.Errorf("ending assigned keys: %w", err)
	}
	return w.ended, nil
}

// EndRecovery begins the account anew: it ends the suspension, raises the origin,
// leaves it to be told to the peers that what is shared with them is gone, and
// records event, in one transaction.
func (db *DB) EndRecovery(ctx context.Context, origin int64, peers []identity.KME, event audit.Event) error {
	var names []string
	for _, p := range peers {
		names = append(names, p.String())
	}
	err := db.do(ctx, solo(func(_ context.Context, a *attempt) error {
		a.record(event)
		a.writes.Queue("DELETE FROM parked")
		a.writes.Queue("DELETE FROM pad") // they may have been spent
		a.writes.Queue("UPDATE peer_run SET anew = true")
		a.writes.Queue("INSERT INTO burned_out (peer, origin) SELECT peer, $2 FROM unnest($1::text[]) AS p (peer)", names, origin)
		a.writes.Queue("UPDATE settings SET origin = $1, suspended = NULL", origin)
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("ending the recovery: %w", err)
	}
	return nil
}

// BurnedOut lists to which peers it is still to be told that all that was shared
// with them before an origin of ours is gone here: the highest origin for each.
func (db *DB) BurnedOut(ctx context.Context) (map[identity.KME]handover.Burned, error) {
	rows, _ := db.pool.Query(ctx, "SELECT peer, max(origin) FROM burned_out WHERE acked_at IS NULL GROUP BY peer")
	pending := make(map[identity.KME]handover.Burned)
	var name string
	var b handover.Burned
	_, err := pgx.ForEachRow(rows, []any{&name, &b.Origin}, func() error {
		peer, err := identity.ParseKME(name)
		pending[peer] = b
		return err
	})
	if err != nil {
		return nil, away("listing whom to tell of a recovery", err)
	}
	return pending, nil
}

// AckBurned notes that a peer has acknowledged b, with the sessions that it had
// opened by then: ours go on above them.
func (db *DB) AckBurned(ctx context.Context, peer identity.KME, b handover.Burned, answer handover.BurnedAnswer) error {
	err := pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
		for _, s := range answer.Links {
			_, err := tx.Exec(ctx, "UPDATE link SET session = greatest(session, $3) WHERE id = $1 AND peer_kme = $2", s.Link, peer.String(), s.Session)
			if err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, "UPDATE burned_out SET acked_at = $3 WHERE peer = $1 AND origin <= $2 AND acked_at IS NULL", peer.String(), b.Origin, db.now())
		return err
	})
	if err != nil {
		return away("acknowledging what was burned", err)
	}
	return nil
}

// HearBurned deletes what is left of up to 256 chunks shared with a peer, since it
// has lost its part of them. It says whether there are no more: from then on b is
// done, and hearing it again touches nothing, so that a copy that comes late takes
// nothing from a pool that was filled since. The peer opens no session until b is done.
func (db *DB) HearBurned(ctx context.Context, from identity.KME, b handover.Burned, event func(link string, atoms []audit.Atoms) audit.Event) (done bool, err error) {
	if err := db.epochs.refresh(ctx, db.pool); err != nil {
		return false, away("hearing what was burned", err)
	}
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		_, err := a.conn.Exec(ctx, "INSERT INTO peer_burned (peer, origin) VALUES ($1, 0) ON CONFLICT DO NOTHING", from.String())
		if err != nil {
			return err
		}
		var known int64
		if err := a.conn.QueryRow(ctx, "SELECT origin FROM peer_burned WHERE peer = $1 FOR UPDATE", from.String()).Scan(&known); err != nil {
			return err
		}
		if done = known >= b.Origin; done {
			return nil
		}
		chunks, err := lockChunks(ctx, a, `remaining > 0 AND link IN (SELECT id FROM link WHERE peer_kme = $2)
			ORDER BY epoch, id LIMIT $1 FOR UPDATE`, expireChunks, from.String())
		if err != nil {
			return err
		}
		if done = len(chunks) == 0; done {
			a.writes.Queue("UPDATE peer_burned SET origin = $2 WHERE peer = $1", from.String(), b.Origin)
		}
		_, err = emptyOld(ctx, a, chunks, event)
		return err
	}), nil)
	if err != nil {
		return false, fmt.Errorf("hearing what %s has burned: %w", from, err)
	}
	return done, nil
}

// HeardBurned is up to which of a peer's recoveries what was shared with it is gone here.
func (db *DB) HeardBurned(ctx context.Context, peer identity.KME) (origin int64, err error) {
	err = db.pool.QueryRow(ctx, "SELECT coalesce(max(origin), 0) FROM peer_burned WHERE peer = $1", peer.String()).Scan(&origin)
	if err != nil {
		return 0, away("reading what was burned", err)
	}
	return origin, nil
}

// Sessions are the highest sessions opened on the links with a peer.
func (db *DB) Sessions(ctx context.Context, peer identity.KME) ([]handover.LinkSession, error) {
	rows, _ := db.pool.Query(ctx, "SELECT id, session FROM link WHERE peer_kme = $1 ORDER BY id", peer.String())
	sessions, err := pgx.CollectRows(rows, pgx.RowToStructByPos[handover.LinkSession])
	if err != nil {
		return nil, away("reading sessions", err)
	}
	return sessions, nil
}

// emptyOld deletes all that is left of locked chunks and records the event of each link.
func emptyOld(ctx context.Context, a *attempt, chunks map[int64]oldChunk, event func(link string, atoms []audit.Atoms) audit.Event) (n int, err error) {
	parts := make(map[key.Epoch][]int64)
	for id, c := range chunks {
		parts[c.epoch] = append(parts[c.epoch], id)
	}
	links := make(map[string][]audit.Atoms)
	for _, e := range slices.Sorted(maps.Keys(parts)) {
		gone, err := emptyChunks(ctx, a, e, parts[e])
		if err != nil {
			return 0, err
		}
		n += len(gone)
		for _, r := range ranges(gone, chunks) {
			links[r.Link] = append(links[r.Link], r)
		}
	}
	for _, link := range slices.Sorted(maps.Keys(links)) {
		a.record(event(link, links[link]))
	}
	return n, nil
}
