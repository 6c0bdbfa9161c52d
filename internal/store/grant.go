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

// GiveJob gives chunks of a link to its other end.
type GiveJob struct {
	Link string
	From key.Epoch // chunks of earlier epochs are too old to be of use
	Most int       // chunks
	// Decide says how many chunks to give, from the atoms that are left at this end
	// and at the other. It is called in the transaction that gives them.
	Decide func(here, there int) (chunks int)
	Event  func(chunks []audit.Atoms) audit.Event // of what was given; not called for nothing
}

// Balance is what the ends of a link have left, after a GiveChunks or at any time.
type Balance struct {
	Here, There int // atoms
	Given       int // chunks, by that call
}

// GiveChunks makes chunks that Decide finds superfluous the other end's, and leaves
// that to be told (PendingGrants), in one transaction: those that may be given
// (handover.Chunk.MayGive), of the oldest epochs first. These are the nearest to
// their end, and the end that is in want will use them first.
//
// Of the nodes of a site one at a time gives: the others, meanwhile, give nothing.
// What Decide is told is thus what the last one has left.
func (db *DB) GiveChunks(ctx context.Context, j GiveJob) (Balance, error) {
	var b Balance
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) (err error) {
		b, err = giveChunks(ctx, a, j)
		return err
	}), nil)
	if err != nil {
		return Balance{}, fmt.Errorf("giving chunks of link %s: %w", j.Link, err)
	}
	return b, nil
}

// Balance is what the ends of a link have left, of an epoch and later ones.
func (db *DB) Balance(ctx context.Context, link string, from key.Epoch) (b Balance, err error) {
	if err := db.pool.QueryRow(ctx, sumPool+" AND epoch >= $2", link, from).Scan(&b.Here, &b.There); err != nil {
		return Balance{}, away("weighing the ends of link "+link, err)
	}
	return b, nil
}

func giveChunks(ctx context.Context, a *attempt, j GiveJob) (b Balance, err error) {
	var alone bool
	if err := a.conn.QueryRow(ctx, "SELECT pg_try_advisory_xact_lock(hashtextextended('give ' || $1::text, 0))", j.Link).Scan(&alone); err != nil {
		return b, err
	}
	err = a.conn.QueryRow(ctx, sumPool+" AND epoch >= $2", j.Link, j.From).Scan(&b.Here, &b.There)
	if err != nil || !alone {
		return b, err
	}
	n := min(j.Decide(b.Here, b.There), j.Most)
	if n <= 0 {
		return b, nil
	}
	rows, _ := a.conn.Query(ctx, `WITH pick AS (
			SELECT c.id FROM chunk c JOIN block b ON b.link = c.link AND b.session = c.session AND b.id = c.block
			WHERE c.link = $1 AND c.owner = 'here' AND c.node IS NULL AND c.remaining > 0 AND b.state = 'ready' AND c.epoch >= $2 AND c.grants < $3
			ORDER BY c.epoch, c.id LIMIT $4 FOR UPDATE OF c SKIP LOCKED),
		give AS (UPDATE chunk SET owner = 'peer', grants = grants + 1 FROM pick WHERE chunk.id = pick.id
			RETURNING chunk.id, session, block, first, atoms, remaining, grants),
		told AS (INSERT INTO grant_out (chunk, grants) SELECT id, grants FROM give)
		SELECT session, block, first, atoms, remaining FROM give ORDER BY id`, j.Link, j.From, handover.MaxGrants, n)
	at, left := audit.Atoms{Link: j.Link}, 0
	var given []audit.Atoms
	_, err = pgx.ForEachRow(rows, []any{&at.Session, &at.Block, &at.First, &at.Count, &left}, func() error {
		given = append(given, at)
		b.Here, b.There = b.Here-left, b.There+left
		return nil
	})
	if b.Given = len(given); b.Given > 0 {
		a.record(j.Event(given))
	}
	return b, err
}

