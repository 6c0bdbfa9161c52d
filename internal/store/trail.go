package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
)

// What the daemon reads of the tree over the audit log, which the sequencer writes, and
// what it keeps of the logs of others. It never reads an event.

// Signed is a checkpoint of the site's own log.
type Signed struct {
	Origin int64
	Size   int64
	Note   string // as the log has signed it
}

// LastCheckpoint is the newest of the site's log; of origin 0 if there is none yet. After
// a failover it may be one of before, or one that is lost: it tells whether there is
// another than was known, and nobody is shown it.
func (db *DB) LastCheckpoint(ctx context.Context) (s Signed, err error) {
	if s, err = readCheckpoint(ctx, db.pool); err != nil {
		return s, away("reading the last checkpoint", err)
	}
	return s, nil
}

// SurelyLastCheckpoint is LastCheckpoint as it stands: see proven.
func (db *DB) SurelyLastCheckpoint(ctx context.Context) (s Signed, err error) {
	err = db.proven(ctx, func(tx pgx.Tx) error {
		s, err = readCheckpoint(ctx, tx)
		return err
	})
	if err != nil {
		return Signed{}, away("reading the last checkpoint for sure", err)
	}
	return s, nil
}

func readCheckpoint(ctx context.Context, from querier) (Signed, error) {
	rows, _ := from.Query(ctx, `SELECT c.origin, c.size, c.note FROM audit_log l JOIN audit_checkpoint c ON c.origin = l.origin AND c.size = l.size
		WHERE l.origin = (SELECT origin FROM settings)`)
	s, err := pgx.CollectOneRow(rows, pgx.RowToStructByPos[Signed])
	if errors.Is(err, pgx.ErrNoRows) {
		return Signed{}, nil
	}
	return s, err
}

// LogTiles are the tiles of the site's log of an origin.
type LogTiles struct {
	db     *DB
	origin int64
}

// Tiles are those of the site's log of an origin, for proofs.
func (db *DB) Tiles(origin int64) LogTiles { return LogTiles{db, origin} }

// Tile implements audit.TileSource.
func (t LogTiles) Tile(level int, n int64, width int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), tripTime)
	defer cancel()
	var data []byte
	err := t.db.pool.QueryRow(ctx, "SELECT data FROM audit_tile WHERE origin = $1 AND level = $2 AND n = $3", t.origin, level, n).Scan(&data)
	if err != nil {
		return nil, away("reading a tile of the audit log", err)
	}
	return data[:min(len(data), width*tlog.HashSize)], nil
}

// AddCosignature keeps the line in which a witness has signed a checkpoint.
func (db *DB) AddCosignature(ctx context.Context, s Signed, witness, line string) error {
	_, err := db.pool.Exec(ctx, "INSERT INTO audit_cosignature (origin, size, witness, line) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING", s.Origin, s.Size, witness, line)
	if err != nil {
		return away("keeping a cosignature", err)
	}
	return nil
}

// TrailLag is how far the tree is behind the chains of the nodes.
type TrailLag struct {
	Events  int64     // not folded yet
	Folded  int64     // leaves of the present log
	Newest  time.Time // when its last checkpoint was made; zero if there is none
	Unknown bool      // no sequencer has ever run
	Forged  string    // what the sequencer found forged in it; "" while nothing is
}

// TrailLag reads it.
func (db *DB) TrailLag(ctx context.Context) (l TrailLag, err error) {
	var newest *time.Time
	err = db.pool.QueryRow(ctx, `SELECT (SELECT coalesce(sum(r.seq - coalesce(n.seq, 0)), 0)::bigint FROM node_run r LEFT JOIN audit_node n USING (node)),
		coalesce(l.size, 0), l.origin IS NULL, coalesce(l.forged, ''), (SELECT at FROM audit_checkpoint c WHERE c.origin = l.origin AND c.size = l.size)
		FROM (SELECT 1) AS one LEFT JOIN (SELECT * FROM audit_log ORDER BY origin DESC LIMIT 1) AS l ON true`).Scan(&l.Events, &l.Folded, &l.Unknown, &l.Forged, &newest)
	if err != nil {
		return l, away("reading how far the audit log's tree has come", err)
	}
	if newest != nil {
		l.Newest = *newest
	}
	return l, nil
}

// Witnessed is what this site has last seen of the log of another.
type Witnessed struct {
	Log  string // its name
	Key  string // its verifier key
	Size int64
	Note string // the checkpoint, as the log had signed it; "" if nothing was seen
}

// WitnessedOf lists the logs of another KME that were witnessed here, the last one last.
func (db *DB) WitnessedOf(ctx context.Context, kme identity.KME) ([]Witnessed, error) {
	rows, _ := db.pool.Query(ctx, "SELECT log, vkey, size, note FROM audit_witnessed WHERE kme = $1 ORDER BY at, log", kme.String())
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Witnessed])
	if err != nil {
		return nil, away("reading what was witnessed", err)
	}
	return list, nil
}

// ErrWitnessed says that another node of the site was first to witness.
var ErrWitnessed = errors.New("something else was witnessed in the meantime")

