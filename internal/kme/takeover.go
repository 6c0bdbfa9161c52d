package kme

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// beginRun gives this process a run number that none has used before, even if the
// database was set back: the token and a file beside it witness the last one, and
// a database that is behind them has the site suspended before its row is touched.
//
// If the process dies between the steps, a number is skipped, which harms nothing:
// the token and the file come after the database, so they are never ahead of it.
func (k *KME) beginRun(ctx context.Context) error {
	inToken, err := k.Token.Counter(ctx, runCounter(k.Node))
	if err != nil {
		return fmt.Errorf("reading the run number in the token: %w", err)
	}
	inFile, err := readNumber(k.runFile())
	if err != nil {
		return err
	}
	now, err := k.Store.Standing(ctx)
	if err != nil {
		return fmt.Errorf("beginning a run: %w", err)
	}
	zeroized, err := k.zeroized(ctx)
	if err != nil {
		return err
	}
	if why := cmp.Or(zeroized, now.Suspended, k.restored(now, inToken, inFile)); why == "" {
		k.Store.Witness().Start(now.Origin)
	} else if err := k.suspend(ctx, why); err != nil {
		return fmt.Errorf("beginning a run: %w: %s", err, why)
	}
	if err := k.nextRun(ctx, max(inToken, inFile)); err != nil {
		return err
	}
	if why := k.suspended(); why != "" {
		k.alarmSuspended(ctx, why)
	}
	for id, l := range k.links {
		if err := k.Store.EnsureLink(ctx, id, l.Peer, l.End); err != nil {
			return fmt.Errorf("registering link %s: %w", id, err)
		}
	}
	if err := k.openTrail(ctx); err != nil {
		return err
	}
	ev := k.own(audit.Start)
	ev.Reason = fmt.Sprintf("run %d", k.run.Load())
	ev.Facts = k.factsNow()
	k.told = ev.Facts
	if err := k.Store.Record(ctx, ev); err != nil {
		return err
	}
	return k.Store.TellSchema(ctx, k.migrated)
}

// migrated makes the event of migrations of the database.
func (k *KME) migrated(c store.SchemaChange) audit.Event {
	ev := k.own(audit.Migrated)
	ev.Reason = fmt.Sprintf("from version %d to %d, the last migration at %s", c.From, c.To, c.Last.UTC().Format(time.RFC3339))
	return ev
}

// nextRun begins a run above atLeast. The order of its steps is what beginRun's
// word rests on. A run of a suspended node, which serves nothing, is known to its
// database alone: whoever brings a better one back finds the witnesses as they were.
func (k *KME) nextRun(ctx context.Context, atLeast int64) error {
	run, err := k.Store.BumpRun(ctx, k.Node, atLeast)
	if err != nil {
		return fmt.Errorf("beginning a run: %w", err)
	}
	k.run.Store(run)
	if k.suspended() != "" {
		return k.beginStore(ctx)
	}
	failpoint.Hit(failpoint.TakeoverBumped)
	setCounter := func(ctx context.Context) error { return k.Token.SetCounter(ctx, runCounter(k.Node), run) }
	if err := k.Store.Alone(ctx, tokenWriters, setCounter); err != nil {
		return fmt.Errorf("keeping the run number in the token: %w", err)
	}
	if err := writeDurably(k.runFile(), []byte(strconv.FormatInt(run, 10)+"\n")); err != nil {
		return err
	}
	return k.beginStore(ctx)
}

func (k *KME) beginStore(ctx context.Context) error {
	if err := k.Store.Begin(ctx, k.run.Load()); err != nil {
		return fmt.Errorf("beginning run %d: %w", k.run.Load(), err)
	}
	return nil
}

// runCounter names the token's counter of a node's run.
func runCounter(node string) string { return "kme-run-" + node }

func (k *KME) runFile() string { return filepath.Join(k.DataDir, "run") }

// readNumber reads what writeDurably has left in a file: 0 if nothing yet.
func readNumber(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("reading a number: %w", err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s holds %.30q, which is not a number from 0", path, text)
	}
	return n, nil
}

