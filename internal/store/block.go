package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// EnsureLink registers a link, before anything else is done with it. A link is for
// ever the one to its peer.
func (db *DB) EnsureLink(ctx context.Context, id string, peer identity.KME, end handover.End) error {
	_, err := db.pool.Exec(ctx, "INSERT INTO link (id, peer_kme, my_end) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", id, peer.String(), end.String())
	if err != nil {
		return away("registering link "+id, err)
	}
	var isPeer, isEnd string
	if err := db.pool.QueryRow(ctx, "SELECT peer_kme, my_end FROM link WHERE id = $1", id).Scan(&isPeer, &isEnd); err != nil {
		return away("registering link "+id, err)
	}
	if isPeer != peer.String() || isEnd != end.String() {
		return fmt.Errorf("link %s is known as %s's end of the link with %s", id, isEnd, isPeer)
	}
	db.ends.Store(id, end)
	return nil
}

// Links lists the links that there ever were.
func (db *DB) Links(ctx context.Context) ([]string, error) {
	rows, _ := db.pool.Query(ctx, "SELECT id FROM link ORDER BY id")
	links, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, away("listing links", err)
	}
	return links, nil
}

// LastBlock is the link's highest session, and when its last block was held or, if it
// has none yet, when it was opened. The session is 0 if there is none.
func (db *DB) LastBlock(ctx context.Context, link string) (session int64, at time.Time, err error) {
	err = db.pool.QueryRow(ctx, `SELECT s.id, COALESCE((SELECT held_at FROM block WHERE link = s.link AND session = s.id ORDER BY id DESC LIMIT 1), s.opened_at)
		FROM session s WHERE s.link = $1 ORDER BY s.id DESC LIMIT 1`, link).Scan(&session, &at)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, at, away("looking for the last block of link "+link, err)
	}
	return session, at, nil
}

// Session is the highest session ever opened on a link: 0 if none was.
func (db *DB) Session(ctx context.Context, link string) (session int64, err error) {
	if err := db.pool.QueryRow(ctx, "SELECT session FROM link WHERE id = $1", link).Scan(&session); err != nil {
		return 0, away("reading the session of link "+link, err)
	}
	return session, nil
}

// SurelySession is Session as it stands: see proven.
func (db *DB) SurelySession(ctx context.Context, link string) (session int64, err error) {
	err = db.proven(ctx, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, "SELECT session FROM link WHERE id = $1", link).Scan(&session)
	})
	if err != nil {
		return 0, away("reading the session of link "+link, err)
	}
	return session, nil
}

// OpenSession opens a session of a link, and closes all lower ones for ever. It
// must be higher than any opened before: otherwise ErrClosedSession.
func (db *DB) OpenSession(ctx context.Context, link string, session int64, event audit.Event) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		tag, err := a.conn.Exec(ctx, "UPDATE link SET session = $2 WHERE id = $1 AND session < $2", link, session)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return refuse(ErrClosedSession)
		}
		a.record(event)
		a.writes.Queue("UPDATE session SET closed_at = $2 WHERE link = $1 AND closed_at IS NULL", link, a.now)
		a.writes.Queue("INSERT INTO session (link, id, opened_at) VALUES ($1, $2, $3)", link, session, a.now)
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("opening session %d of link %s: %w", session, link, err)
	}
	return nil
}

// Atom is one wrapped atom of a block.
type Atom struct {
	ID    key.ID
	Index int // in its block, from 0
	KEK   int64
	IV    [12]byte
	CT    []byte // ciphertext and tag
	Place Place  // where its row lies; zero before it is stored
}

// Place is where the row of an atom lay when it was read. Deleting it there spares the
// index on key_IDs, in which atoms of one block lie far apart. It is a hint: whoever
// uses it compares the key_ID.
type Place pgtype.TID

// Block is a block as it comes from the link, every atom wrapped.
type Block struct {
	handover.BlockRef
	Epoch      key.Epoch
	Owners     handover.Owners
	Mine       handover.End // this end of the link
	Provenance key.Provenance
	Upstream   []key.ID // by index, the names that a device has for the atoms; nil if none had them before
	Digest     handover.Digest
	Atoms      []Atom // by index, without gaps
	Pads       []Pad  // what it gives to the link's reserve
}

