package qlink

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Block is a block of secret bits that the other end holds too.
type Block struct {
	distill.Outcome
	Provenance key.Provenance
	Upstream   []key.ID // of an Upstream: the device's names of the atoms, by index

	// Took is how long the ends were at work on the block, or it was given up after: without
	// what it waited for others.
	Took time.Duration
}

// SourceConfig is what a Source needs. Everything but Progress must be set.
type SourceConfig struct {
	End     handover.End
	Link    string // name of the link, equal at both ends
	Session int64  // not negative, equal at both ends, new for each Source

	Channel distill.Channel // to the other end; it belongs to the caller, who closes it to stop a Source that waits
	Box     *Box            // of this end; it belongs to the caller
	Params  distill.Params

	// InFlight is how many blocks may be at work at a time, from 1 to MaxInFlight, at Alice's
	// end only. 0 is 1. A block whose message is on its way to the other end, or the answer
	// on its way back, is not at work: as many more are begun as make up for those. So an end
	// beside this one has InFlight blocks under way, and one that is far away as many as it
	// takes not to wait for messages, up to MaxInFlight. Each takes memory at both ends.
	InFlight int

	// Random yields the seed of this end's secret choices and all that distillation
	// draws. It must be as good as the keys are to be, and takes calls from several
	// goroutines, like all that follow.
	Random io.Reader

	// The reserve of pads that both ends share: see distill.AliceConfig and BobConfig.
	// NextPad yields the lowest that is not spent and above those of the blocks that are
	// under way.
	NextPad  func(ctx context.Context, above distill.PadName) (distill.Pad, error) // at Alice's end only
	Pad      func(ctx context.Context, name distill.PadName) (distill.Pad, error)  // at Bob's end only
	SpendPad func(ctx context.Context, name distill.PadName) error
	LosePad  func(ctx context.Context, name distill.PadName) error // at Alice's end only: Bob does not have it; called in the order of the pads, as SpendPad

	Terms  func(atoms, bobStored int) distill.Terms   // at Alice's end only
	Stored func() int                                 // at Bob's end only
	Accept func(terms distill.Terms, atoms int) error // at Bob's end only
	Log    *slog.Logger                               // figures only, never a bit

	// Seal, if it is not nil, is given every block the moment it is made, by the goroutine
	// that made it, several perhaps at a time. It makes what is secret in it safe to keep and
	// wipes that, so that no block waits in the clear for those before it. An error is Next's.
	Seal func(ctx context.Context, b Block) error

	Progress func(stage string, done float64) // of the block that is next to end; may be nil
}

// Source yields the secret blocks of one session of a link. It is for one
// goroutine at a time.
//
// Several blocks may be under way, each on a lane of the channel. They are fired one after
// the other, and the transmitter is asked about them in that order, while light goes on: at
// most maxHeld that it has not been asked about, which is as many as the devices hold. They
// end in the order of their numbers too, because either end spends pads in the order of
// theirs: Alice states the terms of no block before those of the one before it, and each end
// spends the pad of none before the other's. She does not wait for his tag in between. Until
// the end they go as they come. To the theorem each is a block of its own: its light is over
// before anything is said of it, and what is said of others meanwhile has been drawn without it.
//
// All that an end, the other end or the channel loses when it dies are the blocks under way:
// light, of which no key was made yet. How many there are follows the distance: see window.
type Source struct {
	cfg     SourceConfig
	lanes   *lanes
	free    []int // lanes without a block
	pending map[int64]distill.PadName
	under   int              // blocks under way: at Bob's end, or that may begin
	results chan result      // with room for all of them
	early   map[int64]result // at Alice's end: of blocks that are not the next to be returned
	due     int64            // and that one
	window  window
	running sync.WaitGroup

	next  int64                    // block to fire, at Alice's end
	last  *flight                  // hers that was begun last
	asked [maxHeld]<-chan struct{} // of hers begun last, by number modulo maxHeld: flight.asked

	mu    sync.Mutex
	top   int64                   // the highest block that has begun, at Bob's end
	begun map[int64]chan struct{} // and which of the MaxInFlight numbers up to it have; nil: see spent
}

// result is how a block went.
type result struct {
	distill.Outcome
	err        error
	lane       int
	of         int64         // the block, at Alice's end
	took, away time.Duration // at work or with messages on their way, and of that the latter
	queued     time.Duration // for blocks that had more to ask
}

