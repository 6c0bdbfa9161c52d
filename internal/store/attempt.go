package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// attempt is one transaction: a batch's way from BEGIN to COMMIT. Its statements
// go in two round trips. The first deletes and empties what the acts ask for,
// merged into one statement for each partition; the second writes what follows
// from what came back, the audit events and the node's row, and commits.
type attempt struct {
	c    *committer
	conn *pgx.Conn
	now  time.Time
	open bool // BEGIN has been sent
	mark int64
	head audit.Head // after the events of this attempt
	sig  []byte     // of the node over it; nil if there are none

	// What the first round trip does, and what came back.
	delete  map[key.Epoch][]key.ID // by their IDs
	placed  map[key.Epoch][]placed // by their places
	deleted map[key.ID]int64       // the chunk of each atom that was there
	empty   map[key.Epoch][]emptying
	emptied map[dueKey]bool
	reads   pgx.Batch
	hit     []string // failpoints between the two

	// What the second one writes.
	removed map[int64]int // atoms by chunk
	due     map[key.Epoch][]dueRow
	untaken map[pair]int64 // rows of due that came, less those that went
	writes  pgx.Batch
	events  []audit.Event
}

// placed is an atom that is to be deleted where it lay.
type placed struct {
	id key.ID
	at pgtype.TID
}

// dueKey names an assigned key of one SAE.
type dueKey struct {
	id  key.ID
	sae identity.SAE
}

// emptying is a row of due that is to end.
type emptying struct {
	dueKey
	how string
}

func (c *committer) newAttempt() *attempt {
	return &attempt{
		c: c, conn: c.conn, now: c.db.now(), mark: c.nextMark(), head: c.head,
		delete: make(map[key.Epoch][]key.ID), placed: make(map[key.Epoch][]placed), deleted: make(map[key.ID]int64),
		empty: make(map[key.Epoch][]emptying), emptied: make(map[dueKey]bool),
		removed: make(map[int64]int), due: make(map[key.Epoch][]dueRow), untaken: make(map[pair]int64),
	}
}

// record adds events to the batch.
func (a *attempt) record(events ...audit.Event) {
	if !failpoint.Unaudited() {
		a.events = append(a.events, events...)
	}
}

// take has an atom deleted from the pool: where it lay, if that is known and the batch
// was not tried so before.
func (a *attempt) take(id key.ID, at Place) {
	e := a.c.db.epochOf(id)
	if at.Valid && !a.c.moved {
		a.placed[e] = append(a.placed[e], placed{id, pgtype.TID(at)})
	} else {
		a.delete[e] = append(a.delete[e], id)
	}
}

// remove counts an atom out of its chunk.
func (a *attempt) remove(chunk int64, atoms int) { a.removed[chunk] += atoms }

// try runs the transaction. If acts refuse, nothing is committed, and they are
// returned with their reasons: the others are to be tried again.
func (a *attempt) try(jobs []*job) (refused map[*job]error, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), tripTime)
	defer cancel()
	if err := a.openDay(ctx); err != nil {
		return nil, err
	}
	refused, err = each(jobs, func(j *job) error { return j.act.ask(a) })
	if err != nil || len(refused) > 0 {
		return refused, err
	}
	if err := a.first(ctx); err != nil {
		return nil, a.rollback(ctx, err)
	}
	refused, err = each(jobs, func(j *job) error { return j.act.settle(ctx, a) })
	if err != nil || len(refused) > 0 {
		return refused, a.rollback(ctx, err)
	}
	for _, name := range a.hit {
		failpoint.Hit(name)
	}
	if err := a.second(ctx); err != nil {
		if u := (*unknown)(nil); errors.As(err, &u) {
			return nil, err
		}
		return nil, a.rollback(ctx, err)
	}
	return nil, nil
}

// each calls do for the jobs in turn and gathers those refused; an error of the
// database ends it. Conflicts do not: the next try knows of all that there are in this one.
func each(jobs []*job, do func(*job) error) (refused map[*job]error, err error) {
	refused = make(map[*job]error)
	var conflict error
	for _, j := range jobs {
		err := do(j)
		switch r := (*refusal)(nil); {
		case errors.As(err, &r):
			refused[j] = r.err
		case errors.Is(err, errConflict):
			conflict = err
		case err != nil:
			return nil, err
		}
	}
	return refused, conflict
}

