package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Report is what Check found.
type Report struct {
	Violations []string // each names its invariant: I1 to I7
	Blocks     int      // blocks seen, both sites
	Events     int      // audit events verified, both sites
	Leaves     int      // of them, those that are in the trees
	Atoms      int      // atoms in the pools, both sites
	Compared   int      // atoms that were unwrapped at both sites and compared
	Served     int      // keys handed to masters
	Taken      int      // keys handed to slaves
}

func (r *Report) fail(invariant, site, format string, args ...any) {
	r.Violations = append(r.Violations, fmt.Sprintf("%s at %s: ", invariant, site)+fmt.Sprintf(format, args...))
}

// Summary is one line for people.
func (r Report) Summary() string {
	verdict := "all invariants hold"
	if n := len(r.Violations); n > 0 {
		verdict = fmt.Sprintf("%d VIOLATIONS", n)
	}
	return fmt.Sprintf("%s: %d blocks, %d events, %d keys stored (%d compared), %d served, %d taken",
		verdict, r.Blocks, r.Events, r.Atoms, r.Compared, r.Served, r.Taken)
}

// How many atoms are unwrapped at each site, at most: by Check, and by checkTables,
// which tests call again and again.
const (
	maxCompared = 2000
	fewCompared = 200
)

// Check holds the invariants against the tables, the audit and the tokens of both
// sites. It asks no daemon anything. What it cannot see from there (the bytes that
// clients got, plaintext in files) is for tests.
func (l *Lab) Check(ctx context.Context) (Report, error) {
	r, err := l.hold(ctx, maxCompared)
	if err != nil {
		return r, err
	}
	for _, s := range []*Site{l.KM1, l.KM2} {
		if err := s.checkTrail(ctx, &r); err != nil {
			return r, err
		}
	}
	return r, nil
}

// checkTables is Check but for the trees of the audit logs, whose verification takes
// the longer the more a lab has done, and with fewer atoms compared.
func (l *Lab) checkTables(ctx context.Context) (Report, error) { return l.hold(ctx, fewCompared) }

// hold holds the invariants of the tables and the tokens, and compares some atoms.
func (l *Lab) hold(ctx context.Context, compared int) (Report, error) {
	var r Report
	var evidence [2]*evidence
	for i, s := range []*Site{l.KM1, l.KM2} {
		e, err := s.gather(ctx)
		if err != nil {
			return r, fmt.Errorf("reading the database of %s: %w", s.Name, err)
		}
		evidence[i] = e
	}
	// Blocks are read again after the events of both sites: what an event at one
	// site relies on was committed at the other before.
	for i, s := range []*Site{l.KM1, l.KM2} {
		other := evidence[1-i]
		blocks, chunks, err := s.blocksNow(ctx)
		if err != nil {
			return r, err
		}
		other.checkServedBlocks(&r, blocks, evidence[i])
		other.checkOwners(&r, chunks, evidence[i])
	}
	for _, e := range evidence {
		e.checkOutcomes(&r)
		e.checkArithmetic(&r)
		r.Blocks += len(e.blocks)
		r.Atoms += len(e.keys)
	}
	checkOnce(&r, evidence[0], evidence[1])
	return r, l.compare(ctx, &r, evidence[0], evidence[1], compared)
}

// evidence is one consistent reading of a site's database.
type evidence struct {
	site   *Site
	events []event
	blocks map[handover.BlockRef]block
	chunks map[handover.ChunkRef]handover.Chunk
	keys   map[key.ID]pooled
	due    []dueRow
	parked int
	dead   int            // blobs, of keys that wait to be used or taken, whose KEK is gone
	counts map[string]int // of table untaken: live rows of due less what is counted, by pair
	dues   int64          // rows of due that went with dropped partitions

	origin     int64            // of the account: raised by each recovery
	remembered map[string]int64 // by link: the first session after the last recovery; older ones may be forgotten
}

type block struct {
	atoms      int
	state      string
	digest     []byte
	provenance key.Provenance
	inPool     int
}

type pooled struct {
	ref   handover.BlockRef
	index int
	kek   int64
	iv    []byte
	ct    []byte
}

type dueRow struct {
	id      key.ID
	sae     string
	gone    string
	expired bool
}

