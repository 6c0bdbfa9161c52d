package kme

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
)

// Trail says how the audit log is kept, beyond the events themselves.
type Trail struct {
	TrustDomain string      // names the log
	Facts       audit.Facts // of the build and the configuration; the rest is filled in

	// Sequencer is the DSN of the role kme_seq, with which this node folds events into
	// the tree if no other does; "" leaves it to kmed sequencer.
	Sequencer string
	// Reader reads the log for the sinks and the archive; nil if there are none. Whoever
	// made it closes it.
	Reader *auditlog.Reader
	// Sinks are where the log is sent to.
	Sinks []siem.Config
	// Keep is how long events stay in the database; 0: for ever. Older ones are in bundles
	// in the folder Archive.
	Keep    time.Duration
	Archive string
	// ForkAlarmOnly has a log that was forged, forked or rewound be an alarm and no more.
	// Otherwise nothing is delivered any more, or not with that peer.
	ForkAlarmOnly bool
	// PeerKeys are the verifier keys of the logs of peers, where they were given. Of
	// others the first key that is seen is kept.
	PeerKeys map[identity.KME]string
	// Witnesses are those beside the peers.
	Witnesses []OtherWitness
}

// trail is what a node knows of the audit logs of its own site and of its peers.
type trail struct {
	logKey     audit.Key
	witnessKey audit.Key
	broken     atomic.Value // why the site's own log is not to be trusted, as text; none: it is

	mu      sync.Mutex
	peers   map[identity.KME]string // whose log is not to be trusted, and why
	watches map[string]time.Time    // when an operator's watch was last recorded
	chosen  map[string]int64        // by witness: the size that it has last seen, as far as we know
}

// witnessKeyLabel is the label of the key with which a KME cosigns.
func witnessKeyLabel(self identity.KME) string { return "kme-audit-witness-" + self.String() }

// LogKeyLabel is the label of the log's key in the token of a KME.
func LogKeyLabel(kme string) string { return "kme-audit-log-" + kme }