// NewSource seeds this end's Box and waits until the other end has done likewise,
// so that no light is sent to a receiver that is not there yet. After an error the
// session is over.
func NewSource(ctx context.Context, cfg SourceConfig) (*Source, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	var seed [bb84.SeedSize]byte
	defer clear(seed[:])
	if _, err := io.ReadFull(cfg.Random, seed[:]); err != nil {
		return nil, fmt.Errorf("drawing a seed for %s's end: %w", cfg.End, err)
	}
	if err := cfg.Box.Seed(ctx, seed, cfg.Session); err != nil {
		return nil, err
	}
	if err := cfg.meet(); err != nil {
		return nil, fmt.Errorf("meeting the other end of link %s in session %d: %w", cfg.Link, cfg.Session, err)
	}
	s := &Source{
		cfg: cfg, lanes: newLanes(cfg.Channel), pending: make(map[int64]distill.PadName),
		results: make(chan result, MaxInFlight), early: make(map[int64]result), next: 1, due: 1, begun: make(map[int64]chan struct{}),
		window: window{base: max(1, cfg.InFlight)},
	}
	for lane := range MaxInFlight {
		s.free = append(s.free, lane)
	}
	start := mark{reached: make(chan struct{})}
	close(start.reached)
	s.last = &flight{fired: start, asked: start, stated: start, over: start}
	for i := range s.asked {
		s.asked[i] = start.reached
	}
	return s, nil
}

func (c *SourceConfig) validate() error {
	if err := c.Params.Validate(); err != nil {
		return fmt.Errorf("profile of link %s: %w", c.Link, err)
	}
	switch {
	case c.End != handover.Alice && c.End != handover.Bob:
		return fmt.Errorf("end %q: want 'a' or 'b'", byte(c.End))
	case c.Box == nil || c.Box.end != c.End:
		return fmt.Errorf("source of %s's end: the box is of the other end, or missing", c.End)
	case c.Session < 0:
		return fmt.Errorf("session %d: want 0 or more", c.Session)
	case c.InFlight < 0 || c.InFlight > MaxInFlight:
		return fmt.Errorf("%d blocks in flight: want 1 to %d", c.InFlight, MaxInFlight)
	case c.Channel == nil || c.Random == nil || c.Log == nil:
		return errors.New("source: channel, random source and log must be set")
	case c.SpendPad == nil:
		return errors.New("source: SpendPad must be set")
	case c.End == handover.Alice && (c.Terms == nil || c.NextPad == nil || c.LosePad == nil):
		return errors.New("source of alice's end: Terms, NextPad and LosePad must be set")
	case c.End == handover.Bob && (c.Stored == nil || c.Accept == nil || c.Pad == nil):
		return errors.New("source of bob's end: Stored, Accept and Pad must be set")
	}
	return nil
}

// kindSeeded is the only message that is not distillation's: this end is seeded
// for the session. Alice speaks first, then waits for Bob's.
const kindSeeded = 0x7e

