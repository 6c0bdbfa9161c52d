package kme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// order is what a master asks for, with every default filled in.
type order struct {
	slaves []identity.SAE // at least one, no two alike
	number int
	bits   int           // size of each key
	ttl    time.Duration // 0 until it is known whose default holds
	reread bool          // the slaves may read the keys again (legacy)

	provenance key.Provenance // that the keys must have; "" for any
}

// suitable are those of ways whose keys are what o wants.
func (o order) suitable(ways []way) ([]way, error) {
	var unmet error
	ways = slices.DeleteFunc(ways, func(w way) bool {
		err := o.met(w.provenance())
		unmet = cmp.Or(unmet, err)
		return err != nil
	})
	if len(ways) == 0 {
		return nil, unmet
	}
	return ways, nil
}

// met is nil if keys of p are what o wants.
func (o order) met(p key.Provenance) error {
	if o.provenance == "" || o.provenance == p {
		return nil
	}
	return etsi014.Unmet(fmt.Errorf("the keys would be %s, not %s", p, o.provenance))
}

// atoms is how many make a key.
func (o order) atoms() int { return (o.bits + key.AtomBits - 1) / key.AtomBits }

// issue is what it gets.
type issue struct {
	keys       []etsi014.Key
	provenance key.Provenance
	expires    time.Time
}

// EncKeys is Get key of 014, 5.3: new keys for the caller (master) and its slaves.
func (k *KME) EncKeys(ctx context.Context, c identity.Caller, rid string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	slaves := append([]identity.SAE{slave}, r.AdditionalSlaves...)
	o := order{slaves: slaves, number: r.Number, bits: r.Bits, ttl: r.TTL, provenance: r.Provenance}
	call := k.begin(c, rid, audit.EncKeys, slave)
	got, err := k.initiate(ctx, call, o)
	k.counted(call, err)
	return etsi014.Container{Keys: got.keys}, err
}

// initiate judges an order and fills it. On an error nothing was handed out.
func (k *KME) initiate(ctx context.Context, c *call, o order) (issue, error) {
	c.ev.Master, c.ev.Slaves, c.ev.Bits = c.sae.String(), names(o.slaves), o.bits
	ways, err := c.judge(o.slaves, o.number, o.bits)
	if err == nil {
		ways, err = o.suitable(ways)
	}
	if err != nil {
		return issue{}, c.refuse(ctx, err)
	}
	if err := k.spend(c.sae, o.number*o.atoms()); err != nil {
		return issue{}, c.refuse(ctx, err)
	}
	if err := k.able(); err != nil {
		return issue{}, c.refuse(ctx, err)
	}
	// From here on the request lives by its own clock: a client that goes away
	// must not leave a key half handed over.
	client := ctx
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	back, err := k.spendShares(ctx, c.sae, o.slaves, o.number)
	if err != nil {
		return issue{}, c.refuse(ctx, err)
	}
	var got issue
	if ways[0].link == nil {
		got, err = k.initiateHere(ctx, c, o)
	} else {
		got, err = k.initiateThere(ctx, client, c, o, ways)
	}
	if err != nil {
		if !c.pending { // else they may yet be handed out
			back()
		}
		wipe(got.keys)
		return issue{}, c.refuse(ctx, err)
	}
	failpoint.Hit(failpoint.EncCommitted)
	return got, nil
}

// initiateThere hands out keys of a link to the peer where slaves are served.
func (k *KME) initiateThere(ctx, client context.Context, c *call, o order, ways []way) (issue, error) {
	to := ways[0].link.Peer
	c.ev.Link = ways[0].link.ID
	if err := k.servingPeer(to); err != nil {
		return issue{}, err
	}
	if !k.hasTakenOver(to) {
		return issue{}, unavailable(time.Second, "the other KME has yet to answer", fmt.Errorf("%s has not said yet what it assigned for this node's earlier runs", to))
	}
	w, lends, err := c.lend(ctx, o, ways)
	if err != nil {
		return issue{}, err
	}
	return w.link.initiate(ctx, client, c, o, w, lends)
}

// lend takes the atoms of an order, all out of one link's pool: the best one's that has
// them, and has such that the order may have.
func (c *call) lend(ctx context.Context, o order, ways []way) (way, []lent, error) {
	var unfit error
	var short []string
	for _, w := range ways {
		l := w.link
		c.ev.Link, c.ev.Policy = l.ID, w.policies
		if c.k.Production && l.Provenance == key.Simulated {
			unfit = cmp.Or[error](unfit, unavailable(0, "", errors.New("the link is simulated, and this node is set to production")))
			continue
		}
		lends, err := l.pool.take(ctx, o.number, o.atoms())
		if err != nil {
			return way{}, nil, err
		}
		if lends == nil {
			short = append(short, l.ID)
			continue
		}
		err = c.fit(lends, o, &w)
		c.ev.Policy = w.policies
		if err == nil {
			l.balance.here.Add(-int64(len(lends)))
			return w, lends, nil
		}
		l.pool.give(lends)
		unfit = cmp.Or(unfit, err)
	}
	if unfit != nil {
		return way{}, nil, unfit
	}
	return way{}, nil, unavailable(5*time.Second, "not enough keys are stored",
		fmt.Errorf("link %s has fewer than %d keys of %d bits", strings.Join(short, ", and link "), o.number, o.bits))
}

