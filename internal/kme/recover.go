package kme

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/store"
)

// ErrNotBurned is what Recover returns when it was not told to burn.
var ErrNotBurned = errors.New("nothing was done: to recover, all of that must be destroyed, which --burn says")

// Recover brings a site back whose database was restored to the past. What was
// delivered since is forgotten, so nothing that the database holds may ever be
// delivered: every KEK of this KME in the token is destroyed, those also that the
// database does not know any more; the pool is burned and waiting keys are ended;
// the peers are told, when the site serves again, to burn their part of the pool;
// and the account goes on in a new origin, in which the witnesses begin anew.
//
// What a peer had assigned to its own SAEs stays takeable there: our masters may
// have been served it, and whoever was not holds nothing.
//
// It is for when the daemons of the site are stopped. Each step can be repeated,
// and the suspension ends with the last one: if it is killed, it is run again.
func (k *KME) Recover(ctx context.Context, burn bool, out io.Writer) error {
	say := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	others, err := k.Store.Connected(ctx)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		return fmt.Errorf("%s is connected to the database: stop all nodes of the site first", strings.Join(others, ", "))
	}
	w, err := k.askWitnesses(ctx, say)
	if err != nil {
		return err
	}
	has, err := k.Store.Holdings(ctx)
	if err != nil {
		return err
	}
	if !burn {
		say("A recovery destroys the %d KEKs of %s in the token, the %d keys of its pool and the %d keys that wait", len(w.keks), k.Self, has.Pool, has.Due)
		say("to be taken here, which the masters at the other KME hold; and the other end's part of the pool.")
		return ErrNotBurned
	}
	if err := k.Store.Suspend(ctx, "a recovery has begun and not ended"); err != nil {
		return err
	}
	if err := k.raiseRuns(ctx, w); err != nil {
		return err
	}
	say("run numbers: those of %s are above all that were ever used", strings.Join(slices.Sorted(maps.Keys(w.runs)), ", "))
	if err := k.destroyKEKs(ctx, w.keks); err != nil {
		return err
	}
	say("KEKs: %d destroyed in the token", len(w.keks))
	pool, due, err := k.burnAll(ctx)
	if err != nil {
		return err
	}
	say("keys: %d burned in the pool, %d ended that waited to be taken", pool, due)
	if err := k.endZeroized(ctx, w.zeroized); err != nil {
		return err
	}
	if err := k.endRecovery(ctx, w); err != nil {
		return err
	}
	say("account: it goes on in origin %d. Start the site's nodes: they have the peers burn their part of the pool, and new keys are made", w.origin+1)
	return nil
}

// witnesses is all that is known of the site's past outside its database.
type witnesses struct {
	origin int64            // the highest
	runs   map[string]int64 // by node: the highest
	lost   []string         // what the database has less of
	keks   []hsm.KEKInfo

	zeroized int64 // the last mark: see Zeroize

	seen []string // checkpoints of the site's logs, as the peers say
}

func (w *witnesses) hear(who string, now, known handover.Figures) {
	if behind := now.Behind(known); behind != "" {
		w.lost = append(w.lost, who+": "+behind)
		for _, n := range known.Nodes {
			w.lost = append(w.lost, fmt.Sprintf("%s: node %s, run %d, event %d, head %s", who, n.Node, n.Run, n.Seq, hex.EncodeToString(n.Head[:])))
		}
	}
	w.origin = max(w.origin, known.Origin)
	for _, n := range known.Nodes {
		w.runs[n.Node] = max(w.runs[n.Node], n.Run)
	}
}

// askWitnesses gathers what the database, the files, the token and the peers say.
func (k *KME) askWitnesses(ctx context.Context, say func(string, ...any)) (*witnesses, error) {
	now, err := k.Store.Standing(ctx)
	if err != nil {
		return nil, err
	}
	m, err := readMarks(ctx, k.Token, k.DataDir)
	if err != nil {
		return nil, err
	}
	if why := cmp.Or(now.Suspended, m.text()); why != "" {
		say("%s is suspended: %s", k.Self, why)
	} else {
		say("%s is not suspended.", k.Self)
	}
	w := &witnesses{runs: map[string]int64{k.Node: 0}, zeroized: m.last()}
	w.hear("", now.Figures, now.Figures)
	w.hear("the witness file", now.Figures, k.Store.Witness().Known())
	for id, client := range k.Peers {
		asking, cancel := context.WithTimeout(ctx, 3*time.Second)
		h := k.hello(asking, id, now)
		h.Run, h.Suspended = max(1, now.Run(k.Node)), true
		answer, err := client.Hello(asking, h)
		cancel()
		if err == nil {
			err = answer.CheckReached(k.Now()) // what we begin is above what it remembers
		}
		if err != nil {
			say("%s does not answer, and cannot say what it remembers: %v", id, err)
			continue
		}
		w.hear(id.String(), now.Figures, answer.Yours)
		asking, cancel = context.WithTimeout(ctx, 3*time.Second)
		seen, err := client.Witnessed(asking)
		cancel()
		if err != nil {
			say("%s does not say what it has witnessed of the audit log: %v", id, err)
		}
		w.seen = append(w.seen, seen.Notes...)
	}
	for node := range w.runs {
		inToken, err := k.Token.Counter(ctx, runCounter(node))
		if err != nil {
			return nil, fmt.Errorf("reading the run number in the token: %w", err)
		}
		w.runs[node] = max(w.runs[node], inToken)
	}
	for _, l := range w.lost {
		say("lost, by %s", l)
	}
	if err := k.follow(ctx, w, say); err != nil {
		return nil, err
	}
	w.keks, err = k.ownKEKs(ctx)
	return w, err
}

