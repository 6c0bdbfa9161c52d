package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Taken is the row of an assigned key, live or gone.
type Taken struct {
	Due
	Gone string // "" while it can be taken, and how it ended afterwards
}

// FindDue looks for assigned keys. rows are those of sae; named has every key that
// is, or was within its epoch, assigned to any SAE. Blobs may be shared with other
// callers: they must not be changed.
func (db *DB) FindDue(ctx context.Context, sae identity.SAE, ids []key.ID) (rows map[key.ID]Taken, named map[key.ID]bool, err error) {
	found, err := db.finder.near(ctx, ids)
	if err == nil && slices.ContainsFunc(ids, func(id key.ID) bool { return len(found[id]) == 0 }) {
		found, err = db.readDue(ctx, "SELECT "+dueColumns+" FROM due WHERE key_id = ANY($1::uuid[])", ids)
	}
	if err != nil {
		return nil, nil, away("looking for assigned keys", err)
	}
	rows, named = make(map[key.ID]Taken), make(map[key.ID]bool)
	for _, id := range ids {
		for _, t := range found[id] {
			named[id] = true
			if t.SAE == sae {
				rows[id] = t
			}
		}
	}
	return rows, named, nil
}

const dueColumns = "key_id, sae, expiry_epoch, master, bits, provenance, kek, iv, ct, expires_at, reread, link, version, peer, node, run, batch, COALESCE(gone_how, '')"

// readDue runs a statement that gives rows of due, for all SAEs of each key.
func (db *DB) readDue(ctx context.Context, sql string, ids []key.ID) (map[key.ID][]Taken, error) {
	rows, err := db.pool.Query(ctx, sql, uuids(ids))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	found := make(map[key.ID][]Taken)
	for rows.Next() {
		var t Taken
		var sae, master, peer string
		var iv []byte
		err := rows.Scan((*[16]byte)(&t.Key), &sae, &t.ExpiryEpoch, &master, &t.Bits, &t.Provenance, &t.KEK, &iv, &t.CT,
			&t.ExpiresAt, &t.Reread, &t.Link, &t.Version, &peer, &t.Node, &t.Run, &t.Batch, &t.Gone)
		if err != nil {
			return nil, err
		}
		copy(t.IV[:], iv)
		if t.SAE, err = identity.ParseSAE(sae); err != nil {
			return nil, err
		}
		if t.Master, err = identity.ParseSAE(master); err != nil {
			return nil, err
		}
		if peer != "" {
			if t.Peer, err = identity.ParseKME(peer); err != nil {
				return nil, err
			}
		}
		found[t.Key] = append(found[t.Key], t)
	}
	return found, rows.Err()
}

// maxProbed bounds how many expiry epochs are asked for a key by the names of their
// partitions: see probed.
const maxProbed = 64

// probed is how many expiry epochs, from the current one, are asked for a key by the
// names of their partitions: those that Config.TTL reaches. A key that is not there is
// looked for in the others too, which is slow.
func (c Config) probed() key.Epoch {
	return min(key.Epoch(c.TTL/c.EpochLength)+2, maxProbed)
}

// maxFinds bounds the requests that share one statement.
const maxFinds = 256

// finder looks for assigned keys in the partitions of the next epochs, for all
// requests that wait at once: like the committer, but it changes nothing.
type finder struct {
	db    *DB
	queue chan *find
	stop  context.Context
	end   context.CancelFunc
	ended sync.WaitGroup
}

// find is one request's look.
type find struct {
	ids   []key.ID
	done  chan struct{}
	found map[key.ID][]Taken // of all requests of the statement
	err   error
}

func newFinder(db *DB) *finder {
	f := &finder{db: db, queue: make(chan *find, maxFinds)}
	f.stop, f.end = context.WithCancel(context.Background())
	f.ended.Go(f.loop)
	return f
}

func (f *finder) close() {
	f.end()
	f.ended.Wait()
}

// near returns the rows of keys that are due in the current epoch or soon after.
func (f *finder) near(ctx context.Context, ids []key.ID) (map[key.ID][]Taken, error) {
	q := &find{ids: ids, done: make(chan struct{})}
	select {
	case f.queue <- q:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-f.stop.Done():
		return nil, fmt.Errorf("%w: closed", ErrUnavailable)
	}
	select {
	case <-q.done:
		return q.found, q.err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-f.stop.Done():
		return nil, fmt.Errorf("%w: closed", ErrUnavailable)
	}
}

func (f *finder) loop() {
	for {
		select {
		case <-f.stop.Done():
			return
		case q := <-f.queue:
			batch := []*find{q}
			for len(batch) < maxFinds && len(f.queue) > 0 {
				batch = append(batch, <-f.queue) // nobody else receives
			}
			f.look(batch)
		}
	}
}

// look answers a batch. The rows are shared: nobody changes them.
func (f *finder) look(batch []*find) {
	wanted := make(map[key.ID]bool)
	for _, q := range batch {
		for _, id := range q.ids {
			wanted[id] = true
		}
	}
	var parts []string
	now := key.EpochAt(f.db.cfg.Now(), f.db.cfg.EpochLength)
	for e := now; e < now+f.db.cfg.probed(); e++ {
		if f.db.epochs.has(e) {
			parts = append(parts, "SELECT "+dueColumns+" FROM "+dueTable(e)+" WHERE key_id = ANY($1::uuid[])")
		}
	}
	var found map[key.ID][]Taken
	var err error
	if len(parts) > 0 {
		ctx, cancel := context.WithTimeout(f.stop, tripTime)
		found, err = f.db.readDue(ctx, strings.Join(parts, " UNION ALL "), slices.Collect(maps.Keys(wanted)))
		cancel()
	}
	if missingTable(err) {
		found, err = nil, nil // dropped just now: the callers look everywhere
	}
	for _, q := range batch {
		q.found, q.err = found, err
		close(q.done)
	}
}
