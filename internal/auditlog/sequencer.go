// Package auditlog keeps the Merkle tree over a site's audit events in PostgreSQL and
// reads it. The Sequencer folds each node's next events into the tree and signs a
// checkpoint; the Reader reads events, tiles and checkpoints for auditors.
//
// What it promises: an event is folded once, after its predecessor in its node's
// chain, and only if its node has signed what leads to it; rows, tiles and checkpoint
// are written in one transaction; a checkpoint is returned after its commit. A
// sequencer that finds an event that is not as its node has written it folds nothing
// any more and says which (audit.BadLeaf).
//
// What it must never do: change or delete an event, or sign two trees of one size and
// give out both. Two sequencers at once are safe: one waits for the other's row.
package auditlog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
)

// maxFold is how many events of each node are folded in one step at most.
const maxFold = 10_000

// Config is what a Sequencer needs. Everything but Log must be set.
type Config struct {
	DSN         string // of the role kme_seq
	TrustDomain string // both name the log
	Site        string
	Key         audit.Key        // of the log
	Now         func() time.Time // the daemon's clock
	Log         *slog.Logger     // nil discards
}

// Sequencer folds events into the tree. Its methods are for one goroutine.
type Sequencer struct {
	cfg    Config
	conn   *pgx.Conn
	leads  bool
	well   bool  // the log, and the nodes have been told
	origin int64 // of the state below; 0: it has to be read
	signer *audit.LogSigner
	key    audit.LogKey
	tree   *audit.Tree
	chains *audit.Chains
	days   map[string]time.Time // of the last folded event, by node
}

// Folded is what a step has done.
type Folded struct {
	Leads  bool   // this sequencer is the site's
	Origin int64  // of the log
	Size   int64  // of the tree
	Events int    // folded by this step
	Note   []byte // the signed checkpoint; nil if nothing was folded
	More   bool   // there is more to fold at once
}

// NewSequencer connects to nothing yet.
func NewSequencer(cfg Config) (*Sequencer, error) {
	if cfg.DSN == "" || cfg.TrustDomain == "" || cfg.Site == "" || cfg.Key == nil || cfg.Now == nil {
		return nil, errors.New("configuring the audit sequencer: a part is missing")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Sequencer{cfg: cfg}, nil
}

// Close ends the connection, and with it the lead.
func (s *Sequencer) Close() {
	if s.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.conn.Close(ctx) // nothing is under way on it
	s.conn, s.leads, s.well, s.origin = nil, false, false, 0
}

// Step folds what there is to fold, if this sequencer is the one of its site: one
// whose connection holds the lock. After an error the next step begins with a new
// connection, and reads how the tree stands.
func (s *Sequencer) Step(ctx context.Context) (f Folded, err error) {
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.conn == nil {
		if s.conn, err = connect(ctx, s.cfg.DSN); err != nil {
			return f, fmt.Errorf("the audit sequencer: %w", err)
		}
	}
	if !s.leads {
		err := s.conn.QueryRow(ctx, "SELECT pg_try_advisory_lock(hashtextextended('kme audit sequencer', 0))").Scan(&s.leads)
		if err != nil {
			return f, fmt.Errorf("the audit sequencer: %w", err)
		}
	}
	if f.Leads = s.leads; !s.leads {
		return f, nil
	}
	err = pgx.BeginFunc(ctx, s.conn, func(tx pgx.Tx) error { return s.fold(ctx, tx, &f) })
	if bad, ok := errors.AsType[*audit.BadLeaf](err); ok {
		if untold := s.tell(ctx, bad.Error()); untold != nil {
			return f, fmt.Errorf("telling the nodes that the audit log is forged (%v): %w", bad, untold)
		}
	}
	if err == nil && !s.well {
		err = s.tell(ctx, "") // it was, perhaps, and has been put right
		s.well = err == nil
	}
	if err != nil {
		return f, fmt.Errorf("folding audit events: %w", err)
	}
	return f, nil
}

// tell lets every node of the site know what is forged in the present log, "" if nothing is.
func (s *Sequencer) tell(ctx context.Context, forged string) error {
	_, err := s.conn.Exec(ctx, "UPDATE audit_log SET forged = $1 WHERE origin = (SELECT max(origin) FROM audit_log) AND forged <> $1", forged)
	return err
}

func connect(ctx context.Context, dsn string) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	config.RuntimeParams["search_path"] = "kme"
	config.RuntimeParams["application_name"] = "kmed audit"
	config.RuntimeParams["idle_in_transaction_session_timeout"] = "30s"
	config.RuntimeParams["synchronous_commit"] = "on"
	config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	return pgx.ConnectConfig(ctx, config)
}

