package auditlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
)

// Reader reads the log for auditors, with the rights of the role kme_auditor. Its
// methods may be called from many goroutines.
type Reader struct{ pool *pgxpool.Pool }

// NewReader connects when it is first asked.
func NewReader(ctx context.Context, dsn string) (*Reader, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("reading the audit log: %w", err)
	}
	config.ConnConfig.RuntimeParams["search_path"] = "kme"
	config.ConnConfig.RuntimeParams["application_name"] = "kmed audit reader"
	config.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
	config.ConnConfig.RuntimeParams["statement_timeout"] = "60s"
	// Whatever the DSN says: a standby may not have what the witness has seen, and a
	// session that is read-only is not refused for it.
	config.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsPrimary
	config.MaxConns = 4
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("reading the audit log: %w", err)
	}
	return &Reader{pool}, nil
}

// Close closes the connections.
func (r *Reader) Close() { r.pool.Close() }

// LogState is how the log of an origin stands.
type LogState struct {
	Origin int64
	Name   string
	Key    string // its verifier key, as the database says
	Size   int64
	Begun  time.Time
	Ended  bool // a recovery has begun another
}

// logColumns are those of a LogState.
const logColumns = "origin, name, vkey, size, begun_at, origin < (SELECT max(origin) FROM audit_log)"

// Snapshot is the log of one origin as it stands at one moment. It is a source for
// audit.Verify, for bundles and for proofs.
type Snapshot struct {
	LogState
	tx pgx.Tx
}

// ErrNoLog says that the site has no log of that origin yet.
var ErrNoLog = errors.New("there is no such audit log yet")

// Snapshot has do read the log of an origin; 0 is the present one.
func (r *Reader) Snapshot(ctx context.Context, origin int64, do func(*Snapshot) error) error {
	return pgx.BeginTxFunc(ctx, r.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "SELECT "+logColumns+" FROM audit_log WHERE $1::bigint IN (0, origin) ORDER BY origin DESC LIMIT 1", origin)
		state, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[LogState])
		if errors.Is(err, pgx.ErrNoRows) {
			return ErrNoLog
		}
		if err != nil {
			return fmt.Errorf("reading the audit log: %w", err)
		}
		return do(&Snapshot{state, tx})
	})
}

// Logs lists the logs of the site's origins, the present one last.
func (r *Reader) Logs(ctx context.Context) ([]LogState, error) {
	rows, _ := r.pool.Query(ctx, "SELECT "+logColumns+" FROM audit_log ORDER BY origin")
	logs, err := pgx.CollectRows(rows, pgx.RowToStructByPos[LogState])
	if err != nil {
		return nil, fmt.Errorf("reading the audit logs: %w", err)
	}
	return logs, nil
}

// Present is the origin of the site's present log.
func (l *Snapshot) Present(ctx context.Context) (origin int64, err error) {
	if err := l.tx.QueryRow(ctx, "SELECT max(origin) FROM audit_log").Scan(&origin); err != nil {
		return 0, fmt.Errorf("reading the audit log: %w", err)
	}
	return origin, nil
}

// ErrNoCheckpoint says that a log has none of that size.
var ErrNoCheckpoint = errors.New("the log has no such checkpoint")

// Checkpoint reads the checkpoint of a size, 0 being the last, with the signatures of
// the witnesses that it has.
func (l *Snapshot) Checkpoint(ctx context.Context, size int64) ([]byte, error) {
	var signed []byte
	err := l.tx.QueryRow(ctx, `SELECT c.note || coalesce(string_agg(s.line, '' ORDER BY s.witness), '')
		FROM audit_checkpoint c LEFT JOIN audit_cosignature s USING (origin, size)
		WHERE c.origin = $1 AND c.size = $2 GROUP BY c.origin, c.size, c.note`, l.Origin, cmp.Or(size, l.Size)).Scan(&signed)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("reading checkpoint %d: %w", size, ErrNoCheckpoint)
	}
	if err != nil {
		return nil, fmt.Errorf("reading checkpoint %d: %w", size, err)
	}
	return signed, nil
}

