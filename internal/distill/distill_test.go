package distill

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// anything lets any count pass.
var anything = [MaxIntensities]Limits{{0, 1 << 24}, {0, 1 << 24}, {0, 1 << 24}}

// errorsUpTo shares out so many errors, half to the decoy.
func errorsUpTo(n int) [MaxIntensities]Limits {
	return [MaxIntensities]Limits{{0, n / 4}, {0, n / 2}, {0, n / 4}}
}

// Profiles of the tests: one as the lab's, one of a single frame that is as small as can
// be and one with a frame or more to reconcile at a time.
var (
	standard = Params{
		Gates: 5_200_000, KeyBits: 1 << 19, FrameBits: 1 << 18, TestBits: 1 << 16, PX: .73, Intensities: 3,
		Key: anything, Test: anything, TestErrors: errorsUpTo(6000), KeyErrors: anything, Doubles: Limits{0, 1 << 20},
		LeakLimit: 110_000, EpsSec: 1e-14, SecretBits: 128_000, Pads: 2,
	}
	small = Params{
		Gates: 20000, KeyBits: 1 << 12, FrameBits: 1 << 10, TestBits: 811, PX: 2. / 3, Intensities: 3,
		Key: anything, Test: anything, TestErrors: errorsUpTo(88), KeyErrors: anything, Doubles: Limits{0, 1 << 20},
		LeakLimit: 2400, EpsSec: 1e-10, SecretBits: 1045, Pads: 2,
	}
)

// oneDecoy is p with the rules of a source with one decoy.
func oneDecoy(p Params) Params {
	p.Intensities = 2
	for _, l := range []*[MaxIntensities]Limits{&p.Key, &p.Test, &p.TestErrors, &p.KeyErrors} {
		l[0].Max += l[2].Max
		l[2] = Limits{}
	}
	return p
}

// click is a gate at which Bob's detectors clicked.
type click struct {
	gate       int64
	basis, bit byte
	double     bool
}

// pulse is what Alice sent in a gate.
type pulse struct{ bit, basis, intensity byte }

// light is what a block left at both ends, made without physics.
type light struct {
	clicks []click
	sent   map[int64]pulse
}

func shine(random *rand.Rand, p Params, detected, errorRate float64) light {
	l := light{sent: make(map[int64]pulse)}
	basis := func() byte {
		if random.Float64() < p.PX {
			return KeyBasis
		}
		return TestBasis
	}
	for gate := range p.Gates {
		if random.Float64() >= detected {
			continue
		}
		d := click{gate, basis(), byte(random.Uint32() & 1), random.Uint32()%1000 == 0}
		a, bit := basis(), byte(random.Uint32()&1)
		if a == d.basis {
			bit = d.bit
			if random.Float64() < errorRate {
				bit ^= 1
			}
		}
		l.sent[gate] = pulse{bit, a, byte(random.IntN(p.Intensities))}
		l.clicks = append(l.clicks, d)
	}
	return l
}

func (l light) answer(_ context.Context, gates Gates) (Sent, error) {
	var pulses []pulse
	for _, gate := range gates.All() {
		pulses = append(pulses, l.sent[gate])
	}
	return sentOf(pulses), nil
}

func (l light) detected(context.Context, int64, int64) (Detections, error) {
	return detectionsOf(l.clicks), nil
}

func sentOf(pulses []pulse) Sent {
	size := packedBytes(len(pulses))
	s := Sent{Bits: make([]byte, size), Bases: make([]byte, size), Low: make([]byte, size), High: make([]byte, size)}
	for i, p := range pulses {
		setBit(s.Bits, i, p.bit)
		setBit(s.Bases, i, p.basis)
		setBit(s.Low, i, p.intensity&1)
		setBit(s.High, i, p.intensity>>1)
	}
	return s
}

