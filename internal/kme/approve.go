package kme

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// byTwo is nil if two officers stand behind what the caller is about to have done: the
// caller, who has signed for the act, and another one, who has signed for the same act
// at this node. Their approvals are used up then, whatever becomes of the act, and
// stand in its outcome event. Whatever destroys or exposes begins with
//
//	if err := call.byTwo(ctx, caller, approvals, "compromise-keys", since, until); err != nil {
//		return call.refuse(ctx, err)
//	}
func (c *call) byTwo(ctx context.Context, caller identity.Caller, given []approval.Approval, name string, on ...string) error {
	act, err := approval.NewAct(name, on...)
	if err != nil {
		return problem.Because(problem.Invalid, err)
	}
	node := c.k.Self.String() + "/" + c.k.Config.Node
	if len(given) == 0 {
		return &problem.Error{
			Kind:   problem.Forbidden,
			Detail: fmt.Sprintf("this takes two officers: let another one say kmectl approve --node %s '%s' >approval.json, and come again with --approval approval.json", node, act),
		}
	}
	unfit := func(format string, args ...any) error {
		err := fmt.Errorf(format, args...)
		return &problem.Error{Kind: problem.Forbidden, Detail: "the approvals do not let this be done: " + err.Error(), Err: err}
	}
	if len(given) != 2 {
		return unfit("%d were given: the caller's and one other are wanted", len(given))
	}
	now := c.k.Now()
	var officers []string
	var nonces [][]byte
	until := now
	for _, a := range given {
		leaf, err := a.Verify(act, node, now)
		if err != nil {
			return unfit("%w", err)
		}
		officer, err := c.k.Officer(leaf, now)
		if err != nil {
			return unfit("the certificate of one names nobody: %w", err)
		}
		if !officer.Has(identity.SecurityOfficer) {
			return unfit("%s is no security officer", officer.ID())
		}
		text, err := json.Marshal(a)
		if err != nil {
			return problem.Because(problem.Internal, err)
		}
		officers, nonces = append(officers, officer.ID()), append(nonces, a.Nonce)
		c.ev.Approvals = append(c.ev.Approvals, string(text))
		if a.Expires.After(until) {
			until = a.Expires
		}
	}
	switch {
	case officers[0] == officers[1]:
		return unfit("both are of %s", officers[0])
	case caller.ID() != officers[0] && caller.ID() != officers[1]:
		return unfit("neither is of the caller, %s", caller.ID())
	}
	if err := c.k.Store.UseApprovals(ctx, nonces, until); errors.Is(err, store.ErrUsed) {
		return unfit("one was used before")
	} else if err != nil {
		return fmt.Errorf("using up approvals: %w", err)
	}
	c.k.waiting.used(now, nonces)
	return nil
}

// asSiteWants is byTwo for what one operator may do where the site's principals.yaml
// does not list it under two_officers.
func (c *call) asSiteWants(ctx context.Context, caller identity.Caller, given []approval.Approval, name string, on ...string) error {
	if !c.k.Policies().TwoOfficers(name) {
		return nil
	}
	return c.byTwo(ctx, caller, given, name, on...)
}
