package kme

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// LinkState is what operators see of a link.
type LinkState struct {
	ID       string
	Peer     identity.KME
	End      handover.End
	State    string // down, open, full, paused, standby
	Why      string // what is in the way, if anything is
	Session  int64
	OpenedAt time.Time // of that session
	Blocks   int       // distilled since this process started
	Aborts   int
	Bits     int64           // of secret, likewise
	Stage    string          // of the block under way
	Done     float64         // of that stage, 0 to 1
	Last     distill.Outcome // of the last block or abort; without bits
	LastAt   time.Time
	LastTook time.Duration
	LastWhy  string // why the last block was aborted; "" if it was not
	Rated    bool   // its error rate was found

	Reserve    store.Reserve // of pads, after the last block
	EpsSecrecy float64       // what the blocks of this year (UTC) add up to: a key is not secret
	EpsCorrect float64       // keys differ, or a forgery went unseen
}

// update changes what operators see.
func (l *link) update(change func(*LinkState)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&l.state)
}

// LinkStates lists the state of every link.
func (k *KME) LinkStates() []LinkState {
	list := make([]LinkState, 0, len(k.links))
	for _, lc := range k.Config.Links {
		l := k.links[lc.ID]
		l.mu.Lock()
		list = append(list, l.state)
		l.mu.Unlock()
	}
	return list
}

// down notes that a session has ended.
func (l *link) down(err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	l.k.Log.Warn("link session ended", "link", l.ID, "err", err)
	l.update(func(s *LinkState) { s.State, s.Why, s.Stage, s.Done = "down", err.Error(), "", 0 })
	l.k.suspect(context.Background(), "link-"+l.ID, fmt.Sprintf("link %s is down: %v", l.ID, err))
}

// standBy notes that the link is another node's to run, and so is what is wrong with it.
func (l *link) standBy(ctx context.Context) {
	l.update(func(s *LinkState) {
		s.State, s.Why, s.Stage, s.Done = admin.LinkStandby, "another node of this site runs the link", "", 0
	})
	l.k.clear(ctx, "link-"+l.ID)
}

// runElsewhere says whether another node of this site has a later session than this
// one, and lately had a block of it.
func (l *link) runElsewhere(ctx context.Context, session int64) bool {
	last, at, err := l.k.Store.LastBlock(ctx, l.ID)
	return err == nil && last > session && l.k.Now().Sub(at) < elsewhere+silences*l.Interval
}

// elsewhere is how long another node may take for a block: this one does not see how
// it comes along.
const elsewhere = 30 * time.Second

// cut notes that no light passes; the next block is tried as if nothing had been.
func (l *link) cut(ctx context.Context, err error) {
	l.update(func(st *LinkState) { st.State, st.Why, st.Stage, st.Done = "down", err.Error(), "", 0 })
	l.k.raise(ctx, "link-"+l.ID, fmt.Sprintf("link %s: %v%s", l.ID, err, l.forecast(ctx)))
}

// drain is how the pool stood when the link began to give nothing.
type drain struct {
	since  time.Time
	stored int
}