func detectionsOf(clicks []click) Detections {
	size := packedBytes(len(clicks))
	d := Detections{Bases: make([]byte, size), Bits: make([]byte, size), Doubles: make([]byte, size)}
	for i, c := range clicks {
		d.Gates.Add(c.gate)
		setBit(d.Bases, i, c.basis)
		setBit(d.Bits, i, c.bit)
		if c.double {
			setBit(d.Doubles, i, 1)
		}
	}
	return d
}

// reserve is the pads of an end: one for each number, all alike at both ends.
type reserve struct {
	last  PadName
	spent []PadName
}

func padNamed(name PadName) (p Pad) {
	p.Name = name
	random := rand.NewChaCha8(seedOf(int(name.Session)<<20 | int(name.Block)<<8 | name.Index))
	_, _ = random.Read(p.Bits[:])
	return p
}

func (r *reserve) next(context.Context) (Pad, error) {
	return padNamed(PadName{r.last.Session, r.last.Block, r.last.Index + 1}), nil
}

func (r *reserve) find(_ context.Context, name PadName) (Pad, error) {
	if name.Compare(r.last) <= 0 {
		return Pad{}, ErrNoPad
	}
	return padNamed(name), nil
}

func (r *reserve) spend(_ context.Context, name PadName) error {
	if name.Compare(r.last) <= 0 {
		return errors.New("spent twice")
	}
	r.last, r.spent = name, append(r.spent, name)
	return nil
}

// message is one message of a pipe.
type message struct {
	kind byte
	body []byte
}

// pipe is one end of an in-memory channel. meddle, if not nil, says what becomes of a
// message that this end sends.
type pipe struct {
	in, out chan message
	closed  chan struct{}
	meddle  func(message) []message
}

var errClosed = errors.New("pipe closed")

func newPipe() (a, b *pipe, closeBoth func()) {
	x, y, closed := make(chan message, 64), make(chan message, 64), make(chan struct{})
	return &pipe{in: x, out: y, closed: closed}, &pipe{in: y, out: x, closed: closed},
		sync.OnceFunc(func() { close(closed) })
}

func (p *pipe) Send(kind byte, body ...[]byte) error {
	messages := []message{{kind, bytes.Join(body, nil)}}
	if p.meddle != nil {
		messages = p.meddle(messages[0])
	}
	for _, m := range messages {
		select {
		case p.out <- m:
		case <-p.closed:
			return errClosed
		}
	}
	return nil
}

func (p *pipe) Recv() (byte, []byte, error) {
	select {
	case m := <-p.in: // what was sent before the pipe was closed still arrives
		return m.kind, m.body, nil
	default:
	}
	select {
	case m := <-p.in:
		return m.kind, m.body, nil
	case <-p.closed:
		return 0, nil, errClosed
	}
}

// ends is a block at both ends of a pipe.
type ends struct {
	alice        AliceConfig
	bob          BobConfig
	padsA, padsB *reserve
}

func newEnds(p Params, l light, seed uint64) *ends {
	e := &ends{padsA: &reserve{}, padsB: &reserve{}}
	e.alice = AliceConfig{
		Params: p, Link: "a-b", Session: 7, Block: 3, Sent: l.answer,
		Random:  rand.NewChaCha8(seedOf(int(seed))),
		NextPad: e.padsA.next, SpendPad: e.padsA.spend,
		Terms: func(atoms, stored int) Terms { return Terms{Epoch: 1000, Owners: "ab"} },
	}
	e.bob = BobConfig{
		Params: p, Link: "a-b", Session: 7, MinBlock: 3, Detections: l.detected,
		Pad: e.padsB.find, SpendPad: e.padsB.spend,
		Stored: func() int { return 42 },
		Accept: func(Terms, int) error { return nil },
	}
	return e
}