// KeepWitnessed keeps that a checkpoint of another's log was found to follow the one of
// size was. It is durable when this returns, so that no two of one size can be
// cosigned.
func (db *DB) KeepWitnessed(ctx context.Context, kme identity.KME, was int64, w Witnessed) error {
	tag, err := db.pool.Exec(ctx, `INSERT INTO audit_witnessed AS w (log, kme, vkey, size, note, at) VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (log) DO UPDATE SET size = excluded.size, note = excluded.note, at = excluded.at
		WHERE w.size = $7 AND w.kme = excluded.kme AND w.vkey = excluded.vkey`, w.Log, kme.String(), w.Key, w.Size, w.Note, db.now(), was)
	if err != nil {
		return away("keeping what was witnessed", err)
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("witnessing %s at %d: %w", w.Log, w.Size, ErrWitnessed)
	}
	return nil
}

// EnsureAuditDays makes the partitions of the audit log for days from now on, so that
// no commit has to at midnight.
func (db *DB) EnsureAuditDays(ctx context.Context, days int) error {
	for i := range days {
		day := db.now().AddDate(0, 0, i).Format(time.DateOnly)
		if _, err := db.pool.Exec(ctx, "SELECT open_audit_day($1::text::date)", day); err != nil {
			return away("opening the audit log's days", err)
		}
	}
	return nil
}

var _ audit.TileSource = LogTiles{}

// checkpointsAtOnce is how many old checkpoints one transaction deletes.
const checkpointsAtOnce = 10_000

// EndCheckpoints deletes the checkpoints of the site's logs that nobody needs any more:
// before the last day, all but the last of each hour (migration 00021 has the rule).
func (db *DB) EndCheckpoints(ctx context.Context) (ended int, err error) {
	for {
		var n int
		if err := db.pool.QueryRow(ctx, "SELECT end_audit_checkpoints($1)", checkpointsAtOnce).Scan(&n); err != nil {
			return ended, away("ending old checkpoints", err)
		}
		if ended += n; n < checkpointsAtOnce {
			return ended, nil
		}
	}
}

// Cursor is where a sink of the audit log has got to: the first leaf of the log of an
// origin that it has not been sent. Origin 0 says that it has been sent nothing.
type Cursor struct{ Origin, Next int64 }

// Cursor reads it.
func (db *DB) Cursor(ctx context.Context, sink string) (c Cursor, err error) {
	err = db.pool.QueryRow(ctx, "SELECT origin, next FROM audit_cursor WHERE sink = $1", sink).Scan(&c.Origin, &c.Next)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return c, away("reading where a sink has got to", err)
	}
	return c, nil
}

// MoveCursor keeps it.
func (db *DB) MoveCursor(ctx context.Context, sink string, c Cursor) error {
	_, err := db.pool.Exec(ctx, `INSERT INTO audit_cursor (sink, origin, next) VALUES ($1, $2, $3)
		ON CONFLICT (sink) DO UPDATE SET origin = excluded.origin, next = excluded.next`, sink, c.Origin, c.Next)
	if err != nil {
		return away("keeping where a sink has got to", err)
	}
	return nil
}

// Archived is a day of the audit log that is in a bundle.
type Archived struct {
	Origin      int64
	Day         time.Time
	First, Last int64 // leaves
	File        string
	Sum         [32]byte // SHA-256 of the file
}

// DropAuditDays drops the events of days that were written to bundles and verified
// there, all or none. events say so, one for each bundle, and are recorded first: no
// dropping without its record.
func (db *DB) DropAuditDays(ctx context.Context, bundles []Archived, events ...audit.Event) error {
	if err := db.Record(ctx, events...); err != nil {
		return err
	}
	var days []time.Time
	var origins, firsts, lasts []int64
	var files []string
	var sums [][]byte
	for _, a := range bundles {
		days, origins, firsts, lasts = append(days, a.Day), append(origins, a.Origin), append(firsts, a.First), append(lasts, a.Last)
		files, sums = append(files, a.File), append(sums, a.Sum[:])
	}
	_, err := db.pool.Exec(ctx, "SELECT drop_audit_days($1::date[], $2, $3, $4, $5, $6)", days, origins, firsts, lasts, files, sums)
	if err != nil {
		return away("dropping days of the audit log", err)
	}
	return nil
}

// SchemaChange says which migrations have made the schema what it is.
type SchemaChange struct {
	From, To int64     // its versions
	Last     time.Time // when the last one was applied, by the database's clock
}

// TellSchema records the event of the schema's migrations since it was recorded last, in
// one transaction with that it was: each is told of once, whoever has applied it.
func (db *DB) TellSchema(ctx context.Context, event func(SchemaChange) audit.Event) error {
	err := db.do(ctx, solo(func(ctx context.Context, a *attempt) error {
		var c SchemaChange
		if err := a.conn.QueryRow(ctx, "SELECT schema_told FROM settings FOR UPDATE").Scan(&c.From); err != nil {
			return err
		}
		var last *time.Time
		err := a.conn.QueryRow(ctx, "SELECT coalesce(max(version_id), 0), max(tstamp) AT TIME ZONE current_setting('TimeZone') FROM goose_db_version WHERE is_applied").Scan(&c.To, &last)
		if err != nil || c.To == c.From || last == nil {
			return err
		}
		c.Last = *last
		a.record(event(c))
		a.writes.Queue("UPDATE settings SET schema_told = $1", c.To)
		return nil
	}), nil)
	if err != nil {
		return fmt.Errorf("recording the schema's migrations: %w", err)
	}
	return nil
}
