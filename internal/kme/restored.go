package kme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// A database that was restored to the past has forgotten what was delivered since.
// Four witnesses remember: the run number in the token and in a file, the head of
// the audit chain in another file, each peer (see greet), and, while this process
// lives, its own memory. Whoever finds that the database is behind one of them
// suspends the site: nothing is served, assigned or consumed, at any node, until
// `kmed recover --burn` has destroyed all that may have been delivered already.
//
// A peer that claims figures too high can suspend us. It is authenticated, and it
// could deny us its service anyway; the evidence in the alarm names it.

// past is what a node knows of its own site's past and its peers'.
type past struct {
	seen      handover.Figures // of this site, as beat last read them
	suspended atomic.Value     // why nothing is served here, as text; none: it is

	mu    sync.Mutex
	peers map[identity.KME]*peerPast
}

// peerPast is what this process remembers of a peer.
type peerPast struct {
	origin int64          // the highest that it has said
	burned int64          // the origin before which what was shared with it was burned, as last seen
	behind string         // why it is in the past; "" if it is not
	acked  handover.Acked // what it has answered of this node's run
	under  int64          // its origin, as far as we knew it, when that was asked
}

// of is a peer's entry. The caller holds mu.
func (p *past) of(id identity.KME) *peerPast {
	if p.peers == nil {
		p.peers = make(map[identity.KME]*peerPast)
	}
	if p.peers[id] == nil {
		p.peers[id] = new(peerPast)
	}
	return p.peers[id]
}

func (p *past) originOf(id identity.KME) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of(id).origin
}

func (p *past) behind(id identity.KME) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of(id).behind
}

// burned notes up to which origin of a peer all was burned, and says whether that is new.
func (p *past) burned(id identity.KME, origin int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.of(id)
	fresh := origin > was.burned
	was.burned = max(was.burned, origin)
	return fresh
}

// answered notes that a peer has answered a batch of ours, which was sent when
// origin was known of it. Whatever origin it has by now, it is no lower: an answer
// that comes late accuses nobody who has been recovered since.
func (p *past) answered(id identity.KME, origin, run, batch int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.of(id)
	if origin > was.under || origin == was.under && (run > was.acked.Run || run == was.acked.Run && batch > was.acked.Batch) {
		was.under, was.acked.Run, was.acked.Batch = origin, run, batch
	}
}

// answeredBy is what a peer has answered in its present origin.
func (p *past) answeredBy(id identity.KME, node string, origin int64) []handover.Acked {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.of(id)
	if was.under != origin || was.acked.Run == 0 {
		return nil
	}
	was.acked.Node = node
	return []handover.Acked{was.acked}
}

// restoredAlarm is the name of the alarm that this site is suspended.
const restoredAlarm = "restored"

// suspended is why nothing is served here, "" while it is. It never ends within a
// process: recovery needs the site's daemons stopped.
func (k *KME) suspended() string {
	why, _ := k.past.suspended.Load().(string)
	return why
}

// suspend stops all nodes of the site: the others read it in the database within a
// second. The database is first, since it is what the evidence is about: one that
// takes no writes, such as a primary that was deposed, serves nothing anyway.
func (k *KME) suspend(ctx context.Context, why string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := k.Store.Suspend(ctx, why); err != nil {
		return err
	}
	k.past.suspended.CompareAndSwap(nil, why)
	k.Store.Witness().Freeze()
	return nil
}

// fenced says why a node is fenced: taken over, as err says, or since its database
// has lost what this process had committed. Then it suspends the site: the next
// process serves its doors, and nothing behind them.
func (k *KME) fenced(ctx context.Context, err error) error {
	var lost string
	select {
	case <-k.Store.Fenced():
		lost = k.Store.SetBack()
	default: // the committer has not met it yet
		if now, err := k.Store.Standing(ctx); err == nil && now.Run(k.Node) < k.run.Load() {
			lost = fmt.Sprintf("node %s is in run %d, and was in run %d", k.Node, now.Run(k.Node), k.run.Load())
		}
	}
	if lost == "" {
		return err
	}
	why := "the database was set back while it was in use: " + lost
	return errors.Join(fmt.Errorf("node %s: %s", k.Node, why), k.suspend(ctx, why))
}