// run distils the block. An end that fails calls closeBoth, also on an Abort: if the
// other end does not know of it, somebody lied.
func (e *ends) run(a, b *pipe, closeBoth func()) (atAlice, atBob Outcome, aliceErr, bobErr error) {
	var wg sync.WaitGroup
	closeOn := func(err error) {
		if err != nil {
			closeBoth()
		}
	}
	wg.Go(func() {
		atAlice, aliceErr = Alice(context.Background(), a, e.alice)
		closeOn(aliceErr)
	})
	wg.Go(func() {
		atBob, bobErr = Bob(context.Background(), b, e.bob)
		closeOn(bobErr)
	})
	wg.Wait()
	return atAlice, atBob, aliceErr, bobErr
}

// tight is standard with no more bits to leak than reconciliation takes at two percent.
var tight = func() Params {
	p := standard
	p.LeakLimit = 78_000
	return p
}()

// detection is a chance of it that leaves enough sifted bits.
func detection(p Params) float64 {
	need := max(float64(p.KeyBits)/(p.PX*p.PX), float64(p.TestBits)/((1-p.PX)*(1-p.PX)))
	return min(.95, 1.1*need/float64(p.Gates))
}

func TestBlock(t *testing.T) {
	for _, test := range []struct {
		name      string
		params    Params
		errorRate float64
		from, to  float64 // the efficiency
		rounds    int     // at most
	}{
		{"one percent", standard, 0.01, 1.1, 1.7, 60},
		{"two percent", standard, 0.02, 1.1, 1.4, 60},
		{"no bits to spare", tight, 0.02, 1, 1.05, 400},
		{"one decoy", oneDecoy(small), 0.02, 1, 2.3, 60},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := shine(rand.New(rand.NewPCG(1, 1)), test.params, detection(test.params), test.errorRate)
			e := newEnds(test.params, l, 1)
			var stages []string
			e.alice.Progress = func(stage string, done float64) {
				if done == 1 {
					stages = append(stages, stage)
				}
			}
			e.alice.Terms = func(atoms, stored int) Terms {
				if atoms != (test.params.SecretBits-2*8*PadBytes)/256 || stored != 42 {
					t.Errorf("terms are asked for %d atoms where %d are stored", atoms, stored)
				}
				return Terms{Epoch: -5, Owners: "abab"}
			}
			a, b, err, bobErr := e.run(newPipe())
			if err != nil || bobErr != nil {
				t.Fatalf("Alice: %v, Bob: %v", err, bobErr)
			}
			if !bytes.Equal(a.Bits, b.Bits) || len(a.Bits) != packedBytes(test.params.KeyedBits()) {
				t.Fatalf("the secrets differ, or are of %d and %d bytes", len(a.Bits), len(b.Bits))
			}
			if bytes.Equal(a.Bits, make([]byte, len(a.Bits))) {
				t.Fatal("the secret is zero")
			}
			want := []string{StageSift, StageEstimate, StageReconcile, StageVerify, StageAmplify}
			if !slices.Equal(stages, want) {
				t.Errorf("stages: got %v, want %v", stages, want)
			}
			if a.Efficiency < test.from || a.Efficiency > test.to || a.Leak > test.params.LeakLimit || a.Rounds > test.rounds {
				t.Errorf("%d bits leaked of %d that may, efficiency %v, in %d rounds", a.Leak, test.params.LeakLimit, a.Efficiency, a.Rounds)
			}
			t.Logf("QBER %.4f, of the key %.4f, leak %d, f %.4f, %d rounds", a.QBER, a.KeyQBER, a.Leak, a.Efficiency, a.Rounds)
			if a.Pads[0].Bits == a.Pads[1].Bits || a.Pads[1].Name != (PadName{7, 3, 1}) {
				t.Errorf("pads of the block: %s and %s", a.Pads[0].Name, a.Pads[1].Name)
			}
			if len(e.padsA.spent) != 1 || !slices.Equal(e.padsA.spent, e.padsB.spent) {
				t.Errorf("pads spent: %v and %v", e.padsA.spent, e.padsB.spent)
			}
			if b.Doubles == 0 {
				t.Error("no double clicks")
			}
			b.Doubles = 0
			if diff := cmp.Diff(a, b); diff != "" {
				t.Errorf("outcomes differ:\n%s", diff)
			}
			if a.Terms != (Terms{Epoch: -5, Owners: "abab"}) || a.Session != 7 || a.Block != 3 {
				t.Errorf("outcome: %+v", a)
			}
		})
	}
}