// lately is of how many of the last checkpoints Cosigned takes one: of a minute.
const lately = 60

// Cosigned reads, of the last checkpoints, the one that most witnesses have signed, and
// the newest of those: the very last one they have mostly not seen yet. It has at least
// so many leaves.
func (l *Snapshot) Cosigned(ctx context.Context, least int64) ([]byte, error) {
	var signed []byte
	err := l.tx.QueryRow(ctx, `SELECT c.note || coalesce(string_agg(s.line, '' ORDER BY s.witness), '')
		FROM (SELECT origin, size, note FROM audit_checkpoint WHERE origin = $1 AND size >= $2 AND size <= $3 ORDER BY size DESC LIMIT $4) AS c
			LEFT JOIN audit_cosignature s USING (origin, size)
		GROUP BY c.size, c.note ORDER BY count(s.line) DESC, c.size DESC LIMIT 1`, l.Origin, least, l.Size, lately).Scan(&signed)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("reading a checkpoint of %d leaves: %w", least, ErrNoCheckpoint)
	}
	if err != nil {
		return nil, fmt.Errorf("reading a checkpoint of %d leaves: %w", least, err)
	}
	return signed, nil
}

// Tile implements audit.TileSource.
func (l *Snapshot) Tile(level int, n int64, width int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var data []byte
	err := l.tx.QueryRow(ctx, "SELECT data FROM audit_tile WHERE origin = $1 AND level = $2 AND n = $3", l.Origin, level, n).Scan(&data)
	if err != nil {
		return nil, fmt.Errorf("reading tile %d of level %d: %w", n, level, err)
	}
	if len(data) < width*tlog.HashSize {
		return nil, fmt.Errorf("tile %d of level %d has %d bytes, and should have %d hashes", n, level, len(data), width)
	}
	return data[:width*tlog.HashSize], nil
}

// run is a range of leaves that are consecutive events of a node in one day.
type run struct {
	First int64
	Node  string
	Day   time.Time
	Seq   int64
	N     int64
}

// Rows implements audit.Source: the leaves from first up to, and without, end.
func (l *Snapshot) Rows(ctx context.Context, first, end int64, do func(audit.Row) error) error {
	for next := first; next < end; {
		rows, _ := l.tx.Query(ctx, `SELECT first, node, day, seq, n FROM audit_range
			WHERE origin = $1 AND first + n > $2 AND first >= coalesce((SELECT max(first) FROM audit_range WHERE origin = $1 AND first <= $2), 0) AND first < $3
			ORDER BY first LIMIT 256`, l.Origin, next, end)
		runs, err := pgx.CollectRows(rows, pgx.RowToStructByPos[run])
		if err != nil {
			return fmt.Errorf("reading leaf %d: %w", next, err)
		}
		if len(runs) == 0 {
			return nil // the caller misses the rest
		}
		for _, x := range runs {
			if x.First > next {
				return &audit.BadLeaf{Leaf: next, Why: "nothing says which event it is"}
			}
			skip := next - x.First
			n := min(x.N, end-x.First) - skip
			if err := l.events(ctx, next, x, x.Seq+skip, n, do); err != nil {
				return err
			}
			next += n
		}
	}
	return nil
}

// page is how many events are read at a time: while they are looked at, the
// connection is free for the tiles.
const page = 2048