// TakeGrant hears what a peer grants (handover.Chunk.OnGrant), and acknowledges all
// of it. event makes the event of the chunks of a link that have become this end's by it;
// it is not called for none.
func (db *DB) TakeGrant(ctx context.Context, from identity.KME, g handover.Grant, event func(link string, taken []audit.Atoms) audit.Event) (handover.GrantAnswer, error) {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		chunks, err := lockGranted(ctx, a, from, g)
		if err != nil {
			return err
		}
		taken := make(map[string][]audit.Atoms)
		for _, granted := range g.Chunks {
			c := chunks[granted.ChunkRef]
			if c == nil {
				continue // its epoch was dropped
			}
			if after := c.OnGrant(granted.Grants); after != c.Chunk {
				c.Chunk = after
				taken[granted.Link] = append(taken[granted.Link], audit.Atoms{Link: granted.Link, Session: granted.Session, Block: granted.Block, First: granted.First, Count: c.atoms})
				a.writes.Queue("UPDATE chunk SET owner = 'here', grants = $2 WHERE id = $1", c.id, after.Grants)
			}
		}
		for _, link := range slices.Sorted(maps.Keys(taken)) {
			a.record(event(link, taken[link]))
		}
		return nil
	}), nil)
	if err != nil {
		return handover.GrantAnswer{}, fmt.Errorf("hearing of %d granted chunks: %w", len(g.Chunks), err)
	}
	return handover.GrantAnswer(g), nil
}

// ownedChunk is a chunk's row, as far as grants are concerned.
type ownedChunk struct {
	handover.Chunk
	id    int64
	atoms int
}

// lockGranted reads those of the chunks that lie here, on links to the KME that grants them.
func lockGranted(ctx context.Context, a *attempt, from identity.KME, g handover.Grant) (map[handover.ChunkRef]*ownedChunk, error) {
	links, sessions, blocks, firsts, _ := columns(g.Chunks)
	rows, _ := a.conn.Query(ctx, `SELECT c.id, c.link, c.session, c.block, c.first, c.atoms, c.owner = 'here', c.grants
		FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::int[]) AS w (link, session, block, first)
		JOIN link l ON l.id = w.link AND l.peer_kme = $5
		JOIN chunk c ON c.link = w.link AND c.session = w.session AND c.block = w.block AND c.first = w.first
		ORDER BY c.id FOR UPDATE OF c`, links, sessions, blocks, firsts, from.String())
	chunks := make(map[handover.ChunkRef]*ownedChunk)
	var ref handover.ChunkRef
	var c ownedChunk
	_, err := pgx.ForEachRow(rows, []any{&c.id, &ref.Link, &ref.Session, &ref.Block, &ref.First, &c.atoms, &c.Mine, &c.Grants}, func() error {
		row := c
		chunks[ref] = &row
		return nil
	})
	return chunks, err
}

// columns are granted chunks as the arrays of a statement.
func columns(chunks []handover.Granted) (links []string, sessions, blocks []int64, firsts, grants []int32) {
	for _, c := range chunks {
		links, sessions, blocks = append(links, c.Link), append(sessions, c.Session), append(blocks, c.Block)
		firsts, grants = append(firsts, int32(c.First)), append(grants, int32(c.Grants))
	}
	return links, sessions, blocks, firsts, grants
}

// PendingGrants lists grants to a peer that it has not acknowledged, as many as fit
// into one message. Any node may tell them.
func (db *DB) PendingGrants(ctx context.Context, peer identity.KME) (handover.Grant, error) {
	rows, _ := db.pool.Query(ctx, `SELECT c.link, c.session, c.block, c.first, o.grants FROM grant_out o JOIN chunk c ON c.id = o.chunk
		JOIN link l ON l.id = c.link WHERE o.acked_at IS NULL AND l.peer_kme = $1 ORDER BY o.chunk, o.grants LIMIT $2`, peer.String(), handover.MaxGranted)
	chunks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (g handover.Granted, err error) {
		return g, row.Scan(&g.Link, &g.Session, &g.Block, &g.First, &g.Grants)
	})
	if err != nil {
		return handover.Grant{}, away("listing grants", err)
	}
	return handover.Grant{Chunks: chunks}, nil
}

// AckGrants notes that the peer has acknowledged grants: exactly these, by their
// counters.
func (db *DB) AckGrants(ctx context.Context, acked []handover.Granted) error {
	links, sessions, blocks, firsts, grants := columns(acked)
	_, err := db.pool.Exec(ctx, `UPDATE grant_out o SET acked_at = $6
		FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::int[], $5::int[]) AS w (link, session, block, first, grants)
		JOIN chunk c ON c.link = w.link AND c.session = w.session AND c.block = w.block AND c.first = w.first
		WHERE o.chunk = c.id AND o.grants = w.grants AND o.acked_at IS NULL`, links, sessions, blocks, firsts, grants, db.now())
	if err != nil {
		return away("acknowledging grants", err)
	}
	return nil
}
