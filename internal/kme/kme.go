// Package kme is the core: the one place where the rules of key delivery live.
// Doors (014, legacy, peers, operators) hand it a Caller that was made from a
// verified certificate and get an answer or a problem.Error; the organs (store,
// HSM, policy, link) do what it says.
//
// It promises: every request that a handler saw gets exactly one outcome event in
// the audit, written before the answer; a key leaves at most once for each SAE
// that is named for it; plain key bytes live for one request, in buffers that are
// wiped; and whatever is gone (HSM, database, peer, link), callers are told 503
// and nothing is consumed unless the peer may already have assigned it.
package kme

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// Config says what a KME node is made of. Everything must be set unless said otherwise.
type Config struct {
	Self     identity.KME
	Node     string // unique within the site
	Store    *store.DB
	Token    *hsm.Token
	Live     *policies.Current
	Policies func() *policies.Set // that of Live, set by New
	Peers    map[identity.KME]*peer.Client
	Links    []LinkConfig
	Log      *slog.Logger
	Now      func() time.Time // the one clock

	DataDir     string        // run file and tallies, fsynced
	EpochLength time.Duration // the same at both ends of a link
	DefaultTTL  time.Duration // lifetime of an assigned key that nobody asked to be shorter or longer
	MaxTTL      time.Duration
	PoolTTL     time.Duration // how long an unassigned atom stays useful
	MaxWraps    int64         // blobs that one KEK seals, about, before another one takes its place; 0 for the const MaxWraps, which is the most
	PoolLimit   int           // atoms per link, both owners together, above which no light is sent
	Production  bool          // refuses simulated keys
	Strict      bool          // see etsi014.Limits
	ReadOnce    bool          // keys asked for through the legacy API are read once, as those of 014
	Quota       Quota         // of each SAE
	Trail       Trail         // how the audit log is kept

	LoadPolicies func() (*policies.Set, error) // reads the files anew, and refuses what needs a restart

	// Officer says whose certificate it is that came with an approval: it must be an
	// operator's that could call now.
	Officer func(leaf *x509.Certificate, now time.Time) (identity.Caller, error)

	// Watched are parts outside the core whose trouble is an alarm here.
	Watched []Watched
	Examine func() []admin.Finding // of what the core does not see: the process's certificates; may be nil
}

// Watched is a part outside the core that is asked every second how it is.
type Watched struct {
	Alarm   string                     // its name
	Trouble func(now time.Time) string // what an operator should know of; "" if all is well
}

// KME is one node of a Key Management Entity.
type KME struct {
	Config
	run        atomic.Int64 // 0 until Run has begun it
	started    time.Time
	keks       *keyring
	links      map[string]*link
	announcers map[identity.KME]*announcer
	noPIN      chan error   // the HSM refused the PIN: the node ends
	hsmDown    atomic.Value // why the HSM's heartbeat failed, as text; "" when it is well
	offsets    sync.Map     // identity.KME -> time.Duration: the peer's clock ahead of ours
	waiting    waiting      // for a second officer
	greeted    atomic.Int64 // how often all peers were
	known      compromises
	searching  sync.Map      // identity.KME -> chan struct{} of one place: see PeerDoor.turn
	reclaimed  sync.Map      // reclaiming -> key.ID: how far takeovers have come that are not done
	collecting chan struct{} // of one place: whoever reads figures from the database
	reclaimFor time.Duration // how long one peer is asked at a time: see reclaimTime
	burning    sync.Mutex    // held while compromised keys are burned: whoever began it is told of all of it
	alarms     alarms
	debts      debts
	watch      watch
	metrics    *metrics
	beaten     atomic.Int64 // when the node last looked after itself, in nanoseconds of the machine's own clock: see Alive
	atoms      buckets      // that may be asked for or taken: see Quota
	excess     buckets      // times to be turned away at once: see tire
	shares     shares

	switches  sync.Mutex        // held while the database is asked who is switched off, and until that is in force
	off       map[string]string // who is switched off and why, by principal; nil until the database was asked; guarded by switches
	reloading sync.Mutex        // held while policies are loaded

	turnstiles sync.Map // peer/node -> *turnstile

	outage, overflow *tally // what could not be recorded while the database was away, or too much waited

	past past

	trail     trail
	sinks     []*siem.Forwarder
	facts     audit.Facts // those that do not change while the process lives
	told      audit.Facts // those last recorded
	clockSeen clockLook
	lag       atomic.Pointer[trailLag]

	takenOver map[identity.KME]chan struct{} // by peer, closed when this node's earlier runs are dealt with there: it may lease and announce on the peer's links
	news      chan struct{}                  // there is something to tell a peer
	uneven    chan struct{}                  // a peer may be in want of chunks
}

