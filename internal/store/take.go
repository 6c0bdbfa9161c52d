package store

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// How an assigned key ended: Taken.Gone, TakeJob.How.
const (
	GoneTaken    = "taken"    // handed to its SAE
	GoneConsumed = "consumed" // erased at the word of its SAE
	GoneExpired  = "expired"
	GoneVoid     = "void" // taken back by the initiator, or ended by a recovery here
)

// DueRef names the row of an assigned key; the SAE is known from elsewhere.
type DueRef struct {
	Key         key.ID
	ExpiryEpoch key.Epoch
}

// TakeJob is one SAE's taking, or erasing, of keys assigned to it.
type TakeJob struct {
	SAE    identity.SAE
	Rows   []DueRef
	How    string // GoneTaken or GoneConsumed
	Events []audit.Event
	// Late, if not nil, is called once, on a goroutine of its own, if Take returned
	// ErrDoubt and the outcome has become known.
	Late func(committed bool)
}

// Take empties the rows, all or none. With ErrShort one of them was gone or never
// there; of any number of takes of a row at most one succeeds.
func (db *DB) Take(ctx context.Context, j TakeJob) error {
	for _, r := range j.Rows { // another node may have opened the epoch
		if err := db.learn(ctx, r.ExpiryEpoch); err != nil {
			return away("taking keys", err)
		}
	}
	return db.do(ctx, &take{j, db}, j.Late)
}

type take struct {
	TakeJob
	db *DB
}

func (t *take) claims(claimed func(claim)) {
	for _, r := range t.Rows {
		claimed(claim{r.Key, t.SAE.String()})
	}
}

func (t *take) weight() int { return len(t.Rows) }

func (t *take) ask(a *attempt) error {
	for _, r := range t.Rows {
		if !t.db.epochs.has(r.ExpiryEpoch) {
			return refuse(ErrExpired)
		}
	}
	for _, r := range t.Rows {
		a.empty[r.ExpiryEpoch] = append(a.empty[r.ExpiryEpoch], emptying{dueKey{r.Key, t.SAE}, t.How})
	}
	return nil
}

func (t *take) settle(_ context.Context, a *attempt) error {
	for _, r := range t.Rows {
		k := dueKey{r.Key, t.SAE}
		if !a.emptied[k] {
			return refuse(ErrShort)
		}
		delete(a.emptied, k) // given to one asker
	}
	a.record(t.Events...)
	a.hit = append(a.hit, failpoint.DecUpdated)
	return nil
}

// ReadJob is one SAE's reading of a key that it may read again.
type ReadJob struct {
	SAE    identity.SAE
	Row    DueRef
	Events []audit.Event
	Late   func(committed bool) // as in TakeJob
}

// Read records that a key is read which stays where it is. With ErrShort it is gone,
// was never there, or may not be read. The row is locked until the commit: of a read
// and a take at once, at whichever nodes, either the read comes first or is short.
func (db *DB) Read(ctx context.Context, j ReadJob) error {
	if err := db.learn(ctx, j.Row.ExpiryEpoch); err != nil { // another node may have opened it
		return away("reading a key", err)
	}
	return db.do(ctx, &read{ReadJob: j, db: db}, j.Late)
}

type read struct {
	ReadJob
	db    *DB
	there bool
}

func (r *read) claims(claimed func(claim)) { claimed(claim{r.Row.Key, r.SAE.String()}) }

func (r *read) weight() int { return 1 }

const lockDue = "SELECT FROM %s WHERE key_id = $1 AND sae = $2 AND reread AND ct IS NOT NULL FOR SHARE"

func (r *read) ask(a *attempt) error {
	if !r.db.epochs.has(r.Row.ExpiryEpoch) {
		return refuse(ErrExpired)
	}
	r.there = false
	a.reads.Queue(fmt.Sprintf(lockDue, dueTable(r.Row.ExpiryEpoch)), [16]byte(r.Row.Key), r.SAE.String()).Query(func(rows pgx.Rows) error {
		r.there = rows.Next()
		rows.Close()
		return rows.Err()
	})
	return nil
}

func (r *read) settle(_ context.Context, a *attempt) error {
	if !r.there {
		return refuse(ErrShort)
	}
	a.record(r.Events...)
	return nil
}

// missingTable says whether a statement named a partition that is not there.
func missingTable(err error) bool { return sqlState(err) == "42P01" }
