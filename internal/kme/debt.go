package kme

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// debt is a burn that must happen, whatever happens to the request that caused
// it. It lives in memory: if the process dies first, the takeover of its run
// finds the same keys through the peer's answer and burns them.
type debt struct {
	link    *link
	lends   []lent
	request string
	why     string
	batch   int64    // of the announce that assigned them, with void
	void    []key.ID // key_IDs to be taken back at the peer; nil if nothing was assigned
	node    string   // of the announce; "": this one, in its current run
	run     int64    // likewise
}

// debts is the queue of what is owed.
type debts struct {
	mu    sync.Mutex
	queue []debt
	more  chan struct{}
}

// owe puts a debt at the end of the queue.
func (k *KME) owe(d debt) {
	k.debts.mu.Lock()
	k.debts.queue = append(k.debts.queue, d)
	k.debts.mu.Unlock()
	select {
	case k.debts.more <- struct{}{}:
	default:
	}
}

// payDebts burns what is owed, in order, as soon as the database takes it.
func (k *KME) payDebts(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-k.debts.more:
		}
		for {
			k.debts.mu.Lock()
			queue := k.debts.queue
			k.debts.queue = nil
			k.debts.mu.Unlock()
			if len(queue) == 0 {
				break
			}
			for _, d := range queue {
				if err := k.pay(ctx, d); err != nil {
					return err
				}
			}
			k.hurry()
		}
	}
}

// pay burns one debt, trying again until it is done or ctx ends.
func (k *KME) pay(ctx context.Context, d debt) error {
	for {
		err := k.Store.Burn(ctx, d.job(k))
		if err == nil {
			return nil
		}
		if errors.Is(err, store.ErrFenced) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(repeatMin):
		}
	}
}

// job is the transaction that pays d: the atoms go, the event says which, and a
// void for the peer is left to be told until it is acknowledged.
func (d debt) job(k *KME) store.BurnJob {
	node, run := d.node, d.run
	if node == "" {
		node, run = k.Node, k.run.Load()
	}
	job := store.BurnJob{Peer: d.link.Peer, Atoms: atomIDs(d.lends), Event: func(burned []key.ID) audit.Event {
		ev := k.own(audit.Burn)
		ev.Request, ev.Link, ev.Reason, ev.Batch, ev.PeerRun = d.request, d.link.ID, d.why, d.batch, run
		if ev.Reason == "" {
			ev.Reason = "assigned, and not served"
		}
		gone := slices.DeleteFunc(slices.Clone(d.lends), func(x lent) bool { return !slices.Contains(burned, x.ID) })
		ev.Keys, ev.Atoms, ev.Count = burned, ranges(gone), len(burned)
		return ev
	}}
	if d.void != nil {
		job.Void = &handover.Void{Node: node, Run: run, Batch: d.batch, Keys: d.void}
	}
	return job
}