// TestAborts shows that both ends give the block up for the same reason, without any
// bits, and that the same channel then carries a good block.
func TestAborts(t *testing.T) {
	refused := errors.New("another epoch here")
	for _, test := range []struct {
		reason    string
		detected  float64
		errorRate float64
		change    func(*ends)
	}{
		{ReasonCounts, 0.1, 0.01, nil},
		{ReasonCounts, 0, 0.01, nil},
		{ReasonQBER, 0.9, 0.25, nil},
		{ReasonLeak, 0.9, 0.03, func(e *ends) { e.alice.LeakLimit, e.bob.LeakLimit = 150, 150 }},
		{ReasonTerms, 0.9, 0.03, func(e *ends) { e.bob.Accept = func(Terms, int) error { return refused } }},
		{ReasonPad, 0.9, 0.03, func(e *ends) { e.padsB.last = PadName{5, 0, 0} }},
		{ReasonDoubles, 0.9, 0.03, func(e *ends) { e.alice.Doubles, e.bob.Doubles = Limits{0, 3}, Limits{0, 3} }},
		{ReasonBases, 0.9, 0.03, func(e *ends) { e.alice.PX, e.bob.PX = .71, .71 }},
		{ReasonRuns, 0.9, 0.03, func(e *ends) {
			all := e.bob.Detections
			e.bob.Detections = func(ctx context.Context, session, block int64) (Detections, error) {
				d, err := all(ctx, session, block)
				for i := range d.Bits {
					d.Bits[i] &= 0x77 // detector 1 is tired at every fourth
				}
				return d, err
			}
		}},
		{ReasonGains, 0.9, 0.03, func(e *ends) { e.alice.Key[1].Max, e.bob.Key[1].Max = 900, 900 }},
		{ReasonGains, 0.9, 0.03, func(e *ends) { e.alice.Test[2].Min, e.bob.Test[2].Min = 600, 600 }},
		{ReasonErrors, 0.9, 0.03, func(e *ends) {
			for _, p := range []*Params{&e.alice.Params, &e.bob.Params} {
				*p = oneDecoy(*p)
				p.KeyErrors[0].Max = 20
			}
			all := e.alice.Sent
			e.alice.Sent = func(ctx context.Context, gates Gates) (Sent, error) {
				sent, err := all(ctx, gates)
				clear(sent.High) // no third intensity
				return sent, err
			}
		}},
	} {
		t.Run(test.reason, func(t *testing.T) {
			random := rand.New(rand.NewPCG(2, 2))
			a, b, closeBoth := newPipe()
			e := newEnds(small, shine(random, small, test.detected, test.errorRate), 1)
			if test.change != nil {
				test.change(e)
			}
			atAlice, atBob, aliceErr, bobErr := e.run(a, b, func() {})
			for name, err := range map[string]error{"Alice": aliceErr, "Bob": bobErr} {
				abort, ok := err.(*Abort)
				if !ok || abort.Reason != test.reason {
					t.Errorf("%s: got %v, want %q", name, err, test.reason)
				}
				if ok && test.reason == ReasonQBER && (abort.QBER < 0.15 || abort.QBER > 0.35) {
					t.Errorf("%s: error rate %v", name, abort.QBER)
				}
			}
			if test.reason == ReasonTerms && (!errors.Is(bobErr, refused) || errors.Is(aliceErr, refused)) {
				t.Errorf("Bob's reason: Alice %v, Bob %v", aliceErr, bobErr)
			}
			if atAlice.Bits != nil || atBob.Bits != nil || atAlice.Block != 3 || atBob.Block != 3 {
				t.Errorf("outcomes: %+v, %+v", atAlice, atBob)
			}

			good := newEnds(small, shine(random, small, 0.9, 0.01), 2)
			atAlice, atBob, aliceErr, bobErr = good.run(a, b, closeBoth)
			atBob.Doubles = 0
			if aliceErr != nil || bobErr != nil || !cmp.Equal(atAlice, atBob) {
				t.Errorf("the next block: Alice %v, Bob %v", aliceErr, bobErr)
			}
		})
	}
}

