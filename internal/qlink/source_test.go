package qlink

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// The numbers that mean a basis are the same in the packages that hand it on.
var (
	_ = [1]struct{}{}[byte(bb84.X)-distill.KeyBasis]
	_ = [1]struct{}{}[byte(bb84.Z)-distill.TestBasis]
)

// The lab's profile makes key at the worst corner of what it lets pass, and less than any
// protocol could.
func TestStandardProfile(t *testing.T) {
	link, p := Standard()
	if err := errors.Join(link.Validate(), p.Validate()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d gates (%.0f ms at 1 GHz), %d test bits, leak at most %d, %d secret bits, %d atoms; limits %v %v %v %v",
		p.Gates, 1e3*link.Seconds(p.Gates), p.TestBits, p.LeakLimit, p.SecretBits, p.KeyedBits()/key.AtomBits, p.Key, p.Test, p.TestErrors, p.Doubles)
	if p.SecretBits < 100_000 || p.KeyedBits()%key.AtomBits != 0 || p.PX != link.PX || p.EpsSec != 1e-14 {
		t.Errorf("profile: %+v", p)
	}
	if rate := float64(p.SecretBits) / float64(p.Gates); rate >= bb84.PLOB(link.EtaChannel()) {
		t.Errorf("%v bits a gate, above PLOB", rate)
	}
	errs := 0
	for _, l := range p.TestErrors {
		errs += l.Max
	}
	if q := float64(errs) / float64(p.TestBits); q > .03 {
		t.Errorf("a QBER of %v may pass", q)
	}
	plan := StandardPlan()
	plan.KeyBits = 1 << 14
	plan.FrameBits = 1 << 14
	if _, err := plan.Profile(link); err == nil {
		t.Error("a profile that makes no key was accepted")
	}
	far := link
	far.Km = 9000
	if _, err := plan.Profile(far); err == nil {
		t.Error("a link that detects nothing was accepted")
	}
}

// wire is one direction of a channel in memory.
type wire chan message

type message struct {
	kind byte
	body []byte
}

// end is one end of a channel in memory.
type end struct {
	out, in wire
	gone    chan struct{} // closed with the channel
}

func (e *end) Send(kind byte, body ...[]byte) error {
	select {
	case e.out <- message{kind, bytes.Join(body, nil)}:
		return nil
	case <-e.gone:
		return io.ErrClosedPipe
	}
}

func (e *end) Recv() (kind byte, body []byte, err error) {
	select {
	case m := <-e.in:
		return m.kind, m.body, nil
	case <-e.gone:
		return 0, nil, io.EOF
	}
}

// newWires makes a channel, and what closes it.
func newWires() (alice, bob *end, hangUp func()) {
	there, back, gone := make(wire), make(wire), make(chan struct{})
	return &end{there, back, gone}, &end{back, there, gone}, sync.OnceFunc(func() { close(gone) })
}

// link is a session with a Source at either end.
type link struct {
	alice, bob *Source
	hangUp     func()
}

// reserve is the pads of an end: without number, and the same at both ends.
type reserve struct {
	mu   sync.Mutex
	last distill.PadName
}

func padNamed(name distill.PadName) distill.Pad {
	pad := distill.Pad{Name: name}
	sum := sha256.Sum256([]byte(name.String()))
	copy(pad.Bits[:], append(sum[:], sum[:16]...))
	return pad
}

func (r *reserve) next(_ context.Context, above distill.PadName) (distill.Pad, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return padNamed(distill.PadName{Index: max(r.last.Index, above.Index) + 1}), nil
}

func (r *reserve) find(_ context.Context, name distill.PadName) (distill.Pad, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if name.Compare(r.last) <= 0 {
		return distill.Pad{}, distill.ErrNoPad
	}
	return padNamed(name), nil
}

func (r *reserve) spend(_ context.Context, name distill.PadName) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if name.Compare(r.last) <= 0 {
		return errors.New("spent twice")
	}
	r.last = name
	return nil
}