// rollback ends the transaction and returns cause. If that fails, the connection
// ends, and the transaction with it.
func (a *attempt) rollback(ctx context.Context, cause error) error {
	if a.open && !a.conn.IsClosed() {
		if _, err := a.conn.Exec(ctx, "ROLLBACK"); err != nil {
			_ = a.conn.Close(ctx)
			return errors.Join(cause, err)
		}
	}
	return cause
}

// begin opens the transaction, for an act that has statements of its own.
func (a *attempt) begin(ctx context.Context) error {
	if a.open {
		return nil
	}
	a.open = true
	_, err := a.conn.Exec(ctx, "BEGIN")
	return err
}

// openDay makes sure that the audit log has a partition for now.
func (a *attempt) openDay(ctx context.Context) error {
	day := a.now.Format(time.DateOnly)
	if a.c.days[day] {
		return nil
	}
	if _, err := a.conn.Exec(ctx, "SELECT open_audit_day($1::text::date)", day); err != nil {
		return fmt.Errorf("opening the audit log's day: %w", err)
	}
	a.c.days[day] = true
	return nil
}

// first is the first round trip: BEGIN, and one statement for each partition.
func (a *attempt) first(ctx context.Context) error {
	if len(a.delete)+len(a.placed)+len(a.empty)+a.reads.Len() == 0 {
		return nil
	}
	var b pgx.Batch
	b.Queue("BEGIN")
	for _, e := range slices.Sorted(maps.Keys(a.delete)) {
		b.Queue(fmt.Sprintf(deleteAtoms, keyTable(e)), uuids(a.delete[e])).Query(a.readDeleted)
	}
	for _, e := range slices.Sorted(maps.Keys(a.placed)) {
		atoms := a.placed[e]
		at := make([]pgtype.TID, len(atoms))
		for i := range atoms {
			at[i] = atoms[i].at
		}
		b.Queue(fmt.Sprintf(deletePlaced, keyTable(e)), at).Query(func(rows pgx.Rows) error { return a.readPlaced(rows, atoms) })
	}
	for _, e := range slices.Sorted(maps.Keys(a.empty)) {
		var ids [][16]byte
		var saes, hows []string
		rows := a.empty[e]
		slices.SortFunc(rows, func(x, y emptying) int { return bytes.Compare(x.id[:], y.id[:]) }) // as every node does: no deadlock
		for _, r := range rows {
			ids, saes, hows = append(ids, r.id), append(saes, r.sae.String()), append(hows, r.how)
		}
		b.Queue(fmt.Sprintf(emptyDue, dueTable(e)), a.now, ids, saes, hows).Query(a.readEmptied)
	}
	b.QueuedQueries = append(b.QueuedQueries, a.reads.QueuedQueries...)
	a.open = true
	return a.conn.SendBatch(ctx, &b).Close()
}

const (
	deleteAtoms  = "DELETE FROM %s WHERE id = ANY($1::uuid[]) RETURNING id, chunk"
	deletePlaced = "DELETE FROM %s WHERE ctid = ANY($1::tid[]) RETURNING id, chunk"
	emptyDue     = `UPDATE %s AS d SET ct = NULL, iv = NULL, gone_at = $1, gone_how = w.how
		FROM unnest($2::uuid[], $3::text[], $4::text[]) AS w (key_id, sae, how)
		WHERE d.key_id = w.key_id AND d.sae = w.sae AND d.ct IS NOT NULL RETURNING d.key_id, d.sae, d.master`
)

func (a *attempt) readDeleted(rows pgx.Rows) error {
	var id [16]byte
	var chunk int64
	_, err := pgx.ForEachRow(rows, []any{&id, &chunk}, func() error {
		a.deleted[id] = chunk
		return nil
	})
	return err
}

// readPlaced compares what was deleted with what was meant. If they differ, an atom
// was taken by another, or the rows have been moved (VACUUM FULL): the batch is tried
// again by ID, which tells.
func (a *attempt) readPlaced(rows pgx.Rows, atoms []placed) error {
	if err := a.readDeleted(rows); err != nil {
		return err
	}
	for _, p := range atoms {
		if _, ok := a.deleted[p.id]; !ok {
			a.c.moved = true
		}
	}
	if int(rows.CommandTag().RowsAffected()) != len(atoms) {
		a.c.moved = true
	}
	if a.c.moved {
		return errConflict
	}
	return nil
}