// fold is the transaction of a step. If the process dies before its commit, nothing
// of it has been seen by anybody.
func (s *Sequencer) fold(ctx context.Context, tx pgx.Tx, f *Folded) error {
	if err := s.load(ctx, tx); err != nil {
		return err
	}
	f.Origin = s.origin
	rows, _ := tx.Query(ctx, "SELECT node, seq FROM node_run ORDER BY node")
	type target struct {
		Node string
		Seq  int64
	}
	targets, err := pgx.CollectRows(rows, pgx.RowToStructByPos[target])
	if err != nil {
		return err
	}
	first := s.tree.Size()
	var batch pgx.Batch
	for _, t := range targets {
		if t.Seq <= s.chains.Head(t.Node).Seq {
			continue
		}
		more, err := s.foldNode(ctx, tx, t.Node, &batch)
		if err != nil {
			return err
		}
		f.More = f.More || more
	}
	f.Size, f.Events = s.tree.Size(), int(s.tree.Size()-first)
	if f.Events == 0 {
		return nil
	}
	for _, t := range s.tree.Tiles() {
		batch.Queue(`INSERT INTO audit_tile (origin, level, n, data) VALUES ($1, $2, $3, $4)
			ON CONFLICT (origin, level, n) DO UPDATE SET data = excluded.data`, s.origin, t.Level, t.N, t.Data)
	}
	c := audit.Checkpoint{Origin: s.signer.Name(), Size: f.Size, Root: s.tree.Root()}
	if f.Note, err = note.Sign(&note.Note{Text: c.Text()}, s.signer); err != nil {
		return fmt.Errorf("signing a checkpoint: %w", err)
	}
	batch.Queue("INSERT INTO audit_checkpoint (origin, size, note, at) VALUES ($1, $2, $3, $4)", s.origin, f.Size, string(f.Note), s.cfg.Now())
	batch.Queue("UPDATE audit_log SET size = $2 WHERE origin = $1", s.origin, f.Size)
	return tx.SendBatch(ctx, &batch).Close()
}

// load locks the log's row and makes sure that what is in memory is what it says.
func (s *Sequencer) load(ctx context.Context, tx pgx.Tx) error {
	var origin, size int64
	if err := tx.QueryRow(ctx, "SELECT origin FROM settings").Scan(&origin); err != nil {
		return err
	}
	err := tx.QueryRow(ctx, "SELECT size FROM audit_log WHERE origin = $1 FOR UPDATE", origin).Scan(&size)
	if err == nil && origin == s.origin && size == s.tree.Size() {
		return nil
	}
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	if s.signer, err = audit.NewLogSigner(audit.LogName(s.cfg.TrustDomain, s.cfg.Site, origin), s.cfg.Key); err != nil {
		return err
	}
	if s.key, err = audit.ParseLogKey(s.signer.VerifierKey()); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "INSERT INTO audit_log (origin, name, vkey, begun_at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
		origin, s.signer.Name(), s.signer.VerifierKey(), s.cfg.Now())
	if err != nil {
		return err
	}
	s.tree, err = audit.LoadTree(size, func(level int, n int64) (data []byte, err error) {
		err = tx.QueryRow(ctx, "SELECT data FROM audit_tile WHERE origin = $1 AND level = $2 AND n = $3", origin, level, n).Scan(&data)
		return data, err
	})
	if err != nil {
		return err
	}
	if err := s.checkOwn(ctx, tx, origin, size); err != nil {
		return err
	}
	s.chains, s.days = audit.NewChains(s.key), make(map[string]time.Time)
	rows, _ := tx.Query(ctx, "SELECT node, day, seq, head, key FROM audit_node")
	var node, key string
	var day time.Time
	var seq int64
	var head []byte
	_, err = pgx.ForEachRow(rows, []any{&node, &day, &seq, &head, &key}, func() error {
		s.days[node] = day
		s.chains.Load(node, audit.Head{Seq: seq, Hash: [32]byte(head)}, key)
		return nil
	})
	if err != nil {
		return err
	}
	s.origin = origin
	s.cfg.Log.Info("audit log", "name", s.signer.Name(), "leaves", size, "key", s.signer.VerifierKey())
	return nil
}

// checkOwn compares the tree that the tiles make with the last checkpoint, which only
// this log's key can have signed: tiles that were changed are not built upon.
func (s *Sequencer) checkOwn(ctx context.Context, tx pgx.Tx, origin, size int64) error {
	if size == 0 {
		return nil
	}
	var signed string
	if err := tx.QueryRow(ctx, "SELECT note FROM audit_checkpoint WHERE origin = $1 AND size = $2", origin, size).Scan(&signed); err != nil {
		return fmt.Errorf("reading the last checkpoint: %w", err)
	}
	c, _, err := audit.OpenCheckpoint([]byte(signed), s.key)
	if err != nil {
		return err
	}
	if c.Size != size || c.Root != s.tree.Root() {
		return &audit.BadLeaf{Leaf: -1, Why: fmt.Sprintf("the tiles of the tree of %d leaves were changed: its root is not that of its checkpoint", size)}
	}
	return nil
}

