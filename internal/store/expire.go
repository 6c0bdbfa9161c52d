package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// ExpireDue ends up to limit assigned keys whose lifetime was over at now, and
// returns how many. event makes the one event of those that ended.
func (db *DB) ExpireDue(ctx context.Context, now time.Time, limit int, event func(rows []DueRef) audit.Event) (n int, err error) {
	w := &expire{event: event, how: GoneExpired}
	for _, e := range db.epochs.upTo(key.EpochAt(now, db.cfg.EpochLength)) {
		if left := limit - len(w.rows); left > 0 {
			if err := db.overdue(ctx, e, now, left, w); err != nil && !missingTable(err) {
				return 0, away("looking for overdue keys", err)
			}
		}
	}
	if len(w.rows) == 0 {
		return 0, nil
	}
	if err := db.do(ctx, w, nil); err != nil {
		return 0, fmt.Errorf("expiring assigned keys: %w", err)
	}
	return w.ended, nil
}

// overdue reads which live rows of an expiry epoch are overdue. An epoch that has
// passed, and has none left, is not read again until a row comes to it after all.
func (db *DB) overdue(ctx context.Context, e key.Epoch, now time.Time, limit int, w *expire) error {
	if db.epochs.isDrained(e) {
		return nil
	}
	found := 0
	err := db.scan(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "SELECT key_id, sae FROM "+dueTable(e)+" WHERE ct IS NOT NULL AND expires_at <= $1 LIMIT $2", now, limit)
		var id [16]byte
		var name string
		_, err := pgx.ForEachRow(rows, []any{&id, &name}, func() error {
			sae, err := identity.ParseSAE(name)
			w.rows = append(w.rows, overdueRow{dueKey{id, sae}, e})
			found++
			return err
		})
		return err
	})
	if err == nil && found == 0 && now.Sub(e.End(db.cfg.EpochLength)) > time.Minute {
		db.epochs.drain(e)
	}
	return err
}

type overdueRow struct {
	dueKey
	epoch key.Epoch
}

// expire empties what is still live of its rows.
type expire struct {
	rows  []overdueRow
	event func([]DueRef) audit.Event
	how   string
	ended int
}

func (w *expire) claims(claimed func(claim)) {
	for _, r := range w.rows {
		claimed(claim{r.id, r.sae.String()})
	}
}

func (w *expire) weight() int { return len(w.rows) }

func (w *expire) ask(a *attempt) error {
	for _, r := range w.rows {
		a.empty[r.epoch] = append(a.empty[r.epoch], emptying{r.dueKey, w.how})
	}
	return nil
}

func (w *expire) settle(_ context.Context, a *attempt) error {
	var refs []DueRef
	for _, r := range w.rows {
		if a.emptied[r.dueKey] {
			delete(a.emptied, r.dueKey)
			refs = append(refs, DueRef{r.id, r.epoch})
		}
	}
	if w.ended = len(refs); w.ended > 0 {
		a.record(w.event(refs))
	}
	return nil
}

// expireChunks bounds the chunks of one ExpirePool.
const expireChunks = 256

// expirable are the chunks whose atoms nobody may be about to serve: those that nobody leases,
// or this run does, or a run that has been taken over, which commits nothing any more. What
// that one had announced is the takeover's to void, however long it waits for the peer.
const expirable = `link = $1 AND epoch < $2 AND remaining > 0
	AND (node IS NULL OR node = $3 AND run = $4 OR run < (SELECT r.run FROM node_run r WHERE r.node = chunk.node))`

// ExpirePool deletes atoms of a link, of epochs before the given one, of chunks that nobody
// leases, or this run or one that has been taken over, of up to 256 chunks, and returns how
// many. event makes the event of those of one link. The caller lends no such atom any more;
// of one that is lent already the Serve is short.
func (db *DB) ExpirePool(ctx context.Context, link string, before key.Epoch, event func(link string, atoms []audit.Atoms) audit.Event) (n int, err error) {
	var old int
	err = db.pool.QueryRow(ctx, "SELECT count(*) FROM chunk WHERE "+expirable, link, before, db.cfg.Node, db.committer.run).Scan(&old)
	if err != nil {
		return 0, away("looking for old chunks", err)
	}
	if old == 0 {
		return 0, nil
	}
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		chunks, err := lockChunks(ctx, a, expirable+" ORDER BY epoch, id LIMIT $5 FOR UPDATE SKIP LOCKED", link, before, db.cfg.Node, a.c.run, expireChunks)
		if err != nil {
			return err
		}
		n, err = emptyOld(ctx, a, chunks, event)
		return err
	}), nil)
	if err != nil {
		return 0, fmt.Errorf("expiring the pool: %w", err)
	}
	return n, nil
}

// oldChunk is where a chunk lies.
type oldChunk struct {
	audit.Atoms // of its block; First and Count are not set
	epoch       key.Epoch
}

func lockChunks(ctx context.Context, a *attempt, which string, args ...any) (map[int64]oldChunk, error) {
	rows, _ := a.conn.Query(ctx, "SELECT id, link, session, block, epoch FROM chunk WHERE "+which, args...)
	chunks := make(map[int64]oldChunk)
	var id int64
	var c oldChunk
	_, err := pgx.ForEachRow(rows, []any{&id, &c.Link, &c.Session, &c.Block, &c.epoch}, func() error {
		chunks[id] = c
		return nil
	})
	return chunks, err
}

// ranges sums up deleted atoms as runs of consecutive ones of their blocks.
func ranges(gone []goneAtom, chunks map[int64]oldChunk) []audit.Atoms {
	slices.SortFunc(gone, func(x, y goneAtom) int {
		if x.chunk != y.chunk {
			return int(x.chunk - y.chunk)
		}
		return x.index - y.index
	})
	var rs []audit.Atoms
	for _, g := range gone {
		at := chunks[g.chunk].Atoms
		at.First, at.Count = g.index, 1
		if n := len(rs); n > 0 {
			last := &rs[n-1]
			if last.Link == at.Link && last.Session == at.Session && last.Block == at.Block && last.First+last.Count == at.First {
				last.Count++
				continue
			}
		}
		rs = append(rs, at)
	}
	return rs
}