// event is what Check reads of an audit event: its own reading of the text.
type event struct {
	Node    string    `json:"node"`
	Seq     int64     `json:"seq"`
	Action  string    `json:"action"`
	Outcome string    `json:"outcome"`
	Request string    `json:"request"`
	Slaves  []string  `json:"slaves"`
	Keys    []key.ID  `json:"keys"`
	Count   int       `json:"count"`
	Reread  bool      `json:"reread"`
	At      time.Time `json:"at"`
	Actor   struct {
		ID string `json:"id"`
	} `json:"actor"`
	Atoms []struct {
		Link    string `json:"link"`
		Session int64  `json:"session"`
		Block   int64  `json:"block"`
		First   int    `json:"first"`
		Count   int    `json:"count"`
	} `json:"atoms"`
}

// gather reads a site's database in one snapshot, and verifies the audit chains
// (I5) on the way.
func (s *Site) gather(ctx context.Context) (*evidence, error) {
	e := &evidence{site: s, blocks: make(map[handover.BlockRef]block), keys: make(map[key.ID]pooled)}
	conn, done, err := s.super(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL search_path = kme"); err != nil {
			return err
		}
		// A snapshot does not keep partitions from going with their epoch; this does.
		if _, err := tx.Exec(ctx, "LOCK TABLE key, due IN ACCESS SHARE MODE"); err != nil {
			return err
		}
		if err := e.readAudit(ctx, tx); err != nil {
			return err
		}
		return e.readTables(ctx, tx)
	})
	return e, err
}

func (e *evidence) readAudit(ctx context.Context, tx pgx.Tx) error {
	heads := make(map[string]audit.Head)
	rows, err := tx.Query(ctx, "SELECT node, seq, prev, body FROM audit ORDER BY node, seq")
	if err != nil {
		return err
	}
	var node, body string
	var seq int64
	var prev []byte
	if _, err = pgx.ForEachRow(rows, []any{&node, &seq, &prev, &body}, func() error {
		head, err := heads[node].Next(seq, prev, []byte(body))
		if err != nil {
			return fmt.Errorf("I5 at %s: node %s: %w", e.site.Name, node, err)
		}
		heads[node] = head
		var ev event
		if err := json.Unmarshal([]byte(body), &ev); err != nil {
			return fmt.Errorf("I5 at %s: node %s: event %d does not parse: %w", e.site.Name, node, seq, err)
		}
		if ev.Node != node || ev.Seq != seq {
			return fmt.Errorf("I5 at %s: event %d of node %s says that it is %d of %s", e.site.Name, seq, node, ev.Seq, ev.Node)
		}
		e.events = append(e.events, ev)
		return nil
	}); err != nil {
		return err
	}
	rows, err = tx.Query(ctx, "SELECT node, seq, head FROM node_run")
	if err != nil {
		return err
	}
	var hash []byte
	_, err = pgx.ForEachRow(rows, []any{&node, &seq, &hash}, func() error {
		if h := heads[node]; h.Seq != seq || !bytes.Equal(h.Hash[:], hash) && seq > 0 {
			return fmt.Errorf("I5 at %s: the chain of node %s ends at %d, its run row says %d", e.site.Name, node, h.Seq, seq)
		}
		return nil
	})
	return err
}

