// Package store keeps a site's keys, assignments and audit log in PostgreSQL.
// There is one method for each verb of the handover and of a key's life.
//
// What it promises: exactly-once is SQL. A key leaves the pool by a DELETE that
// gave it back, an assigned key is taken by an UPDATE that emptied it, and only
// what came back is recorded and may be answered. Whatever changes a key goes
// through one committer, in batches of one transaction each, with its audit events
// in the same transaction; each of these ends with the node's row of node_run moved
// from one commit to the next. That row fences a node whose run has been taken
// over, holds the head of its audit chain and answers "did my commit happen?".
//
// What it must never do: answer from a key that no commit gave it, write an act
// without its event, cancel a commit because a client went away, or use the
// database's clock. It sees wrapped blobs only, never a key.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
)

const schemaName = "kme"

// ErrOldSchema is what Open returns for a database that was not migrated to the
// schema of this program.
var ErrOldSchema = errors.New("the database has to be migrated")

// What a verb returns when it is not done. Except after ErrDoubt, nothing happened.
var (
	// ErrDropped: ctx ended before the verb's batch began.
	ErrDropped = errors.New("dropped before its batch began")
	// ErrDoubt: ctx ended while the batch was being committed. The committer goes
	// on, and the job's Late, if it has one, is called when the outcome is known.
	ErrDoubt = errors.New("the outcome of the commit is not known yet")
	// ErrUnavailable: the database does not answer, or the queue is full.
	ErrUnavailable = errors.New("the database is not available")
	// ErrOverflow: too many events wait to be recorded. It is an ErrUnavailable.
	ErrOverflow = fmt.Errorf("%w: too many events wait", ErrUnavailable)
	// ErrFenced: the node's run has been taken over, or the database was set back to
	// the past (SetBack). The DB is dead, and the process must end. Only for this error a commit in flight may have happened
	// unseen; the takeover deals with its keys.
	ErrFenced = errors.New("the node's run has been taken over")
	// ErrShort: a key was not there any more.
	ErrShort = errors.New("a key is gone")
	// ErrExpired: the epoch of a key has no partition, or not any more.
	ErrExpired = errors.New("the epoch is over")
	// ErrClosedSession: the link's session is not the one that is open.
	ErrClosedSession = errors.New("the link's session is closed")
	// ErrOtherBlock: a different block of that name is, or was, held here.
	ErrOtherBlock = errors.New("another block of that name is known")
	// ErrOvertaken: a later takeover of the node has begun.
	ErrOvertaken = errors.New("a later takeover of the node has begun")
)

// Config is what a DB needs. All fields must be set, Witness, Key and Log excepted.
type Config struct {
	DSN         string           // of the role kme_app; of several hosts the primary is found, connect_timeout (2 s) is for each
	Site        identity.KME     // whose database it is: a database of another KME is refused
	Node        string           // this node's name, unique at the site
	EpochLength time.Duration    // must be what the database was made with
	TTL         time.Duration    // most assigned keys expire no later than this from now: where they are looked for first
	Now         func() time.Time // the daemon's clock
	Witness     *Witness         // is told of each commit; nil: nobody is
	Key         *audit.NodeKey   // signs the head of the audit chain in each commit; nil: nobody does, for tests
	Log         *slog.Logger     // nil discards
}

// DB is one node's way to the database of its site. Its methods may be called
// from many goroutines.
type DB struct {
	cfg       Config
	pool      *pgxpool.Pool // for reading, and for the few changes that carry no event: see below
	epochs    epochSet
	committer *committer
	finder    *finder
	untaken   untaken
	late      sync.WaitGroup // calls of Late under way
	ends      sync.Map       // link ID -> handover.End: ours, of the links that EnsureLink has registered
	counts    sync.Map       // link ID -> *turns[int]: of Stored

	mu        sync.Mutex
	unclaimed map[string][]int64 // by link: chunks leased by this run whose Lease had failed to return them
}

// What the pool reads may be old: after a failover its connections may lead, for a
// while, to a primary that is one no more. It may also run ahead, by a commit that
// a primary had written and not yet replicated when it crashed and came back. So no
// read decides anything that cannot be taken back: it says what to try, and the
// committer's statement finds it so or refuses. Its COMMIT, which no old primary
// can end, proves that all it saw is replicated too.

// pointLookups makes the planner take the index whatever it believes about a
// table's size: hot statements name a few rows of tables that grow by the minute,
// and a plan made while a partition was empty would stay. So there is but one plan of
// each, and it is made once: planning anew costs the server more than the reading.
var pointLookups = map[string]string{
	"search_path":                         schemaName,
	"enable_seqscan":                      "off",
	"enable_bitmapscan":                   "off",
	"enable_hashjoin":                     "off",
	"enable_mergejoin":                    "off",
	"jit":                                 "off",
	"plan_cache_mode":                     "force_generic_plan",
	"default_transaction_isolation":       "read committed",
	"synchronous_commit":                  "on",
	"idle_in_transaction_session_timeout": "10s",
	"tcp_keepalives_idle":                 "10", // a node that lost its power keeps no locks
	"tcp_keepalives_interval":             "5",
	"tcp_keepalives_count":                "3",
	"client_connection_check_interval":    "1s", // nor does one that hung up on a statement
}

// Open connects to the database. It refuses one whose schema version, epoch length
// or site is not the program's. Nothing can be changed before Begin.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Node == "" || cfg.Site == (identity.KME{}) || cfg.EpochLength <= 0 || cfg.Now == nil {
		return nil, errors.New("opening the store: node, site, epoch length and clock must be set")
	}
	poolConfig, err := parse(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	db := &DB{cfg: cfg, unclaimed: make(map[string][]int64)}
	db.committer = newCommitter(db, poolConfig.ConnConfig.Copy())
	if db.pool, err = pgxpool.NewWithConfig(ctx, poolConfig); err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	err = db.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error { return checkSchema(ctx, conn.Conn(), cfg) })
	if err == nil {
		err = db.epochs.refresh(ctx, db.pool)
	}
	if err != nil {
		db.pool.Close()
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	db.finder = newFinder(db)
	return db, nil
}

// Close ends the batch under way, refuses those that wait, and closes all
// connections. If the outcome of a commit is unknown it stays so.
func (db *DB) Close() {
	db.committer.close()
	db.late.Wait()
	db.finder.close()
	db.pool.Close()
}

// Healthy is nil while the committer is connected and gets answers, and otherwise
// why it is not.
func (db *DB) Healthy() error { return db.committer.health() }

// Fenced is closed when the node's run has been taken over. Nothing can be
// committed from then on, and the process must end.
func (db *DB) Fenced() <-chan struct{} { return db.committer.fenced }

// now is the daemon's time in the precision of the database.
func (db *DB) now() time.Time { return db.cfg.Now().UTC().Truncate(time.Microsecond) }

// away wraps the error of a read: the caller can but come again.
func away(doing string, err error) error {
	return fmt.Errorf("%s: %w: %w", doing, ErrUnavailable, err)
}

// scan runs a read that goes through whole tables, which the settings of the
// pool's connections would steer it away from.
func (db *DB) scan(ctx context.Context, read func(pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, db.pool, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, wholeTables); err != nil {
			return err
		}
		return read(tx)
	})
}

// wholeTables undoes pointLookups until the end of the transaction.
const wholeTables = "SET LOCAL enable_seqscan = on; SET LOCAL enable_hashjoin = on; SET LOCAL enable_bitmapscan = on; SET LOCAL plan_cache_mode = auto"
