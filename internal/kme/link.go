package kme

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// LinkConfig says what a link is made of at this end.
type LinkConfig struct {
	ID         string
	Peer       identity.KME
	End        handover.End
	Profile    distill.Params
	Provenance key.Provenance                              // of the keys that it makes
	TTL        time.Duration                               // lifetime of an assigned key that nobody asked to be another; 0 for the node's DefaultTTL
	PoolTTL    time.Duration                               // how long an unassigned atom stays useful; 0 for the node's
	Interval   time.Duration                               // least time from the start of a block to that of the next
	InFlight   int                                         // blocks that may be at work at a time, at Alice's end; 0 for one: see qlink.SourceConfig
	Filler     int                                         // if not 0: no light, but blocks of so many random atoms (qlink.Filler)
	Device     qlink.Device                                // if not nil: no light, but the keys of what stands beside this end (qlink.Upstream)
	DeviceKeys int                                         // with Device, at Alice's end: how many in a block
	Dial       func(context.Context) (*peer.Stream, error) // Alice's end only: the classical channel
	Box        func(context.Context) (*qlink.Box, error)   // this end of the quantum channel
	Secret     func(context.Context) ([]byte, error)       // that both sites share, to begin the reserve of pads with; whoever asks for it wipes it
	Random     io.Reader                                   // seeds and public choices: crypto/rand XOR the HSM
}

// link is one quantum link at this node: its leased pool and the distillation of new
// keys. Several may lead to one peer; they share the announcer.
type link struct {
	LinkConfig
	k         *KME
	client    *peer.Client
	announcer *announcer
	pool      pool

	skewed   atomic.Bool   // the peer's clock is too far off to make blocks
	rested   time.Time     // when no block was last to be expected; of whoever watches alone
	patience time.Duration // blockTime, but in tests

	mu     sync.Mutex
	stream *peer.Stream // of the session under way at Bob's end; a new one closes it
	state  LinkState
	dry    drain

	balance balance
	history history
	sampled sampled
}

func newLink(k *KME, c LinkConfig) *link {
	l := &link{LinkConfig: c, k: k, client: k.Peers[c.Peer], announcer: k.announcerTo(c.Peer), patience: blockTime}
	l.state = LinkState{ID: c.ID, Peer: c.Peer, End: c.End, State: "down", Why: "no session has been opened yet"}
	l.pool = pool{
		lease: l.lease,
		free:  func(ctx context.Context, most int) (int, error) { return k.Store.Free(ctx, c.ID, most) },
		fresh: func(e key.Epoch) bool { return e >= l.usable() },
		nodes: k.alive,

		wanting: make(chan struct{}, 1),
	}
	return l
}

// lease leases chunks whose keys may be handed out. A link may have been a simulated one
// before the node was set to production: what is left of that is burned instead.
func (l *link) lease(ctx context.Context, chunks int) ([]store.Lease, error) {
	for {
		leases, err := l.k.Store.Lease(ctx, l.ID, chunks)
		if err != nil {
			return nil, err
		}
		simulated := func(x store.Lease) bool { return l.k.Production && x.Provenance == key.Simulated }
		var burn []lent
		for _, x := range leases {
			if simulated(x) {
				for _, a := range x.Atoms {
					burn = append(burn, lent{a, &x})
				}
			}
		}
		if len(burn) == 0 {
			return leases, nil
		}
		l.burn(ctx, "", burn, "simulated light, and the node is set to production")
		if leases = slices.DeleteFunc(leases, simulated); len(leases) > 0 {
			return leases, nil
		}
	}
}

// distil runs the link's sessions. At Alice's end one node of the site does so;
// at Bob's, the one that she calls: see Classical.
func (l *link) distil(ctx context.Context) error {
	if l.End == handover.Bob {
		return l.k.every(ctx, repeatMax, nil, l.watch)
	}
	l.standBy(ctx)
	return l.k.Store.Lead(ctx, "link "+l.ID, l.lead)
}

