package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// AssignJob is the receiver's commit of a peer's announce. Its functions are
// called by the committer, possibly more than once: they must be quick and must
// change nothing.
type AssignJob struct {
	Peer     identity.KME
	Announce handover.Announce
	// Admit says why a request may not be assigned whatever the pool holds, or "".
	Admit func(handover.Request) string
	// Due has the rows of each request that may be assigned, by its ID: one for
	// each key and slave, sealed beforehand from what PoolAtoms gave. Link, peer, node,
	// run and batch are filled in from the announce.
	Due map[string][]Due
	// Seen is what PoolAtoms gave. It spares reading the pool once more: what has
	// changed since is noticed, and then it is read. May be nil.
	Seen map[key.ID]PooledAtom
	// Event makes the event of a request of a fresh batch.
	Event func(handover.Request, handover.Result) audit.Event
	// Ready, if not nil, makes the event of a block that was HELD here and has
	// become READY, since the peer announces keys of it.
	Ready func(handover.BlockRef) audit.Event
}

// Assign judges an announce against the peer node's row, and commits it if it is
// fresh: rows of accepted requests move from the pool to due, blocks they come
// from become READY, and the batch is the last one. A batch that was committed
// before is answered again from the rows.
//
// Whatever the announce says, an atom is assigned only if it lies in the chunk and
// at the place that the request names, and the peer owns that chunk.
func (db *DB) Assign(ctx context.Context, j AssignJob) (handover.AnnounceAnswer, error) {
	for _, r := range j.Announce.Requests {
		for _, k := range r.Keys {
			if len(k.Atoms) == 0 {
				return handover.AnnounceAnswer{}, fmt.Errorf("assigning: request %q names a key of no atoms", r.ID)
			}
		}
	}
	w := &assign{AssignJob: j, db: db, ids: atomsOf(j.Announce)}
	w.parts = db.byEpoch(w.ids)
	if err := db.learn(ctx, slices.Collect(maps.Keys(w.parts))...); err != nil {
		return handover.AnnounceAnswer{}, away("assigning", err)
	}
	if err := db.do(ctx, w, nil); err != nil {
		return handover.AnnounceAnswer{}, fmt.Errorf("assigning batch %d of run %d of %s: %w", j.Announce.Batch, j.Announce.Run, j.Announce.Node, err)
	}
	return w.answer, nil
}

type assign struct {
	AssignJob
	db     *DB
	ids    []key.ID // all atoms that the announce names
	parts  map[key.Epoch][]key.ID
	known  handover.PeerRun
	pool   map[key.ID]pooled
	answer handover.AnnounceAnswer

	doubted bool           // Seen did not hold
	chunks  map[int64]bool // with Seen: those of all atoms, and whether the peer owns them
}

// pooled is where an atom lies that is in the pool here.
type pooled struct {
	handover.BlockRef
	index int
	chunk int64
	owner string // "here" or "peer"
	state handover.BlockState
}

// atomsOf lists all atoms that an announce names, each once.
func atomsOf(a handover.Announce) []key.ID {
	var ids []key.ID
	seen := make(map[key.ID]bool)
	for _, r := range a.Requests {
		for _, k := range r.Keys {
			for _, id := range k.Atoms {
				if !seen[id] {
					seen[id] = true
					ids = append(ids, id)
				}
			}
		}
	}
	return ids
}

// claims the announces of the node, so that one batch is judged after the other,
// and the atoms.
func (w *assign) claims(claimed func(claim)) {
	claimed(claim{name: "announces/" + w.Peer.String() + "/" + w.Announce.Node})
	for _, id := range w.ids {
		claimed(claim{id: id})
	}
}

func (w *assign) weight() int {
	n := 1 + len(w.ids)
	for _, r := range w.Announce.Requests {
		n += len(r.Keys) * max(0, len(r.Slaves)-1) // a row for each further slave
	}
	return n
}

const (
	readPeerRun = "SELECT run, last, anew FROM peer_run WHERE peer = $1 AND node = $2"
	readPooled  = `SELECT k.id, k.index, c.id, c.owner, b.link, b.session, b.id, b.state FROM %s k JOIN chunk c ON c.id = k.chunk
		JOIN block b ON b.link = c.link AND b.session = c.session AND b.id = c.block WHERE k.id = ANY($1::uuid[])`
)

