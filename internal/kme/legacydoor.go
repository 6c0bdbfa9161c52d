package kme

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// LegacyLimits are what the legacy door holds requests to: those of 014, and lifetimes.
func (k *KME) LegacyLimits() legacy.Limits {
	l := k.Limits()
	return legacy.Limits{KeySize: l.KeySize, MinSize: l.MinSize, MaxSize: l.MaxSize, TTL: k.DefaultTTL, MaxTTL: k.MaxTTL}
}

// RequestKey is the legacy form of Get key: one key for the caller and recipient.
func (k *KME) RequestKey(ctx context.Context, c identity.Caller, rid string, recipient identity.SAE, bits int, ttl time.Duration) (issued legacy.Issued, err error) {
	call := k.begin(c, rid, audit.EncKeys, recipient)
	defer func() { k.counted(call, err) }()
	got, err := k.initiate(ctx, call, order{slaves: []identity.SAE{recipient}, number: 1, bits: bits, ttl: ttl, reread: !k.ReadOnce})
	if err != nil {
		return legacy.Issued{}, err
	}
	return legacy.Issued{
		ID: got.keys[0].ID, Material: got.keys[0].Material, Bits: bits,
		Algorithm: algorithm(got.provenance), Source: source(got.provenance), ExpiresAt: got.expires,
	}, nil
}

// RetrieveKey is the legacy form of Get key with key IDs. It tells what became of
// a key, as its users expect: 404, 403 or 410.
func (k *KME) RetrieveKey(ctx context.Context, c identity.Caller, rid string, id key.ID) (retrieved legacy.Retrieved, err error) {
	call := k.begin(c, rid, audit.DecKeys, identity.SAE{})
	defer func() { k.counted(call, err) }()
	call.ev.Keys = []key.ID{id}
	got, err := k.take(ctx, call, identity.SAE{}, call.ev.Keys, !k.ReadOnce)
	if err != nil {
		return legacy.Retrieved{}, call.refuse(ctx, legacyKind(err))
	}
	failpoint.Hit(failpoint.DecCommitted)
	return legacy.Retrieved{ID: id, Material: got[0].material, Bits: got[0].row.Bits, Algorithm: algorithm(got[0].row.Provenance)}, nil
}

// ConsumeKey erases a key at the word of its recipient. What has gone already is as
// good as erased.
func (k *KME) ConsumeKey(ctx context.Context, c identity.Caller, rid string, id key.ID) (err error) {
	call := k.begin(c, rid, audit.Consume, identity.SAE{})
	defer func() { k.counted(call, err) }()
	call.ev.Keys = []key.ID{id}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	err = k.consume(ctx, call, id)
	var gone goneError
	if errors.As(err, &gone) {
		done := call.ev
		done.Outcome, done.Reason = audit.Done, gone.Error()
		err = k.Store.RecordLate(ctx, call.late, done)
		call.pending = errors.Is(err, store.ErrDoubt)
	}
	if err != nil {
		return call.refuse(ctx, legacyKind(err))
	}
	return nil
}

// consume erases one row. It needs no HSM.
func (k *KME) consume(ctx context.Context, c *call, id key.ID) error {
	if err := c.atHome(); err != nil {
		return err
	}
	if err := k.spend(c.sae, 1); err != nil {
		return err
	}
	if err := k.serving(); err != nil {
		return err
	}
	due, err := k.find(ctx, c, identity.SAE{}, []key.ID{id})
	if err != nil {
		return err
	}
	done := c.ev
	done.Outcome = audit.Done
	err = k.Store.Take(ctx, store.TakeJob{
		SAE: c.sae, Rows: []store.DueRef{{Key: id, ExpiryEpoch: due[0].ExpiryEpoch}}, How: store.GoneConsumed,
		Events: []audit.Event{done}, Late: c.late,
	})
	c.pending = errors.Is(err, store.ErrDoubt)
	return raced(id, err)
}

// legacyKind tells apart what 014 answers alike.
func legacyKind(err error) error {
	var gone goneError
	switch {
	case errors.As(err, &gone):
		return problem.Because(problem.Gone, err)
	case problem.KindOf(err) == problem.Unauthorized:
		return problem.Because(problem.Forbidden, err)
	case problem.KindOf(err) == problem.Invalid:
		return problem.Because(problem.NotFound, err)
	}
	return err
}

func algorithm(p key.Provenance) string {
	if p == key.LocalRNG {
		return "RNG"
	}
	return "BB84"
}

func source(p key.Provenance) string {
	if p == key.LocalRNG {
		return string(p)
	}
	return "pool"
}

// Service tells how the KME is, in the words of the service it replaces.
func (k *KME) Service(ctx context.Context, c identity.Caller, rid string) (s legacy.Service, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	call := k.begin(c, rid, audit.Status, identity.SAE{})
	defer func() { k.counted(call, err) }()
	if call.sae == (identity.SAE{}) && c.Role() != identity.RoleGateway {
		return legacy.Service{}, call.refuse(ctx, problem.Because(problem.Unauthorized, errors.New("the certificate names no SAE")))
	}
	if err := k.spend(call.spender(), 1); err != nil {
		return legacy.Service{}, call.refuse(ctx, err)
	}
	s = legacy.Service{Database: legacy.Connected, HSM: legacy.Connected}
	if k.hsmWell() != nil {
		s.HSM = "error: the HSM does not answer"
	}
	for _, l := range k.LinkStates() {
		s.Sessions += int(l.Session)
		s.ErrorRate = l.Last.QBER
		n, err := k.Store.Stored(ctx, l.ID)
		if err != nil {
			s.Database = "error: the database does not answer"
			break
		}
		s.Stored += n
	}
	ev := call.ev
	ev.Outcome = audit.Done
	if s.HSM != legacy.Connected || s.Database != legacy.Connected {
		ev.Outcome, ev.Reason = audit.Failed, fmt.Sprintf("HSM: %s; database: %s", s.HSM, s.Database)
	}
	if err := k.Store.RecordLate(ctx, call.late, ev); err != nil {
		call.miss(err)
		s.Database = "error: the database does not answer"
	}
	return s, nil
}
