package kme

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// waiting are the approvals that officers have left at this node for the second one to
// find. They are in memory alone: they end within the hour, and can be given again. They
// allow nothing by themselves: whoever acts has signed as well.
type waiting struct {
	mu   sync.Mutex
	list []admin.Waiting
}

// maxWaiting bounds them. The one that was left first goes first.
const maxWaiting = 64

func (w *waiting) leave(one admin.Waiting, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.prune(now, [][]byte{one.Approval.Nonce})
	w.list = append(w.list, one)
	w.list = w.list[max(0, len(w.list)-maxWaiting):]
}

func (w *waiting) now(now time.Time) []admin.Waiting {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.prune(now, nil)
	return slices.Clone(w.list)
}

// used drops those that were used up.
func (w *waiting) used(now time.Time, nonces [][]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.prune(now, nonces)
}

// prune drops what has ended, and those with these nonces. The caller holds mu.
func (w *waiting) prune(now time.Time, nonces [][]byte) {
	w.list = slices.DeleteFunc(w.list, func(one admin.Waiting) bool {
		return !now.Before(one.Approval.Expires) || slices.ContainsFunc(nonces, func(n []byte) bool { return bytes.Equal(n, one.Approval.Nonce) })
	})
}

// LeaveApproval keeps the caller's own word for another officer to find.
func (d OperatorDoor) LeaveApproval(ctx context.Context, c identity.Caller, rid string, a approval.Approval) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	call := d.k.begin(c, rid, audit.Approve, identity.SAE{})
	if err := call.ownWord(c, a); err != nil {
		return call.refuse(ctx, problem.Because(problem.Forbidden, err))
	}
	text, err := json.Marshal(a)
	if err != nil {
		return call.refuse(ctx, problem.Because(problem.Internal, err))
	}
	done := call.ev
	done.Outcome, done.Approvals = audit.Done, []string{string(text)}
	if err := d.k.Store.RecordLate(ctx, call.late, done); err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return call.refuse(ctx, err)
	}
	d.k.waiting.leave(admin.Waiting{Officer: c.ID(), Approval: a}, d.k.Now())
	return nil
}

// ownWord is nil if an approval is the caller's own, for this node, and holds.
func (c *call) ownWord(caller identity.Caller, a approval.Approval) error {
	act, err := approval.ReadAct(string(a.Act))
	if err != nil {
		return err
	}
	c.ev.Reason = string(act)
	now := c.k.Now()
	leaf, err := a.Verify(act, c.k.Self.String()+"/"+c.k.Config.Node, now)
	if err != nil {
		return err
	}
	officer, err := c.k.Officer(leaf, now)
	switch {
	case err != nil:
		return fmt.Errorf("its certificate names nobody: %w", err)
	case officer.ID() != caller.ID():
		return fmt.Errorf("it is of %s, and %s has brought it", officer.ID(), caller.ID())
	case !officer.Has(identity.SecurityOfficer):
		return fmt.Errorf("%s is no security officer", officer.ID())
	}
	return nil
}

// Waiting lists the approvals that wait here for another officer, oldest first.
func (d OperatorDoor) Waiting(context.Context, identity.Caller, string) ([]admin.Waiting, error) {
	return d.k.waiting.now(d.k.Now()), nil
}