// An abort speaks of an error rate only if there is one.
func TestAbortSaysWhatIsKnown(t *testing.T) {
	cause := errors.New("0 key bits")
	for want, abort := range map[string]*Abort{
		"block aborted: counts too low: 0 key bits":                                 {Reason: ReasonCounts, Err: cause},
		"block aborted: pad unknown":                                                {Reason: ReasonPad, Peer: true},
		"block aborted: error rate above tolerance (error rate 25.00 %)":            {Reason: ReasonQBER, QBER: .25},
		"block aborted: verification failed (error rate 0.00 %)":                    {Reason: ReasonVerify},
		"block aborted: double clicks out of range (error rate 1.00 %): 0 key bits": {Reason: ReasonDoubles, QBER: .01, Err: cause},
	} {
		if got := abort.Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestVerificationFails hands Bob another tag than Alice's.
func TestVerificationFails(t *testing.T) {
	a, b, closeBoth := newPipe()
	a.meddle = func(m message) []message {
		if m.kind == kindTag {
			m.body[20] ^= 1
		}
		return []message{m}
	}
	e := newEnds(small, shine(rand.New(rand.NewPCG(3, 3)), small, 0.9, 0.03), 1)
	_, _, aliceErr, bobErr := e.run(a, b, closeBoth)
	for _, err := range []error{aliceErr, bobErr} {
		if abort, ok := err.(*Abort); !ok || abort.Reason != ReasonVerify {
			t.Errorf("got %v", err)
		}
	}
}

func TestBeginIsRefused(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(4, 4)), small, 0.9, 0.01)
	for name, change := range map[string]func(*ends){
		"another link":     func(e *ends) { e.bob.Link = "a-c" },
		"another session":  func(e *ends) { e.bob.Session = 8 },
		"a repeated block": func(e *ends) { e.bob.MinBlock = 4 },
		"another profile":  func(e *ends) { e.bob.SecretBits-- },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnds(small, l, 1)
			change(e)
			_, _, aliceErr, bobErr := e.run(newPipe())
			if aliceErr == nil || bobErr == nil {
				t.Errorf("Alice: %v, Bob: %v", aliceErr, bobErr)
			}
		})
	}
}

// TestSecretsAreWiped keeps hold of what the callbacks hand over.
func TestSecretsAreWiped(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(5, 6)), small, 0.9, 0.01)
	e := newEnds(small, l, 1)
	var sent Sent
	e.alice.Sent = func(ctx context.Context, gates Gates) (Sent, error) {
		list, err := l.answer(ctx, gates)
		sent = list
		return list, err
	}
	seen := detectionsOf(l.clicks)
	e.bob.Detections = func(context.Context, int64, int64) (Detections, error) { return seen, nil }
	if _, _, aliceErr, bobErr := e.run(newPipe()); aliceErr != nil || bobErr != nil {
		t.Fatalf("Alice %v, Bob %v", aliceErr, bobErr)
	}
	if ones(sent.Bits)+ones(sent.Bases)+ones(sent.Low)+ones(sent.High) != 0 {
		t.Error("Alice's bits are left in memory")
	}
	if ones(seen.Bits) != 0 {
		t.Error("Bob's bits are left in memory")
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	l := shine(rand.New(rand.NewPCG(5, 5)), small, 0.9, 0.01)
	e := newEnds(small, l, 1)
	e.alice.Progress = func(stage string, done float64) {
		if stage == StageReconcile {
			cancel()
		}
	}
	a, b, closeBoth := newPipe()
	done := make(chan error)
	go func() {
		_, err := Bob(context.Background(), b, e.bob)
		done <- err
	}()
	out, err := Alice(ctx, a, e.alice)
	if !errors.Is(err, context.Canceled) || out.Bits != nil {
		t.Errorf("Alice: %v", err)
	}
	closeBoth()
	if err := <-done; err == nil {
		t.Error("Bob has a block that Alice has not")
	}
}