// serving is nil unless the site is suspended.
func (k *KME) serving() *problem.Error {
	why := k.suspended()
	if why == "" {
		return nil
	}
	return unavailable(time.Minute, "the key store is suspended", errors.New("suspended: "+why))
}

// restored says what an earlier process of this node, or its token, knows that
// the database does not; "" if it is nothing.
func (k *KME) restored(now store.Standing, inToken, inFile int64) string {
	run := now.Run(k.Node)
	switch behind := now.Behind(k.Store.Witness().Known()); {
	case behind != "":
		return "the database is behind the witness file: " + behind
	case inToken > run:
		return fmt.Sprintf("the database is behind the token: node %s is in run %d, and was in run %d", k.Node, run, inToken)
	case inFile > run:
		return fmt.Sprintf("the database is behind the run file: node %s is in run %d, and was in run %d", k.Node, run, inFile)
	}
	return ""
}

// watchPast looks whether the database is where it was a second ago or further,
// and whether another node has suspended the site.
func (k *KME) watchPast(ctx context.Context) {
	now := k.standing(ctx)
	if now.Origin == 0 {
		return
	}
	for id := range k.Peers {
		k.forgetBurned(ctx, id)
	}
	why := now.Suspended
	if behind := now.Behind(k.past.seen); behind != "" {
		why = cmp.Or(why, "the database was set back while it was in use: "+behind)
	} else {
		k.past.seen = now.Figures
	}
	if why = cmp.Or(k.suspended(), why); why == "" {
		return
	}
	if err := k.suspend(ctx, why); err != nil {
		k.Log.Warn("suspending the site", "err", err)
		return
	}
	k.alarmSuspended(ctx, why)
}

func (k *KME) alarmSuspended(ctx context.Context, why string) {
	k.raise(ctx, restoredAlarm, why+". Nothing is served until kmed recover --burn: see deploy/RECOVERY.md")
}

// found suspends the site because of what a peer knows, and returns why.
func (k *KME) found(ctx context.Context, peer identity.KME, evidence string) error {
	why := fmt.Sprintf("the database is behind what %s knows: %s", peer, evidence)
	return errors.Join(errors.New(why), k.suspend(ctx, why))
}

// lookTime bounds each look at the database for a beat or a hello, which go on
// without it while it is away.
const lookTime = 500 * time.Millisecond