// follow leaves of the checkpoints that the peers have seen the last one of each log, for
// the new log to name: whoever verifies it learns how long those were that it follows.
// A peer can keep one to itself, and make up none, since the site's log has signed each.
func (k *KME) follow(ctx context.Context, w *witnesses, say func(string, ...any)) error {
	seen := w.seen
	if w.seen = nil; len(seen) == 0 {
		return nil
	}
	key, err := k.Token.OpenSigningKey(ctx, LogKeyLabel(k.Self.String()))
	if errors.Is(err, hsm.ErrNoSigningKey) { // a token that was zeroized, or another one
		say("the audit log's key is not in the token: the new log has another, and does not name what the peers have witnessed of the one before")
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening the audit log's key: %w", err)
	}
	k.trail.logKey = key
	w.seen, err = k.lastOfEach(w.origin+1, seen, say)
	return err
}

// lastOfEach sorts out checkpoints of the site's logs before the one of an origin.
func (k *KME) lastOfEach(origin int64, seen []string, say func(string, ...any)) ([]string, error) {
	key, err := audit.ParseLogKey(k.logKeyText(origin))
	if err != nil {
		return nil, err
	}
	last := make(map[string]audit.Checkpoint) // by log
	notes := make(map[string]string)
	for _, signed := range seen {
		c, err := key.OpenEarlier(signed)
		if err != nil {
			say("what a peer says that it has witnessed is left out: %v", err)
			continue
		}
		if was, ok := last[c.Origin]; !ok || c.Size > was.Size {
			last[c.Origin], notes[c.Origin] = c, signed
		}
	}
	var follows []string
	for _, log := range slices.Sorted(maps.Keys(last)) {
		say("audit log: the new one follows %s of %d leaves, which a peer has witnessed", log, last[log].Size)
		follows = append(follows, notes[log])
	}
	return follows, nil
}

// ownKEKs lists the KEKs of this KME in the token, by their labels: the register is
// as old as the database.
func (k *KME) ownKEKs(ctx context.Context) ([]hsm.KEKInfo, error) {
	all, err := k.Token.ListKEKs(ctx)
	if err != nil {
		return nil, err
	}
	var keks []hsm.KEKInfo
	own := regexp.MustCompile(`^kek-` + regexp.QuoteMeta(k.Self.String()) + `-\d{8}T\d{6}-[0-9a-f]{8}$`)
	for _, one := range all {
		if own.MatchString(one.Label) {
			keks = append(keks, one.KEKInfo)
		}
	}
	return keks, nil
}

// raiseRuns gives every node a run above all that it ever had, and begins this
// node's, in which the recovery is recorded.
func (k *KME) raiseRuns(ctx context.Context, w *witnesses) error {
	for node, run := range w.runs {
		if node == k.Node {
			continue
		}
		if _, err := k.Store.BumpRun(ctx, node, run); err != nil {
			return err
		}
	}
	inFile, err := readNumber(k.runFile())
	if err != nil {
		return err
	}
	return k.nextRun(ctx, max(w.runs[k.Node], inFile))
}

// destroyKEKs destroys the KEKs and records it of each, whatever becomes of the others;
// then, which others of the register are not in the token any more. If the process dies in
// between, the one that it was at is such.
func (k *KME) destroyKEKs(ctx context.Context, keks []hsm.KEKInfo) error {
	rows, err := k.Store.KEKs(ctx)
	if err != nil {
		return err
	}
	gone := func(format string, args ...any) audit.Event {
		ev := k.own(audit.KEKGone)
		ev.Reason = fmt.Sprintf(format, args...)
		return ev
	}
	var errs []error
	for _, info := range keks {
		err := k.Token.DestroyKEK(ctx, info)
		if err == nil {
			ev := gone("%s, check value %x: recovery", info.Label, info.CheckValue)
			if i := slices.IndexFunc(rows, func(row store.KEK) bool { return row.Label == info.Label }); i >= 0 {
				err = k.Store.EndKEK(ctx, rows[i].ID, ev)
			} else {
				err = k.Store.Record(ctx, ev)
			}
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if left, err := k.ownKEKs(ctx); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("%d KEKs are still in the token", len(left)))
	}
	var events []audit.Event
	for _, row := range rows {
		was := slices.ContainsFunc(keks, func(info hsm.KEKInfo) bool { return info.Label == row.Label })
		if !was && (row.State == store.KEKOpen || row.State == store.KEKSealed) {
			events = append(events, gone("%s, check value %x: recovery; it was not in the token any more", row.Label, row.CheckValue))
		}
	}
	return k.Store.EndKEKs(ctx, events...)
}