// believe says whether the batch is decided by what was seen of the pool: if all of
// it was there to be assigned.
func (w *assign) believe() bool {
	if w.doubted {
		return false
	}
	w.chunks = make(map[int64]bool)
	for _, id := range w.ids {
		p, ok := w.Seen[id]
		if !ok || p.BlockState != handover.Ready || !w.db.epochs.has(w.db.epochOf(id)) {
			clear(w.pool)
			w.chunks = nil
			return false
		}
		w.pool[id] = pooled{BlockRef: p.BlockRef, index: p.Index, chunk: p.Chunk, owner: "peer", state: p.BlockState}
		w.chunks[p.Chunk] = false
	}
	return true
}

// askBelieving deletes all atoms at once. settle sees whether they were there and the
// peer's; if not, or if not all of them go, the batch is tried again without belief.
func (w *assign) askBelieving(a *attempt) {
	for _, id := range w.ids {
		a.take(id, w.Seen[id].Place)
	}
	const owned = "SELECT id FROM chunk WHERE id = ANY($1::bigint[]) AND owner = 'peer' ORDER BY id FOR NO KEY UPDATE"
	a.reads.Queue(owned, slices.Sorted(maps.Keys(w.chunks))).Query(func(rows pgx.Rows) error {
		var id int64
		_, err := pgx.ForEachRow(rows, []any{&id}, func() error {
			w.chunks[id] = true
			return nil
		})
		return err
	})
}

// settleBelieving assigns the whole batch, if what was believed is so.
func (w *assign) settleBelieving(a *attempt) error {
	whole := w.answer.Standing == handover.Fresh
	for _, owned := range w.chunks {
		whole = whole && owned
	}
	if !whole || len(w.fresh(a)) != len(w.ids) || len(a.left(w.ids)) != len(w.ids) {
		w.doubted = true
		return errConflict
	}
	return nil
}

// ask reads the peer node's row, which is locked until the commit, and the atoms.
// They are deleted later, when it is known which: the DELETE must give back every
// one, or the batch is tried again.
func (w *assign) ask(a *attempt) error {
	w.known, w.pool, w.chunks = handover.PeerRun{}, make(map[key.ID]pooled), nil
	a.reads.Queue(readPeerRun+" FOR UPDATE", w.Peer.String(), w.Announce.Node).Query(func(rows pgx.Rows) error {
		_, err := pgx.ForEachRow(rows, []any{&w.known.Run, &w.known.Last, &w.known.Anew}, func() error { return nil })
		return err
	})
	if w.believe() {
		w.askBelieving(a)
		return nil
	}
	for e, ids := range w.parts {
		if !w.db.epochs.has(e) {
			continue // not in the pool, then
		}
		a.reads.Queue(fmt.Sprintf(readPooled, keyTable(e)), uuids(ids)).Query(func(rows pgx.Rows) error {
			var id [16]byte
			var p pooled
			_, err := pgx.ForEachRow(rows, []any{&id, &p.index, &p.chunk, &p.owner, &p.Link, &p.Session, &p.Block, &p.state}, func() error {
				w.pool[id] = p
				return nil
			})
			return err
		})
	}
	return nil
}

func (w *assign) settle(ctx context.Context, a *attempt) error {
	w.answer = handover.AnnounceAnswer{Standing: w.known.Judge(w.Announce.Run, w.Announce.Batch)}
	switch {
	case w.chunks != nil:
		return w.settleBelieving(a)
	case w.answer.Standing == handover.Repeat:
		return w.repeat(ctx, a)
	case w.answer.Standing == handover.Fresh:
		return w.delete(ctx, a, w.fresh(a))
	}
	return nil
}

func (w *assign) inPool(id key.ID) bool { _, ok := w.pool[id]; return ok }

// fresh decides the batch, adds the rows of what it accepts, and returns the atoms that
// are to leave the pool for them.
func (w *assign) fresh(a *attempt) []key.ID {
	w.answer.Results = handover.DecideFresh(w.Announce.Requests, w.admit, w.inPool)
	var ids []key.ID
	held := make(map[handover.BlockRef]bool)
	for i, res := range w.answer.Results {
		r := w.Announce.Requests[i]
		a.record(w.Event(r, res))
		if !res.Accepted {
			continue
		}
		atoms := make(map[key.ID][]key.ID) // of keys of several
		for _, k := range r.Keys {
			for _, id := range k.Atoms {
				p := w.pool[id]
				held[p.BlockRef] = p.state == handover.BlockHeld
			}
			if ids = append(ids, k.Atoms...); len(k.Atoms) > 1 {
				atoms[k.ID()] = k.Atoms
			}
		}
		for _, d := range w.Due[r.ID] {
			d.Link, d.Peer, d.Node, d.Run, d.Batch = r.Link, w.Peer, w.Announce.Node, w.Announce.Run, w.Announce.Batch
			a.due[d.ExpiryEpoch] = append(a.due[d.ExpiryEpoch], dueRow{d, atoms[d.Key]})
		}
	}
	for ref, wasHeld := range held {
		if !wasHeld {
			continue
		}
		a.writes.Queue("UPDATE block SET state = 'ready' WHERE link = $1 AND session = $2 AND id = $3 AND state = 'held'", ref.Link, ref.Session, ref.Block)
		if w.Ready != nil {
			a.record(w.Ready(ref))
		}
	}
	a.writes.Queue("UPDATE peer_run SET last = $3, anew = false WHERE peer = $1 AND node = $2", w.Peer.String(), w.Announce.Node, w.Announce.Batch)
	return ids
}

