package qlink

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Block is a block of secret bits that the other end holds too.
type Block struct {
	distill.Outcome
	Provenance key.Provenance
}

// SourceConfig is what a Source needs. Everything but Progress must be set.
type SourceConfig struct {
	End     handover.End
	Link    string // name of the link, equal at both ends
	Session int64  // not negative, equal at both ends, new for each Source

	Channel distill.Channel // to the other end; it belongs to the caller, who closes it to stop a Source that waits
	Box     *Box            // of this end; it belongs to the caller
	Params  distill.Params

	// Random yields the seed of this end's secret choices and all that distillation
	// draws. It must be as good as the keys are to be.
	Random io.Reader

	// The reserve of pads that both ends share: see distill.AliceConfig and BobConfig.
	NextPad  func(ctx context.Context) (distill.Pad, error)                       // at Alice's end only
	Pad      func(ctx context.Context, name distill.PadName) (distill.Pad, error) // at Bob's end only
	SpendPad func(ctx context.Context, name distill.PadName) error
	LosePad  func(ctx context.Context, name distill.PadName) error // at Alice's end only: Bob does not have it

	Terms  func(atoms, bobStored int) distill.Terms   // at Alice's end only
	Stored func() int                                 // at Bob's end only
	Accept func(terms distill.Terms, atoms int) error // at Bob's end only
	Log    *slog.Logger                               // figures only, never a bit

	Progress func(stage string, done float64) // may be nil
}

// Source yields the secret blocks of one session of a link. It is for one
// goroutine at a time.
type Source struct {
	cfg  SourceConfig
	next int64 // block: at Alice's end the one to fire, at Bob's the lowest that may come
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
	return &Source{cfg: cfg, next: 1}, nil
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

// Next makes one block. The errors:
//
//   - A *distill.Abort, which both ends get: the block was given up by the rules.
//     Its figures are in the Block, and Next may be called again.
//   - ErrCut, at Alice's end only: nothing was said to Bob. Next may be called
//     again when the fibre may be mended.
//   - Any other error ends the session at this end; the caller closes the channel,
//     which ends it at the other.
//
// Light that Bob's end did not see is a block without detections, and so an Abort
// for its counts.
func (s *Source) Next(ctx context.Context) (Block, error) {
	distilBlock := s.lead
	if s.cfg.End == handover.Bob {
		distilBlock = s.follow
	}
	out, err := distilBlock(ctx)
	return Block{Outcome: out, Provenance: key.Simulated}, err
}

// lead fires a block and distils it as Alice.
func (s *Source) lead(ctx context.Context) (distill.Outcome, error) {
	block := s.next
	s.next++ // used up, whatever happens
	if err := s.cfg.Box.Fire(ctx, s.cfg.Session, block, s.cfg.Params.Gates); err != nil {
		return distill.Outcome{Session: s.cfg.Session, Block: block}, err
	}
	out, err := distill.Alice(ctx, s.cfg.Channel, distill.AliceConfig{
		Params: s.cfg.Params, Link: s.cfg.Link, Session: s.cfg.Session, Block: block,
		Sent: func(ctx context.Context, gates distill.Gates) (distill.Sent, error) {
			return s.cfg.Box.Sent(ctx, s.cfg.Session, block, gates)
		},
		NextPad: s.cfg.NextPad, SpendPad: s.cfg.SpendPad,
		Random: s.cfg.Random, Terms: s.cfg.Terms, Progress: s.cfg.Progress,
	})
	var abort *distill.Abort
	if errors.As(err, &abort) && abort.Reason == distill.ReasonPad {
		// Bob has spent it, or never had it: it is of no use here either.
		if lost := s.cfg.LosePad(ctx, out.Spent); lost != nil {
			return out, fmt.Errorf("giving pad %s up: %w", out.Spent, lost)
		}
	}
	return out, err
}

// follow distils the block that Alice names.
func (s *Source) follow(ctx context.Context) (distill.Outcome, error) {
	return distill.Bob(ctx, s.cfg.Channel, distill.BobConfig{
		Params: s.cfg.Params, Link: s.cfg.Link, Session: s.cfg.Session, MinBlock: s.next,
		Detections: s.seen, Pad: s.cfg.Pad, SpendPad: s.cfg.SpendPad,
		Stored: s.cfg.Stored, Accept: s.cfg.Accept, Progress: s.cfg.Progress,
	})
}

// seen fetches a block from the receiver. It is called once a block that begins.
func (s *Source) seen(ctx context.Context, session, block int64) (distill.Detections, error) {
	s.next = block + 1
	list, err := s.cfg.Box.Detections(ctx, session, block)
	if errors.Is(err, ErrLost) || errors.Is(err, ErrCut) {
		s.cfg.Log.Warn("no light", "link", s.cfg.Link, "session", session, "block", block, "err", err)
		return distill.Detections{}, nil
	}
	return list, err
}
