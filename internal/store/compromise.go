package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Compromise is a set of keys that somebody may know: those whose IDs are of some
// epochs, and that were there when it was decided.
type Compromise struct {
	ID          int64  // set by the store
	Link        string // "" for all links, and the keys of pairs that are both served here
	First, Last key.Epoch
	Chunks      int64 // the last chunk that is meant; set by the store
	Why         string
	Done        bool // nothing is left of it here
}

// BeginCompromise makes a compromise that was decided here durable, to be ended by
// EndCompromise and to be told to the peers, gives up the pads of the blocks that are meant,
// and records event, which it lets say how many. late is as in ServeJob.
func (db *DB) BeginCompromise(ctx context.Context, c Compromise, late func(committed bool), event audit.Event) (Compromise, error) {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		err := a.conn.QueryRow(ctx, `INSERT INTO compromise (peer, link, first_epoch, last_epoch, chunks, why)
			SELECT '', $1, $2, $3, coalesce(max(id), 0), $4 FROM chunk RETURNING id, chunks`, c.Link, c.First, c.Last, c.Why).Scan(&c.ID, &c.Chunks)
		if err != nil {
			return err
		}
		event, err := givePadsUp(ctx, a, c, math.MaxInt64, math.MaxInt64, event)
		if err != nil {
			return err
		}
		a.record(event)
		a.writes.Queue(`INSERT INTO compromise_out (act, link, session, block)
			SELECT $1, l.id, l.session, coalesce((SELECT max(b.id) FROM block b WHERE b.link = l.id AND b.session = l.session), 0)
			FROM link l WHERE $2 IN ('', l.id)`, c.ID, c.Link)
		return nil
	}), late)
	if err != nil {
		return c, fmt.Errorf("beginning a compromise: %w", err)
	}
	return c, nil
}

// givePadsUp spends the pads that came with the keys of a compromise, up to a block, in the
// order of their names and so with all below them: whoever knows the ones may know the
// others. It returns event, which says how many they were.
func givePadsUp(ctx context.Context, a *attempt, c Compromise, session, block int64, event audit.Event) (audit.Event, error) {
	_, err := a.conn.Exec(ctx, `INSERT INTO link_auth AS a (link, session, block, index)
		SELECT DISTINCT ON (p.link) p.link, p.session, p.block, p.index FROM pad p
			JOIN block b ON b.link = p.link AND b.session = p.session AND b.id = p.block
			WHERE b.epoch BETWEEN $1 AND $2 AND $3 IN ('', p.link) AND (p.session, p.block) <= ($4::bigint, $5::bigint)
			ORDER BY p.link, p.session DESC, p.block DESC, p.index DESC
		ON CONFLICT (link) DO UPDATE SET session = excluded.session, block = excluded.block, index = excluded.index
			WHERE (a.session, a.block, a.index) < (excluded.session, excluded.block, excluded.index)`, c.First, c.Last, c.Link, session, block)
	if err != nil {
		return event, err
	}
	tag, err := a.conn.Exec(ctx, `DELETE FROM pad p USING link_auth a WHERE a.link = p.link AND $1 IN ('', p.link)
		AND (p.session, p.block, p.index) <= (a.session, a.block, a.index)`, c.Link)
	if n := tag.RowsAffected(); err == nil && n > 0 {
		event.Reason += fmt.Sprintf("; %d pads given up", n)
	}
	return event, err
}

// maxHeard is how many compromises of a peer are heard in a day: each is kept for ever, and
// has all that waits looked through.
const maxHeard = 1000

// ErrTooManyCompromises: more than anybody can mean in a day.
var ErrTooManyCompromises = errors.New("too many compromises in a day")

// HearCompromise makes durable what a peer says of the link with it, and gives up the pads
// of the blocks that are meant. Heard again, it is the same. Its number alone tells nothing:
// an act there may mean several links to here, and one after the peer was set back has the
// number of one before. With ErrTooManyCompromises nothing has happened.
func (db *DB) HearCompromise(ctx context.Context, from identity.KME, m handover.Compromise, event audit.Event) (Compromise, error) {
	c := Compromise{Link: m.Link, First: key.Epoch(m.First), Last: key.Epoch(m.Last), Why: "told by " + from.String()}
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		err := a.conn.QueryRow(ctx, `SELECT id, chunks, done_at IS NOT NULL FROM compromise
			WHERE peer = $1 AND act = $2 AND link = $3 AND first_epoch = $4 AND last_epoch = $5 AND session = $6 AND block = $7`,
			from.String(), m.Act, m.Link, c.First, c.Last, m.Session, m.Block).Scan(&c.ID, &c.Chunks, &c.Done)
		if !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		var lately int
		err = a.conn.QueryRow(ctx, "SELECT count(*) FROM compromise WHERE peer = $1 AND (done_at IS NULL OR done_at > $2)", from.String(), a.now.Add(-24*time.Hour)).Scan(&lately)
		if err == nil && lately >= maxHeard {
			err = refuse(ErrTooManyCompromises)
		}
		if err != nil {
			return err
		}
		event, err := givePadsUp(ctx, a, c, m.Session, m.Block, event)
		if err != nil {
			return err
		}
		a.record(event)
		return a.conn.QueryRow(ctx, `INSERT INTO compromise (peer, act, link, first_epoch, last_epoch, chunks, why, session, block)
			SELECT $1, $2, $3, $4, $5, coalesce(max(id), 0), $6, $7, $8 FROM chunk WHERE link = $3 AND (session, block) <= ($7::bigint, $8::bigint)
			RETURNING id, chunks`, from.String(), m.Act, m.Link, c.First, c.Last, c.Why, m.Session, m.Block).Scan(&c.ID, &c.Chunks)
	}), nil)
	if err != nil {
		return c, fmt.Errorf("hearing of a compromise: %w", err)
	}
	return c, nil
}

