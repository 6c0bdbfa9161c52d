package kme

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/store"
)

const (
	beatEvery = time.Second     // how often a node shows that it lives and looks who else does
	deadAfter = 5 * time.Second // without a sign of life: longer than what comes and goes
	blindTime = 3 * time.Second // without a look at the others, after which nothing is known of them
	idleLease = 5 * time.Second // after which a node gives back what it has leased and nobody asks for
)

// sight is what this node sees of another one of its site.
type sight struct {
	store.NodeBeat
	since   time.Time // that this is what is seen, by this node's clock
	alive   bool
	quiet   bool // nothing has changed for deadAfter, or the run has stopped in order
	settled bool // nothing is left of it that a takeover could free
	cut     bool // it has no sessions at the database any more
}

// watch judges by this node's own clock which other nodes of the site live: times
// that others have written tell nothing. It is wrong about a node that is only slow,
// which is safe: a takeover ends the run of the other before it touches anything.
type watch struct {
	mu     sync.Mutex
	looked time.Time // when the last look began
	nodes  map[string]*sight
}

// look takes in what was read of the site's nodes between two moments. listed are
// those that there should be.
func (w *watch) look(before, after time.Time, listed []string, beats []store.NodeBeat) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.nodes == nil {
		w.nodes = make(map[string]*sight)
	}
	blind := before.Sub(w.looked) > blindTime
	w.looked = before
	seen := make(map[string]store.NodeBeat)
	for _, name := range listed {
		seen[name] = store.NodeBeat{NodeRun: store.NodeRun{Node: name}}
	}
	for _, b := range beats {
		seen[b.Node] = b
	}
	for name, b := range seen {
		s := w.nodes[name]
		if s == nil {
			s = &sight{NodeBeat: b, since: after, alive: true}
			w.nodes[name] = s
		}
		s.see(b, before, after, blind)
	}
}

// see takes in one look at the node. blind says that nothing is known since the look
// before.
func (s *sight) see(b store.NodeBeat, before, after time.Time, blind bool) {
	was := s.NodeBeat
	if s.NodeBeat = b; b != was {
		s.since, s.quiet, s.settled, s.cut = after, false, false, false
		switch {
		case b.Beat > 0:
			s.alive = true
		case b.Run == was.Run: // it has said that it stops
			s.alive, s.quiet = false, true
		}
		return
	}
	switch {
	case s.quiet:
	case blind:
		s.since = after
	case before.Sub(s.since) >= deadAfter:
		s.alive, s.quiet = false, true
	}
}

// others are the sights of all nodes but self.
func (w *watch) others(self string) (list []sight) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, s := range w.nodes {
		if name != self {
			list = append(list, *s)
		}
	}
	return list
}

// note changes what is known of a run, if it still is the node's.
func (w *watch) note(n store.NodeRun, change func(*sight)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.nodes[n.Node]; s != nil && s.NodeRun == n {
		change(s)
	}
}

// alive is how many nodes of the site live, this one included.
func (k *KME) alive() int {
	n := 1
	for _, s := range k.watch.others(k.Node) {
		if s.alive {
			n++
		}
	}
	return n
}