func (e *evidence) readTables(ctx context.Context, tx pgx.Tx) error {
	blocks, err := readBlocks(ctx, tx)
	if err != nil {
		return err
	}
	e.blocks = blocks
	if e.chunks, err = readChunks(ctx, tx); err != nil {
		return err
	}
	if err := e.readRecovery(ctx, tx); err != nil {
		return err
	}
	rows, err := tx.Query(ctx, "SELECT k.id, c.link, c.session, c.block, k.index, k.kek, k.iv, k.ct FROM key k JOIN chunk c ON c.id = k.chunk")
	if err != nil {
		return err
	}
	var id [16]byte
	var p pooled
	if _, err := pgx.ForEachRow(rows, []any{&id, &p.ref.Link, &p.ref.Session, &p.ref.Block, &p.index, &p.kek, &p.iv, &p.ct}, func() error {
		kept := p
		kept.iv, kept.ct = slices.Clone(p.iv), slices.Clone(p.ct)
		e.keys[id] = kept
		b := e.blocks[p.ref]
		b.inPool++
		e.blocks[p.ref] = b
		return nil
	}); err != nil {
		return err
	}
	rows, err = tx.Query(ctx, "SELECT key_id, sae, coalesce(gone_how, ''), expires_at < $1 FROM due", time.Now())
	if err != nil {
		return err
	}
	var d dueRow
	if _, err := pgx.ForEachRow(rows, []any{&id, &d.sae, &d.gone, &d.expired}, func() error {
		d.id = id
		e.due = append(e.due, d)
		return nil
	}); err != nil {
		return err
	}
	if err := tx.QueryRow(ctx, "SELECT count(*) FROM parked").Scan(&e.parked); err != nil {
		return err
	}
	if err := e.readCounts(ctx, tx); err != nil {
		return err
	}
	if err := e.readDead(ctx, tx); err != nil {
		return err
	}
	return tx.QueryRow(ctx, "SELECT coalesce(sum(dropped_due), 0) FROM epoch").Scan(&e.dues)
}

// readRecovery reads which part of the past the site may have forgotten: that from
// before its last recovery.
func (e *evidence) readRecovery(ctx context.Context, tx pgx.Tx) error {
	if err := tx.QueryRow(ctx, "SELECT origin FROM settings").Scan(&e.origin); err != nil {
		return err
	}
	var at time.Time
	for _, ev := range e.events {
		if ev.Action == recovery && ev.Outcome == "done" && int64(ev.Count) == e.origin {
			at = ev.At
		}
	}
	if at.IsZero() != (e.origin == 1) {
		return fmt.Errorf("I5 at %s: no event says how the account came to origin %d", e.site.Name, e.origin)
	}
	rows, err := tx.Query(ctx, "SELECT l.id, coalesce(min(s.id), l.session + 1) FROM link l LEFT JOIN session s ON s.link = l.id AND s.opened_at >= $1 GROUP BY l.id", at)
	if err != nil {
		return err
	}
	e.remembered = make(map[string]int64)
	var link string
	var session int64
	_, err = pgx.ForEachRow(rows, []any{&link, &session}, func() error { e.remembered[link] = session; return nil })
	return err
}

// readCounts reads for which pairs the nodes' counts of untaken keys do not add up.
func (e *evidence) readCounts(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, `SELECT slave || ' of ' || master, sum(n)::int FROM (
		SELECT sae AS slave, master, count(*) AS n FROM due WHERE ct IS NOT NULL GROUP BY sae, master
		UNION ALL SELECT slave, master, -n FROM untaken) AS rows_and_counts GROUP BY slave, master HAVING sum(n) <> 0`)
	if err != nil {
		return err
	}
	e.counts = make(map[string]int)
	var who string
	var n int
	_, err = pgx.ForEachRow(rows, []any{&who, &n}, func() error { e.counts[who] = n; return nil })
	return err
}

// readDead counts the blobs that no KEK opens, since theirs is destroyed, or is about to
// be: its epoch drains.
func (e *evidence) readDead(ctx context.Context, tx pgx.Tx) error {
	return tx.QueryRow(ctx, `SELECT count(*) FROM (SELECT kek FROM key UNION ALL SELECT kek FROM due WHERE ct IS NOT NULL) AS blob
		LEFT JOIN kek k ON k.id = blob.kek LEFT JOIN epoch e ON e.epoch = k.epoch
		WHERE k.state IS NULL OR k.state NOT IN ('open', 'sealed') OR e.state NOT IN ('open', 'sealed')`).Scan(&e.dead)
}

// querier is a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func readBlocks(ctx context.Context, q querier) (map[handover.BlockRef]block, error) {
	rows, err := q.Query(ctx, "SELECT link, session, id, atoms, state, digest, provenance FROM kme.block")
	if err != nil {
		return nil, err
	}
	blocks := make(map[handover.BlockRef]block)
	var ref handover.BlockRef
	var b block
	_, err = pgx.ForEachRow(rows, []any{&ref.Link, &ref.Session, &ref.Block, &b.atoms, &b.state, &b.digest, &b.provenance}, func() error {
		kept := b
		kept.digest = slices.Clone(b.digest)
		blocks[ref] = kept
		return nil
	})
	return blocks, err
}