func (db *DB) checkBlock(b Block) error {
	if !b.Owners.Valid(len(b.Atoms)) {
		return fmt.Errorf("%d atoms and owners %q", len(b.Atoms), b.Owners)
	}
	if len(b.Upstream) > 0 && len(b.Upstream) != len(b.Atoms) {
		return fmt.Errorf("%d atoms and %d names of a device", len(b.Atoms), len(b.Upstream))
	}
	for i, a := range b.Atoms {
		if a.Index != i {
			return fmt.Errorf("atom %d has index %d", i, a.Index)
		}
		if e := db.epochOf(a.ID); e != b.Epoch {
			return fmt.Errorf("atom %s is of epoch %d, its block of %d", a.ID, e, b.Epoch)
		}
	}
	return nil
}

// HoldBlock stores a block as HELD, its atoms by one COPY, and records event. It
// is refused with ErrClosedSession if the block's session is not the open one.
// A block that is here already is left as it is: with the same digest that is
// success, and nothing is recorded again; otherwise it is ErrOtherBlock.
func (db *DB) HoldBlock(ctx context.Context, b Block, event audit.Event) error {
	err := db.checkBlock(b)
	if err == nil {
		err = db.learn(ctx, b.Epoch)
	}
	if err == nil {
		err = db.do(ctx, solo(func(ctx context.Context, a *attempt) error { return db.hold(ctx, a, b, event) }), nil)
	}
	if err != nil {
		return fmt.Errorf("storing block %s: %w", b.BlockRef, err)
	}
	return nil
}

func (db *DB) hold(ctx context.Context, a *attempt, b Block, event audit.Event) error {
	if !db.epochs.fillable(b.Epoch) {
		return refuse(ErrExpired)
	}
	// The lock keeps the session open until this block is committed.
	var open bool
	err := a.conn.QueryRow(ctx, "SELECT session = $2 FROM link WHERE id = $1 FOR SHARE", b.Link, b.Session).Scan(&open)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && !open {
		return refuse(ErrClosedSession)
	}
	if err != nil {
		return err
	}
	tag, err := a.conn.Exec(ctx, `INSERT INTO block (link, session, id, epoch, atoms, owners, digest, provenance, upstream, state, held_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'held', $10) ON CONFLICT DO NOTHING`,
		b.Link, b.Session, b.Block, b.Epoch, len(b.Atoms), string(b.Owners), b.Digest[:], b.Provenance, b.Upstream, a.now)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 {
		var same bool
		err := a.conn.QueryRow(ctx, "SELECT digest = $4 AND state <> 'lost' FROM block WHERE link = $1 AND session = $2 AND id = $3",
			b.Link, b.Session, b.Block, b.Digest[:]).Scan(&same)
		if err == nil && !same {
			return refuse(ErrOtherBlock)
		}
		return err
	}
	chunks, err := insertChunks(ctx, a, b)
	if err != nil {
		return err
	}
	_, err = a.conn.CopyFrom(ctx, pgx.Identifier{keyTable(b.Epoch)}, []string{"id", "chunk", "index", "kek", "iv", "ct"},
		pgx.CopyFromSlice(len(b.Atoms), func(i int) ([]any, error) {
			at := &b.Atoms[i]
			return []any{[16]byte(at.ID), chunks[i/key.ChunkAtoms], int32(i), at.KEK, at.IV[:], at.CT}, nil
		}))
	b.keep(a)
	a.record(event)
	return err
}

// insertChunks returns the IDs of the block's chunks, in order.
func insertChunks(ctx context.Context, a *attempt, b Block) ([]int64, error) {
	n := handover.Chunks(len(b.Atoms))
	firsts, counts, owners := make([]int32, n), make([]int32, n), make([]string, n)
	for i := range n {
		firsts[i] = int32(i * key.ChunkAtoms)
		counts[i] = int32(min(key.ChunkAtoms, len(b.Atoms)-i*key.ChunkAtoms))
		if owners[i] = "peer"; b.Owners.Of(i*key.ChunkAtoms) == b.Mine {
			owners[i] = "here"
		}
	}
	rows, _ := a.conn.Query(ctx, `INSERT INTO chunk (link, session, block, epoch, first, atoms, owner, remaining)
		SELECT $1, $2, $3, $4, first, atoms, owner, atoms FROM unnest($5::int[], $6::int[], $7::text[]) AS c (first, atoms, owner)
		RETURNING first, id`, b.Link, b.Session, b.Block, b.Epoch, firsts, counts, owners)
	ids := make([]int64, n)
	var first int
	var id int64
	_, err := pgx.ForEachRow(rows, []any{&first, &id}, func() error {
		ids[first/key.ChunkAtoms] = id
		return nil
	})
	return ids, err
}
