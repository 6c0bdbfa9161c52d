package kme

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// KeyStory tells an auditor what is known here of a key, without its bytes: who may
// have it and who has, which is why it is told to nobody else, and recorded.
func (d OperatorDoor) KeyStory(ctx context.Context, c identity.Caller, rid string, id key.ID) (admin.KeyStory, error) {
	k := d.k
	call := k.begin(c, rid, audit.KeyShown, identity.SAE{})
	call.ev.Keys = []key.ID{id}
	if !c.Has(identity.Auditor) {
		err := fmt.Errorf("operator %s has not the duty %s", c.ID(), identity.Auditor)
		return admin.KeyStory{}, call.refuse(ctx, problem.Because(problem.Forbidden, err))
	}
	known, err := k.Store.Story(ctx, id)
	if err != nil {
		return admin.KeyStory{}, call.refuse(ctx, err)
	}
	story, err := tell(id, known)
	if err != nil {
		return admin.KeyStory{}, call.refuse(ctx, err)
	}
	epoch := key.EpochAt(id.EpochStart(), k.EpochLength)
	story.Epoch, story.Made = int64(epoch), epoch.Start(k.EpochLength).UTC()
	done := call.ev
	done.Outcome = audit.Done
	if err := k.Store.RecordLate(ctx, call.late, done); err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return admin.KeyStory{}, call.refuse(ctx, err)
	}
	return story, nil
}

// tell puts a key's story together, and finds the state that it has come to.
func tell(id key.ID, known store.Story) (admin.KeyStory, error) {
	s := admin.KeyStory{ID: id.String()}
	if p := known.Pool; p != nil {
		s.State = string(key.Stored)
		s.Pool = &admin.KeyPlace{
			Link: p.Link, Session: p.Session, Block: p.Block, Index: p.Index, Held: p.HeldAt.UTC(), BlockState: string(p.State),
			Owner: p.Owner, Leased: p.Leased, KEK: p.KEK, Provenance: string(p.From),
		}
		if p.Upstream != (key.ID{}) {
			s.Pool.Upstream = p.Upstream.String()
		}
	}
	for _, told := range known.Told {
		var ev struct {
			Action, Outcome, Reason, Request, Master string
			Slaves                                   []string
			Reread                                   bool
			Actor                                    struct{ Role, ID string }
		}
		if err := json.Unmarshal(told.Body, &ev); err != nil {
			return s, fmt.Errorf("reading event %d of %s: %w", told.Seq, told.Node, err)
		}
		e := admin.Event{
			At: told.At.UTC(), Node: told.Node, Seq: told.Seq, Action: ev.Action, Outcome: ev.Outcome, Actor: ev.Actor.ID,
			Master: ev.Master, Slaves: ev.Slaves, Reason: ev.Reason, Request: ev.Request,
		}
		if ev.Actor.Role != "" {
			e.Actor = ev.Actor.Role + " " + ev.Actor.ID
		}
		s.Events = append(s.Events, e)
		if to := entered(audit.Action(ev.Action), audit.Outcome(ev.Outcome), ev.Reread); to != "" && known.Pool == nil {
			s.State = string(to)
		}
	}
	for _, d := range known.Due {
		s.Due = append(s.Due, admin.KeyDue{
			SAE: d.SAE.String(), Master: d.Master.String(), Bits: d.Bits, Provenance: string(d.Provenance), KEK: d.KEK, Expires: d.ExpiresAt.UTC(), Gone: d.Gone,
		})
	}
	return s, nil
}

// entered is the state that a key enters by an event that names it, "" if it stays in its own.
func entered(a audit.Action, o audit.Outcome, reread bool) key.State {
	if o != audit.Done {
		return ""
	}
	switch a {
	case audit.Assign:
		return key.Cached
	case audit.EncKeys:
		return key.Served
	case audit.DecKeys, audit.Consume:
		if reread {
			return ""
		}
		return key.Consumed
	case audit.Expire:
		return key.Expired
	case audit.Burn, audit.VoidKeys:
		return key.Void
	}
	return ""
}