func TestParamsValidate(t *testing.T) {
	for _, p := range []Params{standard, small, oneDecoy(standard), oneDecoy(small)} {
		if err := p.Validate(); err != nil {
			t.Errorf("%+v: %v", p, err)
		}
	}
	digests := map[[32]byte]string{standard.digest(): "the profile"}
	for name, change := range map[string]func(*Params){
		"key bits no multiple":     func(p *Params) { p.KeyBits-- },
		"frame no power of two":    func(p *Params) { p.FrameBits *= 3 },
		"no test bits":             func(p *Params) { p.TestBits = 0 },
		"too few gates":            func(p *Params) { p.Gates = 1000 },
		"one intensity":            func(p *Params) { p.Intensities = 1 },
		"too many errors":          func(p *Params) { p.TestErrors[0].Max = p.TestBits / 8 },
		"key limits":               func(p *Params) { p.Key[2].Max = -1 },
		"test limits":              func(p *Params) { p.Test[1].Min = p.Test[1].Max + 1 },
		"limits of key errors":     func(p *Params) { p.KeyErrors[0].Min = -1 },
		"limits of double clicks":  func(p *Params) { p.Doubles.Min = -1 },
		"secret":                   func(p *Params) { p.SecretBits = 0 },
		"leak":                     func(p *Params) { p.LeakLimit = p.KeyBits },
		"basis":                    func(p *Params) { p.PX = 1 },
		"epsilon":                  func(p *Params) { p.EpsSec = 0 },
		"a reserve that runs dry":  func(p *Params) { p.Pads = 1 },
		"nothing left but the pad": func(p *Params) { p.SecretBits = 2*8*PadBytes + 255 },
	} {
		p := standard
		change(&p)
		if p.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
		if other := digests[p.digest()]; other != "" {
			t.Errorf("%s: the same digest as %s", name, other)
		}
		digests[p.digest()] = name
	}
}

// BenchmarkBlock is a block of the lab at both ends, without the light.
func BenchmarkBlock(b *testing.B) {
	l := shine(rand.New(rand.NewPCG(6, 6)), standard, detection(standard), 0.015)
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		e := newEnds(standard, l, uint64(i))
		if _, _, aliceErr, bobErr := e.run(newPipe()); aliceErr != nil || bobErr != nil {
			b.Fatal(aliceErr, bobErr)
		}
	}
	b.ReportMetric(float64(standard.SecretBits)*float64(b.N)/b.Elapsed().Seconds()/1e6, "secret-Mbit/s")
}

// TestEstimated: an abort has an error rate only if test bits were compared before it; not
// one for a reason that a source without test bits has.
func TestEstimated(t *testing.T) {
	t.Parallel()
	for reason, want := range map[string]bool{
		ReasonPad: false, ReasonCounts: false, ReasonBases: false, "the devices have handed out different keys": false, "": false,
		ReasonDoubles: true, ReasonRuns: true, ReasonGains: true, ReasonQBER: true, ReasonLeak: true, ReasonErrors: true, ReasonVerify: true, ReasonTerms: true,
	} {
		a := Abort{Reason: reason}
		if a.Estimated() != want || strings.Contains(a.Error(), "error rate 0") != want {
			t.Errorf("%q: estimated: %t; %v", reason, a.Estimated(), &a)
		}
	}
}
