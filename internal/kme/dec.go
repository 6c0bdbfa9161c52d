package kme

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// notFound is the fixed message of 014, 6.4. Whether a key never was, is gone or
// is another pair's is in the audit only.
const notFound = "one or more keys specified are not found on KME"

// DecKeys is Get key with key IDs of 014, 5.4: the caller takes keys that master
// asked for. All of them or none; each only once.
func (k *KME) DecKeys(ctx context.Context, c identity.Caller, rid string, master identity.SAE, ids []key.ID) (got etsi014.Container, err error) {
	call := k.begin(c, rid, audit.DecKeys, master)
	defer func() { k.counted(call, err) }()
	call.ev.Keys = ids
	taken, err := k.take(ctx, call, master, ids, false)
	if err != nil {
		return etsi014.Container{}, call.refuse(ctx, err)
	}
	failpoint.Hit(failpoint.DecCommitted)
	keys := make([]etsi014.Key, len(taken))
	for i, t := range taken {
		keys[i] = etsi014.Key{ID: t.row.Key, Material: t.material, Provenance: t.row.Provenance}
	}
	return etsi014.Container{Keys: keys}, nil
}

// taken is a key on its way to its taker.
type taken struct {
	row      store.Due
	material key.Material
}

// take judges the request against the rows and policy, unwraps and commits. The
// zero master stands for whoever asked for the keys (the legacy door names none).
// With reread, a key that may be read again stays where it is.
func (k *KME) take(ctx context.Context, c *call, master identity.SAE, ids []key.ID, reread bool) (keys []taken, err error) {
	if err := c.atHome(); err != nil {
		return nil, err
	}
	if err := k.spend(c.sae, len(ids)); err != nil {
		return nil, err
	}
	if err := k.able(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	due, err := k.find(ctx, c, master, ids)
	if err != nil {
		return nil, err
	}
	blobs, refs := make([]wrapped, len(due)), make([]store.DueRef, len(due))
	for i, d := range due {
		blobs[i], refs[i] = k.wrappedDue(d), store.DueRef{Key: d.Key, ExpiryEpoch: d.ExpiryEpoch}
	}
	began := time.Now()
	plains, bad, err := k.unseal(ctx, blobs...)
	if errors.Is(err, hsm.ErrNoKEK) {
		return nil, &problem.Error{Kind: problem.Invalid, Detail: notFound, Err: goneError{due[bad].Key, "expired: " + err.Error()}}
	}
	if errors.Is(err, hsm.ErrTampered) {
		k.incident(ctx, "tampered-due", fmt.Sprintf("the blob of key %s for %s does not open: its row was changed", due[bad].Key, due[bad].SAE))
	}
	if err != nil {
		return nil, fmt.Errorf("unwrapping key %s: %w", due[bad].Key, err)
	}
	keys = make([]taken, len(due))
	for i, d := range due {
		keys[i] = taken{d, key.NewMaterial(plains[i])}
	}
	defer func() {
		if err != nil {
			for _, t := range keys {
				t.material.Wipe()
			}
		}
	}()
	since(k.metrics.hsm, began)
	failpoint.Hit(failpoint.DecUnwrapped)
	defer since(k.metrics.commit, time.Now())
	done := c.ev
	done.Outcome, done.Reread = audit.Done, reread && due[0].Reread
	if done.Reread { // the legacy door's: one key
		err = k.Store.Read(ctx, store.ReadJob{SAE: c.sae, Row: refs[0], Events: []audit.Event{done}, Late: c.late})
	} else {
		err = k.Store.Take(ctx, store.TakeJob{SAE: c.sae, Rows: refs, How: store.GoneTaken, Events: []audit.Event{done}, Late: c.late})
	}
	c.pending = errors.Is(err, store.ErrDoubt)
	return keys, raced(ids[0], err)
}

// raced is err as the caller's own answer if another request has taken the key, or
// time has, since it was found.
func raced(id key.ID, err error) error {
	if errors.Is(err, store.ErrShort) || errors.Is(err, store.ErrExpired) {
		return &problem.Error{Kind: problem.Invalid, Detail: notFound, Err: goneError{id, "taken by another request at the same time"}}
	}
	return err
}

// find looks for the rows that the caller may take now.
func (k *KME) find(ctx context.Context, c *call, master identity.SAE, ids []key.ID) ([]store.Due, error) {
	rows, named, err := k.Store.FindDue(ctx, c.sae, ids)
	if err != nil {
		return nil, fmt.Errorf("finding keys: %w", err)
	}
	return k.entitled(c, master, ids, rows, named)
}

// entitled finds the rows that the caller may take now, in the order asked for.
// Being named for another's key outweighs everything else (014, 5.4: 401).
func (k *KME) entitled(c *call, master identity.SAE, ids []key.ID, rows map[key.ID]store.Taken, named map[key.ID]bool) ([]store.Due, error) {
	for _, id := range ids {
		if _, mine := rows[id]; !mine && named[id] {
			return nil, problem.Because(problem.Unauthorized, fmt.Errorf("%s is not named for key %s", c.sae, id))
		}
	}
	absent := func(format string, args ...any) error {
		return &problem.Error{Kind: problem.Invalid, Detail: notFound, Err: fmt.Errorf(format, args...)}
	}
	due := make([]store.Due, len(ids))
	for i, id := range ids {
		row, ok := rows[id]
		switch {
		case !ok:
			return nil, absent("key %s is unknown here", id)
		case master != (identity.SAE{}) && row.Master != master:
			return nil, absent("key %s was asked for by %s, not %s", id, row.Master, master)
		case row.Gone != "":
			return nil, &problem.Error{Kind: problem.Invalid, Detail: notFound, Err: goneError{id, row.Gone}}
		case !k.Now().Before(row.ExpiresAt):
			return nil, &problem.Error{Kind: problem.Invalid, Detail: notFound, Err: goneError{id, "expired"}}
		}
		due[i] = row.Due
	}
	set := k.Policies()
	c.ev.Master, c.ev.Slaves, c.ev.Bits = due[0].Master.String(), []string{c.sae.String()}, due[0].Bits
	c.ev.Provenance, c.ev.PeerNode, c.ev.PeerRun, c.ev.Batch = due[0].Provenance, due[0].Node, due[0].Run, due[0].Batch
	var asked policies.Question
	for _, d := range due {
		q := policies.Question{
			Action: string(audit.DecKeys), Caller: c.sae, Other: d.Master, Number: len(ids), Bits: d.Bits, Provenance: d.Provenance,
			SameKME: d.Peer == (identity.KME{}),
		}
		if !q.SameKME {
			q.Link = d.Link
		}
		if q == asked {
			continue // the question was just answered
		}
		asked = q
		decision := set.Decide(c.asked(q))
		c.ev.Policy = union(c.ev.Policy, decision.Policies)
		if !decision.Allow {
			return nil, problem.Because(problem.Unauthorized, fmt.Errorf("policy (%s) does not let %s take keys of %s", decision.Reason, c.sae, d.Master))
		}
	}
	return due, nil
}

// goneError says that a key was there and has ended.
type goneError struct {
	id  key.ID
	how string
}

func (e goneError) Error() string { return fmt.Sprintf("key %s is gone: %s", e.id, e.how) }

// AnswerLost records that an answer was committed and could not be delivered: the
// keys in it are burned. It never undoes anything.
func (k *KME) AnswerLost(ctx context.Context, c identity.Caller, rid string, err error) {
	ev := k.begin(c, rid, audit.Lost, identity.SAE{}).ev
	ev.Outcome, ev.Reason = audit.Failed, err.Error()
	k.note(ctx, ev)
}

// Status is Get status of 014, 5.2.
func (k *KME) Status(ctx context.Context, c identity.Caller, rid string, slave identity.SAE) (s etsi014.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	call := k.begin(c, rid, audit.Status, slave)
	defer func() { k.counted(call, err) }()
	ways, err := call.judge([]identity.SAE{slave}, 0, 0)
	if err != nil {
		return etsi014.Status{}, call.refuse(ctx, err)
	}
	if err := k.spend(call.sae, 1); err != nil {
		return etsi014.Status{}, call.refuse(ctx, err)
	}
	limits := k.Limits()
	s = etsi014.Status{
		SourceKME: k.Self.String(), TargetKME: k.Self.String(), Master: call.sae.String(), Slave: slave.String(),
		KeySize: limits.KeySize, MaxPerRequest: limits.MaxPerRequest, MaxSize: limits.MaxSize, MinSize: limits.MinSize, MaxSAEs: limits.MaxSAEs,
		Max: k.PoolLimit,
	}
	if ways[0].link == nil {
		s.Stored = k.PoolLimit // made at request time: as many as are asked for
	} else {
		s.TargetKME, s.Max = ways[0].link.Peer.String(), len(ways)*k.PoolLimit
		for _, w := range ways {
			n, err := k.Store.Stored(ctx, w.link.ID)
			if err != nil {
				return etsi014.Status{}, call.refuse(ctx, fmt.Errorf("counting the pool: %w", err))
			}
			s.Stored += n
		}
		s.Max = max(s.Max, s.Stored)
	}
	done := call.ev
	done.Outcome = audit.Done
	// A client that leaves does not end this: its request would have two outcomes.
	recording, stop := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer stop()
	if err := k.Store.RecordLate(recording, call.late, done); err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return etsi014.Status{}, call.refuse(ctx, err)
	}
	return s, nil
}

// Limits are what this KME serves. The largest request is askAtoms in an announce.
func (k *KME) Limits() etsi014.Limits {
	return etsi014.Limits{KeySize: key.AtomBits, MinSize: handover.MinBits, MaxSize: handover.MaxBits, MaxPerRequest: 128, MaxSAEs: 32, MaxTTL: k.MaxTTL, Strict: k.Strict}
}

// Refused records what a door itself turned away after TLS, and returns what to answer.
func (k *KME) Refused(ctx context.Context, c identity.Caller, rid, route string, err error) error {
	call := k.begin(c, rid, audit.Malformed, identity.SAE{})
	call.ev.Route = route
	err = call.refuse(ctx, err)
	k.counted(call, err)
	return err
}
