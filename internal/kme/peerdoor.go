package kme

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
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
		return handover.Hello{}, problem.Because(problem.Unauthorized, fmt.Errorf("%s says hello as %s", from, h.KME))
	}
	return d.k.hello(ctx), nil
}

// Held answers the peer's HELD, and makes our copy READY or drops it.
func (d PeerDoor) Held(ctx context.Context, from identity.KME, h handover.Held) (handover.HeldAnswer, error) {
	if _, err := d.link(h.Link, from); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	return d.k.Store.HeardHeld(ctx, h, from, d.k.blockEvents(h.BlockRef, h.Atoms))
}

// link is the link of that name, if from is its other end.
func (d PeerDoor) link(id string, from identity.KME) (*link, error) {
	l := d.k.links[id]
	if l == nil || l.Peer != from {
		return nil, problem.Because(problem.Unauthorized, fmt.Errorf("%s is not the other end of link %q", from, id))
	}
	return l, nil
}

// Announce assigns keys of the peer's masters to our SAEs: first commit wins.
func (d PeerDoor) Announce(ctx context.Context, from identity.KME, a handover.Announce) (handover.AnnounceAnswer, error) {
	k := d.k
	if k.able() != nil {
		return handover.AnnounceAnswer{Standing: handover.Declined}, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	job := store.AssignJob{
		Peer: from, Announce: a,
		Due:   make(map[string][]store.Due),
		Ready: func(ref handover.BlockRef) audit.Event { return k.readyEvent(ref) },
		Event: func(r handover.Request, res handover.Result) audit.Event { return k.assignEvent(from, a, r, res) },
	}
	known, err := k.Store.PeerRun(ctx, from, a.Node)
	if err != nil {
		return handover.AnnounceAnswer{}, fmt.Errorf("reading the peer's run: %w", err)
	}
	refusals := make(map[string]string)
	job.Admit = func(r handover.Request) string { return refusals[r.ID] }
	if known.Judge(a.Run, a.Batch) == handover.Fresh {
		if err := d.prepareAll(ctx, from, a, &job, refusals); err != nil {
			return handover.AnnounceAnswer{}, err
		}
	}
	answer, err := k.Store.Assign(ctx, job)
	if err == nil && slices.ContainsFunc(answer.Results, func(r handover.Result) bool { return !r.Accepted }) {
		k.raise(ctx, "refused-"+from.String(), fmt.Sprintf("requests of %s's batch %d were refused: see the audit", from, a.Batch))
	}
	return answer, err
}

// prepareAll judges the requests of a batch and seals what they may have. An error
// is the HSM's or the database's: then the whole batch comes again.
func (d PeerDoor) prepareAll(ctx context.Context, from identity.KME, a handover.Announce, job *store.AssignJob, refusals map[string]string) error {
	admitted := make(map[*link][]handover.Request)
	for _, r := range a.Requests {
		l, err := d.link(r.Link, from)
		if err != nil {
			refusals[r.ID] = err.Error()
		} else if why := l.admit(r); why != "" {
			refusals[r.ID] = why
		} else {
			admitted[l] = append(admitted[l], r)
		}
	}
	for l, requests := range admitted {
		var wanted []handover.Key
		for _, r := range requests {
			wanted = append(wanted, r.Keys...)
		}
		pooled, err := d.k.Store.PoolAtoms(ctx, wanted, l.ID)
		if err != nil {
			return fmt.Errorf("reading the pool: %w", err)
		}
		for _, r := range requests {
			if refusals[r.ID], err = l.prepare(ctx, a, r, pooled, job); err != nil {
				return fmt.Errorf("sealing for request %s: %w", r.ID, err)
			}
		}
	}
	return nil
}

// prepare seals the keys of one request anew for their takers. It returns why the
// request is refused ("" if it is not).
func (l *link) prepare(ctx context.Context, a handover.Announce, r handover.Request, pooled map[key.ID]store.PooledAtom, job *store.AssignJob) (string, error) {
	k := l.k
	expires := k.expiry(r.Lifetime())
	for _, want := range r.Keys {
		secret := make([]byte, 0, len(want.Atoms)*key.AtomBytes)
		for i, id := range want.Atoms {
			p, ok := pooled[id]
			if !ok {
				return "", nil // DecideFresh refuses it, and says which atoms are lacking
			}
			if why := l.claims(want, i, p); why != "" {
				clear(secret)
				return why, nil
			}
			plain, err := k.unsealAtom(ctx, p.Atom, *lentOf(p).from)
			if errors.Is(err, hsm.ErrTampered) {
				clear(secret)
				k.raise(ctx, "tampered-"+id.String(), fmt.Sprintf("the blob of atom %s does not open: its row was changed", id))
				return "the blob does not open", nil
			}
			if err != nil {
				clear(secret)
				return "", err
			}
			secret = append(secret, plain...)
			clear(plain)
		}
		for _, slave := range r.Slaves {
			due := store.Due{
				Key: want.ID(), SAE: slave, Master: r.Master, Bits: r.Bits, Provenance: pooled[want.ID()].Provenance,
				ExpiresAt: expires, Reread: r.Reread, Node: a.Node, Run: a.Run, Batch: a.Batch,
			}
			if err := k.sealDue(ctx, &due, secret[:r.Bits/8]); err != nil {
				clear(secret)
				return "", err
			}
			job.Due[r.ID] = append(job.Due[r.ID], due)
		}
		clear(secret)
	}
	return "", nil
}

// lentOf is a pool atom as a request holds it.
func lentOf(p store.PooledAtom) lent {
	return lent{p.Atom, &store.Lease{Chunk: p.Chunk, BlockRef: p.BlockRef, Epoch: p.Epoch, Provenance: p.Provenance}}
}

// admit says why a request may not be assigned here whatever the pool holds.
func (l *link) admit(r handover.Request) string {
	set := l.k.Policies()
	limits := l.k.Limits()
	atoms := (r.Bits + key.AtomBits - 1) / key.AtomBits
	switch {
	case r.Bits < limits.MinSize || r.Bits > limits.MaxSize || r.Bits%8 != 0:
		return fmt.Sprintf("size of %d bits", r.Bits)
	case len(r.Keys) == 0 || len(r.Keys) > limits.MaxPerRequest:
		return fmt.Sprintf("%d keys", len(r.Keys))
	case r.TTL <= 0 || r.Lifetime() > l.k.MaxTTL:
		return fmt.Sprintf("lifetime of %v", r.Lifetime())
	case len(r.Slaves) == 0 || len(r.Slaves) > 1+limits.MaxSAEs:
		return fmt.Sprintf("%d slaves", len(r.Slaves))
	case !set.Homed(r.Master, l.Peer):
		return fmt.Sprintf("master %s is not homed at %s", r.Master, l.Peer)
	}
	for _, k := range r.Keys {
		if len(k.Atoms) != atoms {
			return fmt.Sprintf("%d atoms for %d bits", len(k.Atoms), r.Bits)
		}
	}
	for _, slave := range r.Slaves {
		if !set.Homed(slave, l.k.Self) {
			return fmt.Sprintf("slave %s is not homed at %s", slave, l.k.Self)
		}
		d := set.Decide(policies.Question{Action: string(audit.EncKeys), Caller: r.Master, Other: slave, Number: len(r.Keys), Bits: r.Bits, Provenance: l.Provenance})
		if !d.Allow {
			return fmt.Sprintf("policy here does not let %s share keys with %s", r.Master, slave)
		}
	}
	return ""
}

// claims says what is wrong with what a peer says of the i-th atom of a key: that
// it owns it, and where it lies.
func (l *link) claims(want handover.Key, i int, p store.PooledAtom) string {
	switch {
	case p.Owner == l.End:
		return "a chunk that is owned here"
	case p.BlockRef != (handover.BlockRef{Link: l.ID, Session: want.Session, Block: want.Block}) || p.Index != want.First+i:
		return "atoms that lie elsewhere"
	case p.BlockState == handover.Lost:
		return "a block that was dropped"
	}
	return ""
}

func (k *KME) assignEvent(from identity.KME, a handover.Announce, r handover.Request, res handover.Result) audit.Event {
	ev := audit.Event{
		Action: audit.Assign, Outcome: audit.Done, Request: r.ID, Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()},
		Link: r.Link, Master: r.Master.String(), Bits: r.Bits, PeerNode: a.Node, PeerRun: a.Run, Batch: a.Batch,
	}
	for _, s := range r.Slaves {
		ev.Slaves = append(ev.Slaves, s.String())
	}
	for _, want := range r.Keys {
		ev.Keys = append(ev.Keys, want.ID())
	}
	if !res.Accepted {
		ev.Outcome, ev.Reason = audit.Refused, res.Why
		return ev
	}
	for _, want := range r.Keys {
		at := audit.Atoms{Link: r.Link, Session: want.Session, Block: want.Block, First: want.First, Count: len(want.Atoms)}
		if n := len(ev.Atoms); n > 0 {
			if last := &ev.Atoms[n-1]; last.Session == at.Session && last.Block == at.Block && last.First+last.Count == at.First {
				last.Count += at.Count
				continue
			}
		}
		ev.Atoms = append(ev.Atoms, at)
	}
	return ev
}

// Void takes assigned keys back. It is answered alike however often it comes.
func (d PeerDoor) Void(ctx context.Context, from identity.KME, v handover.Void) error {
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
func (d PeerDoor) Run(ctx context.Context, from identity.KME, r handover.RunStarted) ([]handover.Assigned, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	rows, ok, err := d.k.Store.HearRun(ctx, from, r)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, problem.New(problem.Invalid, "a higher run of node %s is known", r.Node)
	}
	return rows, nil
}

// Refused records what the peer door turned away after TLS.
func (d PeerDoor) Refused(ctx context.Context, c identity.Caller, r peer.Refusal) {
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