func sourceConfig(e handover.End, ch distill.Channel, box *Box, session int64, profile distill.Params) SourceConfig {
	cfg := SourceConfig{
		End: e, Link: "km1-km2", Session: session, Channel: ch, Box: box,
		Params: profile, Random: rand.Reader, Log: slog.New(slog.DiscardHandler),
	}
	pads := &reserve{}
	cfg.SpendPad = pads.spend
	if e == handover.Alice {
		cfg.NextPad, cfg.LosePad = pads.next, pads.spend
		cfg.Terms = func(atoms, bobStored int) distill.Terms {
			return distill.Terms{Epoch: 1234, Owners: string(handover.Share(atoms, 0, bobStored))}
		}
		return cfg
	}
	cfg.Pad = pads.find
	cfg.Stored = func() int { return 640 }
	cfg.Accept = func(terms distill.Terms, atoms int) error {
		if !handover.Owners(terms.Owners).Valid(atoms) {
			return errors.New("owners do not fit")
		}
		return nil
	}
	return cfg
}

func (c *channel) link(t testing.TB, session int64) *link {
	t.Helper()
	a, b, hangUp := newWires()
	_, profile := Standard()
	l := c.linkOver(t, session, a, b, profile, 1)
	l.hangUp = hangUp
	t.Cleanup(hangUp)
	return l
}

// linkOver is a session over a classical channel of the caller's.
func (c *channel) linkOver(t testing.TB, session int64, a, b distill.Channel, profile distill.Params, inFlight int) *link {
	t.Helper()
	l := &link{}
	aliceBox, bobBox := c.open(t, handover.Alice), c.open(t, handover.Bob)
	errA, errB := both(
		func() (err error) {
			cfg := sourceConfig(handover.Alice, a, aliceBox, session, profile)
			cfg.InFlight = inFlight
			l.alice, err = NewSource(t.Context(), cfg)
			return err
		},
		func() (err error) {
			l.bob, err = NewSource(t.Context(), sourceConfig(handover.Bob, b, bobBox, session, profile))
			return err
		})
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	return l
}

// both runs the two ends at the same time.
func both(alice, bob func() error) (errA, errB error) {
	done := make(chan error)
	go func() { done <- bob() }()
	errA = alice()
	return errA, <-done
}

// next distils a block at both ends.
func (l *link) next(t testing.TB) (a, b Block, errA, errB error) {
	errA, errB = both(
		func() (err error) { a, err = l.alice.Next(t.Context()); return err },
		func() (err error) { b, err = l.bob.Next(t.Context()); return err })
	return a, b, errA, errB
}

func aborted(t *testing.T, err error) *distill.Abort {
	t.Helper()
	var a *distill.Abort
	if !errors.As(err, &a) {
		t.Fatalf("got %v, want an abort", err)
	}
	return a
}

