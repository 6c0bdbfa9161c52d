package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Due is a whole key assigned to one SAE, sealed for it.
type Due struct {
	ExpiryEpoch key.Epoch // of ExpiresAt: its partition
	Key         key.ID
	SAE, Master identity.SAE
	Bits        int // size of the key
	Provenance  key.Provenance
	KEK         int64
	IV          [12]byte
	CT          []byte // ciphertext and tag; nil once it is gone
	Version     int    // of what the blob is bound to: see kme.DueAAD
	ExpiresAt   time.Time
	Reread      bool
	Link        string // that its atoms came over; "" if it was made here, and in few rows from before this was kept

	// Who made it. Set by the store when it is written.
	Peer       identity.KME // the KME that announced it; zero if made here
	Node       string       // the initiating node, its run and batch
	Run, Batch int64
}

// ServeJob is the initiator's commit of one request: its atoms leave the pool, and
// keys for SAEs that are homed here become due.
type ServeJob struct {
	Atoms  []key.ID
	Places []Place // of the Atoms, in order; nil if they are not known
	Due    []Due
	Events []audit.Event
	// Late, if not nil, is called once, on a goroutine of its own, if Serve
	// returned ErrDoubt and the outcome has become known.
	Late func(committed bool)
}

// Serve commits a request whole. With ErrShort an atom was not in the pool any
// more, with ErrExpired an epoch is over, and nothing was done.
func (db *DB) Serve(ctx context.Context, j ServeJob) error {
	return db.do(ctx, &serve{ServeJob: j, db: db}, j.Late)
}

type serve struct {
	ServeJob
	db *DB
}

func (s *serve) claims(claimed func(claim)) {
	for _, id := range s.Atoms {
		claimed(claim{id: id})
	}
}

func (s *serve) weight() int { return len(s.Atoms) + len(s.Due) }

func (s *serve) ask(a *attempt) error {
	for _, d := range s.Due {
		if !s.db.epochs.fillable(d.ExpiryEpoch) {
			return refuse(ErrExpired)
		}
	}
	for i, id := range s.Atoms {
		if !s.db.epochs.has(s.db.epochOf(id)) {
			return refuse(ErrExpired)
		}
		var at Place
		if s.Places != nil {
			at = s.Places[i]
		}
		a.take(id, at)
	}
	return nil
}

func (s *serve) settle(_ context.Context, a *attempt) error {
	if burned := a.left(s.Atoms); len(burned) != len(s.Atoms) {
		return refuse(ErrShort)
	}
	for _, d := range s.Due {
		d.Peer, d.Node, d.Run = identity.KME{}, s.db.cfg.Node, a.c.run
		a.due[d.ExpiryEpoch] = append(a.due[d.ExpiryEpoch], dueRow{Due: d})
	}
	a.record(s.Events...)
	a.hit = append(a.hit, failpoint.EncDeleted)
	return nil
}

// left counts those of ids that this attempt deleted out of their chunks, and
// returns them. Each is given to one asker.
func (a *attempt) left(ids []key.ID) []key.ID {
	gone := make([]key.ID, 0, len(ids))
	for _, id := range ids {
		if chunk, ok := a.deleted[id]; ok {
			delete(a.deleted, id)
			a.remove(chunk, 1)
			gone = append(gone, id)
		}
	}
	return gone
}

// dueRow is a row of due that is to be written. atoms is set for a key of several.
type dueRow struct {
	Due
	atoms []key.ID
}

const dueInsert = `INSERT INTO %s (key_id, sae, expiry_epoch, master, bits, provenance, kek, iv, ct, link, peer, node, run, batch, expires_at, reread, atoms, version)
	SELECT key_id, sae, $1, master, bits, provenance, kek, iv, ct, link, peer, node, run, batch, expires_at, reread, NULLIF(atoms, '')::uuid[], version
	FROM unnest($2::uuid[], $3::text[], $4::text[], $5::int[], $6::text[], $7::bigint[], $8::bytea[], $9::bytea[], $10::text[], $11::text[],
		$12::bigint[], $13::bigint[], $14::timestamptz[], $15::boolean[], $16::text[], $17::text[], $18::smallint[])
	AS d (key_id, sae, master, bits, provenance, kek, iv, ct, peer, node, run, batch, expires_at, reread, atoms, link, version)`

// queueDueRows writes the rows of one expiry epoch.
func queueDueRows(b *pgx.Batch, e key.Epoch, rows []dueRow) {
	var (
		ids                                              [][16]byte
		saes, masters, provs, links, peers, nodes, atoms []string
		bits                                             []int32
		versions                                         []int16
		keks, runs, batches                              []int64
		ivs, cts                                         [][]byte
		expires                                          []time.Time
		rereads                                          []bool
	)
	for _, d := range rows {
		ids, saes, masters = append(ids, d.Key), append(saes, d.SAE.String()), append(masters, d.Master.String())
		bits, provs, keks = append(bits, int32(d.Bits)), append(provs, string(d.Provenance)), append(keks, d.KEK)
		ivs, cts = append(ivs, d.IV[:]), append(cts, d.CT)
		links, peers, nodes = append(links, d.Link), append(peers, d.Peer.String()), append(nodes, d.Node)
		runs, batches = append(runs, d.Run), append(batches, d.Batch)
		expires, rereads = append(expires, d.ExpiresAt), append(rereads, d.Reread)
		atoms, versions = append(atoms, uuidArray(d.atoms)), append(versions, int16(d.Version))
	}
	b.Queue(fmt.Sprintf(dueInsert, dueTable(e)), int64(e), ids, saes, masters, bits, provs, keks, ivs, cts, peers, nodes,
		runs, batches, expires, rereads, atoms, links, versions)
}

// uuidArray is ids as the text of a uuid[], "" for none.
func uuidArray(ids []key.ID) string {
	if len(ids) == 0 {
		return ""
	}
	b := []byte{'{'}
	for i, id := range ids {
		if i > 0 {
			b = append(b, ',')
		}
		b, _ = id.AppendText(b) // never fails
	}
	return string(append(b, '}'))
}

// Record commits events alone: refusals, and what the node does for itself.
func (db *DB) Record(ctx context.Context, events ...audit.Event) error {
	return db.RecordLate(ctx, nil, events...)
}

// RecordLate is Record with a late as in ServeJob.
func (db *DB) RecordLate(ctx context.Context, late func(committed bool), events ...audit.Event) error {
	return db.do(ctx, record(events), late)
}

type record []audit.Event

func (record) claims(func(claim)) {}
func (record) weight() int        { return 1 }
func (record) ask(*attempt) error { return nil }
func (r record) settle(_ context.Context, a *attempt) error {
	a.record(r...)
	return nil
}