// events reads n events of a run, of which the first is event seq and leaf number leaf.
func (l *Snapshot) events(ctx context.Context, leaf int64, x run, seq, n int64, do func(audit.Row) error) error {
	for end := seq + n; seq < end; {
		rows, _ := l.tx.Query(ctx, "SELECT node, seq, prev, body, sig FROM audit WHERE day = $1 AND node = $2 AND seq >= $3 AND seq < $4 ORDER BY seq",
			x.Day, x.Node, seq, min(end, seq+page))
		events, err := pgx.CollectRows(rows, scanRow)
		if err != nil {
			return fmt.Errorf("reading leaf %d: %w", leaf, err)
		}
		for _, e := range events {
			if e.Seq != seq {
				break
			}
			e.Leaf = leaf
			if err := do(e); err != nil {
				return err
			}
			seq, leaf = seq+1, leaf+1
		}
		if len(events) == 0 || events[len(events)-1].Seq != seq-1 || seq < end && len(events) < page {
			return &audit.BadLeaf{Leaf: leaf, Node: x.Node, Seq: seq, Why: "it is missing"}
		}
	}
	return nil
}

func scanRow(row pgx.CollectableRow) (r audit.Row, err error) {
	r.Leaf = -1
	return r, row.Scan(&r.Node, &r.Seq, &r.Prev, &r.Body, &r.Sig)
}

// Tail implements audit.Source: the events beyond the tree, and then those that are
// somewhere they cannot have come to. What a recovery ended has none: they are on their
// way into the log that it began.
func (l *Snapshot) Tail(ctx context.Context, do func(audit.Row) error) error {
	if l.Ended {
		return nil
	}
	node, seq := "", int64(0)
	for {
		rows, _ := l.tx.Query(ctx, `SELECT a.node, a.seq, a.prev, a.body, a.sig FROM audit a LEFT JOIN audit_node n ON n.node = a.node
			WHERE a.seq > coalesce(n.seq, 0) AND (a.node, a.seq) > ($1, $2) ORDER BY a.node, a.seq LIMIT $3`, node, seq, page)
		events, err := pgx.CollectRows(rows, scanRow)
		if err != nil {
			return fmt.Errorf("reading the events beyond the tree: %w", err)
		}
		for _, e := range events {
			if err := do(e); err != nil {
				return err
			}
			node, seq = e.Node, e.Seq
		}
		if len(events) < page {
			return l.strays(ctx)
		}
	}
}

// strays finds an event that no leaf stands for, though its node's chain is in the
// tree beyond its number: it was inserted.
func (l *Snapshot) strays(ctx context.Context) error {
	bad := &audit.BadLeaf{Leaf: -1, Why: "no leaf stands for it: it was inserted"}
	err := l.tx.QueryRow(ctx, `WITH there AS (SELECT day, node, count(*) AS n FROM audit GROUP BY day, node),
			ours AS (SELECT day, node, sum(n) AS n FROM audit_range GROUP BY day, node)
		SELECT a.node, a.seq FROM there t JOIN audit_node f ON f.node = t.node LEFT JOIN ours o ON o.day = t.day AND o.node = t.node
			JOIN audit a ON a.day = t.day AND a.node = t.node AND a.seq <= f.seq
		WHERE t.n > coalesce(o.n, 0)
			AND NOT EXISTS (SELECT FROM audit_range r WHERE r.node = a.node AND r.day = a.day AND r.seq <= a.seq AND a.seq < r.seq + r.n)
		ORDER BY a.node, a.seq LIMIT 1`).Scan(&bad.Node, &bad.Seq)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for inserted events: %w", err)
	}
	return bad
}