// The whole link: light, distillation, equal secrets; Eve aborts blocks at both
// ends and goes; the fibre is cut and mended; the session goes on through it all.
func TestSource(t *testing.T) {
	c := newChannel(t, nil)
	l := c.link(t, 3)
	good := func(number int64) Block {
		t.Helper()
		a, b, errA, errB := l.next(t)
		if errA != nil || errB != nil {
			t.Fatalf("block %d: %v; %v", number, errA, errB)
		}
		if a.Block != number || b.Block != number || a.Session != 3 {
			t.Errorf("blocks %d and %d of session %d, want %d of 3", a.Block, b.Block, a.Session, number)
		}
		if !bytes.Equal(a.Bits, b.Bits) || len(a.Bits) == 0 || a.Length != b.Length || a.Transcript != b.Transcript {
			t.Errorf("block %d: the ends differ", number)
		}
		if a.Provenance != key.Simulated || b.Provenance != key.Simulated {
			t.Errorf("provenance %q and %q", a.Provenance, b.Provenance)
		}
		if a.Length != l.alice.cfg.Params.KeyedBits() || a.QBER > .02 || a.QBER < .01 || a.Terms != b.Terms {
			t.Errorf("block %d: %d bits, QBER %v, terms %v and %v", number, a.Length, a.QBER, a.Terms, b.Terms)
		}
		t.Logf("block %d: %d detections, %d and %d sifted, QBER %.4f and %.4f, leak %d, f %.3f, %d rounds, %d bits",
			number, a.Detected, a.SiftedKey, a.SiftedTest, a.QBER, a.KeyQBER, a.Leak, a.Efficiency, a.Rounds, a.Length)
		return a
	}
	first := good(1)
	begun := time.Now() // Bob waits for the second since he was asked for the first
	second, later, errA, errB := l.next(t)
	if errA != nil || errB != nil || bytes.Equal(first.Bits, second.Bits) {
		t.Errorf("two blocks have the same secret, or: %v; %v", errA, errB)
	}
	if took := time.Since(begun); later.Took <= 0 || later.Took > took || second.Took <= 0 || second.Took > took {
		t.Errorf("a block of %v took Alice %v and Bob %v", took, second.Took, later.Took)
	}

	c.tell(t, "eve 0.5")
	a, b, errA, errB := l.next(t)
	if ab, bb := aborted(t, errA), aborted(t, errB); ab.Reason != distill.ReasonQBER || bb.Reason != ab.Reason || ab.Peer == bb.Peer {
		t.Errorf("with Eve: %v; %v", ab, bb)
	}
	if a.Bits != nil || b.Bits != nil || b.QBER < .13 || b.QBER > .15 {
		t.Errorf("with Eve on half of the photons: bits %v, QBER %v, want .14", a.Bits != nil || b.Bits != nil, b.QBER)
	}
	c.tell(t, "eve blind")
	if _, _, errA, errB := l.next(t); aborted(t, errA).Reason != aborted(t, errB).Reason || aborted(t, errA).Reason == distill.ReasonQBER {
		t.Errorf("with blinded detectors: %v; %v", errA, errB)
	}
	c.tell(t, "eve 0")
	good(5)

	// Bob has spent a pad that Alice has not: she gives it up too, and goes on.
	pad, err := l.alice.cfg.NextPad(t.Context(), distill.PadName{})
	ok(t, err)
	ok(t, l.bob.cfg.SpendPad(t.Context(), pad.Name))
	if _, _, errA, errB := l.next(t); aborted(t, errA).Reason != distill.ReasonPad || aborted(t, errB).Reason != distill.ReasonPad {
		t.Errorf("with a pad that is spent: %v; %v", errA, errB)
	}
	good(7)

	// A cut is Alice's to notice; nothing is said to Bob, and she tries again.
	c.tell(t, "cut")
	for range 2 {
		if _, err := l.alice.Next(t.Context()); !errors.Is(err, ErrCut) {
			t.Fatalf("through a cut fibre: %v, want ErrCut", err)
		}
	}
	c.tell(t, "mend")
	good(10)

	// The receiver is taken over by somebody with the secret: this session's light
	// is lost, then its end is told so.
	thief := c.open(t, handover.Bob)
	ok(t, thief.Seed(t.Context(), seedOf(1), 99))
	errA, errB = both(
		func() error { _, err := l.alice.Next(t.Context()); return err },
		func() error {
			_, err := l.bob.Next(t.Context())
			l.hangUp() // as the caller does after any other error
			return err
		})
	if errA == nil || errB == nil || errors.As(errB, new(*distill.Abort)) {
		t.Errorf("a session whose receiver was taken: %v; %v", errA, errB)
	}
	<-l.alice.Gone()
	<-l.bob.Gone()
}

// Splitting photon numbers leaves the errors and the gain of the signal as they were. It
// is the decoys that show it: over 5 km they click too often, over 20 km so seldom that the
// block is short of bits. In between they are as they should be, and Eve has the bits of
// pulses of several photons only, which the length never counts (TestSplitPhotonsUnseen).
func TestSplitPhotons(t *testing.T) {
	params := bb84.Standard()
	params.Km = 5
	profile, err := StandardPlan().Profile(params)
	ok(t, err)
	c := newChannel(t, func(cfg *Config) { cfg.Params, cfg.Eve = params, bb84.Eve{SplitPhotons: true} })
	alice, bob, hangUp := newWires()
	defer hangUp()
	l := c.linkOver(t, 1, alice, bob, profile, 1)
	a, b, errA, errB := l.next(t)
	if ab, bb := aborted(t, errA), aborted(t, errB); ab.Reason != distill.ReasonGains || bb.Reason != ab.Reason {
		t.Errorf("with Eve: %v; %v", ab, bb)
	}
	if a.Bits != nil || b.Bits != nil || b.QBER > .02 {
		t.Errorf("with Eve: bits %v, QBER %v, want the fibre's own", a.Bits != nil || b.Bits != nil, b.QBER)
	}
	t.Logf("QBER %.4f; %v; %v", b.QBER, errA, errB)
	c.tell(t, "eve 0")
	if a, b, errA, errB := l.next(t); errA != nil || errB != nil || !bytes.Equal(a.Bits, b.Bits) {
		t.Errorf("without her: %v; %v", errA, errB)
	}
}