// standing is how this site stands; of origin 0 while the database is away.
func (k *KME) standing(ctx context.Context) store.Standing {
	if k.Store.Healthy() != nil {
		return store.Standing{}
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	s, err := k.Store.Standing(ctx)
	if err != nil {
		return store.Standing{} // its own alarm stands
	}
	return s
}

// figures are what a peer has told of itself, of origin 0 if nothing. ok is false while the
// database is away: then nothing is known of the peer, and it is not known that it has told
// nothing.
func (k *KME) figures(ctx context.Context, peer identity.KME) (f handover.Figures, ok bool) {
	if k.Store.Healthy() != nil {
		return handover.Figures{}, false
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	f, err := k.Store.Figures(ctx, peer)
	return f, err == nil
}

// judgeSelf compares what a peer remembers of us with how we stand: now must have
// been read after its hello had come. Whatever the peer remembers was durable here
// before it was told.
func (k *KME) judgeSelf(ctx context.Context, from identity.KME, h handover.Hello, now store.Standing) {
	why := now.Behind(h.Yours)
	if h.Yours.Origin == now.Origin && now.Origin > 0 && len(h.Acked) > 0 { // otherwise it speaks of a time before our last recovery
		why = cmp.Or(why, k.forgotten(ctx, from, h.Acked))
	}
	if why == "" || k.suspended() != "" {
		return
	}
	k.Log.Error("restored", "err", k.found(ctx, from, why))
}

// forgotten says which of the batches that we have answered are not known here any more; ""
// if all are, or if that cannot be told for sure: what an old primary says accuses nobody.
func (k *KME) forgotten(ctx context.Context, by identity.KME, acked []handover.Acked) (why string) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	var nodes []string
	for _, a := range acked {
		nodes = append(nodes, a.Node)
	}
	known, err := k.Store.PeerRuns(ctx, by, nodes)
	if err != nil {
		return "" // the next hello is judged again
	}
	for _, a := range acked {
		why = cmp.Or(why, known[a.Node].Behind(a))
	}
	return why
}

// judgePeer compares a peer's answer with what it had told before it was asked, and
// keeps its figures if it is not in the past. Nothing is announced to a peer that
// is, nor accepted from it, until it has been recovered. Without knowing what it had told
// (ok is false) it is what it was.
func (k *KME) judgePeer(ctx context.Context, id identity.KME, h handover.Hello, known handover.Figures, ok bool) {
	if !ok {
		return
	}
	behind := h.Site.Behind(known)
	if behind == "" && h.Suspended {
		behind = "it says so itself"
	}
	if behind == "" && h.Site.Origin == 0 {
		return // its database is away: nothing is proved, nor disproved
	}
	k.past.mu.Lock()
	k.past.of(id).behind = behind
	k.past.mu.Unlock()
	name := restoredAlarm + "-" + id.String()
	if behind != "" {
		k.raise(ctx, name, fmt.Sprintf("%s has been restored to the past, and has to be recovered there: %s", id, behind))
		return
	}
	k.clear(ctx, name)
	k.learn(ctx, id, h)
}

// learn keeps what a peer says of itself. Of one that is suspended it is of no use:
// its evidence against itself must not be overwritten.
func (k *KME) learn(ctx context.Context, id identity.KME, h handover.Hello) {
	if h.Suspended || h.Site.Origin == 0 {
		return
	}
	own := h.Site // without nodes that network.yaml does not give to the peer: each is kept for ever
	own.Nodes = slices.DeleteFunc(slices.Clone(own.Nodes), func(n handover.NodeFigures) bool {
		_, ok := k.Policies().KMEs[id].Node(n.Node)
		return !ok
	})
	if err := k.Store.HearFigures(ctx, id, own); err != nil {
		k.Log.Debug("keeping a peer's figures", "peer", id.String(), "err", err)
		return
	}
	k.past.mu.Lock()
	defer k.past.mu.Unlock()
	p := k.past.of(id)
	p.origin = max(p.origin, h.Site.Origin)
}

// tellRunAgain tells a peer of our run if it has not heard of it since it was
// recovered: until then it takes none of our announces.
func (k *KME) tellRunAgain(ctx context.Context, id identity.KME) {
	if !k.hasTakenOver(id) || k.servingPeer(id) != nil || len(k.past.answeredBy(id, k.Node, k.past.originOf(id))) > 0 {
		return
	}
	// What it lists of lower runs was dealt with when this run began.
	if _, err := k.assignedAt(ctx, id, handover.RunStarted{Node: k.Node, Run: k.run.Load()}); err != nil {
		k.Log.Warn("telling a peer of our run again", "peer", id.String(), "err", err)
	}
}

// servingPeer is nil unless this site or the peer's is in the past.
func (k *KME) servingPeer(id identity.KME) error {
	if err := k.serving(); err != nil {
		return err
	}
	if why := k.trail.peerBroken(id); why != "" && !k.Trail.ForkAlarmOnly {
		return unavailable(time.Minute, "the other KME is not available", fmt.Errorf("the audit log of %s: %s", id, why))
	}
	if behind := k.past.behind(id); behind != "" {
		return unavailable(10*time.Second, "the other KME is not available", fmt.Errorf("%s has been restored to the past: %s", id, behind))
	}
	return nil
}

// keepWitness makes the witness file durable, once a second.
func (k *KME) keepWitness(ctx context.Context) {
	if err := k.Store.Witness().Sync(); err != nil {
		k.raise(ctx, "witness", err.Error())
	} else {
		k.clear(ctx, "witness")
	}
}
