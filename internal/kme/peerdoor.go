package kme

import (
	"context"
	"errors"
	"fmt"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// PeerDoor is the Backend of the peer door. It trusts nothing that a message says:
// the certificate must be the other end of the link, the chunk the sender's, the
// master homed there and the slaves here, and our own policy must allow the pair.
type PeerDoor struct{ k *KME }

// PeerDoor returns the Backend of the peer door.
func (k *KME) PeerDoor() PeerDoor { return PeerDoor{k} }

// Hello answers with this side's figures.
func (d PeerDoor) Hello(ctx context.Context, from identity.KME, h handover.Hello) (handover.Hello, error) {
	if h.KME != from {
		return handover.Hello{}, d.refuse(ctx, from, fmt.Errorf("%s says hello as %s", from, h.KME))
	}
	if err := d.known(ctx, from, h.Node); err != nil {
		return handover.Hello{}, err
	}
	if err := h.CheckReached(d.k.Now()); err != nil {
		return handover.Hello{}, d.refuse(ctx, from, err)
	}
	s := d.k.standing(ctx)
	d.k.judgeSelf(ctx, from, h, s)
	d.k.learn(ctx, from, h)
	return d.k.hello(ctx, from, s), nil
}

// Held answers the peer's HELD, and makes our copy READY or drops it.
func (d PeerDoor) Held(ctx context.Context, from identity.KME, h handover.Held) (handover.HeldAnswer, error) {
	if _, err := d.link(h.Link, from); err != nil {
		return "", d.refuse(ctx, from, err)
	}
	if err := d.k.servingPeer(from); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	answer, err := d.k.Store.HeardHeld(ctx, h, from, d.k.blockEvents(h.BlockRef, h.Atoms))
	if err == nil && answer == handover.Different {
		d.k.incident(ctx, "block-"+h.Link, fmt.Sprintf("block %s is another one at %s: both copies are dropped", h.BlockRef, from))
	}
	return answer, err
}

// refuse records that a KME asked for what it has no part in.
func (d PeerDoor) refuse(ctx context.Context, from identity.KME, err error) error {
	return d.refuseAs(ctx, from, problem.Because(problem.Unauthorized, err))
}

// refuseAs records a message that is refused.
func (d PeerDoor) refuseAs(ctx context.Context, from identity.KME, p *problem.Error) error {
	cause := error(p)
	if p.Err != nil {
		cause = p.Err
	}
	ev := audit.Event{Action: audit.Malformed, Outcome: audit.Refused, Reason: problem.Brief(cause), Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()}}
	return d.k.recordOrCount(ctx, p, ev)
}

// known refuses what comes in the name of a node that network.yaml does not give to
// the peer: each name has a run and a batch of its own here, for ever. A void needs no
// such check: it finds an assigned key or does nothing.
func (d PeerDoor) known(ctx context.Context, from identity.KME, node string) error {
	if _, ok := d.k.Policies().KMEs[from].Node(node); ok {
		return nil
	}
	return d.refuse(ctx, from, fmt.Errorf("%s has no node %q", from, node))
}

// link is the link of that name, if from is its other end.
func (d PeerDoor) link(id string, from identity.KME) (*link, error) {
	l := d.k.links[id]
	if l == nil || l.Peer != from {
		return nil, fmt.Errorf("%s is not the other end of link %q", from, id)
	}
	return l, nil
}

// Void takes assigned keys back. It is answered alike however often it comes.
func (d PeerDoor) Void(ctx context.Context, from identity.KME, v handover.Void) error {
	if err := d.k.servingPeer(from); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	return d.k.Store.Void(ctx, from, v, func(voided []key.ID) audit.Event {
		return audit.Event{
			Action: audit.VoidKeys, Outcome: audit.Done, Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()},
			Keys: voided, Count: len(voided), PeerNode: v.Node, PeerRun: v.Run, Batch: v.Batch,
		}
	})
}

// Run hears of a node's new run and lists what lower runs were assigned here.
func (d PeerDoor) Run(ctx context.Context, from identity.KME, r handover.RunStarted) (answer handover.RunAnswer, err error) {
	if err := d.known(ctx, from, r.Node); err != nil {
		return answer, err
	}
	if err := handover.CheckReached("run", r.Run, d.k.Now()); err != nil {
		return answer, d.refuse(ctx, from, err)
	}
	if err := d.k.servingPeer(from); err != nil {
		return answer, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	leave, err := d.turn(ctx, from)
	if err != nil {
		return answer, err
	}
	defer leave()
	answer, ok, err := d.k.Store.HearRun(ctx, from, r)
	if err == nil && !ok {
		err = d.refuseAs(ctx, from, problem.New(problem.Invalid, "a higher run of node %s is known", r.Node))
	}
	return answer, err
}

// turn waits until nothing else of a peer is being done for which tables are searched through:
// one that asks again and again has nobody wait but itself.
func (d PeerDoor) turn(ctx context.Context, from identity.KME) (leave func(), err error) {
	v, _ := d.k.searching.LoadOrStore(from, make(chan struct{}, 1))
	place := v.(chan struct{})
	select {
	case place <- struct{}{}:
		return func() { <-place }, nil
	case <-ctx.Done():
		return nil, problem.Because(problem.Unavailable, fmt.Errorf("waiting for what else %s has asked: %w", from, ctx.Err()))
	}
}

// Refused records what the peer door turned away after TLS.
func (d PeerDoor) Refused(ctx context.Context, c identity.Caller, r peer.Refusal) {
	if errors.Is(r.Err, peer.ErrTooMany) {
		d.k.incident(ctx, "flood-"+c.ID(), c.ID()+" says more at a time than is listened to")
	}
	_ = d.k.Refused(ctx, c, "", r.Route, r.Err) // the door answers the caller
}

// readyEvent says that both ends hold a block.
func (k *KME) readyEvent(ref handover.BlockRef) audit.Event {
	ev := k.own(audit.Ready)
	ev.Link, ev.Reason = ref.Link, ref.String()
	return ev
}

// blockEvents are the events of a block's move from one state to another.
func (k *KME) blockEvents(ref handover.BlockRef, atoms int) store.BlockEvents {
	return func(before, after handover.BlockState, lost int) []audit.Event {
		if before == after {
			return nil
		}
		ev := k.readyEvent(ref)
		ev.Count, ev.Atoms = atoms, []audit.Atoms{{Link: ref.Link, Session: ref.Session, Block: ref.Block, Count: atoms}}
		if after == handover.Lost {
			ev.Action, ev.Outcome, ev.Count = audit.DropBlock, audit.Failed, lost
			ev.Reason = fmt.Sprintf("%d atoms dropped: the other end does not hold the same block", lost)
		}
		return []audit.Event{ev}
	}
}
