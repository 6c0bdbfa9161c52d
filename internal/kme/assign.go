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
	if standing != handover.Fresh {
		k.tire(ctx, from)
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

// prepare seals the keys of admitted requests, some at a time, as many processors as
// there are.
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
	for some := range slices.Chunk(requests, min((len(requests)+workers-1)/workers, sealRequests)) {
		g.Go(func() error { return l.seal(ctx, a, some, pooled, p) })
	}
	return g.Wait()
}

// sealRequests is how many requests' keys are in the clear at a time, by each processor.
const sealRequests = 64

// wish is a request whose atoms are all in the pool.
type wish struct {
	handover.Request
	blobs []wrapped // of its atoms, key by key
}

// seal seals the keys of requests anew for their takers, and notes in p what became of
// each request. An error is the HSM's or the database's.
func (l *link) seal(ctx context.Context, a handover.Announce, requests []handover.Request, pooled map[key.ID]store.PooledAtom, p *prepared) error {
	var wishes []wish
	for _, r := range requests {
		if w, ok := l.wish(r, pooled, p); ok {
			wishes = append(wishes, w)
		}
	}
	wishes, plains, err := l.grant(ctx, wishes, p)
	defer clearAll(plains)
	if err != nil {
		return err
	}
	var due []store.Due
	var secrets [][]byte // of due
	defer func() { clearAll(secrets) }()
	ends := make([]int, len(wishes)) // of each wish's rows in due
	for i, w := range wishes {
		expires := l.k.expiry(w.Lifetime())
		for _, want := range w.Keys {
			secret := joined(plains[:len(want.Atoms)])
			plains = plains[len(want.Atoms):]
			clear(secret[w.Bits/8:]) // a smaller key is the first bits of an atom
			secret = secret[:w.Bits/8]
			for _, slave := range w.Slaves {
				secrets = append(secrets, secret)
				due = append(due, store.Due{
					Key: want.ID(), SAE: slave, Master: w.Master, Bits: w.Bits, Provenance: pooled[want.ID()].Provenance,
					ExpiresAt: expires, Reread: w.Reread, Link: l.ID, Peer: l.Peer, Node: a.Node, Run: a.Run, Batch: a.Batch,
				})
			}
		}
		ends[i] = len(due)
	}
	if err := l.k.sealDue(ctx, due, secrets); err != nil {
		return fmt.Errorf("sealing %d keys: %w", len(due), err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	first := 0
	for i, w := range wishes {
		p.due[w.ID] = due[first:ends[i]]
		first = ends[i]
	}
	return nil
}

// wish looks for the atoms of a request.
func (l *link) wish(r handover.Request, pooled map[key.ID]store.PooledAtom, p *prepared) (wish, bool) {
	w := wish{Request: r}
	for _, want := range r.Keys {
		for i, id := range want.Atoms {
			atom, ok := pooled[id]
			if !ok {
				return w, false // DecideFresh refuses it, and says which atoms are lacking
			}
			if why := l.claims(want, i, atom); why != "" {
				p.refuse(r.ID, why, id)
				return w, false
			}
			if why := l.fits(r, atom.Provenance); why != "" {
				p.refuse(r.ID, why)
				return w, false
			}
			w.blobs = append(w.blobs, l.k.wrappedAtom(atom.Atom, lentOf(atom).from))
		}
	}
	return w, true
}

// grant opens the atoms of wishes, one after the other, and returns the wishes all of
// whose atoms opened.
func (l *link) grant(ctx context.Context, wishes []wish, p *prepared) ([]wish, [][]byte, error) {
	for {
		var blobs []wrapped
		for _, w := range wishes {
			blobs = append(blobs, w.blobs...)
		}
		plains, bad, err := l.k.unseal(ctx, blobs...)
		if err == nil {
			return wishes, plains, nil
		}
		if !spoilt(err) {
			return nil, nil, fmt.Errorf("opening %d atoms: %w", len(blobs), err)
		}
		i := 0
		for ; bad >= len(wishes[i].blobs); i++ {
			bad -= len(wishes[i].blobs)
		}
		w := wishes[i]
		per := len(w.Keys[0].Atoms) // of each key, see admit
		id := w.Keys[bad/per].Atoms[bad%per]
		l.k.incident(ctx, "tampered-"+l.ID, fmt.Sprintf("the blob of atom %s does not open: %v", id, err))
		p.refuse(w.ID, "the blob does not open", id)
		wishes = slices.Delete(wishes, i, i+1)
	}
}

// refuse notes why a request is refused, and which atoms are of no use here to anybody.
func (p *prepared) refuse(request, why string, bad ...key.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused[request], p.unusable[request] = why, bad
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
		if why := l.allow(set, r, slave, l.Provenance); why != "" {
			return why
		}
	}
	return ""
}

// allow says why policy here does not let a request's master share keys of a provenance
// with a slave, or "".
func (l *link) allow(set *policies.Set, r handover.Request, slave identity.SAE, p key.Provenance) string {
	d := set.Decide(policies.Question{Action: string(audit.EncKeys), Caller: r.Master, Other: slave, Number: len(r.Keys), Bits: r.Bits, Provenance: p, Link: l.ID, Time: l.k.Now()})
	if !d.Allow {
		return fmt.Sprintf("policy here does not let %s share keys with %s", r.Master, slave)
	}
	return ""
}

// fits says why a request may not have an atom that came before the link was another's,
// or "": see call.fit.
func (l *link) fits(r handover.Request, p key.Provenance) string {
	if p == l.Provenance {
		return ""
	}
	for _, slave := range r.Slaves {
		if why := l.allow(l.k.Policies(), r, slave, p); why != "" {
			return why
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
	case l.k.Production && p.Provenance == key.Simulated:
		return "atoms of simulated light, at a production node"
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