// foldNode folds a node's next events, up to the last that it has signed.
func (s *Sequencer) foldNode(ctx context.Context, tx pgx.Tx, node string, batch *pgx.Batch) (more bool, err error) {
	before, note := s.chains.Head(node), s.chains.KeyNote(node)
	events, err := s.next(ctx, tx, node, before.Seq)
	if err != nil || len(events) == 0 {
		return false, err
	}
	// The chain is followed to the last signature, and what comes after it waits. The
	// events of a commit become visible together, so there is nothing after it unless
	// the limit cut a commit in two.
	signed := 0
	for i, e := range events {
		ok, err := s.chains.Add(e.Row)
		if err != nil {
			return false, err
		}
		if ok {
			signed = i + 1
		}
	}
	if signed == 0 && len(events) < maxFold {
		return false, &audit.BadLeaf{Leaf: -1, Node: node, Seq: before.Seq + 1, Why: "the node has not signed it"}
	}
	if signed < len(events) { // to be read again by the next step
		if len(events) < maxFold {
			return false, &audit.BadLeaf{Leaf: -1, Node: node, Seq: events[signed].Seq, Why: "the node has not signed it"}
		}
		s.chains.Load(node, before, note)
		events = events[:signed]
		for _, e := range events {
			if _, err := s.chains.Add(e.Row); err != nil {
				return false, err
			}
		}
	}
	first := s.tree.Size()
	from := 0
	for i, e := range events {
		s.tree.Append(tlog.RecordHash(e.Body))
		if i+1 == len(events) || !events[i+1].day.Equal(e.day) {
			batch.Queue("INSERT INTO audit_range (origin, first, node, day, seq, n) VALUES ($1, $2, $3, $4, $5, $6)",
				s.origin, first+int64(from), node, e.day, events[from].Seq, i+1-from)
			from = i + 1
		}
	}
	last := events[len(events)-1]
	s.days[node] = last.day
	head := s.chains.Head(node)
	batch.Queue(`INSERT INTO audit_node (node, day, seq, head, key) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (node) DO UPDATE SET day = excluded.day, seq = excluded.seq, head = excluded.head, key = excluded.key`,
		node, last.day, head.Seq, head.Hash[:], s.chains.KeyNote(node))
	return len(events) >= maxFold/2, nil
}

// event is a row and the day whose partition it is in.
type event struct {
	audit.Row
	day time.Time
}

// next reads the events that follow event seq of a node. They are in the day of that
// one or later, unless the clock was set back over midnight: then the one that follows
// is looked for everywhere.
func (s *Sequencer) next(ctx context.Context, tx pgx.Tx, node string, seq int64) ([]event, error) {
	day, ok := s.days[node]
	if !ok {
		day = time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	rows, _ := tx.Query(ctx, `SELECT day, node, seq, prev, body, sig FROM audit
		WHERE node = $1 AND seq > $2 AND day >= $3 ORDER BY day, seq LIMIT $4`, node, seq, day, maxFold)
	events, err := pgx.CollectRows(rows, scanEvent)
	if err != nil {
		return nil, err
	}
	for i, e := range events {
		if e.Seq != seq+1+int64(i) {
			events = events[:i] // the days are not in the order of the chain
			break
		}
	}
	if len(events) > 0 {
		return events, nil
	}
	rows, _ = tx.Query(ctx, "SELECT day, node, seq, prev, body, sig FROM audit WHERE node = $1 AND seq = $2 LIMIT 1", node, seq+1)
	if events, err = pgx.CollectRows(rows, scanEvent); err != nil || len(events) == 0 {
		return nil, errors.Join(err, &audit.BadLeaf{Leaf: -1, Node: node, Seq: seq + 1, Why: "it is missing"})
	}
	return s.day(ctx, tx, events[0])
}

// day reads the rest of the day of an event, from that event on.
func (s *Sequencer) day(ctx context.Context, tx pgx.Tx, from event) ([]event, error) {
	rows, _ := tx.Query(ctx, `SELECT day, node, seq, prev, body, sig FROM audit
		WHERE node = $1 AND seq >= $2 AND day = $3 ORDER BY seq LIMIT $4`, from.Node, from.Seq, from.day, maxFold)
	events, err := pgx.CollectRows(rows, scanEvent)
	for i, e := range events {
		if e.Seq != from.Seq+int64(i) {
			return events[:i], err
		}
	}
	return events, err
}

func scanEvent(row pgx.CollectableRow) (e event, err error) {
	e.Leaf = -1
	return e, row.Scan(&e.day, &e.Node, &e.Seq, &e.Prev, &e.Body, &e.Sig)
}