// initiate hands out keys of the link's pool: unwrap, announce, commit. What slaves
// who are at home here are to get is sealed before the peer is told anything.
func (l *link) initiate(ctx, client context.Context, c *call, o order, w way, lends []lent) (got issue, err error) {
	k := l.k
	o.ttl = cmp.Or(o.ttl, l.TTL, k.DefaultTTL)
	failpoint.Hit(failpoint.EncLeased)
	got, bad, err := l.open(ctx, lends, o)
	if err != nil {
		if spoilt(err) {
			l.quarantine(ctx, c.ev.Request, bad, err)
			lends = without(lends, bad)
		}
		l.pool.give(lends)
		return got, err
	}
	here, err := k.sealFor(ctx, l.ID, c.sae, w.here, o, got)
	if err != nil {
		l.pool.give(lends)
		return got, err
	}
	failpoint.Hit(failpoint.EncUnwrapped)

	c.ev.Provenance, c.ev.Keys, c.ev.Atoms = got.provenance, keyIDs(got.keys), ranges(lends)
	request := l.request(c.ev.Request, c.sae, w.there, o, lends, o.atoms())
	asked := time.Now()
	fate := l.ask(ctx, client, request, lends)
	since(k.metrics.announce, asked)
	if fate.err != nil {
		return got, fate.err // whoever settled it has dealt with the atoms
	}
	failpoint.Hit(failpoint.EncAnnounceAnswered)
	return got, l.commit(ctx, c, lends, here, fate.batch)
}

// commit deletes what the peer has assigned, adds what is due here and records it;
// then the keys may be answered. A commit that fails, or whose outcome is not known in time, leaves
// keys that nobody may get: they are burned here and voided at the peer.
func (l *link) commit(ctx context.Context, c *call, lends []lent, here []store.Due, batch int64) error {
	defer since(l.k.metrics.commit, time.Now())
	defer l.announcer.ended()
	c.ev.Batch = batch
	owed := debt{link: l, lends: lends, request: c.ev.Request, batch: batch, void: c.ev.Keys}
	err := l.k.Store.Serve(ctx, store.ServeJob{Atoms: atomIDs(lends), Places: places(lends), Due: here, Events: c.served(here), Late: func(committed bool) {
		c.late(committed)
		if !committed {
			l.k.owe(owed)
		}
	}})
	c.pending = errors.Is(err, store.ErrDoubt)
	if err != nil && !c.pending {
		l.k.owe(owed)
	}
	return err
}

// open unwraps the atoms of an order and makes its keys of them. On an error it
// names the atom that would not open.
func (l *link) open(ctx context.Context, lends []lent, o order) (issue, lent, error) {
	defer since(l.k.metrics.hsm, time.Now())
	got := issue{provenance: lends[0].from.Provenance, expires: l.k.expiry(o.ttl), keys: make([]etsi014.Key, 0, o.number)}
	blobs := make([]wrapped, len(lends))
	for i, a := range lends {
		blobs[i] = l.k.wrappedAtom(a.Atom, a.from)
	}
	plains, bad, err := l.k.unseal(ctx, blobs...)
	if err != nil {
		return issue{}, lends[bad], fmt.Errorf("unwrapping atom %s: %w", lends[bad].ID, err)
	}
	per := len(lends) / o.number
	for i := 0; i < len(lends); i += per {
		secret := joined(plains[i : i+per])
		clear(secret[o.bits/8:]) // a smaller key is the first bits of an atom
		got.keys = append(got.keys, etsi014.Key{ID: lends[i].ID, Material: key.NewMaterial(secret[:o.bits/8]), Provenance: got.provenance})
	}
	return got, lent{}, nil
}

// joined is atoms one after the other, which are wiped.
func joined(plains [][]byte) []byte {
	if len(plains) == 1 {
		return plains[0]
	}
	secret := make([]byte, 0, len(plains)*key.AtomBytes)
	for _, plain := range plains {
		secret = append(secret, plain...)
	}
	clearAll(plains)
	return secret
}

// request is what the peer is asked to assign.
func (l *link) request(rid string, master identity.SAE, slaves []identity.SAE, o order, lends []lent, per int) handover.Request {
	r := handover.Request{ID: rid, Link: l.ID, Master: master, Slaves: slaves, Bits: o.bits, TTL: o.ttl.Milliseconds(), Reread: o.reread}
	for i := 0; i < len(lends); i += per {
		first := lends[i]
		k := handover.Key{Session: first.from.Session, Block: first.from.Block, First: first.Index}
		for _, a := range lends[i : i+per] {
			k.Atoms = append(k.Atoms, a.ID)
		}
		r.Keys = append(r.Keys, k)
	}
	return r
}

