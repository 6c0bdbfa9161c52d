package distill

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/qutemail/kme/internal/key"
)

// Alice distils one block as the end that sent the light. She leads: Bob's machine
// must be waiting, or about to wait, at the other end of ch. The error is an *Abort
// (see there) or says why the channel must not be used again. ctx is looked at between
// messages only: who wants to stop a machine that waits closes ch.
func Alice(ctx context.Context, ch Channel, cfg AliceConfig) (Outcome, error) {
	if err := cfg.validate(); err != nil {
		return Outcome{}, fmt.Errorf("distilling: %w", err)
	}
	a := &aliceEnd{
		AliceConfig: cfg,
		talk:        newTalk(ctx, ch, alice, cfg.TestBits),
		out:         Outcome{Session: cfg.Session, Block: cfg.Block, Gates: cfg.Gates},
	}
	defer a.wipe()
	for _, stage := range []func() error{a.begin, a.sift, a.reconcile, a.verify, a.close} {
		if err := stage(); err != nil {
			return a.out.failed(), blockError(cfg.Session, cfg.Block, err)
		}
	}
	a.out.epsilons(cfg.Params, a.talk.said)
	return a.out, nil
}

// blockError says which block failed. An Abort is returned as such.
func blockError(session, block int64, err error) error {
	if abort, ok := errors.AsType[*Abort](err); ok {
		return abort
	}
	return fmt.Errorf("distilling block %d of session %d: %w", block, session, err)
}

func (c AliceConfig) validate() error {
	if c.Sent == nil || c.Terms == nil || c.Random == nil || c.NextPad == nil || c.SpendPad == nil {
		return errors.New("the fields Sent, Terms, Random, NextPad and SpendPad must be set")
	}
	if c.Session < 0 || c.Block < 0 || len(c.Link) > maxLink {
		return errors.New("negative session or block, or a link's name that is too long")
	}
	return c.Params.Validate()
}

// aliceEnd is Alice's machine.
type aliceEnd struct {
	AliceConfig
	talk   *talk
	out    Outcome
	sifted *sifted // secret
	views  []*view // secret; of each frame, once reconciliation has begun
}

func (a *aliceEnd) wipe() {
	a.talk.auth.disarm()
	if a.sifted != nil {
		clear(a.sifted.key)
	}
	for _, v := range a.views {
		clear(v.mixed)
	}
}

func (a *aliceEnd) progress(stage string, done float64) {
	if a.Progress != nil {
		a.Progress(stage, done)
	}
}

// seed draws a public seed.
func (a *aliceEnd) seed() (seed [32]byte, err error) {
	if _, err := io.ReadFull(a.Random, seed[:]); err != nil {
		return seed, fmt.Errorf("drawing a seed: %w", err)
	}
	return seed, nil
}

// begin says which block it is, and with which pad it will be authenticated.
func (a *aliceEnd) begin() error {
	pad, err := a.NextPad(a.talk.ctx)
	if err != nil {
		return fmt.Errorf("taking a pad from the reserve: %w", err)
	}
	defer clear(pad.Bits[:])
	a.out.Spent = pad.Name
	m := beginMessage{profile: a.digest(), session: a.Session, block: a.Block, pad: pad.Name, link: a.Link}
	body := m.encode()
	if err := a.talk.send(kindBegin, body); err != nil {
		return err
	}
	a.talk.arm(pad, alice, body)
	return nil
}

// sift ends when both ends have the key bits and know the errors of the test bits.
func (a *aliceEnd) sift() error {
	a.progress(StageSift, 0)
	_, body, err := a.talk.receive(kindDetected)
	if err != nil {
		return err
	}
	gates, theirBases, err := parseDetected(body, a.Gates)
	if err != nil {
		return fmt.Errorf("reading Bob's detections: %w", err)
	}
	n := gates.Len()
	a.out.Detected = n
	sent, err := a.Sent(a.talk.ctx, gates)
	if err != nil {
		return fmt.Errorf("asking what was sent: %w", err)
	}
	defer sent.wipe()
	if err := sent.validate(n, a.Intensities); err != nil {
		return err
	}
	matches := equalBits(sent.Bases, theirBases, n)
	a.out.SiftedKey, a.out.SiftedTest = tally(matches, theirBases)
	if err := a.out.enough(a.Params); err != nil {
		return a.talk.abort(ReasonCounts, 0, err)
	}
	if err := proportion(sent.Bases, theirBases, n, a.PX); err != nil {
		return a.talk.abort(ReasonBases, 0, err)
	}
	m := siftedMessage{matches: matches, intensities: planes(a.Params, matches, sent)}
	if m.seed, err = a.seed(); err != nil {
		return err
	}
	a.sifted = sift(a.Params, m.seed, matches, theirBases, sent.Bits, m.intensities)
	a.out.Key, a.out.Test = a.sifted.used.key, a.sifted.used.test
	m.test = a.sifted.test
	a.progress(StageSift, 1)
	a.progress(StageEstimate, 0)
	if err := a.talk.send(kindSifted, m.encode()); err != nil {
		return err
	}
	return a.estimate()
}