// Blinded detectors click in every gate that Eve has them click in, one of them and never
// both, whatever was sent. The errors are few; the decoys show it, and the double clicks that
// are missing: either test catches it without the other.
func TestBlinding(t *testing.T) {
	params := bb84.Standard()
	standard, err := StandardPlan().Profile(params)
	ok(t, err)
	anyDoubles, anyGains := standard, standard
	anyDoubles.Doubles = distill.Limits{Max: math.MaxInt32}
	for k := range anyGains.Intensities {
		for _, l := range [][]distill.Limits{anyGains.Key[:], anyGains.Test[:], anyGains.TestErrors[:], anyGains.KeyErrors[:]} {
			l[k].Min = 0
		}
		anyGains.Key[k].Max, anyGains.Test[k].Max = anyGains.KeyBits, anyGains.TestBits
	}
	c := newChannel(t, func(cfg *Config) { cfg.Eve = bb84.Eve{Blind: true} })
	session := int64(0)
	for reason, profile := range map[string]distill.Params{distill.ReasonGains: anyDoubles, distill.ReasonDoubles: anyGains} {
		session++
		alice, bob, hangUp := newWires()
		l := c.linkOver(t, session, alice, bob, profile, 1)
		a, b, errA, errB := l.next(t)
		if ab, bb := aborted(t, errA), aborted(t, errB); ab.Reason != reason || bb.Reason != reason {
			t.Errorf("want %s: %v; %v", reason, ab, bb)
		}
		if a.Bits != nil || b.Bits != nil || b.QBER > .02 {
			t.Errorf("bits %v, QBER %v, want the fibre's own", a.Bits != nil || b.Bits != nil, b.QBER)
		}
		t.Logf("QBER %.4f; %v; %v", b.QBER, errA, errB)
		hangUp()
		l.alice.Close()
		l.bob.Close()
	}
}

// Several blocks may be under way: they end in the order of their numbers, alike at both
// ends, each with a pad of its own, whatever happens to the light of some.
func TestBlocksInFlight(t *testing.T) {
	c := newChannel(t, nil)
	a, b, hangUp := newWires()
	defer hangUp()
	_, profile := Standard()
	l := c.linkOver(t, 1, a, b, profile, 3)
	var last distill.PadName
	number, aborts := int64(0), 0
	type ending struct {
		Block
		err error
	}
	atBob := make(map[int64]ending) // where one that is given up ends before an earlier one
	next := func(want func(reason string) bool) {
		t.Helper()
		a, b, errA, errB := l.next(t)
		atBob[b.Block] = ending{b, errB}
		number++
		for atBob[number].Session == 0 {
			b, errB := l.bob.Rest()
			atBob[b.Block] = ending{b, errB}
		}
		if b, errB = atBob[number].Block, atBob[number].err; a.Block != number {
			t.Fatalf("block %d, want %d", a.Block, number)
		}
		if errA == nil && errB == nil {
			if !bytes.Equal(a.Bits, b.Bits) || len(a.Bits) == 0 || a.Transcript != b.Transcript {
				t.Errorf("block %d: the ends differ", number)
			}
			if a.Spent.Compare(last) <= 0 || a.Spent != b.Spent {
				t.Errorf("block %d: pads %s and %s, after %s", number, a.Spent, b.Spent, last)
			}
			last = a.Spent
			return
		}
		aborts++
		if reason := aborted(t, errA).Reason; reason != aborted(t, errB).Reason || !want(reason) {
			t.Errorf("block %d: %v; %v", number, errA, errB)
		}
	}
	never := func(string) bool { return false }
	for range 2 {
		next(never)
	}
	if l.alice.Pending() < 2 {
		t.Errorf("%d blocks are under way", l.alice.Pending())
	}
	tooWrong := func(reason string) bool { return reason == distill.ReasonQBER }
	c.tell(t, "eve 0.5")
	for range l.alice.Pending() { // they may have been fired before
		next(tooWrong)
	}
	before := aborts
	if next(tooWrong); aborts == before {
		t.Error("a block was not given up")
	}
	c.tell(t, "eve 0")
	for range l.alice.Pending() {
		next(tooWrong)
	}
	next(never)
	for l.alice.Pending() > 0 {
		if _, err := l.alice.Rest(); err != nil {
			t.Errorf("what was under way: %v", err)
		}
	}
	hangUp()
	l.alice.Close()
	l.bob.Close()
}

