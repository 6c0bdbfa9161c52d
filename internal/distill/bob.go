package distill

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// Bob distils the next block as the end that measured the light; Alice says which one
// that is. The error is an *Abort (see there) or says why the channel must not be used
// again. ctx is looked at between messages only.
func Bob(ctx context.Context, ch Channel, cfg BobConfig) (Outcome, error) {
	if err := cfg.validate(); err != nil {
		return Outcome{}, fmt.Errorf("distilling: %w", err)
	}
	b := &bobEnd{
		BobConfig: cfg,
		talk:      newTalk(ctx, ch, bob, cfg.TestBits),
		out:       Outcome{Session: cfg.Session, Gates: cfg.Gates},
	}
	defer b.wipe()
	if err := b.begin(); err != nil {
		if abort, ok := errors.AsType[*Abort](err); ok {
			return b.out.failed(), abort
		}
		return Outcome{}, fmt.Errorf("beginning a block of session %d: %w", cfg.Session, err)
	}
	for _, stage := range []func() error{b.sift, b.reconcile, b.verify, b.close} {
		if err := stage(); err != nil {
			return b.out.failed(), blockError(cfg.Session, b.out.Block, err)
		}
	}
	b.out.epsilons(cfg.Params, b.talk.said)
	return b.out, nil
}

func (c BobConfig) validate() error {
	if c.Detections == nil || c.Stored == nil || c.Accept == nil || c.Pad == nil || c.SpendPad == nil {
		return errors.New("the fields Detections, Stored, Accept, Pad and SpendPad must be set")
	}
	if c.Session < 0 || len(c.Link) > maxLink {
		return errors.New("negative session, or a link's name that is too long")
	}
	return c.Params.Validate()
}

// bobEnd is Bob's machine.
type bobEnd struct {
	BobConfig
	talk     *talk
	out      Outcome
	sifted   *sifted   // secret
	searches []*search // secret; of each frame, once reconciliation has begun
}

func (b *bobEnd) wipe() {
	b.talk.auth.disarm()
	if b.sifted != nil {
		clear(b.sifted.key)
	}
	for _, s := range b.searches {
		clear(s.mixed)
	}
}

func (b *bobEnd) progress(stage string, done float64) {
	if b.Progress != nil {
		b.Progress(stage, done)
	}
}

// begin hears which block it is.
func (b *bobEnd) begin() error {
	_, body, err := b.talk.receive(kindBegin)
	if err != nil {
		return err
	}
	m, err := parseBegin(body)
	switch {
	case err != nil:
		return fmt.Errorf("reading what Alice begins: %w", err)
	case m.link != b.Link || m.session != b.Session:
		return fmt.Errorf("Alice begins a block of link %q, session %d", m.link, m.session)
	case m.block < b.MinBlock:
		return fmt.Errorf("Alice begins block %d, where %d is the lowest to come", m.block, b.MinBlock)
	case m.profile != b.digest():
		return errors.New("Alice has another profile for this link")
	}
	b.out.Block, b.out.Spent = m.block, m.pad
	pad, err := b.Pad(b.talk.ctx, m.pad)
	switch {
	case errors.Is(err, ErrNoPad):
		return b.talk.abort(ReasonPad, 0, err)
	case err != nil:
		return fmt.Errorf("looking for pad %s: %w", m.pad, err)
	}
	b.talk.arm(pad, alice, body)
	clear(pad.Bits[:])
	return nil
}

// sift ends when both ends have the key bits and know the error rate of the test bits.
func (b *bobEnd) sift() error {
	b.progress(StageSift, 0)
	detections, err := b.Detections(b.talk.ctx, b.Session, b.out.Block)
	if err != nil {
		return fmt.Errorf("asking what was detected: %w", err)
	}
	defer detections.wipe()
	if err := detections.validate(b.Gates); err != nil {
		return err
	}
	n, bases := detections.Gates.Len(), detections.Bases
	b.out.Detected, b.out.Doubles = n, ones(detections.Doubles)
	if err := b.talk.send(kindDetected, encodeDetected(detections.Gates, bases)); err != nil {
		return err
	}
	_, body, err := b.talk.receive(kindSifted)
	if err != nil {
		return err
	}
	m, err := parseSifted(body, n, b.Params)
	if err != nil {
		return fmt.Errorf("reading Alice's choice: %w", err)
	}
	b.out.SiftedKey, b.out.SiftedTest = tally(m.matches, bases)
	if err := b.out.enough(b.Params); err != nil {
		return fmt.Errorf("Alice chose from too few: %w", err)
	}
	b.sifted = sift(b.Params, m.seed, m.matches, bases, detections.Bits, m.intensities)
	b.out.Key, b.out.Test = b.sifted.used.key, b.sifted.used.test
	b.progress(StageSift, 1)
	return b.estimate(m.test, runs(detections.Bits, n))
}

