package store

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Lease is a chunk that this node's run alone may serve from.
type Lease struct {
	Chunk int64
	handover.BlockRef
	First      int // index of the chunk's first atom in its block
	Epoch      key.Epoch
	Provenance key.Provenance
	Atoms      []Atom // those still in the pool, by index
}

// Lease leases up to maxChunks chunks of a link: owned here, of READY blocks, not
// leased by anybody, oldest epoch first. Chunks that an earlier call leased without
// being able to return them come first.
func (db *DB) Lease(ctx context.Context, link string, maxChunks int) ([]Lease, error) {
	var chunks []int64
	act := solo(func(ctx context.Context, a *attempt) error {
		rows, _ := a.conn.Query(ctx, `WITH pick AS (
				SELECT c.id `+fromFree+` ORDER BY c.epoch, c.id LIMIT $2 FOR UPDATE OF c SKIP LOCKED)
			UPDATE chunk SET node = $3, run = $4 FROM pick WHERE chunk.id = pick.id RETURNING chunk.id`,
			link, maxChunks, db.cfg.Node, a.c.run)
		picked, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		chunks = picked
		return err
	})
	err := db.do(ctx, act, func(committed bool) {
		if committed {
			db.setAside(link, chunks)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("leasing chunks of link %s: %w", link, err)
	}
	db.mu.Lock()
	chunks = append(db.unclaimed[link], chunks...)
	delete(db.unclaimed, link)
	db.mu.Unlock()
	leases, err := db.loadLeases(ctx, link, chunks)
	if err != nil {
		db.setAside(link, chunks)
		return nil, away("loading leased chunks of link "+link, err)
	}
	return leases, nil
}

const fromFree = `FROM chunk c JOIN block b ON b.link = c.link AND b.session = c.session AND b.id = c.block
	WHERE c.link = $1 AND c.owner = 'here' AND c.node IS NULL AND c.remaining > 0 AND b.state = 'ready'`

// Free is how many chunks of a link Lease would lease now, counted no further than most:
// a pool may hold some hundred thousand.
func (db *DB) Free(ctx context.Context, link string, most int) (chunks int, err error) {
	if err := db.pool.QueryRow(ctx, "SELECT count(*) FROM (SELECT "+fromFree+" LIMIT $2) c", link, most).Scan(&chunks); err != nil {
		return 0, away("counting what can be leased of link "+link, err)
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	return min(most, chunks+len(db.unclaimed[link])), nil
}

// setAside keeps chunks of a link that are leased by this run and that nobody uses.
func (db *DB) setAside(link string, chunks []int64) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.unclaimed[link] = append(db.unclaimed[link], chunks...)
}

// loadLeases reads leased chunks and their atoms. Nobody but this node changes
// them, unless their block is lost.
func (db *DB) loadLeases(ctx context.Context, link string, chunks []int64) ([]Lease, error) {
	rows, _ := db.pool.Query(ctx, `SELECT c.id, c.link, c.session, c.block, c.first, c.epoch, b.provenance FROM chunk c
		JOIN block b ON b.link = c.link AND b.session = c.session AND b.id = c.block
		WHERE c.id = ANY($1::bigint[]) ORDER BY c.epoch, c.id`, chunks)
	leases, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (l Lease, err error) {
		return l, row.Scan(&l.Chunk, &l.Link, &l.Session, &l.Block, &l.First, &l.Epoch, &l.Provenance)
	})
	if err != nil {
		return nil, err
	}
	at := make(map[int64]*Lease, len(leases))
	parts := make(map[key.Epoch][]int64)
	for i := range leases {
		l := &leases[i]
		at[l.Chunk] = l
		parts[l.Epoch] = append(parts[l.Epoch], l.Chunk)
	}
	if err := db.learn(ctx, slices.Collect(maps.Keys(parts))...); err != nil { // another node may have opened them
		return nil, err
	}
	for e, ids := range parts {
		rows, _ := db.pool.Query(ctx, "SELECT chunk, id, index, kek, iv, ct, ctid FROM "+keyTable(e)+" WHERE chunk = ANY($1::bigint[]) ORDER BY chunk, index", ids)
		for rows.Next() {
			var chunk int64
			var a Atom
			var iv []byte
			if err := rows.Scan(&chunk, (*[16]byte)(&a.ID), &a.Index, &a.KEK, &iv, &a.CT, (*pgtype.TID)(&a.Place)); err != nil {
				rows.Close()
				return nil, err
			}
			copy(a.IV[:], iv)
			at[chunk].Atoms = append(at[chunk].Atoms, a)
		}
		if err := rows.Err(); err != nil {
			return nil, err
		}
	}
	return leases, nil
}

// Stored is how many atoms of a link this end may still hand out: those left in
// the READY chunks that it owns, leased or not. Counting takes the longer the more is
// stored, and any SAE may ask as often as it likes: those who come while it is counted
// share the next count.
func (db *DB) Stored(ctx context.Context, link string) (atoms int, err error) {
	c, _ := db.counts.LoadOrStore(link, new(turns[int]))
	atoms, err = c.(*turns[int]).next(ctx, func(ctx context.Context) (n int, err error) {
		// All that lies here, less the few blocks that are not READY: a join of all
		// chunks with their blocks takes three times as long.
		err = db.pool.QueryRow(ctx, `SELECT COALESCE(sum(remaining), 0) - COALESCE((SELECT sum(c.remaining) FROM block b
				JOIN chunk c ON b.link = c.link AND b.session = c.session AND b.id = c.block
				WHERE b.link = $1 AND b.state <> 'ready' AND c.owner = 'here'), 0)
			FROM chunk WHERE link = $1 AND owner = 'here'`, link).Scan(&n)
		return n, err
	})
	if err != nil {
		return 0, away("counting what link "+link+" has stored", err)
	}
	return atoms, nil
}

// Pool is how many atoms of a link are left at each owner, HELD blocks included:
// what a new block is shared by.
func (db *DB) Pool(ctx context.Context, link string) (here, peer int, err error) {
	err = db.pool.QueryRow(ctx, sumPool, link).Scan(&here, &peer)
	if err != nil {
		return 0, 0, away("counting the pool of link "+link, err)
	}
	return here, peer, nil
}

const sumPool = `SELECT COALESCE(sum(remaining) FILTER (WHERE owner = 'here'), 0), COALESCE(sum(remaining) FILTER (WHERE owner = 'peer'), 0)
	FROM chunk WHERE link = $1`

// PooledAtom is an atom in the pool and where it lies.
type PooledAtom struct {
	Atom
	Chunk int64
	handover.BlockRef
	Epoch      key.Epoch
	Provenance key.Provenance
	Owner      handover.End
	BlockState handover.BlockState
}

// PoolAtoms reads those of the keys' atoms that are in the pool of a link.
func (db *DB) PoolAtoms(ctx context.Context, refs []handover.Key, link string) (map[key.ID]PooledAtom, error) {
	var ids []key.ID
	for _, r := range refs {
		ids = append(ids, r.Atoms...)
	}
	parts := db.byEpoch(ids)
	if err := db.learn(ctx, slices.Collect(maps.Keys(parts))...); err != nil {
		return nil, away("reading atoms", err)
	}
	end, ok := db.ends.Load(link)
	if !ok {
		return nil, fmt.Errorf("reading atoms: link %s is not registered", link)
	}
	atoms, crowded := make(map[key.ID]PooledAtom, len(ids)), crowdedChunks(refs)
	for e, part := range parts {
		if !db.epochs.has(e) {
			continue
		}
		if err := db.readPool(ctx, e, part, crowded, link, end.(handover.End), atoms); err != nil && !missingTable(err) {
			return nil, away("reading atoms", err)
		}
	}
	return atoms, nil
}

// chunkPlaces are where chunks of a link lie: the columns of their index.
type chunkPlaces struct {
	sessions, blocks []int64
	firsts           []int32
}

// crowd is how many atoms of a chunk must be wanted for the whole of it to be read: its
// atoms lie side by side, and looking for one alone takes the server ten times as long.
const crowd = key.ChunkAtoms / 8

// crowdedChunks are the chunks that many of the keys' atoms lie in, by what the keys say.
func crowdedChunks(refs []handover.Key) (at chunkPlaces) {
	type place struct {
		session, block int64
		first          int
	}
	wanted := make(map[place]int)
	for _, r := range refs {
		p := place{r.Session, r.Block, r.First - r.First%key.ChunkAtoms}
		was := wanted[p]
		wanted[p] += len(r.Atoms)
		if was < crowd && wanted[p] >= crowd {
			at.sessions, at.blocks, at.firsts = append(at.sessions, p.session), append(at.blocks, p.block), append(at.firsts, int32(p.first))
		}
	}
	return at
}

const (
	pooledColumns = "SELECT k.id, k.index, k.kek, k.iv, k.ct, k.ctid, c.id, b.link, b.session, b.id, b.epoch, b.provenance, b.state, c.owner = 'here' FROM "
	itsBlock      = " JOIN block b ON b.link = c.link AND b.session = c.session AND b.id = c.block "
)

// readPool adds to atoms those of ids that are in an epoch's pool. Chunks that are said to
// be crowded are read first, and what was not found in them is looked for wherever it is.
func (db *DB) readPool(ctx context.Context, e key.Epoch, ids []key.ID, crowded chunkPlaces, link string, end handover.End, atoms map[key.ID]PooledAtom) error {
	missing := make(map[key.ID]bool, len(ids))
	for _, id := range ids {
		missing[id] = true
	}
	add := func(rows pgx.Rows) error {
		defer rows.Close()
		for rows.Next() {
			var p PooledAtom
			var iv []byte
			var ours bool
			err := rows.Scan((*[16]byte)(&p.ID), &p.Index, &p.KEK, &iv, &p.CT, (*pgtype.TID)(&p.Place), &p.Chunk, &p.Link, &p.Session, &p.Block, &p.Epoch, &p.Provenance, &p.BlockState, &ours)
			if err != nil {
				return err
			}
			if p.Link != link || !missing[p.ID] {
				continue
			}
			copy(p.IV[:], iv)
			if p.Owner = end; !ours {
				p.Owner = end.Other()
			}
			atoms[p.ID] = p
			delete(missing, p.ID)
		}
		return rows.Err()
	}
	if len(crowded.firsts) > 0 {
		// Each chunk is looked up by itself (OFFSET 0): else the planner may read all of
		// its block's.
		rows, _ := db.pool.Query(ctx, pooledColumns+`unnest($2::bigint[], $3::bigint[], $4::int[]) AS w (session, block, first)
			CROSS JOIN LATERAL (SELECT * FROM chunk WHERE link = $1 AND session = w.session AND block = w.block AND first = w.first OFFSET 0) c`+
			itsBlock+"JOIN "+keyTable(e)+" k ON k.chunk = c.id", link, crowded.sessions, crowded.blocks, crowded.firsts)
		if err := add(rows); err != nil {
			return err
		}
	}
	if len(missing) == 0 {
		return nil
	}
	// The link is compared above: as a condition of the query it would have the
	// planner read all chunks of the link.
	rows, _ := db.pool.Query(ctx, pooledColumns+keyTable(e)+" k JOIN chunk c ON c.id = k.chunk"+itsBlock+"WHERE k.id = ANY($1::uuid[])",
		uuids(slices.Collect(maps.Keys(missing))))
	return add(rows)
}