func readChunks(ctx context.Context, q querier) (map[handover.ChunkRef]handover.Chunk, error) {
	rows, err := q.Query(ctx, "SELECT link, session, block, first, owner = 'here', grants FROM kme.chunk")
	if err != nil {
		return nil, err
	}
	chunks := make(map[handover.ChunkRef]handover.Chunk)
	var ref handover.ChunkRef
	var c handover.Chunk
	_, err = pgx.ForEachRow(rows, []any{&ref.Link, &ref.Session, &ref.Block, &ref.First, &c.Mine, &c.Grants}, func() error {
		chunks[ref] = c
		return nil
	})
	return chunks, err
}

func (s *Site) blocksNow(ctx context.Context) (map[handover.BlockRef]block, map[handover.ChunkRef]handover.Chunk, error) {
	conn, done, err := s.super(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	blocks, err := readBlocks(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	chunks, err := readChunks(ctx, conn)
	return blocks, chunks, err
}

// The actions of the audit that Check knows by name.
const (
	encKeys, decKeys, status, malformed = "enc_keys", "dec_keys", "status", "malformed"
	consume, cleanup                    = "consume", "cleanup"
	assign, burn, expire, lost          = "assign", "burn", "expire", "block-lost"
	recovery                            = "recover"
	compromised, shown                  = "compromise", "key-shown"
	trusted, disable, enable, reloaded  = "link-trusted", "disable", "enable", "policies"
	approve, auditRead                  = "approval-left", "audit-read"
)

// checkOutcomes is I4: a request that a handler saw has exactly one outcome event.
func (e *evidence) checkOutcomes(r *Report) {
	r.Events += len(e.events)
	outcomes := make(map[string]int)
	for _, ev := range e.events {
		switch ev.Action {
		case encKeys, decKeys, status, malformed, consume, cleanup, compromised, shown, trusted, disable, enable, reloaded, approve, auditRead:
			if ev.Request != "" {
				outcomes[ev.Request]++
			}
		}
	}
	for request, n := range outcomes {
		if n != 1 {
			r.fail("I4", e.site.Name, "request %s has %d outcome events", request, n)
		}
	}
}

// checkServedBlocks is I7: nothing was handed out or assigned from a block that the
// other site does not hold.
func (e *evidence) checkServedBlocks(r *Report, there map[handover.BlockRef]block, other *evidence) {
	seen := make(map[handover.BlockRef]bool)
	for _, ev := range e.events {
		if ev.Outcome != "done" || ev.Action != encKeys && ev.Action != assign {
			continue
		}
		for _, a := range ev.Atoms {
			ref := handover.BlockRef{Link: a.Link, Session: a.Session, Block: a.Block}
			if seen[ref] {
				continue
			}
			seen[ref] = true
			b, ok := there[ref]
			switch {
			case !ok && a.Session < other.remembered[a.Link]: // it has forgotten
			case !ok:
				r.fail("I7", e.site.Name, "keys of block %s are used, and %s does not know it", ref, other.site.Name)
			case b.state == "lost":
				r.fail("I7", e.site.Name, "keys of block %s are used, and %s has dropped it", ref, other.site.Name)
			case !bytes.Equal(b.digest, e.blocks[ref].digest):
				r.fail("I7", e.site.Name, "keys of block %s are used, and %s holds another under this name", ref, other.site.Name)
			}
		}
	}
}

// checkOwners is why I2 holds: a chunk, whose atoms its owner alone assigns, never
// has two. When an end read as its owner has been given it for the n-th time, the
// other, read later, knows of that grant, and if it is the owner by then, of one more.
//
// What either end has forgotten is burned at both, and nobody's.
func (e *evidence) checkOwners(r *Report, later map[handover.ChunkRef]handover.Chunk, other *evidence) {
	for ref, c := range e.chunks {
		l, ok := later[ref]
		if ref.Session < max(e.remembered[ref.Link], other.remembered[ref.Link]) {
			continue
		}
		if c.Mine && ok && (l.Grants < c.Grants || l.Mine && l.Grants == c.Grants) {
			r.fail("I2", e.site.Name, "chunk %s is owned here after %d grants, and %s knows of %d: owner there %v", ref, c.Grants, other.site.Name, l.Grants, l.Mine)
		}
	}
}

// checkArithmetic is I6: every atom of every block is in the pool or left it by
// one event, and every assignment has its row.
func (e *evidence) checkArithmetic(r *Report) {
	left := make(map[handover.BlockRef]int)
	assigned := int64(0)
	for _, ev := range e.events {
		if ev.Action == lost {
			for _, a := range ev.Atoms {
				left[handover.BlockRef{Link: a.Link, Session: a.Session, Block: a.Block}] += ev.Count
			}
			continue
		}
		if ev.Outcome == "done" && ev.Action == assign {
			assigned += int64(len(ev.Keys) * len(ev.Slaves))
		}
		if ev.Action == burn || ev.Action == expire || ev.Outcome == "done" && (ev.Action == assign || ev.Action == encKeys) {
			for _, a := range ev.Atoms {
				left[handover.BlockRef{Link: a.Link, Session: a.Session, Block: a.Block}] += a.Count
			}
		}
	}
	for ref, b := range e.blocks {
		if b.inPool+left[ref] != b.atoms {
			r.fail("I6", e.site.Name, "block %s (%s) of %d atoms: %d in the pool and %d left it", ref, b.state, b.atoms, b.inPool, left[ref])
		}
	}
	if e.dead > 0 {
		r.fail("I6", e.site.Name, "%d keys lie under KEKs that are destroyed", e.dead)
	}
	for who, n := range e.counts {
		r.fail("I6", e.site.Name, "%d more keys wait for %s than are counted in untaken", n, who)
	}
	if rows := int64(len(e.due)) + e.dues; rows != assigned {
		r.fail("I6", e.site.Name, "%d keys were assigned, and there are %d rows for them", assigned, rows)
	}
}

// naming is that an SAE may have a key, or has one.
type naming struct {
	id  key.ID
	sae string
}

// checkOnce is I2: no key is handed to one SAE twice, what the legacy API lets it
// read again aside, nor to one that was not named.
// Whoever is named by the master's request has the key assigned at one site, and can
// take it there alone.
func checkOnce(r *Report, sites ...*evidence) {
	served := make(map[key.ID][]string) // the slaves, by key
	for _, e := range sites {
		for ev, id := range e.done(encKeys) {
			if served[id] != nil {
				r.fail("I2", e.site.Name, "key %s was handed to a master again", id)
			}
			served[id] = ev.Slaves
		}
	}
	taken := make(map[naming]int)
	for _, e := range sites {
		assigned := make(map[naming]bool)
		for ev, id := range e.done(assign) {
			for _, sae := range ev.Slaves {
				assigned[naming{id, sae}] = true
				if named := served[id]; named != nil && !slices.Contains(named, sae) {
					r.fail("I2", e.site.Name, "key %s is assigned to %s, whom its master did not name", id, sae)
				}
			}
		}
		for _, d := range e.due {
			if !assigned[naming{d.id, d.sae}] {
				r.fail("I2", e.site.Name, "there is a row of key %s for %s, who was not named", d.id, d.sae)
			}
		}
		for ev, id := range e.done(decKeys) {
			n := naming{id, ev.Actor.ID}
			if !ev.Reread {
				taken[n]++
			}
			if !assigned[n] {
				r.fail("I2", e.site.Name, "key %s was handed to %s, who was not named", id, n.sae)
			}
		}
	}
	for n, times := range taken {
		if times != 1 {
			r.fail("I2", "both", "key %s was handed to %s %d times", n.id, n.sae, times)
		}
	}
	r.Served, r.Taken = len(served), len(taken)
}

// done are the events of an action that was done, once for each of their keys.
func (e *evidence) done(action string) iter.Seq2[event, key.ID] {
	return func(yield func(event, key.ID) bool) {
		for _, ev := range e.events {
			if ev.Action != action || ev.Outcome != "done" {
				continue
			}
			for _, id := range ev.Keys {
				if !yield(ev, id) {
					return
				}
			}
		}
	}
}