// New checks the configuration and prepares a node. It touches neither the
// database nor the HSM; Run does.
func New(c Config) (*KME, error) {
	if c.Store == nil || c.Token == nil || c.Live == nil || c.LoadPolicies == nil || c.Officer == nil || c.Log == nil || c.Now == nil || c.DataDir == "" || c.Node == "" {
		return nil, errors.New("configuring the KME: a part is missing")
	}
	if c.EpochLength <= 0 || c.DefaultTTL <= 0 || c.MaxTTL < c.DefaultTTL || c.PoolTTL <= 0 || c.PoolLimit <= 0 {
		return nil, errors.New("configuring the KME: epoch length, lifetimes and pool limit must be positive, and the longest lifetime at least the default")
	}
	if c.Quota.Rate <= 0 || c.Quota.Burst < MinBurst || c.Quota.Untaken <= 0 {
		return nil, fmt.Errorf("configuring the KME: the quota must be positive, and its burst at least %d", MinBurst)
	}
	if c.Trail.TrustDomain == "" || c.Store.Key() == nil {
		return nil, errors.New("configuring the KME: the audit log has no name, or the node no key for it")
	}
	if c.Trail.Reader == nil && (len(c.Trail.Sinks) > 0 || c.Trail.Keep > 0) {
		return nil, errors.New("configuring the KME: the audit log's sinks and archive need a reader of it")
	}
	if c.Store.Witness() == nil {
		return nil, errors.New("configuring the KME: the store keeps no witness file")
	}
	if c.MaxWraps == 0 {
		c.MaxWraps = MaxWraps
	}
	if c.MaxWraps < 1 || c.MaxWraps > MaxWraps {
		return nil, fmt.Errorf("configuring the KME: a KEK seals at least 1 blob and at most %d, not %d", MaxWraps, c.MaxWraps)
	}
	c.Policies = c.Live.Set
	k := &KME{
		Config:     c,
		started:    c.Now(),
		links:      make(map[string]*link),
		debts:      debts{more: make(chan struct{}, 1)},
		metrics:    newMetrics(),
		takenOver:  make(map[identity.KME]chan struct{}),
		collecting: make(chan struct{}, 1),
		reclaimFor: reclaimTime,
		news:       make(chan struct{}, 1),
		uneven:     make(chan struct{}, 1),
	}
	k.noPIN = make(chan error, 1)
	k.hsmDown.Store("")
	k.keks = newKeyring(k)
	for _, s := range c.Trail.Sinks {
		k.sinks = append(k.sinks, siem.New(s))
	}
	for id := range c.Peers {
		k.takenOver[id] = make(chan struct{})
	}
	for _, lc := range c.Links {
		if lc.TTL < 0 || lc.TTL > c.MaxTTL || lc.PoolTTL != 0 && lc.PoolTTL < max(c.EpochLength, MinPoolTTL) {
			return nil, fmt.Errorf("configuring the KME: link %s: a ttl of %v and a pool_ttl of %v: at most max_ttl (%v), and at least an epoch (%v) and %v", lc.ID, lc.TTL, lc.PoolTTL, c.MaxTTL, c.EpochLength, MinPoolTTL)
		}
		if c.Peers[lc.Peer] == nil {
			return nil, fmt.Errorf("configuring the KME: link %s: no client for peer %s", lc.ID, lc.Peer)
		}
		if k.links[lc.ID] != nil {
			return nil, fmt.Errorf("configuring the KME: link %s is there twice", lc.ID)
		}
		k.links[lc.ID] = newLink(k, lc)
	}
	if k.Examine == nil {
		k.Examine = func() []admin.Finding { return nil }
	}
	var err error
	if k.outage, k.overflow, err = openTallies(c.DataDir); err != nil {
		return nil, err
	}
	return k, nil
}