// takeOver deals with what this node's earlier runs left behind at one peer. Until then
// nothing of that peer's links is leased or announced here; the others' do not wait for it.
func (k *KME) takeOver(ctx context.Context, id identity.KME) error {
	if k.suspended() != "" {
		<-ctx.Done()
		return ctx.Err()
	}
	own := store.NodeRun{Node: k.Node, Run: k.run.Load()}
	alarm := takeoverAlarm(k.Node, id)
	for wait := repeatMin; ; wait = min(2*wait, repeatMax) {
		err := k.inheritAt(ctx, id, own)
		switch {
		case err == nil:
			close(k.takenOver[id])
			k.clear(ctx, alarm) // in this order: see isReady
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, store.ErrFenced):
			return err
		case errors.Is(err, store.ErrOvertaken):
			return fmt.Errorf("%w: %w", store.ErrFenced, err)
		}
		k.suspect(ctx, alarm, err.Error())
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// takeoverAlarm is the name of the alarm that a node cannot be taken over from, since a
// peer cannot be asked.
func takeoverAlarm(node string, id identity.KME) string {
	return "takeover-" + node + "-" + id.String()
}

// hasTakenOver says whether this node may lease and announce on a peer's links.
func (k *KME) hasTakenOver(id identity.KME) bool {
	select {
	case <-k.takenOver[id]:
		return true
	default:
		return false
	}
}

// isReady says whether this node is as good as its site's other ones: it may lease and
// announce, except to peers that it has not been able to ask yet, and whose alarm stands.
func (k *KME) isReady() bool {
	for id := range k.takenOver {
		if !k.stands(takeoverAlarm(k.Node, id)) && !k.hasTakenOver(id) {
			return false
		}
	}
	return true
}

// inherit deals with what a dead node's runs below n.Run have left behind, at all peers at
// once: one that is away, or whose list has no end, holds up its own links alone.
func (k *KME) inherit(ctx context.Context, n store.NodeRun) error {
	left, err := k.Store.LeftBy(ctx, n)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var errs []error
	var all sync.WaitGroup
	for id := range k.Peers {
		if !slices.ContainsFunc(left.Earlier, k.leadsTo(id)) {
			k.clear(ctx, takeoverAlarm(n.Node, id)) // it is done, perhaps by another node
			continue
		}
		all.Go(func() {
			err := k.inheritAt(ctx, id, n)
			over := errors.Is(err, store.ErrFenced) || errors.Is(err, store.ErrOvertaken) || ctx.Err() != nil
			if alarm := takeoverAlarm(n.Node, id); err == nil {
				k.clear(ctx, alarm)
			} else if !over {
				k.suspect(ctx, alarm, err.Error())
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// leadsTo says of a link's ID whether the link is one of this node's to the peer.
func (k *KME) leadsTo(id identity.KME) func(link string) bool {
	return func(link string) bool {
		l := k.links[link]
		return l != nil && l.Peer == id
	}
}

// inheritAt deals with what a node's runs below n.Run have left behind at one peer: it
// asks the peer what was assigned for them, burns and voids what was never served, and
// frees the chunks of the peer's links that they had leased. No other peer knows anything
// of those: an atom is announced on its own link. Whoever made n.Run does it, or whoever
// finds it not done; done twice, also at once, it does no harm. If the process dies before
// the end, the chunks that are not free say at which peers it is not done.
func (k *KME) inheritAt(ctx context.Context, id identity.KME, n store.NodeRun) error {
	if err := k.reclaimAt(ctx, id, n); err != nil {
		return fmt.Errorf("cannot learn what %s assigned for earlier runs of %s: %w", id, n.Node, err)
	}
	failpoint.Hit(failpoint.TakeoverBurned)
	var links []string
	for link := range k.links {
		if k.leadsTo(id)(link) {
			links = append(links, link)
		}
	}
	ev := k.own(audit.Takeover)
	ev.Peer, ev.Reason = id.String(), fmt.Sprintf("runs of %s below %d are dealt with at %s", n.Node, n.Run, id)
	return k.Store.EndTakeover(ctx, n, links, ev)
}

// reclaimAt tells a peer of the node's run and burns and voids what it had assigned
// for lower ones and is still in the pool here. What is not was served.
func (k *KME) reclaimAt(ctx context.Context, id identity.KME, n store.NodeRun) error {
	ctx, cancel := context.WithTimeoutCause(ctx, k.reclaimFor, fmt.Errorf("not all of it was said within %v", k.reclaimFor))
	defer cancel()
	of := reclaiming{id, n}
	started := handover.RunStarted{Node: n.Node, Run: n.Run, After: k.reclaimedUpTo(of)}
	for {
		answer, err := k.assignedAt(ctx, id, started)
		if err != nil {
			return errors.Join(err, context.Cause(ctx))
		}
		for _, l := range k.links {
			if l.Peer != id || len(answer.Assigned) == 0 {
				continue
			}
			if err := l.reclaimAssigned(ctx, started, answer.Assigned); err != nil {
				return err
			}
		}
		if answer.UpTo == (key.ID{}) {
			k.reclaimed.Delete(of)
			return nil
		}
		started.After = answer.UpTo
		k.reclaimed.Store(of, started.After)
	}
}

// reclaimTime bounds how long one peer is asked at a time. Whoever asks it again goes on
// where that ended: of lower runs nothing comes to what has been dealt with.
const reclaimTime = 10 * time.Second

// reclaiming is a takeover at a peer that is under way.
type reclaiming struct {
	peer identity.KME
	store.NodeRun
}

// reclaimedUpTo is up to which key a takeover has been dealt with.
func (k *KME) reclaimedUpTo(of reclaiming) (last key.ID) {
	if v, ok := k.reclaimed.Load(of); ok {
		last = v.(key.ID)
	}
	return last
}

// assignedAt asks a peer for the next keys that it has assigned for lower runs.
func (k *KME) assignedAt(ctx context.Context, id identity.KME, started handover.RunStarted) (answer handover.RunAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*announceTime)
	defer cancel()
	origin := k.past.originOf(id)
	if answer, err = k.Peers[id].Run(ctx, started); err != nil {
		return answer, err
	}
	if started.Node == k.Node {
		k.past.answered(id, origin, started.Run, 0)
	}
	if len(answer.Assigned) > 0 && bytes.Compare(answer.Assigned[0].Key[:], started.After[:]) <= 0 {
		return answer, fmt.Errorf("%s lists key %s when asked for those after %s", id, answer.Assigned[0].Key, started.After)
	}
	if answer.UpTo != (key.ID{}) && bytes.Compare(answer.UpTo[:], started.After[:]) <= 0 { // there might be no end
		return answer, fmt.Errorf("%s has looked up to %s when asked for what is after %s", id, answer.UpTo, started.After)
	}
	return answer, nil
}

// reclaimAssigned burns those of the assigned keys whose atoms are in this link's
// pool and this end's to assign.
func (l *link) reclaimAssigned(ctx context.Context, started handover.RunStarted, assigned []handover.Assigned) error {
	refs := make([]handover.Key, len(assigned))
	for i, a := range assigned {
		refs[i] = handover.Key{Atoms: a.Atoms}
	}
	pooled, err := l.k.Store.PoolAtoms(ctx, refs, l.ID)
	if err != nil {
		return fmt.Errorf("looking for assigned atoms: %w", err)
	}
	mine := func(id key.ID) bool {
		p, ok := pooled[id]
		return ok && p.Owner == l.End
	}
	for _, o := range handover.Orphans(started, assigned, mine) {
		d := debt{link: l, node: o.Void.Node, run: o.Void.Run, batch: o.Void.Batch, void: o.Void.Keys}
		d.why = fmt.Sprintf("assigned for run %d of %s, and not served", d.run, d.node)
		for _, id := range o.Atoms {
			d.lends = append(d.lends, lentOf(pooled[id]))
		}
		if err := l.k.pay(ctx, d); err != nil {
			return err
		}
	}
	return nil
}