// burnAll empties the pool and ends what waits, transaction by transaction.
func (k *KME) burnAll(ctx context.Context) (pool, due int, err error) {
	for {
		n, chunks, err := k.Store.BurnPool(ctx, k.burnedAway("recovery: it may have been delivered"))
		if err != nil {
			return pool, due, err
		}
		if pool += n; chunks == 0 {
			break
		}
	}
	for {
		n, err := k.Store.VoidDue(ctx, 8*expireBatch, func(rows []store.DueRef) audit.Event {
			ev := k.dueExpired(rows)
			ev.Action, ev.Reason = audit.VoidKeys, "recovery: it may have been taken"
			return ev
		})
		if err != nil {
			return pool, due, err
		}
		if due += n; n == 0 {
			return pool, due, nil
		}
	}
}

// burnedAway makes the event of atoms of a link that were burned together.
func (k *KME) burnedAway(why string) func(string, []audit.Atoms) audit.Event {
	return func(link string, atoms []audit.Atoms) audit.Event {
		ev := k.poolExpired(link, atoms)
		ev.Action, ev.Reason = audit.Burn, why
		return ev
	}
}

// endRecovery begins the new account. The log goes on where the restored database
// ends; the event says what it once had.
func (k *KME) endRecovery(ctx context.Context, w *witnesses) error {
	ev := k.own(audit.Recover)
	ev.Count = int(w.origin + 1)
	ev.Reason = fmt.Sprintf("origin %d begins", w.origin+1)
	if len(w.lost) > 0 {
		ev.Reason += "; lost, by " + strings.Join(w.lost, "; ")
	}
	ev.Follows = w.seen
	k.Store.Witness().Start(w.origin + 1)
	return k.Store.EndRecovery(ctx, w.origin+1, slices.Collect(maps.Keys(k.Peers)), ev)
}

// tellBurned tells the peers, until they answer, of a recovery here.
func (k *KME) tellBurned(ctx context.Context) {
	pending, err := k.Store.BurnedOut(ctx)
	if err != nil {
		return
	}
	for id, b := range pending {
		client := k.Peers[id]
		if client == nil {
			continue
		}
		asking, cancel := context.WithTimeout(ctx, 2*requestTime)
		answer, err := client.Burned(asking, b)
		for _, l := range answer.Links { // ours go on above them
			err = errors.Join(err, handover.CheckReached("session", l.Session, k.Now()))
		}
		if err == nil {
			err = k.Store.AckBurned(asking, id, b, answer)
		}
		cancel()
		if err != nil {
			k.Log.Warn("telling a peer of the recovery", "peer", id.String(), "err", err)
		}
	}
}

// Burned drops what is left here of what was shared with a site that has lost it.
func (d PeerDoor) Burned(ctx context.Context, from identity.KME, b handover.Burned) (handover.BurnedAnswer, error) {
	k := d.k
	if err := k.serving(); err != nil {
		return handover.BurnedAnswer{}, err
	}
	if err := handover.CheckReached("origin", b.Origin, k.Now()); err != nil {
		return handover.BurnedAnswer{}, d.refuse(ctx, from, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	for done := false; !done; {
		var err error
		if done, err = k.Store.HearBurned(ctx, from, b, k.burnedAway(fmt.Sprintf("%s was recovered from the past, and has lost it", from))); err != nil {
			return handover.BurnedAnswer{}, err
		}
	}
	k.forgetBurned(ctx, from)
	k.Log.Warn("a peer was recovered: what was shared with it is burned", "peer", from.String(), "origin", b.Origin)
	sessions, err := k.Store.Sessions(ctx, from)
	return handover.BurnedAnswer{Links: sessions}, err
}

// forgetBurned drops what this node has leased of a pool that was burned since it
// last looked, whichever node of the site was told.
func (k *KME) forgetBurned(ctx context.Context, peer identity.KME) {
	origin, err := k.Store.HeardBurned(ctx, peer)
	if err != nil || !k.past.burned(peer, origin) {
		return
	}
	for _, l := range k.links {
		if l.Peer == peer {
			l.pool.forget()
		}
	}
	k.trail.trust(peer) // its log goes on in another origin; the one that ended where it was set back is no sign any more
	k.clear(ctx, "audit-log-"+peer.String())
}

// mayOpen says whether the link may open a session: not while the peer has not
// answered that it has burned what this end has lost.
func (l *link) mayOpen(ctx context.Context) error {
	if err := l.k.servingPeer(l.Peer); err != nil {
		return err
	}
	if err := l.trusted(ctx); err != nil {
		return err
	}
	pending, err := l.k.Store.BurnedOut(ctx)
	if err != nil {
		return err
	}
	if b, ok := pending[l.Peer]; ok {
		return fmt.Errorf("%s has not burned its part of the pool since the recovery here (origin %d)", l.Peer, b.Origin)
	}
	return nil
}
