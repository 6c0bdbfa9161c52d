package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// BlockEvents makes the events of what a message did to a block: its state before
// and after, and how many atoms were deleted because it was lost. It is called by
// the committer, possibly more than once, also when nothing moved.
type BlockEvents func(before, after handover.BlockState, lost int) []audit.Event

// HeardHeld answers the peer's word that it holds a block, and moves ours
// accordingly (handover.OnHeld): READY, or LOST and its keys deleted.
func (db *DB) HeardHeld(ctx context.Context, h handover.Held, from identity.KME, events BlockEvents) (handover.HeldAnswer, error) {
	var answer handover.HeldAnswer
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		// In this order: once the session is seen closed, whatever it held is seen.
		var session int64
		err := a.conn.QueryRow(ctx, "SELECT session FROM link WHERE id = $1 AND peer_kme = $2", h.Link, from.String()).Scan(&session)
		if errors.Is(err, pgx.ErrNoRows) {
			return refuse(fmt.Errorf("%s is not the other end of link %s", from, h.Link))
		}
		if err != nil {
			return err
		}
		was, err := lockBlock(ctx, a, h.BlockRef)
		if err != nil {
			return err
		}
		var after handover.BlockState
		after, answer = handover.OnHeld(was.state, was.digest == h.Digest, h.Session < session)
		return moveBlock(ctx, a, h.BlockRef, was, after, events)
	}), nil)
	if err != nil {
		return "", fmt.Errorf("hearing of block %s: %w", h.BlockRef, err)
	}
	return answer, nil
}

// HeardHeldAnswer moves our block as the peer's answer to our Held asks
// (handover.OnHeldAnswer).
func (db *DB) HeardHeldAnswer(ctx context.Context, ref handover.BlockRef, answer handover.HeldAnswer, events BlockEvents) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		was, err := lockBlock(ctx, a, ref)
		if err != nil {
			return err
		}
		return moveBlock(ctx, a, ref, was, handover.OnHeldAnswer(was.state, answer), events)
	}), nil)
	if err != nil {
		return fmt.Errorf("hearing the answer about block %s: %w", ref, err)
	}
	return nil
}

// heldBlock is what is kept of a block here; Absent if it is not.
type heldBlock struct {
	state  handover.BlockState
	digest handover.Digest
	epoch  key.Epoch
}

func lockBlock(ctx context.Context, a *attempt, ref handover.BlockRef) (b heldBlock, err error) {
	var digest []byte
	err = a.conn.QueryRow(ctx, "SELECT state, digest, epoch FROM block WHERE link = $1 AND session = $2 AND id = $3 FOR UPDATE",
		ref.Link, ref.Session, ref.Block).Scan(&b.state, &digest, &b.epoch)
	if errors.Is(err, pgx.ErrNoRows) {
		return heldBlock{}, nil
	}
	copy(b.digest[:], digest)
	return b, err
}

// moveBlock moves a block, and deletes its keys and pads if it goes to Lost.
func moveBlock(ctx context.Context, a *attempt, ref handover.BlockRef, was heldBlock, after handover.BlockState, events BlockEvents) error {
	lost := 0
	if after != was.state {
		_, err := a.conn.Exec(ctx, "UPDATE block SET state = $4 WHERE link = $1 AND session = $2 AND id = $3", ref.Link, ref.Session, ref.Block, after)
		if err != nil {
			return err
		}
	}
	if after == handover.Lost && was.state != handover.Lost {
		rows, _ := a.conn.Query(ctx, "SELECT id FROM chunk WHERE link = $1 AND session = $2 AND block = $3", ref.Link, ref.Session, ref.Block)
		chunks, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		if err != nil {
			return err
		}
		gone, err := emptyChunks(ctx, a, was.epoch, chunks)
		if err != nil {
			return err
		}
		lost = len(gone)
		a.writes.Queue("DELETE FROM pad WHERE link = $1 AND session = $2 AND block = $3", ref.Link, ref.Session, ref.Block)
	}
	a.record(events(was.state, after, lost)...)
	return nil
}

// goneAtom is an atom that was deleted with its chunk.
type goneAtom struct {
	chunk int64
	index int
}

// emptyChunks deletes all that is left of chunks of an epoch.
func emptyChunks(ctx context.Context, a *attempt, e key.Epoch, chunks []int64) ([]goneAtom, error) {
	if err := a.c.db.learn(ctx, e); err != nil { // another node may have opened it
		return nil, err
	}
	if !a.c.db.epochs.has(e) {
		return nil, nil
	}
	rows, _ := a.conn.Query(ctx, "DELETE FROM "+keyTable(e)+" WHERE chunk = ANY($1::bigint[]) RETURNING chunk, index", chunks)
	gone, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (g goneAtom, err error) { return g, row.Scan(&g.chunk, &g.index) })
	for _, g := range gone {
		a.remove(g.chunk, 1)
	}
	return gone, err
}

// HeldBlocks lists the blocks of a link that are still HELD here, to be told again.
func (db *DB) HeldBlocks(ctx context.Context, link string) ([]handover.Held, error) {
	rows, _ := db.pool.Query(ctx, "SELECT link, session, id, epoch, atoms, owners, digest FROM block WHERE link = $1 AND state = 'held' ORDER BY session, id", link)
	held, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (h handover.Held, err error) {
		var digest []byte
		err = row.Scan(&h.Link, &h.Session, &h.Block, &h.Epoch, &h.Atoms, &h.Owners, &digest)
		copy(h.Digest[:], digest)
		return h, err
	})
	if err != nil {
		return nil, away("listing held blocks", err)
	}
	return held, nil
}
