package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// ErrSpent says that a pad is not above the highest that is spent.
var ErrSpent = errors.New("the pad is spent")

// ErrNoPad says that the reserve does not hold the pad, or none at all.
var ErrNoPad = errors.New("the reserve holds no such pad")

// PadName names a pad of a link: the block that it came from, and its place there. Names
// are ordered as their members are.
type PadName struct {
	Session, Block int64
	Index          int
}

// Pad is a wrapped pad of the reserve.
type Pad struct {
	PadName
	KEK int64
	IV  [12]byte
	CT  []byte
}

const padColumns = "p.session, p.block, p.index, p.kek, p.iv, p.ct"

// unspent is what is above all that is spent, and may be opened. p is the pad, a the row of
// link_auth, if there is one.
const unspent = "(p.session, p.block, p.index) > (COALESCE(a.session, 0), COALESCE(a.block, 0), COALESCE(a.index, 0))" +
	" AND NOT EXISTS (SELECT FROM kek WHERE kek.id = p.kek AND kek.state = 'destroyed')"

// NextPad is the lowest pad of those above one that are not spent, of a block that both
// ends hold.
func (db *DB) NextPad(ctx context.Context, link string, over PadName) (Pad, error) {
	return db.pad(ctx, `SELECT `+padColumns+` FROM pad p JOIN block b ON b.link = p.link AND b.session = p.session AND b.id = p.block
		LEFT JOIN link_auth a ON a.link = p.link WHERE p.link = $1 AND b.state = 'ready' AND `+unspent+`
		AND (p.session, p.block, p.index) > ($2, $3, $4) ORDER BY p.session, p.block, p.index LIMIT 1`, link, over.Session, over.Block, over.Index)
}

// Pad is the one of that name, unless it is spent, or its block lost.
func (db *DB) Pad(ctx context.Context, link string, name PadName) (Pad, error) {
	return db.pad(ctx, `SELECT `+padColumns+` FROM pad p JOIN block b ON b.link = p.link AND b.session = p.session AND b.id = p.block
		LEFT JOIN link_auth a ON a.link = p.link
		WHERE p.link = $1 AND p.session = $2 AND p.block = $3 AND p.index = $4 AND b.state <> 'lost' AND `+unspent, link, name.Session, name.Block, name.Index)
}

func (db *DB) pad(ctx context.Context, sql string, args ...any) (p Pad, err error) {
	var iv []byte
	err = db.pool.QueryRow(ctx, sql, args...).Scan(&p.Session, &p.Block, &p.Index, &p.KEK, &iv, &p.CT)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return p, ErrNoPad
	case err != nil:
		return p, away("looking for a pad", err)
	case len(iv) != len(p.IV):
		return p, fmt.Errorf("a pad with an IV of %d bytes", len(iv))
	}
	p.IV = [12]byte(iv)
	return p, nil
}

// Reserve is how a link's reserve stands.
type Reserve struct {
	Pads     int     // that are not spent, of blocks that are not lost
	Lowest   PadName // of these; zero if there is none
	Spent    PadName // the highest that is spent; zero if none is
	Failures int     // tags of the peer that were wrong since the last block
}

// Reserve tells how it stands.
func (db *DB) Reserve(ctx context.Context, link string) (r Reserve, err error) {
	err = db.pool.QueryRow(ctx, "SELECT session, block, index, failures FROM link_auth WHERE link = $1", link).
		Scan(&r.Spent.Session, &r.Spent.Block, &r.Spent.Index, &r.Failures)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return r, away("reading what is spent of the reserve", err)
	}
	err = db.pool.QueryRow(ctx, `SELECT count(*) OVER (), p.session, p.block, p.index FROM pad p
		JOIN block b ON b.link = p.link AND b.session = p.session AND b.id = p.block LEFT JOIN link_auth a ON a.link = p.link
		WHERE p.link = $1 AND b.state <> 'lost' AND `+unspent+` ORDER BY 2, 3, 4 LIMIT 1`, link).
		Scan(&r.Pads, &r.Lowest.Session, &r.Lowest.Block, &r.Lowest.Index)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return r, away("counting the reserve", err)
	}
	return r, nil
}