// estimate compares the test bits. What Alice finds Bob should have found: he has seen
// the same.
func (a *aliceEnd) estimate() error {
	_, body, err := a.talk.receive(kindTested)
	if err != nil {
		return err
	}
	theirs, err := parsePacked(body, a.TestBits)
	if err != nil {
		return fmt.Errorf("reading Bob's test bits: %w", err)
	}
	tooMany := a.out.tested(a.Params, a.sifted.wrong(theirs))
	if err := a.out.gains(a.Params); err != nil {
		return a.talk.abort(ReasonGains, a.out.TestErrors.total(), err)
	}
	if tooMany != nil {
		return a.talk.abort(ReasonQBER, a.out.TestErrors.total(), tooMany)
	}
	a.progress(StageEstimate, 1)
	return nil
}

// reconcile answers Bob's questions until he is done, or until the next answer would
// reveal more than the profile allows.
func (a *aliceEnd) reconcile() error {
	a.progress(StageReconcile, 0)
	seed, err := a.seed()
	if err != nil {
		return err
	}
	if err := a.talk.send(kindPasses, seed[:]); err != nil {
		return err
	}
	errors := a.out.TestErrors.total()
	passes := newPasses(a.FrameBits, expectedRate(errors, a.TestBits), seed)
	for _, f := range a.sifted.frames(a.FrameBits) {
		a.views = append(a.views, newView(passes, f))
	}
	for {
		kind, body, err := a.talk.receive(kindQuestion, kindReconciled)
		if err != nil {
			return err
		}
		if kind == kindReconciled {
			return a.reconciled(body)
		}
		round, err := parseQuestions(body, len(a.views), passes.log)
		if err != nil {
			return fmt.Errorf("reading Bob's question: %w", err)
		}
		n := countAll(round)
		if a.out.Leak+n > a.LeakLimit {
			return a.talk.abort(ReasonLeak, errors, leakError(a.out.Leak+n, a.LeakLimit))
		}
		a.out.Leak += n
		a.out.Rounds++
		answers, next := make([]byte, packedBytes(n)), 0
		for _, f := range round {
			next = a.views[f.frame].answer(f.questions, answers, next)
		}
		if err := a.talk.send(kindAnswer, answers); err != nil {
			return err
		}
		a.progress(StageReconcile, reconcileProgress(a.out.Leak, a.KeyBits, passes.rate))
	}
}

// reconciled takes Bob's figures.
func (a *aliceEnd) reconciled(body []byte) error {
	m, err := parseReconciled(body, a.KeyBits)
	if err != nil {
		return fmt.Errorf("reading Bob's figures: %w", err)
	}
	if m.leak != a.out.Leak {
		return fmt.Errorf("Bob counts %d revealed bits where Alice revealed %d", m.leak, a.out.Leak)
	}
	if err := a.out.corrected(a.Params, m.corrected); err != nil {
		return a.talk.abort(ReasonErrors, a.out.TestErrors.total(), err)
	}
	a.progress(StageReconcile, 1)
	return nil
}

// verify sends the tag. Bob compares.
func (a *aliceEnd) verify() error {
	a.progress(StageVerify, 0)
	var m tagMessage
	if _, err := io.ReadFull(a.Random, m.point[:]); err != nil {
		return fmt.Errorf("drawing the point of the verification hash: %w", err)
	}
	m.tag = tag(a.sifted.key, m.point)
	return a.talk.send(kindTag, m.encode())
}

// close hears that the keys are equal, states the terms, draws the seed of
// amplification now that nothing about the key is said any more, and checks Bob's tag
// before she gives hers. From then on she has the block; should Bob not get her tag, he
// has not, which the handover of blocks between the ends finds out.
func (a *aliceEnd) close() error {
	_, body, err := a.talk.receive(kindVerified)
	if err != nil {
		return err
	}
	verified, err := parseVerified(body)
	if err != nil {
		return fmt.Errorf("reading Bob's verdict: %w", err)
	}
	a.progress(StageVerify, 1)
	a.progress(StageAmplify, 0)
	m := closingMessage{
		terms: a.Terms(a.KeyedBits()/key.AtomBits, verified.stored),
		seed:  make([]byte, packedBytes(a.KeyBits-1)),
	}
	if len(m.terms.Owners) > MaxOwners {
		return fmt.Errorf("terms with %d bytes of owners", len(m.terms.Owners))
	}
	if _, err := io.ReadFull(a.Random, m.seed); err != nil {
		return fmt.Errorf("drawing the seed of amplification: %w", err)
	}
	m.seed[len(m.seed)-1] &= 0x7f // KeyBits is a multiple of 8, and the seed a bit less
	if err := a.talk.send(kindClosing, m.encode()); err != nil {
		return err
	}
	a.out.amplified(a.Params, a.sifted.key, m, a.talk.sum())
	if err := a.talk.confirmed(); err != nil {
		return err
	}
	if err := a.SpendPad(a.talk.ctx, a.out.Spent); err != nil {
		return fmt.Errorf("spending pad %s: %w", a.out.Spent, err)
	}
	if err := a.talk.confirm(); err != nil {
		return err
	}
	a.progress(StageAmplify, 1)
	return nil
}
