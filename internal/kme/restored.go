package kme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/handover"
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

// past is what a node knows of its site's past.
type past struct {
	seen      handover.Figures // of this site, as beat last read them
	suspended atomic.Value     // why nothing is served here, as text; none: it is
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
	if err := k.Store.Suspend(ctx, why); err != nil {
		return err
	}
	k.past.suspended.CompareAndSwap(nil, why)
	k.Store.Witness().Freeze()
	return nil
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
	now, err := k.Store.Standing(ctx)
	if err != nil {
		return // its own alarm stands
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
	k.raise(ctx, restoredAlarm, why+". Nothing is served until kmed recover --burn: see deploy/RECOVERY.md")
}

// keepWitness makes the witness file durable, once a second.
func (k *KME) keepWitness(ctx context.Context) {
	if err := k.Store.Witness().Sync(); err != nil {
		k.raise(ctx, "witness", err.Error())
	} else {
		k.clear(ctx, "witness")
	}
}