// lead runs the link's sessions, one after another.
func (l *link) lead(ctx context.Context) error {
	defer l.standBy(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { _ = l.k.every(ctx, repeatMax, nil, l.watchOpen) })
	defer watching.Wait()
	defer cancel()
	l.update(func(s *LinkState) { s.State, s.Why = "down", "no session has been opened yet" })
	for wait := repeatMin; ; wait = min(2*wait, repeatMax) {
		began := l.k.Now()
		err := l.alice(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		l.down(err)
		if l.k.Now().Sub(began) > repeatMax {
			wait = repeatMin
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// The frames that open a session, before distillation has the channel for itself.
const (
	frameOffer = 1 // Alice: the link and the highest session she has opened
	frameKnown = 2 // Bob: the highest he has opened
	frameOpen  = 3 // Alice, then Bob: the session that is now open at this end, durably
)

type sessionFrame struct {
	Link    string        `json:"link"`
	Session int64         `json:"session"`
	Nonce   []byte        `json:"nonce,omitempty"` // in frameOffer and frameKnown: drawn for this session, nonceSize bytes
	Pads    store.PadName `json:"pads,omitzero"`   // in frameOpen: at or below which this end has no pad
}

// nonceSize is what each end adds to the names of the pads that are expanded from the shared
// secret, in bytes: numbers of sessions may be used again, if both sites have lost theirs.
const nonceSize = 16

func newNonce() []byte {
	b := make([]byte, nonceSize)
	_, _ = rand.Read(b) // never fails: it ends the process instead
	return b
}

func say(s *peer.Stream, kind byte, f sessionFrame) error {
	body, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return s.Send(kind, body)
}

// maxSessionFrame is the longest frame, in bytes, with which a session is opened.
const maxSessionFrame = 4 << 10

func hear(s *peer.Stream, kind byte) (sessionFrame, error) {
	got, body, err := s.RecvShort(maxSessionFrame)
	if err != nil {
		return sessionFrame{}, err
	}
	if got != kind {
		return sessionFrame{}, fmt.Errorf("frame of kind %d, want %d", got, kind)
	}
	f, err := parseSession(body)
	if err != nil {
		return f, fmt.Errorf("frame of kind %d: %w", kind, err)
	}
	if kind != frameOpen && len(f.Nonce) != nonceSize {
		return f, fmt.Errorf("frame of kind %d has a nonce of %d bytes, want %d: the other end runs an older version", kind, len(f.Nonce), nonceSize)
	}
	return f, nil
}

func parseSession(body []byte) (f sessionFrame, err error) {
	if err := json.Unmarshal(body, &f); err != nil {
		return f, fmt.Errorf("it does not parse: %w", err)
	}
	return f, handover.CheckSession(f.Session)
}

// alice leads one session: she dials, opens a session with a number higher than
// either end has ever opened, and distils block after block.
func (l *link) alice(ctx context.Context) error {
	if err := l.mayOpen(ctx); err != nil {
		return err
	}
	mine, err := l.k.Store.Session(ctx, l.ID)
	if err != nil {
		return fmt.Errorf("reading the session: %w", err)
	}
	s, err := l.Dial(ctx)
	if err != nil {
		return fmt.Errorf("opening the classical channel to %s: %w", l.Peer, err)
	}
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.SetDeadline(time.Now().Add(openTime)); err != nil {
		return err
	}
	offer := sessionFrame{Link: l.ID, Session: mine, Nonce: newNonce()}
	if err := say(s, frameOffer, offer); err != nil {
		return err
	}
	theirs, err := hear(s, frameKnown)
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	if err := handover.CheckReached("session", theirs.Session, l.k.Now()); err != nil {
		return fmt.Errorf("opening a session: the peer knows %w", err)
	}
	if theirs.Session > mine {
		return l.behind(ctx, theirs.Session, mine)
	}
	session := mine + 1
	if err := handover.CheckSession(session); err != nil {
		return fmt.Errorf("opening a session of link %s: %w", l.ID, err)
	}
	if err := l.openHere(ctx, session); err != nil {
		return err
	}
	floor, err := l.floor(ctx, session)
	if err != nil {
		return err
	}
	if err := say(s, frameOpen, sessionFrame{Link: l.ID, Session: session, Pads: floor}); err != nil {
		return err
	}
	f, err := hear(s, frameOpen)
	if err != nil {
		return fmt.Errorf("opening session %d: %w", session, err)
	}
	if f.Session != session {
		return fmt.Errorf("opening session %d: the peer opened %d", session, f.Session)
	}
	if err := l.meetReserve(ctx, session, f.Pads); err != nil {
		return err
	}
	return l.session(ctx, s, session, slices.Concat(offer.Nonce, theirs.Nonce))
}

// behind says why Bob knows of a higher session than the one that was the last here when it
// was read. He was told of his after it was committed here. Another node of this site may
// have opened it meanwhile; if that is not so, the database has lost it.
func (l *link) behind(ctx context.Context, theirs, mine int64) error {
	now, err := l.k.Store.SurelySession(ctx, l.ID)
	if err != nil {
		return err
	}
	if theirs > now {
		return l.k.found(ctx, l.Peer, fmt.Sprintf("session %d of link %s is open there, and %d is the last that is known here", theirs, l.ID, now))
	}
	return fmt.Errorf("another node of this site has opened session %d meanwhile: %d was the last", theirs, mine)
}

// openTime is how long the ends may take to open a session.
const openTime = time.Minute

// Classical is the handler of the classical door: one call a stream, at Bob's end.
func (k *KME) Classical(ctx context.Context, from identity.KME, s *peer.Stream) {
	err := s.SetDeadline(time.Now().Add(openTime))
	var offer sessionFrame
	if err == nil {
		offer, err = hear(s, frameOffer)
	}
	if err != nil {
		k.Log.Warn("classical channel", "from", from.String(), "err", err)
		return
	}
	l := k.links[offer.Link]
	if l == nil || l.Peer != from || l.End != handover.Bob {
		k.incident(ctx, "stranger-"+from.String(), fmt.Sprintf("%s opened a classical channel for link %.64q, of which it is not Alice's end", from, offer.Link))
		return
	}
	l.follow(ctx, s, offer)
}

// follow follows one session, and notes its end.
func (l *link) follow(ctx context.Context, s *peer.Stream, offer sessionFrame) {
	err := l.bob(ctx, s, offer)
	if l.release(s) && ctx.Err() == nil {
		l.down(err)
	}
}

// bob follows one session.
func (l *link) bob(ctx context.Context, s *peer.Stream, offer sessionFrame) error {
	if err := l.mayOpen(ctx); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	mine, err := l.k.Store.Session(ctx, l.ID)
	if err != nil {
		return fmt.Errorf("reading the session: %w", err)
	}
	known := sessionFrame{Link: l.ID, Session: mine, Nonce: newNonce()}
	if err := say(s, frameKnown, known); err != nil {
		return err
	}
	f, err := hear(s, frameOpen)
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	if f.Session <= max(mine, offer.Session) {
		return fmt.Errorf("opening a session: the peer opened %d, not above %d and %d", f.Session, mine, offer.Session)
	}
	if err := handover.CheckReached("session", f.Session, l.k.Now()); err != nil {
		return fmt.Errorf("opening a session: the peer opened %w", err)
	}
	if err := l.openHere(ctx, f.Session); err != nil {
		return err
	}
	l.replace(s)
	floor, err := l.floor(ctx, f.Session)
	if err != nil {
		return err
	}
	if err := say(s, frameOpen, sessionFrame{Link: l.ID, Session: f.Session, Pads: floor}); err != nil {
		return err
	}
	if err := l.meetReserve(ctx, f.Session, f.Pads); err != nil {
		return err
	}
	return l.session(ctx, s, f.Session, slices.Concat(offer.Nonce, known.Nonce))
}

// replace closes the stream of an earlier session that has not noticed its end.
func (l *link) replace(s *peer.Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stream != nil {
		l.stream.Close()
	}
	l.stream = s
}

// release says whether no other session has taken the place of that of s.
func (l *link) release(s *peer.Stream) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := l.stream == nil || l.stream == s
	if l.stream == s {
		l.stream = nil
	}
	return last
}

// openHere commits that a session is open here, and with it that all older ones are
// closed: from now on this end answers NEVER for blocks of those that it does not hold.
func (l *link) openHere(ctx context.Context, session int64) error {
	ev := l.k.own(audit.LinkOpen)
	ev.Link, ev.Peer, ev.Reason = l.ID, l.Peer.String(), fmt.Sprintf("session %d as %s", session, l.End)
	if err := l.k.Store.OpenSession(ctx, l.ID, session, ev); err != nil {
		return fmt.Errorf("opening session %d: %w", session, err)
	}
	l.k.hurry() // blocks held in older sessions are settled now
	return nil
}

// blockTime is how long Alice's end waits for a block under way to end, before she gives the
// session up: something that it needs hangs, at either end.
const blockTime = 2 * time.Minute

// session distils blocks until something fails that is more than a bad block. nonce is
// Alice's, then Bob's.
func (l *link) session(ctx context.Context, s *peer.Stream, session int64, nonce []byte) error {
	sealed := newSealedBlocks(l)
	source, done, err := l.source(ctx, s, &reserve{l: l, session: session, nonce: nonce}, sealed.seal)
	if err != nil {
		return fmt.Errorf("opening the quantum channel: %w", err)
	}
	defer done()
	defer s.Close() // what is under way ends with it
	if err := s.SetDeadline(time.Time{}); err != nil {
		return err
	}
	l.update(func(st *LinkState) { st.State, st.Why, st.Session, st.OpenedAt = "open", "", session, l.k.Now() })
	l.k.clear(ctx, "link-"+l.ID)
	l.account(ctx)
	for {
		room := true
		if l.End == handover.Alice {
			if room, err = l.room(ctx, source); err != nil {
				return err
			}
			_ = s.SetDeadline(time.Now().Add(max(l.patience, silences*l.Interval)))
		}
		began := l.k.Now()
		var block qlink.Block
		if room {
			block, err = source.Next(ctx)
		} else {
			block, err = source.Rest() // what is under way has been promised to nobody else
		}
		if l.End == handover.Alice && source.Pending() == 0 {
			_ = s.SetDeadline(time.Time{}) // it may rest for long
		}
		var abort *distill.Abort
		switch {
		case errors.Is(err, qlink.ErrCut), errors.Is(err, qlink.ErrDevice):
			l.cut(ctx, err)
		case errors.As(err, &abort):
			l.aborted(ctx, block, abort)
		case errors.Is(err, distill.ErrTag):
			l.tagFailed(ctx, err)
			return err
		case err != nil:
			return err
		default:
			if err := sealed.hold(ctx, block); err != nil {
				return err
			}
			l.distilled(ctx, block)
		}
		if l.End == handover.Alice {
			if err := l.pace(ctx, began, source.Gone()); err != nil {
				return err
			}
		}
	}
}

// source opens this end of the quantum channel for a session. Where several blocks may be
// under way, seal is given each as it is made.
func (l *link) source(ctx context.Context, s *peer.Stream, pads *reserve, seal func(context.Context, qlink.Block) error) (blockSource, func(), error) {
	session := pads.session
	if l.Filler > 0 {
		f, err := qlink.NewFiller(qlink.FillerConfig{
			End: l.End, Link: l.ID, Session: session, Channel: s, Atoms: l.Filler, Random: l.Random, Terms: l.terms, Accept: l.accept,
		})
		if err != nil {
			return nil, nil, err
		}
		return f, f.Close, nil
	}
	if l.Device != nil {
		u, err := qlink.NewUpstream(qlink.UpstreamConfig{
			End: l.End, Link: l.ID, Session: session, Channel: s, Device: l.Device, Keys: l.DeviceKeys, Terms: l.terms, Accept: l.accept,
		})
		if err != nil {
			return nil, nil, err
		}
		return u, u.Close, nil
	}
	box, err := l.Box(ctx)
	if err != nil {
		return nil, nil, err
	}
	cfg := l.distillation(s, box, pads)
	cfg.Seal = seal
	source, err := qlink.NewSource(ctx, cfg)
	if err != nil {
		_ = box.Close()
		return nil, nil, err
	}
	return source, func() { _ = box.Close(); source.Close() }, nil
}

// blockSource is where the secret blocks of a session come from.
type blockSource interface {
	Next(context.Context) (qlink.Block, error)
	Rest() (qlink.Block, error) // Next, and nothing new begun
	Pending() int               // blocks that are under way, at Alice's end
	Gone() <-chan struct{}      // closed when the classical channel has ended
}

// distillation is what a source of this end is made of.
func (l *link) distillation(s *peer.Stream, box *qlink.Box, pads *reserve) qlink.SourceConfig {
	return qlink.SourceConfig{
		NextPad: pads.next, Pad: pads.find, SpendPad: pads.spend, LosePad: pads.lose,
		End: l.End, Link: l.ID, Session: pads.session, Channel: s, Box: box, Params: l.Profile, InFlight: l.InFlight, Random: l.Random, Log: l.k.Log,
		Terms:  l.terms,
		Stored: func() int { return 0 }, // Alice counts both ends' shares in her own register
		Accept: l.accept,
		Progress: func(stage string, done float64) {
			l.update(func(st *LinkState) { st.Stage, st.Done = stage, done })
		},
	}
}

// terms are named by Alice's end: the epoch of the block and who owns which chunk.
func (l *link) terms(atoms, _ int) distill.Terms {
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	here, there, err := l.k.Store.Pool(ctx, l.ID)
	if err != nil {
		here, there = 0, 0 // the hold that follows will say that the database is away
	}
	return distill.Terms{
		Epoch:  int64(key.EpochAt(l.k.Now(), l.k.EpochLength)),
		Owners: string(handover.Share(atoms, here, there)),
	}
}

// epochSlack is how far the ends' clocks may differ at the border of two epochs.
const epochSlack = 30 * time.Second

// accept judges Alice's terms at Bob's end: his own clock's epoch, or the
// neighbour close to the border.
func (l *link) accept(t distill.Terms, atoms int) error {
	if !handover.Owners(t.Owners).Valid(atoms) {
		return fmt.Errorf("owners %q of %d atoms", t.Owners, atoms)
	}
	now, e := l.k.Now(), key.Epoch(t.Epoch)
	if now.Before(e.Start(l.k.EpochLength).Add(-epochSlack)) || now.After(e.End(l.k.EpochLength).Add(epochSlack)) {
		return fmt.Errorf("epoch %d is not the one of this clock", e)
	}
	return nil
}

// room says whether another block is wanted and could be kept, and waits until one is if
// none is under way.
func (l *link) room(ctx context.Context, source blockSource) (bool, error) {
	for {
		state, why := "open", ""
		here, there, err := l.k.Store.Pool(ctx, l.ID)
		switch {
		case l.k.suspended() != "":
			state, why = "paused", "the site is suspended"
		case err != nil:
			state, why = "paused", "the database is away"
		case l.k.hsmWell() != nil:
			state, why = "paused", "the HSM is away"
		case l.skewed.Load():
			state, why = "paused", "the clocks of the ends differ too much"
		case l.spentYear():
			state, why = "paused", "the blocks of this year have used up what may be risked"
		case here+there >= l.k.PoolLimit:
			state, why = "full", fmt.Sprintf("%d keys are stored", here+there)
		}
		l.update(func(s *LinkState) { s.State, s.Why = state, why })
		if state == "open" || source.Pending() > 0 {
			return state == "open", nil
		}
		if err := l.pace(ctx, l.k.Now(), source.Gone()); err != nil {
			return false, err
		}
		select {
		case <-source.Gone():
			return false, errors.New("the classical channel has ended while the link was at rest")
		default:
		}
		if l.spentYear() { // it may be over
			l.account(ctx)
		}
	}
}

// spentYear says that another block would be one too many for this year's epsilon.
func (l *link) spentYear() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.EpsSecrecy+l.state.EpsCorrect >= yearlyEpsilon
}

// pace waits until the link's interval has passed since began, or the channel is gone.
func (l *link) pace(ctx context.Context, began time.Time, gone <-chan struct{}) error {
	t := time.NewTimer(min(l.Interval, max(0, l.Interval-l.k.Now().Sub(began)))) // whatever the clock has done since
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
	case <-gone:
	}
	return nil
}