func (c *SourceConfig) meet() error {
	say := func() error {
		return c.Channel.Send(kindSeeded, binary.BigEndian.AppendUint64(nil, uint64(c.Session)))
	}
	hear := func() error {
		kind, body, err := c.Channel.Recv()
		switch {
		case err != nil:
			return err
		case kind != kindSeeded || len(body) != 8:
			return fmt.Errorf("%w: kind %#x of %d bytes", errMalformed, kind, len(body))
		case binary.BigEndian.Uint64(body) != uint64(c.Session):
			return fmt.Errorf("it is in session %d", binary.BigEndian.Uint64(body))
		}
		return nil
	}
	steps := []func() error{say, hear}
	if c.End == handover.Bob {
		steps = []func() error{hear, say}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// Next makes one block, and sees that others are under way. The errors:
//
//   - A *distill.Abort, which both ends get: the block was given up by the rules.
//     Its figures are in the Block, and Next may be called again.
//   - ErrCut, at Alice's end only: nothing was said to Bob. Next may be called
//     again when the fibre may be mended.
//   - Any other error ends the session at this end; the caller closes the channel,
//     which ends it at the other, and then the Source.
//
// Light that Bob's end did not see is a block without detections, and so an Abort
// for its counts.
func (s *Source) Next(ctx context.Context) (Block, error) {
	begin, most := s.lead, s.window.most()
	if s.cfg.End == handover.Bob {
		begin, most = s.follow, MaxInFlight
	}
	for s.under < most {
		if err := begin(ctx); err != nil {
			if s.under > 0 {
				break // there is no pad for it yet, perhaps: a block that ends brings some
			}
			return Block{Outcome: distill.Outcome{Session: s.cfg.Session}, Provenance: key.Simulated}, err
		}
	}
	return s.Rest()
}

// Rest is Next without another block begun. Some must be under way.
func (s *Source) Rest() (Block, error) {
	r := s.result()
	s.under--
	s.free = append(s.free, r.lane)
	delete(s.pending, r.of)
	if r.err == nil {
		s.window.ended(r.took, r.away, r.queued)
	}
	return Block{Outcome: r.Outcome, Provenance: key.Simulated, Took: r.took}, r.err
}

// result waits for the block that is to be returned next: at Alice's end the one that was
// begun first, at Bob's whichever is there.
func (s *Source) result() result {
	if s.cfg.End == handover.Bob {
		return <-s.results
	}
	for {
		if r, ok := s.early[s.due]; ok {
			delete(s.early, s.due)
			s.due++
			return r
		}
		r := <-s.results
		s.early[r.of] = r
	}
}

// Pending is how many blocks Alice's end has begun that Next has not returned.
func (s *Source) Pending() int { return len(s.pending) }

// Gone is closed when the channel has ended.
func (s *Source) Gone() <-chan struct{} { return s.lanes.gone }

// Close waits for the blocks under way to end, and wipes what came of them. The channel
// must have been closed.
func (s *Source) Close() {
	s.running.Wait()
	s.lanes.wait()
	for len(s.results) > 0 {
		r := <-s.results
		s.early[r.of] = r
	}
	for _, r := range s.early {
		clear(r.Bits)
		clear(r.Pads)
	}
}

// run has a block made, and sealed, on a lane.
func (s *Source) run(ctx context.Context, of int64, distil func(*lane) (distill.Outcome, error)) {
	r := result{lane: s.free[0], of: of}
	s.free = s.free[1:]
	s.under++
	s.running.Go(func() {
		ch := s.lanes.lane(r.lane)
		if s.cfg.End == handover.Alice {
			ch.begun = time.Now()
		}
		r.Outcome, r.err = distil(ch)
		if r.err == nil && s.cfg.Seal != nil {
			r.err = s.cfg.Seal(ctx, Block{Outcome: r.Outcome, Provenance: key.Simulated})
			clear(r.Bits)
			clear(r.Pads)
		}
		r.took, r.away, r.queued = ch.took(), ch.away(), ch.queued
		s.results <- r
	})
}

// lead begins the next block at Alice's end.
func (s *Source) lead(ctx context.Context) error {
	var above distill.PadName
	for _, name := range s.pending {
		if name.Compare(above) > 0 {
			above = name
		}
	}
	pad, err := s.cfg.NextPad(ctx, above)
	if err != nil {
		return fmt.Errorf("taking a pad from the reserve: %w", err)
	}
	f := s.fly(pad)
	s.pending[f.block] = pad.Name
	s.run(ctx, f.block, func(ch *lane) (distill.Outcome, error) {
		defer f.over.reach()
		defer f.stated.reach()
		defer f.asked.reach()
		defer f.fired.reach() // also one that was given up early
		return s.distil(ctx, ch, f)
	})
	return nil
}

// flight is a block of Alice's end on its way.
type flight struct {
	block int64
	pad   distill.Pad
	room  <-chan struct{} // closed when the devices have room for it

	fired  mark // its light is over
	asked  mark // the transmitter has said all that it will be asked about it
	stated mark // its terms are stated, or it was given up
	over   mark // its pad is spent, or it was given up
}

// fly makes the flight of the next block.
func (s *Source) fly(pad distill.Pad) *flight {
	f := &flight{
		block: s.next, pad: pad,
		fired: s.last.fired.next(), asked: s.last.asked.next(), stated: s.last.stated.next(), over: s.last.over.next(),
	}
	slot := &s.asked[f.block%maxHeld]
	f.room, *slot = *slot, f.asked.reached
	s.next++ // used up, whatever happens
	s.last = f
	return f
}

// mark is a point in the life of a block that no block reaches before the one before it.
type mark struct {
	before  <-chan struct{} // closed when that one has reached it
	reached chan struct{}   // and when this one has
	reach   func()          // waits for that one, and says that this one has
}

// next is the mark of the next block.
func (m mark) next() mark {
	before, reached := m.reached, make(chan struct{})
	return mark{before, reached, sync.OnceFunc(func() { <-before; close(reached) })}
}

// distil fires a block and distils it as Alice.
func (s *Source) distil(ctx context.Context, ch *lane, f *flight) (distill.Outcome, error) {
	defer clear(f.pad.Bits[:])
	ch.hold(f.fired.before)
	ch.hold(f.room)
	if err := s.cfg.Box.Fire(ctx, s.cfg.Session, f.block, s.cfg.Params.Gates); err != nil {
		return distill.Outcome{Session: s.cfg.Session, Block: f.block}, err
	}
	f.fired.reach()
	out, err := distill.Alice(ctx, ch, distill.AliceConfig{
		Params: s.cfg.Params, Link: s.cfg.Link, Session: s.cfg.Session, Block: f.block,
		Sent: func(ctx context.Context, gates distill.Gates) (distill.Sent, error) {
			defer f.asked.reach()
			ch.hold(f.asked.before)
			return s.cfg.Box.Sent(ctx, s.cfg.Session, f.block, gates)
		},
		NextPad: func(context.Context) (distill.Pad, error) { return f.pad, nil },
		SpendPad: func(ctx context.Context, name distill.PadName) error {
			ch.hold(f.over.before)
			return s.cfg.SpendPad(ctx, name)
		},
		Random: s.cfg.Random, Progress: s.progress(f.over.before),
		Terms: func(atoms, bobStored int) distill.Terms {
			ch.queue(f.stated.before)
			f.stated.reach()
			return s.cfg.Terms(atoms, bobStored)
		},
	})
	var abort *distill.Abort
	if errors.As(err, &abort) && abort.Reason == distill.ReasonPad {
		// Bob has spent it, or never had it: it is of no use here either. Giving it up gives up
		// all below it, which the blocks before this one may still spend.
		f.asked.reach()
		f.stated.reach()
		ch.hold(f.over.before)
		if lost := s.cfg.LosePad(ctx, out.Spent); lost != nil {
			return out, fmt.Errorf("giving pad %s up: %w", out.Spent, lost)
		}
	}
	return out, err
}

// progress tells how a block comes along, once no other is to end before it.
func (s *Source) progress(first <-chan struct{}) func(stage string, done float64) {
	if s.cfg.Progress == nil {
		return nil
	}
	return func(stage string, done float64) {
		select {
		case <-first:
			s.cfg.Progress(stage, done)
		default:
		}
	}
}

// follow waits at Bob's end for a block that Alice names.
func (s *Source) follow(ctx context.Context) error {
	s.run(ctx, 0, func(ch *lane) (distill.Outcome, error) {
		var block int64 // 0 until it has begun
		defer func() { s.spent(block) }()
		return distill.Bob(ctx, ch, distill.BobConfig{
			Params: s.cfg.Params, Link: s.cfg.Link, Session: s.cfg.Session,
			Detections: func(ctx context.Context, session, named int64) (distill.Detections, error) {
				if !s.mayBegin(named) {
					return distill.Detections{}, fmt.Errorf("block %d begins, which has begun before, or is long over", named)
				}
				block = named
				return s.seen(ctx, session, named)
			},
			Pad: s.cfg.Pad,
			SpendPad: func(ctx context.Context, name distill.PadName) error {
				for _, lower := range s.unspent(block) {
					ch.hold(lower)
				}
				defer s.spent(block)
				return s.cfg.SpendPad(ctx, name)
			},
			Stored: s.cfg.Stored, Accept: s.cfg.Accept, Progress: s.cfg.Progress,
		})
	})
	return nil
}

// seen fetches a block from the receiver.
func (s *Source) seen(ctx context.Context, session, block int64) (distill.Detections, error) {
	list, err := s.cfg.Box.Detections(ctx, session, block)
	if errors.Is(err, ErrLost) || errors.Is(err, ErrCut) {
		s.cfg.Log.Warn("no light", "link", s.cfg.Link, "session", session, "block", block, "err", err)
		return distill.Detections{}, nil
	}
	return list, err
}

// mayBegin says whether a block that Alice begins is one that has not begun yet. Those under
// way need not begin in the order of their numbers, but she numbers them without a gap.
func (s *Source) mayBegin(block int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, twice := s.begun[block]; twice || block < 1 || block <= s.top-MaxInFlight { // pads of block 0 are expanded from the shared secret
		return false
	}
	s.begun[block] = make(chan struct{})
	s.top = max(s.top, block)
	maps.DeleteFunc(s.begun, func(n int64, spent chan struct{}) bool { return spent == nil && n <= s.top-MaxInFlight })
	return true
}

// unspent are the blocks below one at Bob's end whose pads may still be spent: each channel
// is closed when that is over. For Alice stated their terms before, as far as they came.
func (s *Source) unspent(block int64) (lower []<-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, spent := range s.begun {
		if n < block && spent != nil {
			lower = append(lower, spent)
		}
	}
	return lower
}

// spent says that the pad of a block is spent at Bob's end, or will not be.
func (s *Source) spent(block int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if spent := s.begun[block]; spent != nil {
		close(spent)
		s.begun[block] = nil
	}
}