// forecast says how long the keys in the pool last, for an alarm that the link
// gives none: at the rate at which they have gone since it began to.
func (l *link) forecast(ctx context.Context) string {
	left, err := l.k.Store.Stored(ctx, l.ID)
	if err != nil {
		return ""
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.k.Now()
	if l.dry.since.IsZero() {
		l.dry = drain{now, left}
	}
	text := fmt.Sprintf("; %d keys are left", left)
	if gone := l.dry.stored - left; gone > 0 && left > 0 {
		text += fmt.Sprintf(", for about %v", time.Duration(float64(now.Sub(l.dry.since))*float64(left)/float64(gone)).Round(time.Second))
	}
	return text
}

// watch looks after the link at Bob's end, which only waits: whoever is in the way
// of the next block (a cut fibre, an HSM that is away at the other end) is known to
// Alice's end alone. No block in a while, though there is room for one, is an alarm.
func (l *link) watch(ctx context.Context) {
	l.mu.Lock()
	s := l.state
	l.mu.Unlock()
	here, there, err := l.k.Store.Pool(ctx, l.ID)
	if err != nil || here+there >= l.k.PoolLimit {
		l.rested = l.k.Now()
		return
	}
	if s.State != "open" && l.runElsewhere(ctx, s.Session) {
		l.standBy(ctx)
		return
	}
	if s.State == "open" {
		quiet := l.quiet(s)
		if quiet < silences*l.Interval || s.Stage != "" && quiet < blockSlow {
			return
		}
		s.Why = fmt.Sprintf("no block has come for %v", quiet.Round(time.Second))
		l.update(func(now *LinkState) {
			if now.LastAt.Equal(s.LastAt) {
				now.State, now.Why = "down", s.Why
			}
		})
	}
	l.k.suspect(ctx, "link-"+l.ID, fmt.Sprintf("link %s is down: %s%s", l.ID, s.Why, l.forecast(ctx)))
}

// quiet is for how long there was no block, nor an abort, though one was to be expected.
func (l *link) quiet(s LinkState) time.Duration {
	return l.k.Now().Sub(slices.MaxFunc([]time.Time{s.OpenedAt, s.LastAt, l.rested}, time.Time.Compare))
}

// watchOpen looks after the link at Alice's end while it is open: whatever is in the way of a
// block under way, in this process or beside it, none that ends is an alarm.
func (l *link) watchOpen(ctx context.Context) {
	l.mu.Lock()
	s := l.state
	l.mu.Unlock()
	if s.State != "open" { // whatever is in the way has been said
		l.rested = l.k.Now()
		return
	}
	if quiet := l.quiet(s); quiet >= max(blockSlow, silences*l.Interval) {
		l.k.suspect(ctx, "link-"+l.ID, fmt.Sprintf("link %s: no block has come for %v%s", l.ID, quiet.Round(time.Second), l.forecast(ctx)))
	}
}

// blockSlow is after how long a block under way that does not end is an alarm.
const blockSlow = time.Minute

// silences is after how many intervals without a block Bob's end begins to suspect
// the link.
const silences = 3

// distilled notes a block for operators.
func (l *link) distilled(ctx context.Context, b qlink.Block) {
	o, rated := b.Outcome, l.light()
	o.Bits, o.Pads = nil, nil
	l.update(func(s *LinkState) {
		s.Blocks++
		s.Bits += int64(o.Length)
		s.State, s.Why = "open", ""
		s.Last, s.LastAt, s.LastTook, s.LastWhy, s.Rated, s.Stage, s.Done = o, l.k.Now(), b.Took, "", rated, "", 0
	})
	l.history.block(o.QBER, rated, o.Length)
	l.enter(ctx, o, b.Took, rated, "")
	l.mu.Lock()
	l.dry = drain{}
	l.mu.Unlock()
	l.k.clear(ctx, "qber-"+l.ID)
	l.k.clear(ctx, "link-"+l.ID)
	l.k.Log.Info("block", "link", l.ID, "block", o.Block, "atoms", o.Atoms(), "qber", o.QBER, "f", o.Efficiency, "took", b.Took.Round(time.Millisecond))
}

// light says whether blocks come from light, and so show an error rate.
func (l *link) light() bool { return l.Filler == 0 && l.Device == nil }

// enter keeps the figures of a block in the database, and reads what they add up to. If
// the database is away they are lost: nothing rests on them but pictures, and the year's
// epsilon, of which a block that cannot be held uses nothing.
func (l *link) enter(ctx context.Context, o distill.Outcome, took time.Duration, rated bool, why string) {
	n := l.Profile.Intensities
	err := l.k.Store.NoteDistilled(ctx, l.ID, store.Distilled{
		Session: o.Session, Block: o.Block, At: l.k.Now(), Took: took, Aborted: why, Gates: o.Gates, Detected: o.Detected, Doubles: o.Doubles,
		SiftedKey: o.SiftedKey, SiftedTest: o.SiftedTest, Key: o.Key[:n], Test: o.Test[:n], TestErrors: o.TestErrors[:n], KeyErrors: o.KeyErrors[:n],
		Rated: rated, TestQBER: o.QBER, KeyQBER: o.KeyQBER, Leak: o.Leak, Efficiency: o.Efficiency, Rounds: o.Rounds, SecretBits: o.Length,
		EpsSecrecy: o.EpsSec, EpsCorrect: o.EpsCor,
	})
	if err != nil {
		l.k.Log.Warn("keeping the figures of a block", "link", l.ID, "block", o.Block, "err", err)
	}
	l.account(ctx)
}

// account reads how the reserve and the year's epsilon stand.
func (l *link) account(ctx context.Context) {
	r, err := l.k.Store.Reserve(ctx, l.ID)
	if err != nil {
		return // the database is away: its own alarm stands
	}
	secrecy, correct, err := l.k.Store.Epsilon(ctx, l.ID, l.k.Now())
	if err != nil {
		return
	}
	l.update(func(s *LinkState) { s.Reserve, s.EpsSecrecy, s.EpsCorrect = r, secrecy, correct })
	if name := "pads-" + l.ID; l.End == handover.Bob && r.Pads >= store.ReserveLimit(l.End, l.Profile.Pads) {
		l.k.raise(ctx, name, fmt.Sprintf("%d pads of link %s wait here: %s spends none of those that its blocks give, as no honest end does. Those of further blocks are not kept", r.Pads, l.ID, l.Peer))
	} else {
		l.k.clear(ctx, name)
	}
	if name := "epsilon-" + l.ID; secrecy+correct > yearlyEpsilon/2 {
		l.k.raise(ctx, name, fmt.Sprintf("the blocks of link %s have used %.2g of this year's %.2g: at all of it the link rests", l.ID, secrecy+correct, yearlyEpsilon))
	} else {
		l.k.clear(ctx, name)
	}
}

// yearlyEpsilon is how likely it may become in a year that any key of a link is known to
// somebody else, or that its ends disagree: 10^8 blocks of 10^-14.
const yearlyEpsilon = 1e-6

// aborted records a block that was given up: an alarm, and the link goes on.
func (l *link) aborted(ctx context.Context, b qlink.Block, a *distill.Abort) {
	o, rated := b.Outcome, l.light() && a.Estimated()
	o.QBER = a.QBER
	l.update(func(s *LinkState) {
		s.Aborts++
		s.State, s.Why = "open", ""
		s.Last, s.LastAt, s.LastTook, s.LastWhy, s.Rated, s.Stage, s.Done = o, l.k.Now(), b.Took, a.Reason, rated, "", 0
	})
	l.history.block(a.QBER, rated, 0)
	l.enter(ctx, o, b.Took, rated, a.Reason)
	ev := l.k.own(audit.LinkAbort)
	ev.Outcome, ev.Link, ev.Peer, ev.Reason = audit.Refused, l.ID, l.Peer.String(), a.Error()
	l.k.note(ctx, ev)
	l.k.raise(ctx, "qber-"+l.ID, fmt.Sprintf("link %s: %v", l.ID, a))
}
