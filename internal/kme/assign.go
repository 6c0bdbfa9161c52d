package kme

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// Announce assigns keys of the peer's masters to our SAEs: first commit wins.
// Whatever fails before the commit has begun declines this copy of the batch; only
// a commit whose outcome is unknown leaves the peer in doubt.
func (d PeerDoor) Announce(ctx context.Context, from identity.KME, a handover.Announce) (handover.AnnounceAnswer, error) {
	k := d.k
	if err := d.known(ctx, from, a.Node); err != nil {
		return handover.AnnounceAnswer{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	t := k.turnstile(from, a.Node)
	if err := t.enter(ctx, a.Batch); err != nil {
		return k.decline(a, err), nil
	}
	defer t.leave(a.Batch)
	p := &prepared{due: make(map[string][]store.Due), refused: make(map[string]string), full: make(map[string]bool), unusable: make(map[string][]key.ID), seen: make(map[key.ID]store.PooledAtom)}
	standing, err := d.judge(ctx, from, a, t)
	if err != nil {
		return k.decline(a, err), nil
	}
	switch standing {
	case handover.Ahead, handover.Stale: // whatever the store knows by now, nothing of it is done
		return handover.AnnounceAnswer{Standing: standing}, nil
	case handover.Fresh:
		if err := d.prepare(ctx, from, a, p); err != nil {
			return k.decline(a, err), nil
		}
		t.turn(ctx, a.Run, a.Batch)
	}
	answer, err := k.Store.Assign(ctx, store.AssignJob{
		Peer: from, Announce: a, Due: p.due, Seen: p.seen,
		Admit: func(r handover.Request) string { return p.refused[r.ID] },
		Event: func(r handover.Request, res handover.Result) audit.Event { return assignEvent(from, a, r, res) },
		Ready: k.readyEvent,
	})
	if err != nil {
		return answer, err
	}
	if answer.Standing == handover.Fresh {
		k.used(a.Requests, answer.Results)
	}
	if answer.Standing == handover.Fresh || answer.Standing == handover.Repeat {
		t.learn(handover.PeerRun{Run: a.Run, Last: a.Batch})
	}
	for i, res := range answer.Results {
		if bad := p.unusable[res.ID]; !res.Accepted && len(bad) > 0 {
			answer.Results[i].Lacking = bad // the peer burns them; else it would offer them for ever
		}
		answer.Results[i].Full = p.full[res.ID] && !res.Accepted
	}
	refused := func(r handover.Result) bool { return !r.Accepted && !r.Full }
	if answer.Standing == handover.Fresh && slices.ContainsFunc(answer.Results, refused) {
		k.incident(ctx, "refused-"+from.String(), fmt.Sprintf("requests of %s's batch %d were refused: see the audit", from, a.Batch))
	}
	return answer, nil
}

// turnstile is the one of a peer's node.
func (k *KME) turnstile(from identity.KME, node string) *turnstile {
	t, ok := k.turnstiles.Load(from.String() + "/" + node)
	if !ok {
		t, _ = k.turnstiles.LoadOrStore(from.String()+"/"+node, newTurnstile())
	}
	return t.(*turnstile)
}

func (k *KME) decline(a handover.Announce, why error) handover.AnnounceAnswer {
	k.Log.Warn("declining a batch", "node", a.Node, "run", a.Run, "batch", a.Batch, "err", why)
	return handover.AnnounceAnswer{Standing: handover.Declined}
}

// prepared is what was worked out for a fresh batch before it is committed.
type prepared struct {
	mu       sync.Mutex
	due      map[string][]store.Due // by request, sealed for their takers
	refused  map[string]string      // by request: why, "" if it is not
	full     map[string]bool        // by request: it is refused because its slaves take too little
	unusable map[string][]key.ID    // by request: atoms that are in the pool here and of no use
	seen     map[key.ID]store.PooledAtom
}

// judge says what a batch is, as far as is known before it is its turn: Fresh also if
// some before it may be on their way. An error is that this site cannot act on it now.
func (d PeerDoor) judge(ctx context.Context, from identity.KME, a handover.Announce, t *turnstile) (handover.Standing, error) {
	if err := d.k.able(); err != nil {
		return "", err
	}
	if err := d.k.servingPeer(from); err != nil {
		return "", err
	}
	known := t.knows()
	if known.Run < a.Run || known.Last+announceWindow < a.Batch { // this process's first batch of that run, or another node had those before
		var err error
		if known, err = d.k.Store.PeerRun(ctx, from, a.Node); err != nil {
			return "", fmt.Errorf("reading the peer's run: %w", err)
		}
		t.learn(known)
	}
	if a.Run == known.Run && known.Last < a.Batch && a.Batch <= known.Last+announceWindow {
		return handover.Fresh, nil
	}
	return known.Judge(a.Run, a.Batch), nil
}

// prepare judges the requests of a batch that is to come and seals what they may
// have. An error is the HSM's or the database's.
func (d PeerDoor) prepare(ctx context.Context, from identity.KME, a handover.Announce, p *prepared) error {
	admitted, given := make(map[*link][]handover.Request), make(rooms)
	for _, r := range a.Requests {
		l, err := d.link(r.Link, from)
		if err != nil {
			p.refused[r.ID] = err.Error()
		} else if why := l.admit(r); why != "" {
			p.refused[r.ID] = why
		} else if err := given.give(d.k, r); err != nil {
			p.refused[r.ID], p.full[r.ID] = err.Error(), true
		} else {
			admitted[l] = append(admitted[l], r)
		}
	}
	for l, requests := range admitted {
		if err := l.prepare(ctx, a, requests, p); err != nil {
			return err
		}
	}
	return nil
}

// prepare seals the keys of admitted requests, as many at a time as there are processors.
func (l *link) prepare(ctx context.Context, a handover.Announce, requests []handover.Request, p *prepared) error {
	var wanted []handover.Key
	for _, r := range requests {
		wanted = append(wanted, r.Keys...)
	}
	pooled, err := l.k.Store.PoolAtoms(ctx, wanted, l.ID)
	if err != nil {
		return fmt.Errorf("reading the pool: %w", err)
	}
	maps.Copy(p.seen, pooled)
	g, ctx := errgroup.WithContext(ctx)
	workers := min(runtime.GOMAXPROCS(0), len(requests))
	for w := range workers {
		g.Go(func() error {
			for i := w; i < len(requests); i += workers {
				r := requests[i]
				due, bad, why, err := l.seal(ctx, a, r, pooled)
				if err != nil {
					return fmt.Errorf("sealing for request %s: %w", r.ID, err)
				}
				p.mu.Lock()
				p.due[r.ID], p.refused[r.ID], p.unusable[r.ID] = due, why, bad
				p.mu.Unlock()
			}
			return nil
		})
	}
	return g.Wait()
}

// seal seals the keys of one request anew for their takers. It returns why the
// request is refused ("" if it is not), and which atom is of no use here.
func (l *link) seal(ctx context.Context, a handover.Announce, r handover.Request, pooled map[key.ID]store.PooledAtom) (due []store.Due, bad []key.ID, why string, err error) {
	expires := l.k.expiry(r.Lifetime())
	secret := make([]byte, 0, (r.Bits+key.AtomBits-1)/key.AtomBits*key.AtomBytes)
	defer clear(secret[:cap(secret)])
	for _, want := range r.Keys {
		secret = secret[:0]
		for i, id := range want.Atoms {
			atom, ok := pooled[id]
			if !ok {
				return nil, nil, "", nil // DecideFresh refuses it, and says which atoms are lacking
			}
			if why := l.claims(want, i, atom); why != "" {
				return nil, []key.ID{id}, why, nil
			}
			plain, err := l.k.unsealAtom(ctx, atom.Atom, *lentOf(atom).from)
			if spoilt(err) {
				l.k.incident(ctx, "tampered-"+l.ID, fmt.Sprintf("the blob of atom %s does not open: %v", id, err))
				return nil, []key.ID{id}, "the blob does not open", nil
			}
			if err != nil {
				return nil, nil, "", err
			}
			secret = append(secret, plain...)
			clear(plain)
		}
		for _, slave := range r.Slaves {
			row := store.Due{
				Key: want.ID(), SAE: slave, Master: r.Master, Bits: r.Bits, Provenance: pooled[want.ID()].Provenance,
				ExpiresAt: expires, Reread: r.Reread, Node: a.Node, Run: a.Run, Batch: a.Batch,
			}
			if err := l.k.sealDue(ctx, &row, secret[:r.Bits/8]); err != nil {
				return nil, nil, "", err
			}
			due = append(due, row)
		}
	}
	return due, nil, "", nil
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
	case l.k.Production && l.Provenance == key.Simulated:
		return "keys of a simulated link, at a production node"
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
		d := set.Decide(policies.Question{Action: string(audit.EncKeys), Caller: r.Master, Other: slave, Number: len(r.Keys), Bits: r.Bits, Provenance: l.Provenance, Link: l.ID, Time: l.k.Now()})
		if !d.Allow {
			return fmt.Sprintf("policy here does not let %s share keys with %s", r.Master, slave)
		}
	}
	return ""
}

// claims says what is wrong with what a peer says of the i-th atom of a key: that
// it owns it, and where it lies; and that it is not too old, which a peer sees a little
// earlier than we do: see usable.
func (l *link) claims(want handover.Key, i int, p store.PooledAtom) string {
	switch {
	case p.Owner == l.End:
		return "a chunk that is owned here"
	case p.BlockRef != (handover.BlockRef{Link: l.ID, Session: want.Session, Block: want.Block}) || p.Index != want.First+i:
		return "atoms that lie elsewhere"
	case p.BlockState == handover.Lost:
		return "a block that was dropped"
	case p.Epoch < l.k.oldest(l.ID):
		return "atoms that are too old"
	}
	return ""
}

func assignEvent(from identity.KME, a handover.Announce, r handover.Request, res handover.Result) audit.Event {
	ev := audit.Event{
		Action: audit.Assign, Outcome: audit.Done, Request: r.ID, Actor: audit.Actor{Role: string(identity.RoleKME), ID: from.String()},
		Link: r.Link, Master: r.Master.String(), Slaves: names(r.Slaves), Bits: r.Bits, PeerNode: a.Node, PeerRun: a.Run, Batch: a.Batch,
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