// watchNodes shows the site's other nodes that this one lives, and looks who else does.
func (k *KME) watchNodes(ctx context.Context) error {
	t := time.NewTicker(beatEvery)
	defer t.Stop()
	for {
		err := k.lookAround(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, store.ErrFenced):
			return fmt.Errorf("node %s: run %d has no right to serve any more: %w", k.Node, k.run.Load(), err)
		case err != nil:
			k.Log.Warn("looking after the site's nodes", "err", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

func (k *KME) lookAround(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := k.Store.Beat(ctx); err != nil {
		return err
	}
	// Not the daemon's clock, which may be set: what counts is how much time has passed.
	before := time.Now()
	beats, err := k.Store.Nodes(ctx)
	if err != nil {
		return err
	}
	var listed []string
	for _, n := range k.Policies().KMEs[k.Self].Nodes {
		listed = append(listed, n.Name)
	}
	k.watch.look(before, time.Now(), listed, beats)
	for _, s := range k.watch.others(k.Node) {
		if _, ok := k.Policies().KMEs[k.Self].Node(s.Node); ok {
			k.judgeNode(ctx, s)
		}
		if err := k.cutOff(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// cutOff ends the sessions of a dead node at the database, look by look until none is
// left: a node that is only paused holds on to what it leads.
func (k *KME) cutOff(ctx context.Context, s sight) error {
	name := "node-sessions-" + s.Node
	if s.alive || !s.quiet {
		k.clear(ctx, name)
		return nil
	}
	if s.cut {
		return nil
	}
	left, err := k.Store.Disconnect(ctx, s.Node, deadAfter)
	if err != nil {
		return err
	}
	if left > 0 {
		k.suspect(ctx, name, fmt.Sprintf("%d sessions of node %s, which shows no sign of life, cannot be ended at the database: they are at work, or its role was not granted to %s. What they lead and lock is nobody else's",
			left, s.Node, store.OwnerRole))
		return nil
	}
	k.clear(ctx, name)
	k.watch.note(s.NodeRun, func(s *sight) { s.cut = true })
	return nil
}

// share has each link give back what this node has leased in vain, if there are
// others that may need it.
func (k *KME) share(ctx context.Context) {
	if k.alive() == 1 {
		return
	}
	for _, l := range k.links {
		l.share(ctx)
	}
}

// judgeNode raises or clears the alarm about another node of the site.
func (k *KME) judgeNode(ctx context.Context, s sight) {
	name := "node-" + s.Node
	switch {
	case s.alive:
		k.clear(ctx, name)
		k.clearTakeover(ctx, s.Node) // it takes over from itself
	case s.Run == 0:
		k.raise(ctx, name, fmt.Sprintf("node %s has never run", s.Node))
	default:
		k.raise(ctx, name, fmt.Sprintf("node %s shows no sign of life: it is down, or cannot reach the database", s.Node))
	}
}

// succeed takes over what dead nodes of the site have left, as long as this node is
// the one of its site that does so. If it dies on the way, the next one goes on.
func (k *KME) succeed(ctx context.Context) error {
	defer k.clearTakeovers(context.WithoutCancel(ctx))
	t := time.NewTicker(beatEvery)
	defer t.Stop()
	for {
		for _, s := range k.watch.others(k.Node) {
			if s.alive || !s.quiet || s.settled || k.suspended() != "" {
				continue
			}
			err := k.succeedNode(ctx, s.NodeRun)
			if errors.Is(err, store.ErrFenced) {
				return err
			}
			if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrOvertaken) {
				k.Log.Warn("taking over", "from", s.Node, "err", err) // a peer that is away has an alarm
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// clearTakeovers ends the alarms that others cannot be taken over from: that is another
// node's to do now, and to say.
func (k *KME) clearTakeovers(ctx context.Context) {
	for _, s := range k.watch.others(k.Node) {
		k.clearTakeover(ctx, s.Node)
	}
}

func (k *KME) clearTakeover(ctx context.Context, node string) {
	for id := range k.Peers {
		k.clear(ctx, takeoverAlarm(node, id))
	}
}

// succeedNode takes over from one dead node. ErrOvertaken says that it has started
// again, or that another node was first.
func (k *KME) succeedNode(ctx context.Context, n store.NodeRun) error {
	left, err := k.Store.LeftBy(ctx, n)
	if err != nil {
		return err
	}
	if !k.mayInherit(left.Now) && !k.mayInherit(left.Earlier) {
		if err := k.Store.ForgetParked(ctx, n.Node); err != nil {
			return err
		}
		k.clearTakeover(ctx, n.Node) // another node may have done it
		k.watch.note(n, func(s *sight) { s.settled = true })
		return nil
	}
	if k.mayInherit(left.Now) {
		if n, err = k.depose(ctx, n, "it has leased keys"); err != nil {
			return err
		}
		// If this process dies here or later, the chunks of lower runs say that a
		// takeover is not finished.
		failpoint.Hit(failpoint.TakeoverBumped)
	}
	if err := k.inherit(ctx, n); err != nil {
		return err
	}
	k.Log.Info("taken over", "from", n.Node, "runs below", n.Run)
	return nil
}

// depose ends the run of a node that shows no sign of life, because of what it has that
// others need. That is recorded by itself: not every takeover goes on to ask a peer.
func (k *KME) depose(ctx context.Context, n store.NodeRun, has string) (store.NodeRun, error) {
	k.Log.Warn("taking over from a node that shows no sign of life", "from", n.Node, "run", n.Run, "why", has)
	ev := k.own(audit.Takeover)
	ev.Reason = fmt.Sprintf("run %d of %s is ended: the node shows no sign of life, and %s", n.Run, n.Node, has)
	return k.Store.Depose(ctx, n, ev)
}

// mayInherit says whether any of the links is this node's: what is leased of another,
// which is not in its configuration any more, waits until the link is back.
func (k *KME) mayInherit(links []string) bool {
	return slices.ContainsFunc(links, func(link string) bool { return k.links[link] != nil })
}