// NodeKeys implements audit.Source.
func (l *Snapshot) NodeKeys(ctx context.Context) (map[string]string, error) {
	rows, _ := l.tx.Query(ctx, "SELECT node, key FROM audit_node WHERE key <> ''")
	notes := make(map[string]string)
	var node, note string
	_, err := pgx.ForEachRow(rows, []any{&node, &note}, func() error {
		notes[node] = note
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the nodes' keys: %w", err)
	}
	return notes, nil
}

// Heads are the ends of the nodes' chains, as the nodes' rows say.
func (l *Snapshot) Heads(ctx context.Context) (map[string]audit.Head, error) {
	rows, _ := l.tx.Query(ctx, "SELECT node, seq, head FROM node_run WHERE seq > 0")
	heads := make(map[string]audit.Head)
	var node string
	var h audit.Head
	var hash []byte
	_, err := pgx.ForEachRow(rows, []any{&node, &h.Seq, &hash}, func() error {
		h.Hash = [32]byte(hash)
		heads[node] = h
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the heads: %w", err)
	}
	return heads, nil
}

// Filter says which events are looked for. What is empty asks for any.
type Filter struct {
	From, To                                             time.Time // of the event, from and without
	First                                                int64     // leaf: those before are left out
	SAE, Key, Request, Action, Outcome, Serial, Operator string
	Limit                                                int
	Placed                                               bool // only those that the log has
}

// Search lists events of the log in the order of its leaves, and then those that are
// not in it yet. Where a time is given, days without it are not looked at; the time is that
// of the event's text, which is the one that the log vouches for.
func (l *Snapshot) Search(ctx context.Context, f Filter) ([]audit.Row, error) {
	from, to := f.From, f.To
	if from.IsZero() {
		from = time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	if to.IsZero() {
		to = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	unplaced := int64(1) << 62 // where those are that are not in the log yet
	if f.Placed {
		unplaced = -1 // before all that is looked for
	}
	rows, _ := l.tx.Query(ctx, `SELECT coalesce(r.first + a.seq - r.seq, -1) AS leaf, a.node, a.seq, a.prev, a.body, a.sig
		FROM audit a LEFT JOIN LATERAL (SELECT first, seq, n FROM audit_range r WHERE r.origin = $1 AND r.node = a.node AND r.seq <= a.seq
			ORDER BY r.seq DESC LIMIT 1) AS r ON a.seq < r.seq + r.n
		WHERE a.day >= ($2::timestamptz AT TIME ZONE 'UTC')::date AND a.day <= ($3::timestamptz AT TIME ZONE 'UTC')::date
			AND (a.body::json->>'at')::timestamptz >= $2 AND (a.body::json->>'at')::timestamptz < $3
			AND ($4 = '' OR position(to_json($4::text)::text IN a.body) > 0
				AND (a.body::json->'actor'->>'id' = $4 AND a.body::json->'actor'->>'role' = 'sae' OR a.body::json->>'peer' = $4
					OR a.body::json->>'master' = $4 OR $4 IN (SELECT json_array_elements_text(a.body::json->'slaves'))))
			AND ($5 = '' OR position(to_json($5::text)::text IN a.body) > 0 AND $5 IN (SELECT json_array_elements_text(a.body::json->'keys')))
			AND ($6 = '' OR a.body::json->>'request' = $6)
			AND ($7 = '' OR a.body::json->>'action' = $7)
			AND ($8 = '' OR a.body::json->>'outcome' = $8)
			AND ($9 = '' OR a.body::json->'actor'->>'serial' = $9)
			AND ($10 = '' OR a.body::json->'actor'->>'id' = $10 AND a.body::json->'actor'->>'role' = 'operator')
			AND coalesce(r.first + a.seq - r.seq, $12) >= $11
		ORDER BY r.first IS NULL, leaf, a.node, a.seq LIMIT $13`,
		l.Origin, from, to, f.SAE, f.Key, f.Request, f.Action, f.Outcome, f.Serial, f.Operator, f.First, unplaced, f.Limit)
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r audit.Row, err error) {
		return r, row.Scan(&r.Leaf, &r.Node, &r.Seq, &r.Prev, &r.Body, &r.Sig)
	})
	if err != nil {
		return nil, fmt.Errorf("searching the audit log: %w", err)
	}
	return found, nil
}

// Prove proves that the log has a leaf, by a checkpoint that witnesses have signed, if
// there is one.
func (l *Snapshot) Prove(ctx context.Context, leaf int64, key audit.LogKey) (p audit.Proof, err error) {
	signed, err := l.Cosigned(ctx, leaf+1)
	if err != nil {
		return p, err
	}
	c, _, err := audit.OpenCheckpoint(signed, key)
	if err != nil {
		return p, err
	}
	p = audit.Proof{Leaf: leaf, Checkpoint: string(signed)}
	if p.Proof, err = audit.ProveLeaf(c, leaf, l); err != nil {
		return p, err
	}
	err = l.Rows(ctx, leaf, leaf+1, func(r audit.Row) error {
		p.Text = string(r.Body)
		return nil
	})
	return p, err
}

// Leaves calls do for up to limit leaves of the log of an origin, from first on; origin
// 0 is the first log that there is. It returns the log's state, and the origin of the
// log that follows it, 0 if none does. A leaf is shown to be the log's by its last
// checkpoint, which key has signed: its error is a *audit.BadLeaf at one that is not.
func (r *Reader) Leaves(ctx context.Context, key func(LogState) string, origin, first int64, limit int, do func(audit.Row) error) (state LogState, following int64, err error) {
	logs, err := r.Logs(ctx)
	if err != nil || len(logs) == 0 {
		return LogState{}, 0, err
	}
	at := 0
	for i, l := range logs {
		if l.Origin == origin {
			at = i
		}
	}
	state = logs[at]
	if at+1 < len(logs) {
		following = logs[at+1].Origin
	}
	err = r.Snapshot(ctx, state.Origin, func(l *Snapshot) error {
		end := min(first+int64(limit), l.Size)
		if first >= end {
			return nil
		}
		k, err := audit.ParseLogKey(key(l.LogState))
		if err != nil {
			return err
		}
		signed, err := l.Checkpoint(ctx, 0)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, k)
		if err != nil {
			return err
		}
		return audit.Proved(ctx, c, first, end, l, do)
	})
	return state, following, err
}

// Day is a day of the audit log, and the leaves of the log of an origin that its events
// are among.
type Day struct {
	Origin      int64
	Day         time.Time
	First, Last int64
}

// Days lists the days before one whose events are in the database and in a log, oldest
// first: one for each log that has leaves of it.
func (r *Reader) Days(ctx context.Context, before time.Time) ([]Day, error) {
	rows, _ := r.pool.Query(ctx, `SELECT r.origin, r.day, min(r.first), max(r.first + r.n - 1) FROM audit_range r
		WHERE r.day < $1 AND r.day IN (SELECT to_date(substr(c.relname, 8), 'YYYYMMDD') FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
			WHERE i.inhparent = 'audit'::regclass)
		GROUP BY r.origin, r.day ORDER BY r.day, r.origin`, before)
	days, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Day])
	if err != nil {
		return nil, fmt.Errorf("listing the audit log's days: %w", err)
	}
	return days, nil
}

