package kme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// A compromise is that somebody may know keys of some time. They are meant by their
// IDs, which tell the epoch: both ends mean the same without naming each. It is first
// made durable, with the event of who decided it; then all is burned that there is, and
// the other end is told until it has burned its part. If the process dies on the way,
// any node of the site goes on.

// compromises are those that this node knows of.
type compromises struct {
	mu   sync.Mutex // held while the list is read and its leases are dropped
	last int64      // the highest ID
}

// Compromise burns, here and at the other ends, the keys of a time and a link, or all,
// that two officers suspect.
func (d OperatorDoor) Compromise(ctx context.Context, c identity.Caller, rid string, given []approval.Approval, s admin.Suspicion) (admin.Compromised, error) {
	k := d.k
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	call := k.begin(c, rid, audit.Compromise, identity.SAE{})
	what, err := k.suspicion(c, s)
	if err != nil {
		return admin.Compromised{}, call.refuse(ctx, err)
	}
	answer := admin.Compromised{From: what.First.Start(k.EpochLength).UTC(), To: what.Last.End(k.EpochLength).UTC(), Untold: []string{}}
	act, on := s.Act(k.EpochLength)
	if err := call.byTwo(ctx, c, given, act, on...); err != nil {
		return admin.Compromised{}, call.refuse(ctx, err)
	}
	done := call.ev
	done.Outcome, done.Link = audit.Done, s.Link
	done.Reason = fmt.Sprintf("keys made from %s to %s", answer.From.Format(time.RFC3339), answer.To.Format(time.RFC3339))
	if err := k.compromise(ctx, call, what, done, &answer); err != nil {
		return answer, err
	}
	k.tellCompromises(ctx)
	pending, err := k.Store.CompromisesOut(ctx)
	if err != nil {
		return answer, k.classify(err)
	}
	for _, p := range pending {
		answer.Untold = append(answer.Untold, p.Peer.String())
	}
	slices.Sort(answer.Untold)
	answer.Untold = slices.Compact(answer.Untold)
	return answer, nil
}

// compromise records a compromise and burns what there is here of it. Nobody else of
// this node does so meanwhile: the officer is told of all of it.
func (k *KME) compromise(ctx context.Context, call *call, what store.Compromise, done audit.Event, answer *admin.Compromised) (err error) {
	k.burning.Lock()
	defer k.burning.Unlock()
	if what, err = k.Store.BeginCompromise(ctx, what, call.late, done); err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return call.refuse(ctx, err)
	}
	// From here on it is decided and recorded, whatever the caller is told.
	if answer.Burned, answer.Voided, err = k.burnCompromised(ctx, what); err != nil {
		return k.classify(err)
	}
	return nil
}

// suspicion is what an officer means, in epochs.
func (k *KME) suspicion(c identity.Caller, s admin.Suspicion) (store.Compromise, error) {
	var none store.Compromise
	if !c.Has(identity.SecurityOfficer) {
		return none, problem.Because(problem.Forbidden, fmt.Errorf("operator %s has not the duty %s", c.ID(), identity.SecurityOfficer))
	}
	if err := k.serving(); err != nil {
		return none, err
	}
	now := k.Now()
	if s.Until.IsZero() || s.Until.After(now) {
		s.Until = now
	}
	if s.Since.IsZero() || s.Since.After(s.Until) || s.Since.Before(time.Unix(0, 0)) {
		return none, problem.New(problem.Invalid, "that is no time: it begins at %s and ends at %s", s.Since.UTC().Format(time.RFC3339), s.Until.UTC().Format(time.RFC3339))
	}
	if s.Link != "" && k.links[s.Link] == nil {
		return none, problem.New(problem.Invalid, "there is no link %.64q here", s.Link)
	}
	return store.Compromise{
		Link: s.Link, First: key.EpochAt(s.Since, k.EpochLength), Last: key.EpochAt(s.Until, k.EpochLength),
		Why: fmt.Sprintf("compromise, decided by %s", c.ID()),
	}, nil
}