// initiateHere serves SAEs that are all at home here: the keys are made in the HSM
// at request time, sealed for the slaves and committed in one transaction.
func (k *KME) initiateHere(ctx context.Context, c *call, o order) (issue, error) {
	o.ttl = cmp.Or(o.ttl, k.DefaultTTL)
	got := issue{provenance: key.LocalRNG, expires: k.expiry(o.ttl), keys: make([]etsi014.Key, 0, o.number)}
	epoch := key.EpochAt(k.Now(), k.EpochLength)
	began := time.Now()
	for range o.number {
		secret := make([]byte, o.bits/8)
		if err := k.Token.Random(ctx, secret); err != nil {
			return got, fmt.Errorf("making a key: %w", err)
		}
		id := key.NewLocalID(epoch.Start(k.EpochLength))
		got.keys = append(got.keys, etsi014.Key{ID: id, Material: key.NewMaterial(secret), Provenance: key.LocalRNG})
	}
	here, err := k.sealFor(ctx, "", c.sae, o.slaves, o, got)
	if err != nil {
		return got, err
	}
	since(k.metrics.hsm, began)
	c.ev.Provenance, c.ev.Keys = key.LocalRNG, keyIDs(got.keys)
	defer since(k.metrics.commit, time.Now())
	err = k.Store.Serve(ctx, store.ServeJob{Due: here, Events: c.served(here), Late: c.late})
	c.pending = errors.Is(err, store.ErrDoubt)
	return got, err
}

// sealFor seals every key of an issue for each of the slaves that are served here. link is
// where its atoms are from, "" if it was made here.
func (k *KME) sealFor(ctx context.Context, link string, master identity.SAE, slaves []identity.SAE, o order, got issue) ([]store.Due, error) {
	for _, slave := range slaves {
		if err := k.room(slave, master, o.number); err != nil {
			return nil, full(err)
		}
	}
	var due []store.Due
	var plains [][]byte
	for _, served := range got.keys {
		for _, slave := range slaves {
			due = append(due, store.Due{Link: link, Key: served.ID, SAE: slave, Master: master, Bits: o.bits, Provenance: got.provenance, ExpiresAt: got.expires, Reread: o.reread})
			plains = append(plains, served.Material.Reveal())
		}
	}
	if err := k.sealDue(ctx, due, plains); err != nil {
		return nil, fmt.Errorf("sealing %d keys: %w", len(got.keys), err)
	}
	return due, nil
}

// served are the events of a request that is answered with keys: its outcome and,
// if some of its slaves are served here, what was assigned to them.
func (c *call) served(here []store.Due) []audit.Event {
	done := c.ev
	done.Outcome = audit.Done
	if len(here) == 0 {
		return []audit.Event{done}
	}
	assigned := c.k.own(audit.Assign)
	assigned.Request, assigned.Link, assigned.Master, assigned.Bits = done.Request, done.Link, done.Master, done.Bits
	assigned.Keys, assigned.Provenance, assigned.Batch = done.Keys, done.Provenance, done.Batch
	for _, d := range here { // key by key
		if d.Key != here[0].Key {
			break
		}
		assigned.Slaves = append(assigned.Slaves, d.SAE.String())
	}
	return []audit.Event{done, assigned}
}

func names(saes []identity.SAE) []string {
	list := make([]string, len(saes))
	for i, sae := range saes {
		list[i] = sae.String()
	}
	return list
}

func keyIDs(keys []etsi014.Key) []key.ID {
	ids := make([]key.ID, len(keys))
	for i := range keys {
		ids[i] = keys[i].ID
	}
	return ids
}

func wipe(keys []etsi014.Key) {
	for _, k := range keys {
		k.Material.Wipe()
	}
}

func without(lends []lent, bad lent) []lent {
	kept := make([]lent, 0, len(lends))
	for _, a := range lends {
		if a.ID != bad.ID {
			kept = append(kept, a)
		}
	}
	return kept
}

// ranges sums up atoms as runs of consecutive ones, in order.
func ranges(lends []lent) []audit.Atoms {
	var rs []audit.Atoms
	for _, a := range lends {
		if n := len(rs); n > 0 {
			last := &rs[n-1]
			if last.Link == a.from.Link && last.Session == a.from.Session && last.Block == a.from.Block && last.First+last.Count == a.Index {
				last.Count++
				continue
			}
		}
		rs = append(rs, audit.Atoms{Link: a.from.Link, Session: a.from.Session, Block: a.from.Block, First: a.Index, Count: 1})
	}
	return rs
}