// Compromises lists those after an ID, oldest first.
func (db *DB) Compromises(ctx context.Context, after int64) ([]Compromise, error) {
	return db.compromises(ctx, "id > $1", after)
}

// UnfinishedCompromises lists those of which something may be left here, oldest first.
func (db *DB) UnfinishedCompromises(ctx context.Context) ([]Compromise, error) {
	return db.compromises(ctx, "done_at IS NULL")
}

func (db *DB) compromises(ctx context.Context, which string, args ...any) ([]Compromise, error) {
	rows, _ := db.pool.Query(ctx, "SELECT id, link, first_epoch, last_epoch, chunks, why, done_at IS NOT NULL FROM compromise WHERE "+which+" ORDER BY id", args...)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Compromise])
	if err != nil {
		return nil, away("listing compromises", err)
	}
	return list, nil
}

// BurnCompromised deletes what is left of up to 256 of the compromised chunks, whoever
// owns or leases them, and says of how many: 0 when none is left. event makes the event
// of those of one link.
func (db *DB) BurnCompromised(ctx context.Context, c Compromise, event func(link string, atoms []audit.Atoms) audit.Event) (n, chunks int, err error) {
	if err := db.refreshEpochs(ctx); err != nil {
		return 0, 0, err
	}
	err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		found, err := lockChunks(ctx, a, `remaining > 0 AND epoch BETWEEN $2 AND $3 AND id <= $4 AND $5 IN ('', link)
			ORDER BY epoch, id LIMIT $1 FOR UPDATE`, expireChunks, c.First, c.Last, c.Chunks, c.Link)
		if err != nil {
			return err
		}
		chunks = len(found)
		n, err = emptyOld(ctx, a, found, event)
		return err
	}), nil)
	if err != nil {
		return 0, 0, fmt.Errorf("burning compromised keys: %w", err)
	}
	return n, chunks, nil
}

// VoidCompromised ends the compromised keys that wait to be taken now, in batches of
// limit, and returns how many. Of the keys made here for pairs that are both served here,
// none is a link's; one of light whose link is not known is meant by a compromise of any.
// event makes the event of each batch.
func (db *DB) VoidCompromised(ctx context.Context, c Compromise, limit int, event func(rows []DueRef) audit.Event) (ended int, err error) {
	var all []overdueRow
	err = db.proven(ctx, func(tx pgx.Tx) error { // an older list would leave some for ever
		if _, err := tx.Exec(ctx, wholeTables); err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `SELECT key_id, sae, expiry_epoch FROM due WHERE ct IS NOT NULL AND key_id >= $1 AND key_id < $2
			AND ($3 IN ('', link) OR link = '' AND provenance <> 'local-rng')`,
			[16]byte(key.MinID(c.First.Start(db.cfg.EpochLength))), [16]byte(key.MinID(c.Last.End(db.cfg.EpochLength))), c.Link)
		var r overdueRow
		var id [16]byte
		var name string
		_, err := pgx.ForEachRow(rows, []any{&id, &name, &r.epoch}, func() (err error) {
			r.id = id
			r.sae, err = identity.ParseSAE(name)
			all = append(all, r)
			return err
		})
		return err
	})
	if err != nil {
		return 0, away("looking for compromised keys", err)
	}
	for len(all) > 0 {
		n := min(limit, len(all))
		w := &expire{event: event, how: GoneVoid, rows: all[:n]}
		if err := db.do(ctx, w, nil); err != nil {
			return ended, fmt.Errorf("ending compromised keys: %w", err)
		}
		ended += w.ended
		all = all[n:]
	}
	return ended, nil
}

// EndCompromise notes that nothing is left here of a compromise.
func (db *DB) EndCompromise(ctx context.Context, id int64) error {
	if _, err := db.pool.Exec(ctx, "UPDATE compromise SET done_at = $2 WHERE id = $1 AND done_at IS NULL", id, db.now()); err != nil {
		return away("ending a compromise", err)
	}
	return nil
}

// PendingCompromise is one that the other end of a link has not acknowledged.
type PendingCompromise struct {
	Peer identity.KME
	handover.Compromise
}

// CompromisesOut lists what is still to be told, oldest first.
func (db *DB) CompromisesOut(ctx context.Context) ([]PendingCompromise, error) {
	rows, _ := db.pool.Query(ctx, `SELECT l.peer_kme, o.act, o.link, c.first_epoch, c.last_epoch, o.session, o.block
		FROM compromise_out o JOIN compromise c ON c.id = o.act JOIN link l ON l.id = o.link WHERE o.acked_at IS NULL ORDER BY o.act, o.link`)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p PendingCompromise, err error) {
		var peer string
		if err := row.Scan(&peer, &p.Act, &p.Link, &p.First, &p.Last, &p.Session, &p.Block); err != nil {
			return p, err
		}
		p.Peer, err = identity.ParseKME(peer)
		return p, err
	})
	if err != nil {
		return nil, away("listing compromises to be told", err)
	}
	return list, nil
}

// AckCompromise notes that the other end of a link has burned its part.
func (db *DB) AckCompromise(ctx context.Context, act int64, link string) error {
	if _, err := db.pool.Exec(ctx, "UPDATE compromise_out SET acked_at = $3 WHERE act = $1 AND link = $2 AND acked_at IS NULL", act, link, db.now()); err != nil {
		return away("acknowledging a compromise", err)
	}
	return nil
}