// estimate compares the test bits, and shows Alice his, unless his bits depend on each other.
func (b *bobEnd) estimate(theirs []byte, alike error) error {
	b.progress(StageEstimate, 0)
	tooMany := b.out.tested(b.Params, b.sifted.wrong(theirs))
	if !b.Doubles.hold(b.out.Doubles) {
		return b.talk.abort(ReasonDoubles, b.out.TestErrors.total(), fmt.Errorf("%d double clicks, where %d to %d pass", b.out.Doubles, b.Doubles.Min, b.Doubles.Max))
	}
	if alike != nil {
		return b.talk.abort(ReasonRuns, b.out.TestErrors.total(), alike)
	}
	if err := b.out.gains(b.Params); err != nil {
		return b.talk.abort(ReasonGains, b.out.TestErrors.total(), err)
	}
	if tooMany != nil {
		return b.talk.abort(ReasonQBER, b.out.TestErrors.total(), tooMany)
	}
	if err := b.talk.send(kindTested, b.sifted.test); err != nil {
		return err
	}
	b.progress(StageEstimate, 1)
	return nil
}

// reconcile makes Bob's key equal to Alice's.
func (b *bobEnd) reconcile() error {
	b.progress(StageReconcile, 0)
	_, body, err := b.talk.receive(kindPasses)
	if err != nil {
		return err
	}
	if len(body) != 32 {
		return fmt.Errorf("a seed of %d bytes", len(body))
	}
	rate := expectedRate(b.out.TestErrors.total(), b.TestBits)
	before := slices.Clone(b.sifted.key)
	defer clear(before)
	ask := func(round []frameQuestions) ([]byte, error) { return b.ask(round, rate) }
	b.searches, err = reconcile(newPasses(b.FrameBits, rate, [32]byte(body)), b.sifted.frames(b.FrameBits), b.haste(), ask)
	if err != nil {
		return err
	}
	m := reconciledMessage{corrected: b.sifted.corrected(before), leak: b.out.Leak}
	if err := b.out.corrected(b.Params, m.corrected); err != nil {
		return b.talk.abort(ReasonErrors, b.out.TestErrors.total(), err)
	}
	if err := b.talk.send(kindReconciled, m.encode()); err != nil {
		return err
	}
	b.progress(StageReconcile, 1)
	return nil
}

// haste is what LeakLimit leaves beyond what reconciliation takes, if the key has as many
// errors as it may by the test bits. The length of the secret has paid for LeakLimit, not for
// what does leak: bits that are left over would buy nothing, and spent they save questions.
func (b *bobEnd) haste() haste {
	const sigmas, usual = 4, 1.05 // usual: efficiency
	errors := float64(b.out.TestErrors.total())
	highest := (errors + sigmas*math.Sqrt(errors) + sigmas) / float64(b.TestBits)
	return haste{
		must: int(usual * float64(b.FrameBits) * entropy(min(.5, highest))),
		may:  b.LeakLimit / b.Frames(),
	}
}

// ask puts questions to Alice, as far as the profile allows her to answer.
func (b *bobEnd) ask(round []frameQuestions, rate float64) ([]byte, error) {
	n := countAll(round)
	if b.out.Leak+n > b.LeakLimit {
		return nil, b.talk.abort(ReasonLeak, b.out.TestErrors.total(), leakError(b.out.Leak+n, b.LeakLimit))
	}
	if err := b.talk.send(kindQuestion, encodeQuestions(round)); err != nil {
		return nil, err
	}
	_, body, err := b.talk.receive(kindAnswer)
	if err != nil {
		return nil, err
	}
	answers, err := parsePacked(body, n)
	if err != nil {
		return nil, fmt.Errorf("reading Alice's answer: %w", err)
	}
	b.out.Leak += n
	b.out.Rounds++
	b.progress(StageReconcile, reconcileProgress(b.out.Leak, b.KeyBits, rate))
	return answers, nil
}

// verify compares the tags, and tells Alice how many atoms are stored at this end.
func (b *bobEnd) verify() error {
	b.progress(StageVerify, 0)
	_, body, err := b.talk.receive(kindTag)
	if err != nil {
		return err
	}
	m, err := parseTag(body)
	if err != nil {
		return fmt.Errorf("reading Alice's tag: %w", err)
	}
	mine := tag(b.sifted.key, m.point)
	if subtle.ConstantTimeCompare(mine[:], m.tag[:]) != 1 {
		return b.talk.abort(ReasonVerify, b.out.TestErrors.total(), nil)
	}
	stored := max(0, min(b.Stored(), maxCount))
	if err := b.talk.send(kindVerified, verifiedMessage{stored}.encode()); err != nil {
		return err
	}
	b.progress(StageVerify, 1)
	return nil
}

// close judges the terms, amplifies, gives his tag, and checks Alice's.
func (b *bobEnd) close() error {
	b.progress(StageAmplify, 0)
	_, body, err := b.talk.receive(kindClosing)
	if err != nil {
		return err
	}
	m, err := parseClosing(body, b.KeyBits)
	if err != nil {
		return fmt.Errorf("reading Alice's terms: %w", err)
	}
	if err := b.Accept(m.terms, b.KeyedBits()/key.AtomBits); err != nil {
		return b.talk.abort(ReasonTerms, b.out.TestErrors.total(), err)
	}
	b.out.amplified(b.Params, b.sifted.key, m, b.talk.sum())
	if err := b.SpendPad(b.talk.ctx, b.out.Spent); err != nil {
		return fmt.Errorf("spending pad %s: %w", b.out.Spent, err)
	}
	if err := b.talk.confirm(); err != nil {
		return err
	}
	if err := b.talk.confirmed(); err != nil {
		return err
	}
	b.progress(StageAmplify, 1)
	return nil
}