func (a *attempt) readEmptied(rows pgx.Rows) error {
	var id [16]byte
	var slave, master string
	_, err := pgx.ForEachRow(rows, []any{&id, &slave, &master}, func() error {
		p, err := pairOf(slave, master)
		a.emptied[dueKey{id, p.slave}] = true
		a.untaken[p]--
		return err
	})
	return err
}

// second is the second round trip. After it everything is committed, nothing is
// (a plain error) or nobody knows yet (*unknown).
func (a *attempt) second(ctx context.Context) error {
	var b pgx.Batch
	if !a.open {
		b.Queue("BEGIN")
	}
	a.queueDue(&b)
	a.queueUntaken(&b)
	a.queueRemoved(&b)
	b.QueuedQueries = append(b.QueuedQueries, a.writes.QueuedQueries...)
	a.queueEvents(&b)
	was := a.c.head
	b.Queue("SELECT advance_run($1, $2, $3, $4, $5, $6, $7)", a.c.db.cfg.Node, a.c.run, a.c.mark, a.mark, was.Hash[:], a.head.Seq, a.head.Hash[:])
	b.Queue("COMMIT").Exec(func(tag pgconn.CommandTag) error {
		if tag.String() != "COMMIT" {
			return fmt.Errorf("COMMIT was answered %s", tag)
		}
		return nil
	})
	a.open = true
	a.c.warning = ""
	err := a.conn.SendBatch(ctx, &b).Close()
	if err == nil && a.c.warning != "" {
		// Somebody ended the wait for the standby: committed here, and perhaps nowhere else.
		return &unknown{errors.New(a.c.warning)}
	}
	if pg := (*pgconn.PgError)(nil); err == nil || errors.As(err, &pg) && pg.SeverityUnlocalized == "ERROR" {
		return err // an ERROR ends the transaction, whichever statement raised it
	}
	if pgconn.SafeToRetry(err) {
		return err // not one byte was sent
	}
	return &unknown{err}
}

// queueDue writes the rows of keys that were assigned.
func (a *attempt) queueDue(b *pgx.Batch) {
	for _, e := range slices.Sorted(maps.Keys(a.due)) {
		queueDueRows(b, e, a.due[e])
		for _, d := range a.due[e] {
			a.untaken[pair{d.SAE, d.Master}]++
		}
	}
}

// queueRemoved counts down the chunks.
func (a *attempt) queueRemoved(b *pgx.Batch) {
	if len(a.removed) == 0 {
		return
	}
	chunks := slices.Sorted(maps.Keys(a.removed))
	counts := make([]int32, len(chunks))
	for i, c := range chunks {
		counts[i] = int32(a.removed[c])
	}
	b.Queue("UPDATE chunk SET remaining = remaining - gone.n FROM unnest($1::bigint[], $2::int[]) AS gone (id, n) WHERE chunk.id = gone.id", chunks, counts)
}

// queueEvents completes the events, chains them, signs the chain's head and writes them:
// the signature stands with the last of them.
func (a *attempt) queueEvents(b *pgx.Batch) {
	if len(a.events) == 0 {
		return
	}
	cfg := a.c.db.cfg
	head, at := a.c.head, a.now.Truncate(audit.Clock)
	first := head.Seq + 1
	var text []byte
	prevs := make([][]byte, len(a.events))
	bodies := make([]string, len(a.events))
	for i := range a.events {
		e := &a.events[i]
		e.Site, e.Node, e.Run, e.At = cfg.Site.String(), cfg.Node, a.c.run, at
		prevs[i] = slices.Clone(head.Hash[:])
		text, head = head.Append(text[:0], e)
		bodies[i] = string(text)
	}
	a.head = head
	if cfg.Key != nil {
		a.sig = cfg.Key.Sign(cfg.Node, head)
	}
	b.Queue(`INSERT INTO audit_d`+at.Format("20060102")+` (day, node, seq, prev, body, at, sig)
		SELECT $1::text::date, $2, $3::bigint + n - 1, prev, body, $4, CASE WHEN n = cardinality($5::bytea[]) THEN $7::bytea END
		FROM unnest($5::bytea[], $6::text[]) WITH ORDINALITY AS e (prev, body, n)`,
		at.Format(time.DateOnly), cfg.Node, first, at, prevs, bodies, a.sig)
}

// uuids is ids in the form that pgx writes without looking twice.
func uuids(ids []key.ID) [][16]byte {
	us := make([][16]byte, len(ids))
	for i, id := range ids {
		us[i] = id
	}
	return us
}