// SpendPad commits that the pad of that name is spent, and every lower one, in the session
// that is open: ErrSpent if it is already, ErrClosedSession if another session is open.
// Only then may a tag made with it leave.
func (db *DB) SpendPad(ctx context.Context, link string, session int64, name PadName) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		var open bool
		err := a.conn.QueryRow(ctx, "SELECT session = $2 FROM link WHERE id = $1 FOR SHARE", link, session).Scan(&open)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && !open {
			return refuse(ErrClosedSession)
		}
		if err != nil {
			return err
		}
		tag, err := a.conn.Exec(ctx, `INSERT INTO link_auth AS a (link, session, block, index) VALUES ($1, $2, $3, $4)
			ON CONFLICT (link) DO UPDATE SET session = $2, block = $3, index = $4 WHERE (a.session, a.block, a.index) < ($2, $3, $4)`,
			link, name.Session, name.Block, name.Index)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return refuse(ErrSpent)
		}
		a.writes.Queue("DELETE FROM pad WHERE link = $1 AND (session, block, index) <= ($2, $3, $4)", link, name.Session, name.Block, name.Index)
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("spending a pad of link %s: %w", link, err)
	}
	return nil
}

// TagFailed counts a tag of the peer that was wrong. TrustAgain forgets the count.
func (db *DB) TagFailed(ctx context.Context, link string) error {
	return db.countFailures(ctx, link, "failures + 1", nil)
}

// TrustAgain forgets how many tags were wrong. late is as in ServeJob.
func (db *DB) TrustAgain(ctx context.Context, link string, late func(committed bool), events ...audit.Event) error {
	return db.countFailures(ctx, link, "0", late, events...)
}

func (db *DB) countFailures(ctx context.Context, link, to string, late func(committed bool), events ...audit.Event) error {
	err := db.do(ctx, solo(func(_ context.Context, a *attempt) error {
		a.record(events...)
		a.writes.Queue("INSERT INTO link_auth (link) VALUES ($1) ON CONFLICT DO NOTHING", link)
		a.writes.Queue("UPDATE link_auth SET failures = "+to+" WHERE link = $1", link)
		return nil
	}), late)
	if err != nil {
		return fmt.Errorf("counting wrong tags of link %s: %w", link, err)
	}
	return nil
}

// LinkPad is a pad of a link.
type LinkPad struct {
	Link string
	Pad
}

// PadsUnder lists the pads that are sealed under a KEK of an epoch.
func (db *DB) PadsUnder(ctx context.Context, e key.Epoch) ([]LinkPad, error) {
	rows, _ := db.pool.Query(ctx, "SELECT p.link, "+padColumns+" FROM pad p JOIN kek k ON k.id = p.kek WHERE k.epoch = $1", e)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p LinkPad, err error) {
		var iv []byte
		err = row.Scan(&p.Link, &p.Session, &p.Block, &p.Index, &p.KEK, &iv, &p.CT)
		if err == nil && copy(p.IV[:], iv) != len(p.IV) {
			err = fmt.Errorf("a pad with an IV of %d bytes", len(iv))
		}
		return p, err
	})
	if err != nil {
		return nil, away("looking for the pads of an epoch", err)
	}
	return list, nil
}

// ResealPads replaces what pads are sealed as, where they are not spent by now, and forgets
// those that do not open.
func (db *DB) ResealPads(ctx context.Context, pads, spoilt []LinkPad) error {
	const named = " WHERE link = $1 AND session = $2 AND block = $3 AND index = $4"
	err := db.do(ctx, solo(func(_ context.Context, a *attempt) error {
		for _, p := range pads {
			a.writes.Queue("UPDATE pad SET kek = $5, iv = $6, ct = $7"+named, p.Link, p.Session, p.Block, p.Index, p.KEK, p.IV[:], p.CT)
		}
		for _, p := range spoilt {
			a.writes.Queue("DELETE FROM pad"+named, p.Link, p.Session, p.Block, p.Index)
		}
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("sealing %d pads anew: %w", len(pads), err)
	}
	return nil
}

// maxReserve is how many pads Alice's end of a link keeps.
const maxReserve = 256

// ReserveLimit is how many pads an end of a link keeps, if each block gives so many. It is
// Alice who names the pad of a block: if each end counted, what the one keeps the other might
// not. So Bob's keeps all that an honest Alice may have kept: while her reserve is full each
// block spends her lowest and has room for one, and those of a block that she has not kept he
// forgets when she spends a higher one. One that never does fills up no more than that.
func ReserveLimit(end handover.End, each int) int {
	if end == handover.Bob {
		return maxReserve * (each + 1)
	}
	return maxReserve
}

// keep adds a block's pads to the reserve, as long as it is not full.
func (b Block) keep(a *attempt) {
	limit := ReserveLimit(b.Mine, len(b.Pads))
	for _, p := range b.Pads {
		a.writes.Queue(`INSERT INTO pad (link, session, block, index, kek, iv, ct) SELECT $1, $2, $3, $4, $5, $6, $7
			WHERE (SELECT count(*) FROM pad WHERE link = $1) < $8`, b.Link, b.Session, b.Block, p.Index, p.KEK, p.IV[:], p.CT, limit)
	}
	a.writes.Queue("UPDATE link_auth SET failures = 0 WHERE link = $1 AND failures > 0", b.Link)
}