// Blocks are sealed the moment they are made, also while nobody asks for the next one, and
// nothing of them is left in the clear.
func TestBlocksAreSealedAtOnce(t *testing.T) {
	c := newChannel(t, nil)
	a, b, hangUp := newWires()
	defer hangUp()
	_, profile := Standard()
	l := c.linkOver(t, 1, a, b, profile, 3)
	type sum struct {
		block int64
		bits  [sha256.Size]byte
	}
	made := [2]chan sum{make(chan sum, MaxInFlight), make(chan sum, MaxInFlight)}
	for i, s := range []*Source{l.alice, l.bob} {
		s.cfg.Seal = func(_ context.Context, block Block) error {
			made[i] <- sum{block.Block, sha256.Sum256(block.Bits)}
			return nil
		}
	}
	if _, _, errA, errB := l.next(t); errA != nil || errB != nil {
		t.Fatalf("%v; %v", errA, errB)
	}
	secret := make(map[int64][sha256.Size]byte)
	for range 3 {
		for _, end := range made {
			s := <-end
			if was, ok := secret[s.block]; ok && was != s.bits {
				t.Errorf("block %d: the ends sealed different bits", s.block)
			}
			secret[s.block] = s.bits
		}
	}
	if len(secret) != 3 {
		t.Errorf("%d blocks were sealed", len(secret))
	}
	for range 2 {
		a, err := l.alice.Rest()
		b, bobErr := l.bob.Rest()
		if err != nil || bobErr != nil || !bytes.Equal(a.Bits, make([]byte, len(a.Bits))) || !bytes.Equal(b.Bits, make([]byte, len(b.Bits))) {
			t.Errorf("blocks %d and %d: %v; %v", a.Block, b.Block, err, bobErr)
		}
	}
	hangUp()
	l.alice.Close()
	l.bob.Close()
}

// An end that cannot seal a block has no use for others.
func TestSealFails(t *testing.T) {
	c := newChannel(t, nil)
	l := c.link(t, 1)
	broken := errors.New("the HSM is away")
	l.alice.cfg.Seal = func(context.Context, Block) error { return broken }
	a, _, err, _ := l.next(t)
	if !errors.Is(err, broken) || !bytes.Equal(a.Bits, make([]byte, len(a.Bits))) {
		t.Errorf("%v", err)
	}
	l.hangUp()
	l.alice.Close()
	l.bob.Close()
}

// A block that is given up while an earlier one is still under way does not let a later one
// end before that: pads are spent in order. Here the first block waits, at Bob's end, until
// the third has come as far; the second meets no light.
func TestBlocksEndInOrder(t *testing.T) {
	c := newChannel(t, nil)
	a, b, hangUp := newWires()
	defer hangUp()
	_, profile := Standard()
	l := c.linkOver(t, 1, a, b, profile, 3)
	pad, stored := l.bob.cfg.Pad, l.bob.cfg.Stored
	var verified atomic.Int64
	l.bob.cfg.Pad = func(ctx context.Context, name distill.PadName) (distill.Pad, error) { // which is asked for when a block begins
		if name.Index == 2 {
			if _, err := l.bob.cfg.Box.Detections(ctx, 1, 2); err != nil { // and so it is lost
				t.Error(err)
			}
		}
		return pad(ctx, name)
	}
	third := make(chan struct{})
	l.bob.cfg.Stored = func() int { // which is asked for when the keys were found to be equal
		switch verified.Add(1) {
		case 1:
			<-third
		case 2:
			close(third)
		}
		return stored()
	}
	for number := int64(1); number <= 3; number++ {
		got, _, err, bobErr := l.next(t)
		if got.Block != number {
			t.Fatalf("block %d, want %d: %v; %v", got.Block, number, err, bobErr)
		}
		if number == 2 {
			if reason := aborted(t, err).Reason; reason != distill.ReasonCounts {
				t.Errorf("block 2: %v", err)
			}
		} else if err != nil {
			t.Errorf("block %d: %v", number, err)
		}
	}
	hangUp()
	l.alice.Close()
	l.bob.Close()
}

