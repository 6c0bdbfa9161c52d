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
	for _, stage := range []func() error{a.sift, a.reconcile, a.verify, a.close} {
		if err := stage(); err != nil {
			return a.out.failed(), blockError(cfg.Session, cfg.Block, err)
		}
	}
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
	if c.Sent == nil || c.Terms == nil || c.Random == nil {
		return errors.New("the fields Sent, Terms and Random must be set")
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
	errors int   // among the test bits
	key    frame // secret
	view   *view // secret; nil until reconciliation
}

func (a *aliceEnd) wipe() {
	clear(a.key)
	if a.view != nil {
		clear(a.view.mixed)
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

// sift ends when both ends have the key bits and know the error rate of the test bits.
func (a *aliceEnd) sift() error {
	a.progress(StageSift, 0)
	begin := beginMessage{profile: a.digest(), session: a.Session, block: a.Block, link: a.Link}
	if err := a.talk.send(kindBegin, begin.encode()); err != nil {
		return err
	}
	_, body, err := a.talk.receive(kindDetected)
	if err != nil {
		return err
	}
	gates, theirBases, err := parseDetected(body, a.Gates)
	if err != nil {
		return fmt.Errorf("reading Bob's detections: %w", err)
	}
	a.out.Detected = len(gates)
	bases, values, err := a.Sent(a.talk.ctx, gates)
	if err != nil {
		return fmt.Errorf("asking what was sent: %w", err)
	}
	defer clear(values)
	if len(bases) != len(theirBases) || len(values) != len(theirBases) {
		return fmt.Errorf("what was sent at %d gates came in %d and %d bytes", len(gates), len(bases), len(values))
	}
	matches := equalBits(bases, theirBases, len(gates))
	a.out.SiftedKey, a.out.SiftedTest = tally(matches, theirBases)
	if err := a.out.enough(a.Params); err != nil {
		return a.talk.abort(ReasonCounts, 0, err)
	}
	sifted := siftedMessage{matches: matches}
	if sifted.seed, err = a.seed(); err != nil {
		return err
	}
	a.key, sifted.test = sift(a.Params, sifted.seed, matches, theirBases, values)
	a.progress(StageSift, 1)
	a.progress(StageEstimate, 0)
	if err := a.talk.send(kindSifted, sifted.encode()); err != nil {
		return err
	}
	return a.estimate(sifted.test)
}

// estimate compares the test bits.
func (a *aliceEnd) estimate(test []byte) error {
	_, body, err := a.talk.receive(kindTested)
	if err != nil {
		return err
	}
	theirs, err := parsePacked(body, a.TestBits)
	if err != nil {
		return fmt.Errorf("reading Bob's test bits: %w", err)
	}
	a.errors = differences(test, theirs)
	a.out.QBER = float64(a.errors) / float64(a.TestBits)
	if a.out.QBER > a.QTol { // Bob has seen the same bits and should have said so
		return a.talk.abort(ReasonQBER, a.errors, nil)
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
	passes := newPasses(a.KeyBits, expectedRate(a.errors, a.TestBits), seed)
	a.view = newView(passes, a.key)
	for {
		kind, body, err := a.talk.receive(kindQuestion, kindReconciled)
		if err != nil {
			return err
		}
		if kind == kindReconciled {
			return a.reconciled(body)
		}
		questions, err := parseQuestions(body, passes.log)
		if err != nil {
			return fmt.Errorf("reading Bob's question: %w", err)
		}
		n := count(questions)
		if a.out.Leak+n > a.LeakLimit {
			return a.talk.abort(ReasonLeak, a.errors, leakError(a.out.Leak+n, a.LeakLimit))
		}
		a.out.Leak += n
		a.out.Rounds++
		if err := a.talk.send(kindAnswer, a.view.answer(questions)); err != nil {
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
	a.out.corrected(m.corrected, a.KeyBits)
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
	m.tag = tag(a.key, m.point)
	return a.talk.send(kindTag, m.encode())
}

// close hears that the keys are equal, states the terms, draws the seed of
// amplification now that nothing about the key is said any more, and compares what
// was said. From the confirmation on she has the block; should Bob not get hers, he
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
		terms: a.Terms(a.SecretBits/key.AtomBits, verified.stored),
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
	a.out.amplified(a.Params, a.key, m, a.talk.sum())
	if err := a.talk.confirmed(a.out.Transcript); err != nil {
		return err
	}
	if err := a.talk.confirm(a.out.Transcript); err != nil {
		return err
	}
	a.progress(StageAmplify, 1)
	return nil
}