// delete takes atoms out of the pool, all or none.
func (w *assign) delete(ctx context.Context, a *attempt, ids []key.ID) error {
	if len(ids) == 0 {
		return nil
	}
	for _, id := range ids {
		a.remove(w.pool[id].chunk, 1)
	}
	var b pgx.Batch
	gone := int64(0)
	for e, part := range w.db.byEpoch(ids) {
		b.Queue(fmt.Sprintf(deleteAtoms, keyTable(e)), uuids(part)).Query(func(rows pgx.Rows) error {
			rows.Close()
			gone += rows.CommandTag().RowsAffected()
			return rows.Err()
		})
	}
	if err := a.conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	if gone != int64(len(ids)) {
		return errConflict
	}
	return nil
}

// admit adds to the caller's judgement what only this transaction can see.
func (w *assign) admit(r handover.Request) string {
	if why := w.Admit(r); why != "" {
		return why
	}
	whole := true
	for _, k := range r.Keys {
		for i, id := range k.Atoms {
			p, ok := w.pool[id]
			whole = whole && ok
			switch {
			case !ok: // it is refused as lacking
			case p.BlockRef != (handover.BlockRef{Link: r.Link, Session: k.Session, Block: k.Block}) || p.index != k.First+i:
				return "atoms that lie elsewhere"
			case p.owner != "peer":
				return "a chunk that is owned here"
			}
		}
	}
	if whole && !w.sealed(r) {
		return "not sealed in time" // the atoms came after the caller had looked
	}
	return ""
}

// sealed says whether there is a row for each key and slave, and no other.
func (w *assign) sealed(r handover.Request) bool {
	want := make(map[dueKey]bool)
	for _, k := range r.Keys {
		for _, s := range r.Slaves {
			want[dueKey{k.ID(), s}] = true
		}
	}
	for _, d := range w.Due[r.ID] {
		if !want[dueKey{d.Key, d.SAE}] || d.Master != r.Master || !w.db.epochs.fillable(d.ExpiryEpoch) {
			return false
		}
		delete(want, dueKey{d.Key, d.SAE})
	}
	return len(want) == 0 && len(w.Due[r.ID]) == len(r.Keys)*len(r.Slaves)
}

// repeat answers a batch that was committed before.
func (w *assign) repeat(ctx context.Context, a *attempt) error {
	var ids []key.ID
	for _, r := range w.Announce.Requests {
		for _, k := range r.Keys {
			ids = append(ids, k.ID())
		}
	}
	rows, _ := a.conn.Query(ctx, `SELECT key_id, sae, master, peer, node, run, batch, COALESCE(gone_how = 'void', false)
		FROM due WHERE key_id = ANY($1::uuid[])`, uuids(ids))
	defer rows.Close()
	due := make(map[key.ID][]handover.DueRow)
	for rows.Next() {
		var d handover.DueRow
		var sae, master, peer string
		if err := rows.Scan((*[16]byte)(&d.Key), &sae, &master, &peer, &d.Node, &d.Run, &d.Batch, &d.Voided); err != nil {
			return err
		}
		var errSAE, errMaster error
		d.SAE, errSAE = identity.ParseSAE(sae)
		d.Master, errMaster = identity.ParseSAE(master)
		if err := errors.Join(errSAE, errMaster); err != nil {
			return err
		}
		if peer != w.Peer.String() {
			d.Node = "" // another KME's node of that name
		}
		due[d.Key] = append(due[d.Key], d)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	w.answer.Results = handover.DecideRepeat(w.Announce, func(id key.ID) []handover.DueRow { return slices.Clone(due[id]) }, w.inPool)
	return nil
}