// A pad that Bob lacks is given up when the blocks before are over, which spend lower ones.
// Here the first block waits, at Bob's end, until the second has been given up and the third
// has come as far.
func TestPadsAreLostInOrder(t *testing.T) {
	c := newChannel(t, nil)
	a, b, hangUp := newWires()
	defer hangUp()
	_, profile := Standard()
	l := c.linkOver(t, 1, a, b, profile, 3)
	find, stored, lose := l.bob.cfg.Pad, l.bob.cfg.Stored, l.alice.cfg.LosePad
	l.bob.cfg.Pad = func(ctx context.Context, name distill.PadName) (distill.Pad, error) {
		if name.Index == 2 {
			return distill.Pad{}, distill.ErrNoPad
		}
		return find(ctx, name)
	}
	lost := make(chan struct{})
	l.alice.cfg.LosePad = func(ctx context.Context, name distill.PadName) error {
		defer close(lost)
		return lose(ctx, name)
	}
	third := make(chan struct{})
	var verified atomic.Int64
	l.bob.cfg.Stored = func() int { // which is asked for when the keys were found to be equal
		switch verified.Add(1) {
		case 1:
			<-third
			select {
			case <-lost:
				t.Error("a pad was given up before the block was over that has a lower one")
			default:
			}
		case 2:
			close(third)
		}
		return stored()
	}
	for number := int64(1); number <= 3; number++ {
		got, _, err, _ := l.next(t)
		if got.Block != number {
			t.Fatalf("block %d, want %d: %v", got.Block, number, err)
		}
		if number == 2 {
			if reason := aborted(t, err).Reason; reason != distill.ReasonPad {
				t.Errorf("block 2: %v", err)
			}
		} else if err != nil {
			t.Errorf("block %d: %v", number, err)
		}
	}
	<-lost
	hangUp()
	l.alice.Close()
	l.bob.Close()
}

// Light goes on while the ends sift what was fired before, as far as the devices hold it:
// here Bob does not answer for the first block until as many are fired, and one more is not.
func TestLightGoesOn(t *testing.T) {
	c := newChannel(t, nil)
	a, b, hangUp := newWires()
	defer hangUp()
	_, profile := Standard()
	l := c.linkOver(t, 1, a, b, profile, maxHeld+1)
	pad := l.bob.cfg.Pad
	l.bob.cfg.Pad = func(ctx context.Context, name distill.PadName) (distill.Pad, error) { // which is asked for when a block begins
		if name.Index == 1 {
			waitStatus(t, c, fmt.Sprintf("blocks=%d ", maxHeld))
		}
		return pad(ctx, name)
	}
	for number := int64(1); number <= maxHeld; number++ {
		got, _, errA, errB := l.next(t)
		if got.Block != number || errA != nil || errB != nil {
			t.Fatalf("block %d, want %d: %v; %v", got.Block, number, errA, errB)
		}
	}
	hangUp()
	l.alice.Close()
	l.bob.Close()
}

// A block begins once, whichever of those under way is the first to.
func TestBlocksBeginOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := &Source{begun: make(map[int64]chan struct{})}
		begun, top := make(map[int64]bool), int64(0)
		for _, block := range rapid.SliceOf(rapid.Int64Range(-1, 3*MaxInFlight)).Draw(t, "blocks") {
			want := block >= 1 && !begun[block] && block > top-MaxInFlight
			if s.mayBegin(block) != want {
				t.Fatalf("block %d may begin: %v, after %v", block, !want, begun)
			}
			if want {
				begun[block], top = true, max(top, block)
			}
			s.spent(block)
			if len(s.begun) > MaxInFlight {
				t.Fatalf("%d numbers are kept", len(s.begun))
			}
		}
	})
	s := &Source{begun: make(map[int64]chan struct{})}
	for _, tc := range []struct {
		block int64
		want  bool
	}{{math.MaxInt64, true}, {math.MaxInt64, false}, {math.MaxInt64 - MaxInFlight, false}, {1, false}} {
		if s.mayBegin(tc.block) != tc.want {
			t.Errorf("block %d may begin: %v", tc.block, !tc.want)
		}
	}
}