// openTrailKey opens a signing key of the site in the token, and makes it if it is not
// there: the nodes of a site take turns.
func (k *KME) openTrailKey(ctx context.Context, label string) (audit.Key, error) {
	var key *hsm.SigningKey
	err := k.Store.Alone(ctx, tokenWriters, func(ctx context.Context) (err error) {
		if key, err = k.Token.OpenSigningKey(ctx, label); errors.Is(err, hsm.ErrNoSigningKey) {
			key, err = k.Token.NewSigningKey(ctx, label)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("the audit log's key: %w", err)
	}
	return key, nil
}

// openTrail opens the keys and fills in what this node's events rest on.
func (k *KME) openTrail(ctx context.Context) error {
	var err error
	if k.trail.logKey, err = k.openTrailKey(ctx, LogKeyLabel(k.Self.String())); err != nil {
		return err
	}
	if k.trail.witnessKey, err = k.openTrailKey(ctx, witnessKeyLabel(k.Self)); err != nil {
		return err
	}
	voucher, err := audit.NewLogSigner(audit.VouchName(k.logName(1)), k.trail.logKey)
	if err != nil {
		return err
	}
	k.facts.Build, k.facts.Config = k.Trail.Facts.Build, k.Trail.Facts.Config
	k.facts.Key, err = audit.SignNodeKey(voucher, k.Node, k.Store.Key().Public())
	return err
}

// logName is the name of the site's log in an origin.
func (k *KME) logName(origin int64) string {
	return audit.LogName(k.Trail.TrustDomain, k.Self.String(), origin)
}

// logKeyText is the verifier key of the site's log in an origin, which an auditor is given.
func (k *KME) logKeyText(origin int64) string {
	s, err := audit.NewLogSigner(k.logName(origin), k.trail.logKey)
	if err != nil {
		return ""
	}
	return s.VerifierKey()
}

// logKeyOf is the verifier key of a log. One that was ended by a recovery has, if the token
// was zeroized before that, another key than the log has now: that of its row, which an
// auditor holds against the one that he was given.
func (k *KME) logKeyOf(l auditlog.LogState) string {
	if key, err := audit.ParseLogKey(l.Key); err == nil && l.Ended && key.Name() == k.logName(l.Origin) {
		return l.Key
	}
	return k.logKeyText(l.Origin)
}

// factsNow are this node's facts as they are now.
func (k *KME) factsNow() audit.Facts {
	f := k.facts
	f.Policies, f.Clock = k.Policies().Digest, clockQuality()
	return f
}

// watchFacts records what has changed of the facts since the start or the last change.
func (k *KME) watchFacts(ctx context.Context) {
	now := k.factsNow()
	if now == k.told {
		return
	}
	ev := k.own(audit.FactsChanged)
	ev.Facts = now
	if k.note(ctx, ev) {
		k.told = now
	}
}

// clockStepAt is a step of the clock that is recorded.
const clockStepAt = 100 * time.Millisecond

// watchClock compares the daemon's clock with how much time has passed, and records
// a step. A clock that is slewed is not stepped.
func (k *KME) watchClock(ctx context.Context) {
	now, wall := time.Now(), k.Now()
	if was := k.clockSeen; !was.mono.IsZero() {
		if step := wall.Sub(was.wall) - now.Sub(was.mono); step.Abs() >= clockStepAt {
			ev := k.own(audit.ClockStep)
			ev.Reason = fmt.Sprintf("the clock was set by %+v", step.Round(time.Millisecond))
			k.note(ctx, ev)
		}
	}
	k.clockSeen = clockLook{mono: now, wall: wall.Round(0)} // Round: without Go's own reading of how much time has passed
}

// clockLook is one look at the clock.
type clockLook struct{ mono, wall time.Time }

const (
	foldEvery = time.Second
	lagAlarm  = 10 * time.Second // how old a checkpoint may be while events wait
	// daysAhead is for how many days the audit log has partitions, today included.
	daysAhead = 8
)

// tamperAlarm is the name of the alarm that the site's own log is not as it was written.
const tamperAlarm = "audit-log"

// sequence folds the site's events into the tree and signs checkpoints, while no other
// node or process does.
func (k *KME) sequence(ctx context.Context) error {
	q, err := auditlog.NewSequencer(auditlog.Config{
		DSN: k.Trail.Sequencer, TrustDomain: k.Trail.TrustDomain, Site: k.Self.String(), Key: k.trail.logKey, Now: k.Now, Log: k.Log,
	})
	if err != nil {
		return err
	}
	defer q.Close()
	led := false
	return k.every(ctx, foldEvery, nil, func(ctx context.Context) {
		for {
			stepping, cancel := context.WithTimeout(ctx, 30*time.Second)
			f, err := q.Step(stepping)
			cancel()
			if err != nil {
				k.foldFailed(ctx, err)
				return
			}
			k.clear(ctx, "audit-sequencer")
			if f.Leads != led {
				led = f.Leads
				ev := k.own(audit.AuditStart)
				ev.Reason = fmt.Sprintf("log %s goes on at leaf %d", k.logName(f.Origin), f.Size)
				if !led { // the connection that held the lead was lost, and another was first to make one
					ev = k.own(audit.AuditStop)
					ev.Reason = "another sequencer folds the log"
				}
				k.note(ctx, ev)
			}
			if !f.More {
				return
			}
		}
	})
}

// foldFailed says what is wrong: with the log, which is for good, or on the way to it.
func (k *KME) foldFailed(ctx context.Context, err error) {
	var bad *audit.BadLeaf
	if errors.As(err, &bad) {
		k.distrust(ctx, bad.Error())
		return
	}
	if ctx.Err() == nil {
		k.suspect(ctx, "audit-sequencer", err.Error())
	}
}

// distrust notes that the site's own log was forged, forked or rewound.
func (k *KME) distrust(ctx context.Context, why string) {
	k.trail.broken.CompareAndSwap(nil, why)
	k.raise(ctx, tamperAlarm, why+". See deploy/AUDIT.md")
}

// distrusted is why the site's own log is not to be trusted, "" while it is.
func (k *KME) distrusted() string {
	why, _ := k.trail.broken.Load().(string)
	return why
}

// trailWell is nil unless deliveries stop because the log is not to be trusted.
func (k *KME) trailWell() *problem.Error {
	if why := k.distrusted(); why != "" && !k.Trail.ForkAlarmOnly {
		return unavailable(time.Minute, "the key store is suspended", errors.New("audit log: "+why))
	}
	return nil
}

// trailLag is how far the tree was behind the events at the last look.
type trailLag struct {
	store.TrailLag
	folded time.Time // when no event was seen to wait last, or a checkpoint was made: a quiet log is not late
}

// watchTrail looks whether the tree keeps up with the events, and opens the days to come.
func (k *KME) watchTrail(ctx context.Context) {
	if k.Store.Healthy() != nil {
		return
	}
	asking, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	seen, err := k.lookAtTrail(asking)
	if err != nil {
		return
	}
	if late := k.Now().Sub(seen.folded); late > lagAlarm && k.Now().Sub(k.started) > lagAlarm {
		k.raise(ctx, "audit-lag", fmt.Sprintf("%d events are not in the audit log's tree, and for %v there was no checkpoint", seen.Events, late.Round(time.Second)))
	} else {
		k.clear(ctx, "audit-lag")
	}
}

// lookAtTrail reads how far the tree is behind the events, and whether one was found forged.
func (k *KME) lookAtTrail(ctx context.Context) (*trailLag, error) {
	lag, err := k.Store.TrailLag(ctx)
	if err != nil {
		return nil, err
	}
	if lag.Forged != "" { // by another node's sequencer, perhaps, or one that is no node's
		k.distrust(ctx, lag.Forged)
	}
	seen := &trailLag{lag, k.Now()}
	if lag.Events > 0 {
		seen.folded = lag.Newest
		if before := k.lag.Load(); before != nil && before.folded.After(lag.Newest) {
			seen.folded = before.folded
		}
	}
	k.lag.Store(seen)
	return seen, nil
}

// openDays opens the audit log's days, a week ahead.
func (k *KME) openDays(ctx context.Context) {
	if err := k.Store.EnsureAuditDays(ctx, daysAhead); err != nil {
		k.suspect(ctx, "audit-days", err.Error())
		return
	}
	k.clear(ctx, "audit-days")
}

// endCheckpoints deletes old checkpoints from the database. What is left undone is done
// an hour later.
func (k *KME) endCheckpoints(ctx context.Context) {
	ended, err := k.Store.EndCheckpoints(ctx)
	if err != nil {
		k.Log.Debug("ending old checkpoints", "err", err)
	} else if ended > 0 {
		k.Log.Info("old audit checkpoints deleted", "count", ended)
	}
}

// checkpointFile is where the day's checkpoints are kept outside the database.
func (k *KME) checkpointFile() string {
	return filepath.Join(k.DataDir, "checkpoints", k.Now().UTC().Format(time.DateOnly))
}

// keepCheckpoint appends a checkpoint to the day's file and makes it durable.
func (k *KME) keepCheckpoint(signed string) error {
	name := k.checkpointFile()
	// Not the data folder itself, which would be an empty one in the place of that which is gone.
	if err := os.Mkdir(filepath.Dir(name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keeping a checkpoint: %w", err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("keeping a checkpoint: %w", err)
	}
	_, err = f.WriteString(signed + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("keeping a checkpoint: %w", err)
	}
	return nil
}
