package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Story is what is known here of one key, but for its bytes.
type Story struct {
	Pool *PoolPlace // where its first atom lies; nil if that is not in the pool (any more)
	Due  []Taken    // its assignments, while the tables of their epochs are there
	Told []Told     // the events that name it, oldest first, at most 1000
}

// PoolPlace is where an atom lies in the pool.
type PoolPlace struct {
	handover.BlockRef
	Index  int
	KEK    int64
	Owner  string // "here" or "peer"
	Leased string // the node that has leased its chunk, "" if none
	HeldAt time.Time
	State  handover.BlockState
	From   key.Provenance

	Upstream key.ID // the device's name of it; zero if none had it before
}

// Told is an event as it stands in the audit.
type Told struct {
	Node string
	Seq  int64
	At   time.Time
	Body []byte // its canonical text
}

// Story gathers what is known of a key.
func (db *DB) Story(ctx context.Context, id key.ID) (s Story, err error) {
	if err := db.refreshEpochs(ctx); err != nil {
		return s, err
	}
	if e := db.epochOf(id); db.epochs.has(e) {
		rows, _ := db.pool.Query(ctx, `SELECT b.link, b.session, b.id, k.index, k.kek, c.owner, coalesce(c.node, ''), b.held_at, b.state, b.provenance,
			coalesce(b.upstream[k.index + 1], '00000000-0000-0000-0000-000000000000')
			FROM `+keyTable(e)+` k JOIN chunk c ON c.id = k.chunk JOIN block b ON b.link = c.link AND b.session = c.session AND b.id = c.block
			WHERE k.id = $1`, [16]byte(id))
		places, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p PoolPlace, err error) {
			return p, row.Scan(&p.Link, &p.Session, &p.Block, &p.Index, &p.KEK, &p.Owner, &p.Leased, &p.HeldAt, &p.State, &p.From, (*[16]byte)(&p.Upstream))
		})
		if err != nil && !missingTable(err) {
			return s, away("looking for an atom", err)
		}
		if len(places) > 0 {
			s.Pool = &places[0]
		}
	}
	found, err := db.readDue(ctx, "SELECT "+dueColumns+" FROM due WHERE key_id = ANY($1::uuid[]) ORDER BY sae", []key.ID{id})
	if err != nil {
		return s, away("looking for assignments", err)
	}
	for _, t := range found[id] {
		t.IV, t.CT = [12]byte{}, nil
		s.Due = append(s.Due, t)
	}
	rows, _ := db.pool.Query(ctx, "SELECT node, seq, at, body FROM key_story($1, $2::text::date)", [16]byte(id), id.EpochStart().UTC().Add(-24*time.Hour).Format(time.DateOnly))
	s.Told, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Told, err error) {
		return e, row.Scan(&e.Node, &e.Seq, &e.At, &e.Body)
	})
	if err != nil {
		return s, away("reading what the audit says of a key", err)
	}
	return s, nil
}