// A block waits at Bob's end for the pads of those before it that have begun, whatever has
// begun or ended since, and for no others.
func TestPadsWaitForLowerOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := &Source{begun: make(map[int64]chan struct{})}
		unspent := make(map[int64]bool)
		top := int64(0)
		t.Repeat(map[string]func(*rapid.T){
			"begin": func(t *rapid.T) {
				block := top + rapid.Int64Range(1-MaxInFlight, MaxInFlight).Draw(t, "block")
				if s.mayBegin(block) {
					unspent[block], top = true, max(top, block)
				}
			},
			"spend": func(t *rapid.T) {
				if len(unspent) == 0 {
					t.Skip("no block is under way") // of rapid: this step only, it draws another one
				}
				block := rapid.SampledFrom(slices.Sorted(maps.Keys(unspent))).Draw(t, "block")
				delete(unspent, block)
				waits := s.unspent(block + 1)
				s.spent(block)
				s.spent(block) // once more, when it ends
				for _, lower := range waits {
					select {
					case <-lower:
						return
					default:
					}
				}
				t.Fatalf("block %d is spent, and one above it still waits", block)
			},
			"": func(t *rapid.T) {
				for block := range unspent {
					want := 0
					for lower := range unspent {
						if lower < block {
							want++
						}
					}
					if got := len(s.unspent(block)); got != want {
						t.Fatalf("block %d waits for %d blocks, want %d", block, got, want)
					}
				}
			},
		})
	})
}

// Alice states the terms of a block while that before it still waits for Bob's tag: here he
// does not spend the first pad before he has her terms of the second block. Pads are spent in
// the order of their blocks all the same, at both ends.
func TestTermsDoNotWaitForTags(t *testing.T) {
	c := newChannel(t, nil)
	a, b, hangUp := newWires()
	defer hangUp()
	_, profile := Standard()
	l := c.linkOver(t, 1, a, b, profile, 2)
	var stated atomic.Int64
	second := make(chan struct{})
	accept := l.bob.cfg.Accept
	l.bob.cfg.Accept = func(terms distill.Terms, atoms int) error {
		if stated.Add(1) == 2 {
			close(second)
		}
		return accept(terms, atoms)
	}
	var mu sync.Mutex
	spent := make(map[*Source][]int)
	for _, end := range []*Source{l.alice, l.bob} {
		spend := end.cfg.SpendPad
		end.cfg.SpendPad = func(ctx context.Context, name distill.PadName) error {
			if name.Index == 1 && end == l.bob {
				<-second
			}
			mu.Lock()
			defer mu.Unlock()
			spent[end] = append(spent[end], name.Index)
			return spend(ctx, name)
		}
	}
	for number := int64(1); number <= 2; number++ {
		got, _, errA, errB := l.next(t)
		if got.Block != number || errA != nil || errB != nil {
			t.Fatalf("block %d, want %d: %v; %v", got.Block, number, errA, errB)
		}
	}
	hangUp()
	l.alice.Close()
	l.bob.Close()
	for _, end := range []*Source{l.alice, l.bob} {
		if got := spent[end]; !slices.IsSorted(got) || len(got) < 2 {
			t.Errorf("%s spent pads %v", end.cfg.End, got)
		}
	}
}

// A lane that does not exist, a message on none, or more than was asked for, ends all of them.
func TestLanesOutOfTurn(t *testing.T) {
	for name, said := range map[string][][]byte{ // bodies, the lane before them
		"no such lane": {{0, 1}, {MaxInFlight, 2}},
		"no lane":      {{0, 1}, {}},
		"a flood":      {{2, 1}, {2, 2}, {2, 3}},
	} {
		a, b, hangUp := newWires()
		l := newLanes(a)
		for _, body := range said {
			if err := b.Send(7, body); err != nil {
				t.Fatal(err)
			}
		}
		l.wait()
		if _, _, err := l.lane(5).Recv(); err == nil {
			t.Errorf("%s: nothing ended", name)
		}
		if kind, body, err := l.lane(int(said[0][0])).Recv(); err != nil || kind != 7 || !bytes.Equal(body, []byte{1}) {
			t.Errorf("%s: what came before is lost: %#x %x %v", name, kind, body, err)
		}
		hangUp()
	}
}

// Messages that nobody reads are bounded, on however many lanes they come.
func TestLanesHoldLittle(t *testing.T) {
	a, b, hangUp := newWires()
	defer hangUp()
	l := newLanes(a)
	const eighth = maxWaiting / 8
	say := func(lane byte) {
		t.Helper()
		if err := b.Send(7, append([]byte{lane}, make([]byte, eighth)...)); err != nil {
			t.Fatal(err)
		}
	}
	for lane := range byte(8) {
		say(lane)
	}
	for lane := range 8 { // what is read does not count
		if _, body, err := l.lane(lane).Recv(); err != nil || len(body) != eighth {
			t.Fatal(err)
		}
	}
	for lane := range byte(9) {
		say(lane)
	}
	l.wait()
	if _, _, err := l.lane(8).Recv(); err == nil {
		t.Error("nothing ended")
	}
}

