package kme

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/audit"
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
	counter := "kme-run-" + k.Node
	inToken, err := k.Token.Counter(ctx, counter)
	if err != nil {
		return fmt.Errorf("reading the run number in the token: %w", err)
	}
	path := filepath.Join(k.DataDir, "run")
	inFile, err := readNumber(path)
	if err != nil {
		return err
	}
	now, err := k.Store.Standing(ctx)
	if err != nil {
		return fmt.Errorf("beginning a run: %w", err)
	}
	if why := cmp.Or(now.Suspended, k.restored(now, inToken, inFile)); why == "" {
		k.Store.Witness().Start(now.Origin)
	} else if err := k.suspend(ctx, why); err != nil {
		return fmt.Errorf("beginning a run: %w: %s", err, why)
	}
	run, err := k.Store.BumpRun(ctx, k.Node, max(inToken, inFile))
	if err != nil {
		return fmt.Errorf("beginning a run: %w", err)
	}
	k.run.Store(run)
	if err := k.Token.SetCounter(ctx, counter, run); err != nil {
		return fmt.Errorf("keeping the run number in the token: %w", err)
	}
	if err := writeDurably(path, []byte(strconv.FormatInt(run, 10)+"\n")); err != nil {
		return err
	}
	if err := k.Store.Begin(ctx, run); err != nil {
		return fmt.Errorf("beginning run %d: %w", run, err)
	}
	for id, l := range k.links {
		if err := k.Store.EnsureLink(ctx, id, l.Peer, l.End); err != nil {
			return fmt.Errorf("registering link %s: %w", id, err)
		}
	}
	ev := k.own(audit.Start)
	ev.Reason = fmt.Sprintf("run %d", run)
	return k.Store.Record(ctx, ev)
}

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

// takeOver deals with what this node's earlier runs left behind: it asks each peer
// what was assigned for them, burns and voids what was never served, and frees the
// chunks that they had leased. Until then nothing is leased or announced.
func (k *KME) takeOver(ctx context.Context) error {
	if k.suspended() != "" {
		<-ctx.Done()
		return ctx.Err()
	}
	for id := range k.Peers {
		for wait := repeatMin; ; wait = min(2*wait, repeatMax) {
			err := k.reclaimAt(ctx, id)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, store.ErrFenced) {
				return err
			}
			k.suspect(ctx, "takeover-"+id.String(), fmt.Sprintf("cannot learn what %s assigned for this node's earlier runs: %v", id, err))
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
		}
		k.clear(ctx, "takeover-"+id.String())
	}
	ev := k.own(audit.Takeover)
	ev.Reason = fmt.Sprintf("earlier runs than %d are dealt with", k.run.Load())
	for {
		err := k.Store.EndTakeover(ctx, k.Node, k.run.Load(), ev)
		if err == nil {
			close(k.takenOver)
			return nil
		}
		if errors.Is(err, store.ErrFenced) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(repeatMax):
		}
	}
}

// reclaimAt tells a peer of this run and burns and voids what it had assigned for
// lower ones and is still in the pool here. What is not was served.
func (k *KME) reclaimAt(ctx context.Context, id identity.KME) error {
	started := handover.RunStarted{Node: k.Node, Run: k.run.Load()}
	for {
		assigned, err := k.assignedAt(ctx, id, started)
		if err != nil {
			return err
		}
		for _, l := range k.links {
			if l.Peer != id {
				continue
			}
			if err := l.reclaimAssigned(ctx, started, assigned); err != nil {
				return err
			}
		}
		if len(assigned) < handover.MaxAssigned {
			return nil
		}
		started.After = assigned[len(assigned)-1].Key
	}
}

// assignedAt asks a peer for the next keys that it has assigned for lower runs.
func (k *KME) assignedAt(ctx context.Context, id identity.KME, started handover.RunStarted) ([]handover.Assigned, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*announceTime)
	defer cancel()
	origin := k.past.originOf(id)
	assigned, err := k.Peers[id].Run(ctx, started)
	if err == nil && started.Node == k.Node {
		k.past.answered(id, origin, started.Run, 0)
	}
	last := started.After
	for _, a := range assigned {
		if bytes.Compare(a.Key[:], last[:]) <= 0 { // without an order there might be no end
			return nil, fmt.Errorf("%s lists key %s after %s", id, a.Key, last)
		}
		last = a.Key
	}
	return assigned, err
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
		d := debt{link: l, run: o.Void.Run, batch: o.Void.Batch, void: o.Void.Keys, why: "assigned for an earlier run, and not served"}
		for _, id := range o.Atoms {
			d.lends = append(d.lends, lentOf(pooled[id]))
		}
		if err := l.k.pay(ctx, d); err != nil {
			return err
		}
	}
	return nil
}