// Run starts the node's next run and serves until ctx ends or the node may serve
// no more (another process has taken over its name). The doors may be opened as
// soon as started is called; what cannot be done yet is answered 503.
func (k *KME) Run(ctx context.Context, started func()) error {
	if err := k.beginRun(ctx); err != nil {
		return err
	}
	if k.suspended() == "" {
		if err := k.keks.verify(ctx); err != nil {
			return err
		}
		if err := k.keks.prepare(ctx); err != nil {
			return err
		}
	}
	if err := k.lookAtSwitches(ctx); err != nil { // nobody is let in who may be shut out
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return k.watchFence(ctx) })
	g.Go(func() error { return k.watchPIN(ctx) })
	g.Go(func() error {
		return k.every(ctx, switchEvery, nil, func(ctx context.Context) {
			if err := k.lookAtSwitches(ctx); err != nil {
				k.Log.Debug("looking at who is switched off", "err", err) // the database has an alarm of its own
			}
		})
	})
	g.Go(func() error { return k.watchNodes(ctx) })
	g.Go(func() error { return k.every(ctx, time.Second, nil, k.share) })
	for id := range k.Peers {
		g.Go(func() error { return k.takeOver(ctx, id) })
	}
	g.Go(func() error { return k.Store.Lead(ctx, "takeovers", k.succeed) })
	g.Go(func() error { return k.every(ctx, time.Second, nil, k.beat) })
	g.Go(func() error { return k.every(ctx, time.Second, nil, k.keepWitness) })
	g.Go(func() error { return k.every(ctx, time.Second, nil, k.watchTrail) })
	g.Go(func() error { return k.every(ctx, time.Hour, nil, k.openDays) })
	g.Go(func() error { return k.every(ctx, time.Hour, nil, k.endCheckpoints) })
	g.Go(func() error { return k.Store.Lead(ctx, "audit witnesses", k.publish) })
	if len(k.sinks) > 0 {
		g.Go(func() error { return k.Store.Lead(ctx, "audit sinks", k.forward) })
	}
	if k.Trail.Keep > 0 {
		g.Go(func() error { return k.Store.Lead(ctx, "audit archive", k.retain) })
	}
	if k.Trail.Sequencer != "" {
		g.Go(func() error { return k.sequence(ctx) })
	}
	g.Go(func() error { return k.every(ctx, time.Second, k.news, k.tellPeers) })
	g.Go(func() error { return k.every(ctx, balanceEvery, k.uneven, k.balance) })
	g.Go(func() error { return k.every(ctx, 10*time.Second, nil, k.expire) })
	g.Go(func() error { return k.every(ctx, historyEvery, nil, k.chronicle) })
	g.Go(func() error { return k.every(ctx, time.Hour, nil, k.endHistory) })
	g.Go(func() error { return k.every(ctx, tendEvery, nil, k.tendEpochs) })
	g.Go(func() error { return k.Store.Lead(ctx, "epochs", k.endEpochs) })
	k.greet(ctx) // before anything is served: a peer may know that we are in the past
	g.Go(func() error { return k.every(ctx, 2*time.Second, nil, k.greet) })
	g.Go(func() error { return k.payDebts(ctx) })
	for _, a := range k.announcers {
		g.Go(func() error { return a.announce(ctx) })
	}
	for _, l := range k.links {
		g.Go(func() error { return l.pool.stock(ctx) })
		g.Go(func() error { return l.distil(ctx) })
	}
	started()
	err := g.Wait()
	if errors.Is(err, store.ErrFenced) { // whoever met it first says the least of why
		err = k.fenced(context.WithoutCancel(ctx), err)
	}
	inOrder := errors.Is(err, context.Canceled)
	k.stopped(inOrder)
	if inOrder {
		return nil
	}
	return err
}

// watchFence ends the node when another process has bumped its run, or when the
// database was set back.
func (k *KME) watchFence(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-k.Store.Fenced():
		return fmt.Errorf("node %s: run %d was taken over by another process: this one serves no more: %w", k.Node, k.run.Load(), store.ErrFenced)
	}
}

// watchPIN ends the node when the HSM has refused the PIN: no heartbeat can help, and
// whoever starts it again must have seen to the PIN.
func (k *KME) watchPIN(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-k.noPIN:
		return fmt.Errorf("node %s: %w", k.Node, err)
	}
}

// every calls do at once and then once per interval, and earlier when there is
// news (which may be nil), until ctx ends.
func (k *KME) every(ctx context.Context, interval time.Duration, news <-chan struct{}, do func(context.Context)) error {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		do(ctx)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		case <-news:
		}
	}
}

