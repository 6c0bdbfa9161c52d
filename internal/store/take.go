package store

import (
	"context"
	"strings"

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
	GoneVoid     = "void" // taken back by the initiator
)

// Taken is the row of an assigned key, live or gone.
type Taken struct {
	Due
	Gone string // "" while it can be taken, and how it ended afterwards
}

// probed is how many expiry epochs, from the current one, are asked for a key by
// the names of their partitions: those that the default lifetime reaches.
const probed = 3

const dueColumns = `SELECT key_id, sae, sae = $2, expiry_epoch, master, bits, provenance, kek, iv, ct, expires_at, reread, peer, node, run, batch, COALESCE(gone_how, '') FROM `

// FindDue looks for assigned keys. rows are those of sae; named has every key that
// is, or was within its epoch, assigned to any SAE.
func (db *DB) FindDue(ctx context.Context, sae identity.SAE, ids []key.ID) (rows map[key.ID]Taken, named map[key.ID]bool, err error) {
	now := key.EpochAt(db.cfg.Now(), db.cfg.EpochLength)
	var near []string
	for e := now; e < now+probed; e++ {
		if db.epochs.has(e) {
			near = append(near, dueColumns+dueTable(e)+" WHERE key_id = ANY($1::uuid[])")
		}
	}
	rows, named = make(map[key.ID]Taken), make(map[key.ID]bool)
	read := func(sql string) error {
		found, _ := db.pool.Query(ctx, sql, uuids(ids), sae.String())
		return readDue(found, sae, rows, named)
	}
	if len(near) > 0 {
		if err := read(strings.Join(near, " UNION ALL ")); err != nil && !missingTable(err) {
			return nil, nil, away("looking for assigned keys", err)
		}
	}
	for _, id := range ids {
		if named[id] {
			continue
		}
		if err := read(dueColumns + "due WHERE key_id = ANY($1::uuid[])"); err != nil {
			return nil, nil, away("looking for assigned keys", err)
		}
		break
	}
	return rows, named, nil
}

func readDue(found pgx.Rows, sae identity.SAE, rows map[key.ID]Taken, named map[key.ID]bool) error {
	defer found.Close()
	for found.Next() {
		var t Taken
		var owner, master, peer string
		var mine bool
		var iv []byte
		err := found.Scan((*[16]byte)(&t.Key), &owner, &mine, &t.ExpiryEpoch, &master, &t.Bits, &t.Provenance, &t.KEK, &iv, &t.CT,
			&t.ExpiresAt, &t.Reread, &peer, &t.Node, &t.Run, &t.Batch, &t.Gone)
		if err != nil {
			return err
		}
		named[t.Key] = true
		if !mine {
			continue
		}
		t.SAE = sae
		copy(t.IV[:], iv)
		if t.Master, err = identity.ParseSAE(master); err != nil {
			return err
		}
		if peer != "" {
			if t.Peer, err = identity.ParseKME(peer); err != nil {
				return err
			}
		}
		rows[t.Key] = t
	}
	return found.Err()
}

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

// missingTable says whether a statement named a partition that is not there.
func missingTable(err error) bool { return sqlState(err) == "42P01" }