// A fresh session starts after the restart of both ends on the same channel.
func TestSourceSessions(t *testing.T) {
	c := newChannel(t, nil)
	old := c.link(t, 1)
	old.hangUp()
	if _, err := old.bob.Next(t.Context()); err == nil {
		t.Error("a block came through a closed channel")
	}
	l := c.link(t, 2)
	if a, b, errA, errB := l.next(t); errA != nil || errB != nil || !bytes.Equal(a.Bits, b.Bits) {
		t.Fatalf("a block of the new session: %v; %v", errA, errB)
	}
	if _, err := old.alice.Next(t.Context()); err == nil {
		t.Error("the old session still fires")
	}
}

// Light that met no receiver is a block without detections: an abort at both ends,
// and the session goes on.
func TestSourceInTheDark(t *testing.T) {
	c := newChannel(t, nil)
	l := c.link(t, 1)
	pad := l.bob.cfg.Pad
	var forget sync.Once
	l.bob.cfg.Pad = func(ctx context.Context, name distill.PadName) (distill.Pad, error) { // which is asked for when a block begins
		forget.Do(func() {
			if err := l.bob.cfg.Box.Seed(t.Context(), seedOf(7), 1); err != nil { // the receiver forgets what it saw
				t.Error(err)
			}
		})
		return pad(ctx, name)
	}
	a, b, errA, errB := l.next(t)
	if ab, bb := aborted(t, errA), aborted(t, errB); ab.Reason != distill.ReasonCounts || bb.Reason != ab.Reason {
		t.Errorf("in the dark: %v; %v", ab, bb)
	}
	if a.Detected != 0 || b.Detected != 0 {
		t.Errorf("in the dark: %d and %d detections", a.Detected, b.Detected)
	}
	if _, b, errA, errB := l.next(t); errA != nil || errB != nil || b.Block != 2 {
		t.Errorf("the block after: number %d, %v; %v", b.Block, errA, errB)
	}
}

func TestNewSourceRefuses(t *testing.T) {
	c := newChannel(t, nil)
	box, other := c.open(t, handover.Alice), c.open(t, handover.Bob)
	_, profile := Standard()
	for name, spoil := range map[string]func(*SourceConfig){
		"no key":            func(s *SourceConfig) { s.Params.SecretBits = 0 },
		"no end":            func(s *SourceConfig) { s.End = 'c' },
		"the other's box":   func(s *SourceConfig) { s.Box = other },
		"no box":            func(s *SourceConfig) { s.Box = nil },
		"negative session":  func(s *SourceConfig) { s.Session = -1 },
		"no channel":        func(s *SourceConfig) { s.Channel = nil },
		"no terms":          func(s *SourceConfig) { s.Terms = nil },
		"no accept":         func(s *SourceConfig) { s.End, s.Box = handover.Bob, other },
		"no random":         func(s *SourceConfig) { s.Random = nil },
		"too little random": func(s *SourceConfig) { s.Random = strings.NewReader("short") },
	} {
		a, _, hangUp := newWires()
		hangUp()
		cfg := sourceConfig(handover.Alice, a, box, 1, profile)
		spoil(&cfg)
		if _, err := NewSource(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// The ends must be in the same session before the first light.
func TestSourcesMeet(t *testing.T) {
	c := newChannel(t, nil)
	_, profile := Standard()
	for name, say := range map[string]message{
		"another session": {kindSeeded, put8(nil, 2)},
		"another kind":    {1, put8(nil, 1)},
		"too short":       {kindSeeded, nil},
	} {
		a, b, hangUp := newWires()
		errA, _ := both(
			func() error {
				_, err := NewSource(t.Context(), sourceConfig(handover.Alice, a, c.open(t, handover.Alice), 1, profile))
				return err
			},
			func() error {
				if _, _, err := b.Recv(); err != nil {
					return err
				}
				return b.Send(say.kind, say.body)
			})
		if errA == nil {
			t.Errorf("%s: accepted", name)
		}
		hangUp()
	}
}