// hurry has the peers told what there is to tell, now.
func (k *KME) hurry() {
	select {
	case k.news <- struct{}{}:
	default:
	}
}

// stopped gives back what the node has leased and records that it stops, as well as
// it can: the database may be what stopped it. What it cannot give back, since it is
// announced or owed, is the matter of a takeover. The last event of a node that ends in
// order is that its record ends: a run without it was killed, or its end was cut off. (What
// became of a commit that was in doubt may still follow it.)
func (k *KME) stopped(inOrder bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	var leased []store.Leased
	for _, l := range k.links {
		leased = append(leased, leasedOf(l.pool.empty())...)
	}
	noCopies := k.keks.close() // nobody is served any more
	events := []audit.Event{k.own(audit.Stop)}
	if inOrder {
		events = append(events, k.own(audit.AuditStop))
	}
	if err := k.Store.Stop(ctx, leased, noCopies, events...); err != nil {
		k.Log.Warn("recording the stop", "err", err)
	}
}

// beat asks the database and the HSM whether they are well. While the HSM is not,
// nothing is wrapped or unwrapped.
func (k *KME) beat(ctx context.Context) {
	k.beaten.Store(int64(time.Since(processStart)))
	k.endIncidents(ctx)
	for _, w := range k.Watched {
		if text := w.Trouble(k.Now()); text != "" {
			k.raise(ctx, w.Alarm, text)
		} else {
			k.clear(ctx, w.Alarm)
		}
	}
	k.watchClock(ctx)
	k.watchFacts(ctx)
	if err := k.keepTallies(); err != nil {
		k.raise(ctx, "data", "the data folder takes no writes: "+err.Error())
	} else {
		k.clear(ctx, "data")
	}
	if err := k.Store.Healthy(); err != nil {
		k.raise(ctx, "database", "the database does not answer: "+err.Error())
		k.tryDatabase(ctx, err)
	} else {
		k.clear(ctx, "database")
		k.lookAtDatabase(ctx)
	}
	k.watchZeroized(ctx)
	took, err := k.heartbeat(ctx)
	if ctx.Err() != nil {
		return // the node stops: that is no fault of the HSM
	}
	if err != nil {
		k.hsmDown.Store(err.Error())
		k.raise(ctx, "hsm", "HSM token does not answer: "+err.Error())
		if errors.Is(err, hsm.ErrPINRefused) {
			select {
			case k.noPIN <- err:
			default: // the node is ending
			}
		}
		return
	}
	k.hsmDown.Store("")
	k.clear(ctx, "hsm")
	if h := k.Token.Health(); h.Stage == hsm.Grace {
		k.raise(ctx, "hsm-grace", fmt.Sprintf("the HSM token is away since %s, and its session keys are used on: %v", h.Since.UTC().Format(time.RFC3339), h.Cause))
	} else {
		k.clear(ctx, "hsm-grace")
	}
	if took > hsmSlow {
		k.suspect(ctx, "hsm-slow", fmt.Sprintf("the HSM token is slow: a heartbeat took %v", took.Round(time.Millisecond)))
	} else {
		k.clear(ctx, "hsm-slow")
	}
}

// looksTime bounds all of a beat's looks at a database that may not answer.
const looksTime = 2 * time.Second

func (k *KME) lookAtDatabase(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, looksTime)
	defer cancel()
	k.watchPast(ctx)
	k.watchCompromises(ctx)
	k.summarise(ctx)
	if err := k.Store.LookAtUntaken(ctx); err != nil {
		k.Log.Warn("looking at what waits to be taken", "err", err) // what was read before still counts
	}
}

// processStart is what times of the machine's own clock are counted from, which no step
// of the wall clock moves.
var processStart = time.Now()

// stuckAfter is how long a node may not have looked after itself, which it does each
// second: each of its looks ends within a few seconds, whatever is away.
const stuckAfter = 15 * time.Second

// Alive is nil while the node looks after itself: its process is not stuck. It says
// nothing about what the node needs to hand out keys.
func (k *KME) Alive() error {
	if quiet := time.Since(processStart) - time.Duration(k.beaten.Load()); k.beaten.Load() != 0 && quiet > stuckAfter {
		return fmt.Errorf("the node has not looked after itself for %v", quiet.Round(time.Second))
	}
	return nil
}

