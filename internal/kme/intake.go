package kme

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// sealedBlocks are the blocks of a session whose atoms are wrapped and not stored yet. Each
// is wrapped the moment it is made, whichever others are under way; they are stored one
// after the other.
type sealedBlocks struct {
	l      *link
	mu     sync.Mutex
	blocks map[int64]store.Block // by number
}

func newSealedBlocks(l *link) *sealedBlocks {
	return &sealedBlocks{l: l, blocks: make(map[int64]store.Block)}
}

// seal wraps a block, and wipes its bits.
func (s *sealedBlocks) seal(ctx context.Context, b qlink.Block) error {
	block, err := s.l.sealBlock(ctx, b)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blocks[b.Block] = block
	return nil
}

// hold stores a block that is sealed, or seals it first.
func (s *sealedBlocks) hold(ctx context.Context, b qlink.Block) error {
	s.mu.Lock()
	block, ok := s.blocks[b.Block]
	delete(s.blocks, b.Block)
	s.mu.Unlock()
	if !ok {
		return s.l.intake(ctx, b)
	}
	return s.l.hold(ctx, b, block)
}

// intake seals a block and stores it.
func (l *link) intake(ctx context.Context, b qlink.Block) error {
	block, err := l.sealBlock(ctx, b)
	if err != nil {
		return err
	}
	return l.hold(ctx, b, block)
}

// sealBlock cuts a block into atoms and wraps each in the HSM the moment it exists. The bits are
// wiped before it returns.
func (l *link) sealBlock(ctx context.Context, b qlink.Block) (store.Block, error) {
	defer clear(b.Bits)
	defer clear(b.Pads)
	failpoint.Hit(failpoint.IntakeDistilled)
	k := l.k
	if err := k.serving(); err != nil {
		return store.Block{}, err
	}
	if k.Production && b.Provenance == key.Simulated {
		return store.Block{}, fmt.Errorf("block %d is simulated: this node is set to production", b.Block)
	}
	block, err := l.wrap(ctx, b)
	if err != nil {
		return store.Block{}, err
	}
	failpoint.Hit(failpoint.IntakeWrapped)
	return block, nil
}

// hold stores a sealed block HELD and has the other end told. If the process dies before
// HELD is committed, the session dies with it, and the other end is answered NEVER: nothing
// of the block is ever used.
func (l *link) hold(ctx context.Context, b qlink.Block, block store.Block) error {
	k := l.k
	ev := k.own(audit.Hold)
	ev.Link, ev.Peer, ev.Provenance, ev.Count, ev.Bits = l.ID, l.Peer.String(), b.Provenance, len(block.Atoms), key.AtomBits
	ev.Atoms = []audit.Atoms{{Link: l.ID, Session: b.Session, Block: b.Block, Count: len(block.Atoms)}}
	ev.Reason = fmt.Sprintf("qber %.4f, leak %d bits, %d secret bits", b.QBER, b.Leak, b.Length)
	if len(b.Upstream) > 0 {
		ev.Reason = fmt.Sprintf("handed out by the device: %d secret bits", b.Length)
	}
	if err := k.Store.HoldBlock(ctx, block, ev); err != nil {
		return fmt.Errorf("holding block %s: %w", block.BlockRef, err)
	}
	failpoint.Hit(failpoint.IntakeHeldCommitted)
	k.hurry()
	return nil
}

// wrap names the atoms of a block and seals each alone.
func (l *link) wrap(ctx context.Context, b qlink.Block) (store.Block, error) {
	k := l.k
	block := store.Block{
		BlockRef: handover.BlockRef{Link: l.ID, Session: b.Session, Block: b.Block},
		Epoch:    key.Epoch(b.Terms.Epoch), Owners: handover.Owners(b.Terms.Owners), Mine: l.End,
		Provenance: b.Provenance, Upstream: b.Upstream, Atoms: make([]store.Atom, b.Outcome.Atoms()),
	}
	kek, err := k.keks.forEpoch(ctx, block.Epoch)
	if err != nil {
		return block, err
	}
	if block.Pads, err = l.wrapPads(ctx, b, kek); err != nil {
		return block, err
	}
	name := key.Name{Link: l.ID, Session: b.Session, Block: b.Block, Transcript: b.Transcript}
	ids := make([]key.ID, len(block.Atoms))
	for i := range ids {
		ids[i] = name.ID(block.Epoch.Start(k.EpochLength), i)
	}
	block.Digest = handover.DigestOf(ids, block.Owners)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for first := 0; first < len(ids); first += wrapAtoms {
		g.Go(func() error {
			some := block.Atoms[first:min(first+wrapAtoms, len(ids))]
			plains, aads := make([][]byte, len(some)), make([][]byte, len(some))
			for i := range some {
				at := first + i
				plains[i] = b.Bits[at*key.AtomBytes : (at+1)*key.AtomBytes]
				aads[i] = AtomAAD(make([]byte, 0, aadRoom), k.Self, kek.id, block.BlockRef, at, ids[at], b.Provenance)
			}
			sealed, err := wrap(ctx, kek.kek.WrapAllInBackground, plains, aads)
			if err != nil {
				return fmt.Errorf("wrapping atoms %d and on of block %s: %w", first, block.BlockRef, err)
			}
			for i, s := range sealed {
				some[i] = store.Atom{ID: ids[first+i], Index: first + i, KEK: kek.id, IV: s.IV, CT: s.CT}
			}
			return nil
		})
	}
	return block, g.Wait()
}