// burnCompromised burns what there is here of a compromise. It may be done again.
func (k *KME) burnCompromised(ctx context.Context, c store.Compromise) (burned, voided int, err error) {
	k.watchCompromises(ctx) // this node lends no such atom any more
	for {
		n, chunks, err := k.Store.BurnCompromised(ctx, c, k.burnedAway(c.Why))
		if err != nil {
			return burned, voided, err
		}
		if burned += n; chunks == 0 {
			break
		}
	}
	voided, err = k.Store.VoidCompromised(ctx, c, expireBatch, func(rows []store.DueRef) audit.Event {
		ev := k.dueExpired(rows)
		ev.Action, ev.Link, ev.Reason = audit.VoidKeys, c.Link, c.Why
		return ev
	})
	if err != nil {
		return burned, voided, err
	}
	return burned, voided, k.Store.EndCompromise(ctx, c.ID)
}

// watchCompromises takes the atoms out of this node's hand that are compromised since it
// last looked, whichever node of the site knows why.
func (k *KME) watchCompromises(ctx context.Context) {
	k.known.mu.Lock()
	defer k.known.mu.Unlock()
	fresh, err := k.Store.Compromises(ctx, k.known.last)
	if err != nil {
		return // the database is away; its own alarm stands
	}
	for _, c := range fresh {
		for _, l := range k.links {
			l.pool.drop(func(h store.Lease) bool {
				return cmp.Or(c.Link, l.ID) == l.ID && c.First <= h.Epoch && h.Epoch <= c.Last && h.Chunk <= c.Chunks
			})
		}
		k.known.last = c.ID
	}
}

// tellCompromises goes on with compromises that a process has left half done, and tells
// the peers of those that they have not acknowledged.
func (k *KME) tellCompromises(ctx context.Context) {
	if err := k.endCompromises(ctx); err != nil {
		k.Log.Warn("burning compromised keys", "err", err)
		return
	}
	pending, err := k.Store.CompromisesOut(ctx)
	if err != nil {
		return
	}
	silent := make(map[identity.KME]bool)
	for _, p := range pending {
		client := k.Peers[p.Peer]
		if client == nil || silent[p.Peer] {
			continue
		}
		asking, cancel := context.WithTimeout(ctx, 2*requestTime)
		err := client.Compromise(asking, p.Compromise)
		if err == nil {
			err = k.Store.AckCompromise(asking, p.Act, p.Link)
		}
		cancel()
		if err != nil {
			k.Log.Warn("telling a peer of a compromise", "peer", p.Peer.String(), "err", err)
			silent[p.Peer] = true
		}
	}
}

// endCompromises goes on with compromises that were left half done.
func (k *KME) endCompromises(ctx context.Context) error {
	k.burning.Lock()
	defer k.burning.Unlock()
	unfinished, err := k.Store.UnfinishedCompromises(ctx)
	if err != nil {
		return err
	}
	for _, c := range unfinished {
		if _, _, err := k.burnCompromised(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// Compromise burns our part of keys of a link that the peer suspects: it could as well
// have used them up.
func (d PeerDoor) Compromise(ctx context.Context, from identity.KME, m handover.Compromise) error {
	k := d.k
	if _, err := d.link(m.Link, from); err != nil {
		return d.refuse(ctx, from, err)
	}
	if err := k.servingPeer(from); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*requestTime)
	defer cancel()
	ev := audit.Event{
		Action: audit.Compromise, Outcome: audit.Done, Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()}, Link: m.Link,
		Reason: fmt.Sprintf("keys made from %s to %s", key.Epoch(m.First).Start(k.EpochLength).UTC().Format(time.RFC3339), key.Epoch(m.Last).End(k.EpochLength).UTC().Format(time.RFC3339)),
	}
	leave, err := d.turn(ctx, from)
	if err != nil {
		return err
	}
	defer leave()
	c, err := k.Store.HearCompromise(ctx, from, m, ev)
	if errors.Is(err, store.ErrTooManyCompromises) {
		return d.refuse(ctx, from, err)
	}
	if err != nil || c.Done {
		return err
	}
	k.incident(ctx, "compromise-"+m.Link, fmt.Sprintf("%s has had keys burned that somebody may know: %s", from, ev.Reason))
	_, _, err = k.burnCompromised(ctx, c)
	return err
}