// Archived is where leaves are that are not in the database any more.
type Archived struct {
	Day         time.Time
	First, Last int64
	File        string // in the folder of the archive
	Sum         []byte // SHA-256
}

// Archived says which bundle has a leaf, as the database has it; false if the leaf is in
// the database.
func (l *Snapshot) Archived(ctx context.Context, leaf int64) (a Archived, ok bool, err error) {
	rows, _ := l.tx.Query(ctx, "SELECT day, first, last, file, sha256 FROM audit_archive WHERE origin = $1 AND $2 BETWEEN first AND last ORDER BY day LIMIT 1", l.Origin, leaf)
	a, err = pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[Archived])
	if errors.Is(err, pgx.ErrNoRows) {
		return a, false, nil
	}
	if err != nil {
		return a, false, fmt.Errorf("looking for the bundle of leaf %d: %w", leaf, err)
	}
	return a, true, nil
}

// Kept is the first leaf whose event, and that of each after it, is in the database:
// those before it are in bundles.
func (l *Snapshot) Kept(ctx context.Context) (leaf int64, err error) {
	if err = l.tx.QueryRow(ctx, "SELECT coalesce(max(last) + 1, 0) FROM audit_archive WHERE origin = $1", l.Origin).Scan(&leaf); err != nil {
		return 0, fmt.Errorf("reading what of the audit log is kept: %w", err)
	}
	return leaf, nil
}