// tryDatabase records an event that says that the database is not well: one that answers
// and cannot commit (its disk is full) is well again when it can commit that.
func (k *KME) tryDatabase(ctx context.Context, why error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	ev := k.own(audit.Alarm)
	ev.Outcome, ev.Reason = audit.Failed, "database: "+why.Error()
	_ = k.Store.Record(ctx, ev) // the alarm stands
}

// hsmSlow is a time for a heartbeat, which is a few operations, beyond which requests
// for many keys do not come to their end in time.
const hsmSlow = 250 * time.Millisecond

// heartbeat asks the token whether it is well, and says how long it took to answer.
func (k *KME) heartbeat(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	began := time.Now()
	err := hsmFault(ctx)
	if err == nil {
		err = k.Token.Heartbeat(ctx)
	}
	return time.Since(began), err
}

// hsmWell is nil while the HSM answers its heartbeat.
func (k *KME) hsmWell() error {
	if why := k.hsmDown.Load().(string); why != "" {
		return errors.New(why)
	}
	return nil
}

// greet says hello to every peer: it notices a clock that is off, a peer that is gone
// and a site that was restored to the past, theirs or ours.
func (k *KME) greet(ctx context.Context) {
	for id, client := range k.Peers {
		known, ok := k.figures(ctx, id)
		mine := k.hello(ctx, id, k.standing(ctx))
		before, asked := k.Now(), time.Now()
		asking, cancel := context.WithTimeout(ctx, 2*time.Second)
		h, err := client.Hello(asking, mine)
		cancel()
		if err == nil {
			err = h.CheckReached(k.Now())
		}
		name := peerAlarm(id)
		if err != nil {
			k.suspect(ctx, name, fmt.Sprintf("%s does not answer: %v", id, err))
			continue
		}
		k.clear(ctx, name)
		if took := time.Since(asked); took > peerSlow {
			k.suspect(ctx, "slow-"+id.String(), fmt.Sprintf("%s took %v to answer", id, took.Round(time.Millisecond)))
		} else {
			k.clear(ctx, "slow-"+id.String())
		}
		k.judgeClock(ctx, id, h, before)
		k.judgePeer(ctx, id, h, known, ok)
		k.judgeSelf(ctx, id, h, k.standing(ctx))
		k.tellRunAgain(ctx, id)
	}
	k.greeted.Add(1)
}

// peerSlow is a time for an answer that leaves an announce little room to be in time.
const peerSlow = announceTime / 4

// peerAlarm is the name of the alarm that a peer does not answer.
func peerAlarm(id identity.KME) string { return "peer-" + id.String() }

const (
	clockAlarm = time.Second      // an offset that operators should know of
	clockLimit = 30 * time.Second // an offset beyond which no block is made
)

// judgeClock compares the peer's clock with the middle of the exchange.
func (k *KME) judgeClock(ctx context.Context, id identity.KME, h handover.Hello, before time.Time) {
	middle := before.Add(k.Now().Sub(before) / 2)
	ahead := time.UnixMilli(h.Clock).Sub(middle)
	k.offsets.Store(id, ahead)
	offset := ahead.Abs()
	for _, l := range k.links {
		if l.Peer == id {
			l.skewed.Store(offset > clockLimit)
		}
	}
	if name := "clock-" + id.String(); offset > clockAlarm {
		k.raise(ctx, name, fmt.Sprintf("the clocks here and at %s differ by %v", id, offset.Round(time.Millisecond)))
	} else {
		k.clear(ctx, name)
	}
}

// hello is what this node says to a peer; s is how this site stands.
func (k *KME) hello(ctx context.Context, to identity.KME, s store.Standing) handover.Hello {
	h := handover.Hello{KME: k.Self, Node: k.Node, Run: k.run.Load(), Site: s.Figures, Suspended: k.suspended() != ""}
	if h.Yours, _ = k.figures(ctx, to); h.Yours.Origin > 0 {
		h.Acked = k.past.answeredBy(to, k.Node, h.Yours.Origin)
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	for id, l := range k.links {
		session, err := k.Store.Session(ctx, id)
		if err != nil {
			continue // the database is away: the rest of the hello still says that we live
		}
		h.Links = append(h.Links, handover.HelloLink{Link: l.ID, Session: session, TTL: cmp.Or(l.TTL, k.DefaultTTL).Milliseconds(), Pool: k.PoolLimit})
	}
	h.Clock = k.Now().UnixMilli()
	return h
}