// wrapAtoms is how many atoms are prepared for the token at a time.
const wrapAtoms = 256

// tellPeers repeats, until it is answered, what the peers must hear: which blocks
// we hold, which assigned keys they must void, and which chunks they are given.
func (k *KME) tellPeers(ctx context.Context) {
	if k.suspended() != "" {
		return
	}
	k.tellBurned(ctx)
	for id, l := range k.links {
		blocks, err := k.Store.HeldBlocks(ctx, id)
		if err != nil {
			return // the database is away; its own alarm stands
		}
		for _, h := range blocks {
			if err := l.tellHeld(ctx, h); err != nil {
				k.Log.Debug("telling of a held block", "block", h.BlockRef.String(), "err", err)
				break
			}
		}
	}
	voids, err := k.Store.Voids(ctx)
	if err != nil {
		return
	}
	silent := make(map[identity.KME]bool)
	for _, v := range voids {
		client := k.Peers[v.Peer]
		if client == nil || silent[v.Peer] {
			continue // of a peer that is no longer configured, they stand in the table for the operator
		}
		ctx, cancel := context.WithTimeout(ctx, announceTime)
		err := client.Void(ctx, v.Void)
		if err == nil {
			err = k.Store.AckVoid(ctx, v)
		}
		cancel()
		if err != nil {
			k.Log.Debug("telling of a void", "peer", v.Peer.String(), "err", err)
			silent[v.Peer] = true // the others' turn
		}
	}
	k.tellCompromises(ctx)
	for id := range k.Peers {
		if err := k.tellGrants(ctx, id); err != nil {
			k.Log.Debug("telling of granted chunks", "peer", id.String(), "err", err)
		}
	}
}

// tellHeld says HELD for one block and acts on the answer.
func (l *link) tellHeld(ctx context.Context, h handover.Held) error {
	ctx, cancel := context.WithTimeout(ctx, announceTime)
	defer cancel()
	answer, err := l.client.Held(ctx, h)
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.IntakeHeldSent)
	if err := l.k.Store.HeardHeldAnswer(ctx, h.BlockRef, answer, l.k.blockEvents(h.BlockRef, h.Atoms)); err != nil {
		return err
	}
	switch answer {
	case handover.Equal:
		failpoint.Hit(failpoint.IntakeReady)
	case handover.Different:
		l.k.incident(ctx, "block-"+l.ID, fmt.Sprintf("block %s is another one at %s: both copies are dropped", h.BlockRef, l.Peer))
	}
	return nil
}

// poolTTL is how long unassigned atoms of a link stay useful.
func (k *KME) poolTTL(link string) time.Duration {
	if l := k.links[link]; l != nil {
		return cmp.Or(l.PoolTTL, k.PoolTTL)
	}
	return k.PoolTTL // it was taken out of network.yaml
}

// oldest is the first epoch whose atoms are still used, of a link.
func (k *KME) oldest(link string) key.Epoch {
	return key.EpochAt(k.Now().Add(-k.poolTTL(link)), k.EpochLength)
}

// MinPoolTTL is the least time that unassigned atoms stay useful: what is close to its end
// is not used (usable).
const MinPoolTTL = time.Minute

// usable is the first epoch whose atoms may be announced: a little before the peer
// expires them, so that none is announced in vain.
func (l *link) usable() key.Epoch {
	return key.EpochAt(l.k.Now().Add(epochSlack+requestTime-l.k.poolTTL(l.ID)), l.k.EpochLength)
}

// expire ends what has outlived its time.
func (k *KME) expire(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if k.Store.Healthy() != nil || k.suspended() != "" {
		return
	}
	if _, err := k.expireDue(ctx); err != nil {
		k.Log.Warn("expiring assigned keys", "err", err)
	}
	links, err := k.Store.Links(ctx)
	for _, id := range links {
		if _, err = k.Store.ExpirePool(ctx, id, k.oldest(id), k.poolExpired); err != nil {
			break
		}
	}
	if err != nil {
		k.Log.Warn("expiring the pool", "err", err)
	}
}

// expireDue ends the assigned keys whose lifetime is over, and returns how many.
func (k *KME) expireDue(ctx context.Context) (ended int, err error) {
	for {
		n, err := k.Store.ExpireDue(ctx, k.Now(), expireBatch, k.dueExpired)
		ended += n
		if err != nil || n < expireBatch {
			return ended, err
		}
	}
}

// expireBatch is how many rows one transaction expires.
const expireBatch = 500

func (k *KME) dueExpired(rows []store.DueRef) audit.Event {
	ev := k.own(audit.Expire)
	ev.Count, ev.Reason = len(rows), "not taken in time"
	for _, r := range rows {
		ev.Keys = append(ev.Keys, r.Key)
	}
	return ev
}

func (k *KME) poolExpired(link string, atoms []audit.Atoms) audit.Event {
	ev := k.own(audit.Expire)
	ev.Link, ev.Atoms, ev.Reason = link, atoms, "not asked for in time"
	for _, a := range atoms {
		ev.Count += a.Count
	}
	return ev
}
