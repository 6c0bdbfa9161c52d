package distill

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Profiles of the tests. The textbook one and the lossier one are those of the golden
// values of Tomamichel et al. for n = 2^18, k = 2^16.
var (
	textbook = Params{
		Gates: 5_200_000, KeyBits: 1 << 18, TestBits: 1 << 16, QTol: 0.02, PX: 2. / 3,
		LeakLimit: 40785, EpsSec: 1e-10, SecretBits: 155840,
	}
	noisy = Params{
		Gates: 5_200_000, KeyBits: 1 << 18, TestBits: 1 << 16, QTol: 0.05, PX: 2. / 3,
		LeakLimit: 82585, EpsSec: 1e-10, SecretBits: 81980,
	}
	small = Params{
		Gates: 5000, KeyBits: 1 << 10, TestBits: 203, QTol: 0.1, PX: 2. / 3,
		LeakLimit: 600, EpsSec: 1e-10, SecretBits: 261,
	}
)

// light is what a block left at both ends, made without physics.
type light struct {
	detections  []Detection
	bases, bits []byte // Alice's, packed, by gate
}

func shine(random *rand.Rand, p Params, detected, errorRate float64) light {
	l := light{bases: make([]byte, packedBytes(int(p.Gates))), bits: make([]byte, packedBytes(int(p.Gates)))}
	basis := func() byte {
		if random.Float64() < p.PX {
			return KeyBasis
		}
		return TestBasis
	}
	for gate := range int(p.Gates) {
		if random.Float64() >= detected {
			continue
		}
		d := Detection{Gate: int64(gate), Basis: basis(), Bit: byte(random.Uint32() & 1)}
		a, bit := basis(), byte(random.Uint32()&1)
		if a == d.Basis {
			bit = d.Bit
			if random.Float64() < errorRate {
				bit ^= 1
			}
		}
		setBit(l.bases, gate, a)
		setBit(l.bits, gate, bit)
		l.detections = append(l.detections, d)
	}
	return l
}

func (l light) sent(_ context.Context, gates []int64) (bases, values []byte, err error) {
	bases, values = make([]byte, packedBytes(len(gates))), make([]byte, packedBytes(len(gates)))
	for i, gate := range gates {
		setBit(bases, i, bitAt(l.bases, int(gate)))
		setBit(values, i, bitAt(l.bits, int(gate)))
	}
	return bases, values, nil
}

func (l light) detected(context.Context, int64, int64) ([]Detection, error) {
	return slices.Clone(l.detections), nil
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

func (p *pipe) Send(kind byte, body []byte) error {
	messages := []message{{kind, bytes.Clone(body)}}
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
	alice AliceConfig
	bob   BobConfig
}

func newEnds(p Params, l light, seed uint64) *ends {
	return &ends{
		alice: AliceConfig{
			Params: p, Link: "a-b", Session: 7, Block: 3, Sent: l.sent,
			Random: rand.NewChaCha8(seedOf(int(seed))),
			Terms:  func(atoms, stored int) Terms { return Terms{Epoch: 1000, Owners: "ab"} },
		},
		bob: BobConfig{
			Params: p, Link: "a-b", Session: 7, MinBlock: 3, Detections: l.detected,
			Stored: func() int { return 42 },
			Accept: func(Terms, int) error { return nil },
		},
	}
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

func TestBlock(t *testing.T) {
	for _, test := range []struct {
		name      string
		params    Params
		errorRate float64
		limit     float64 // of the efficiency
	}{
		{"half a percent", textbook, 0.005, 1.06},
		{"one percent", textbook, 0.01, 1.06},
		{"two percent", noisy, 0.02, 1.06},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := shine(rand.New(rand.NewPCG(1, 1)), test.params, 0.126, test.errorRate)
			e := newEnds(test.params, l, 1)
			var stages []string
			e.alice.Progress = func(stage string, done float64) {
				if done == 1 {
					stages = append(stages, stage)
				}
			}
			e.alice.Terms = func(atoms, stored int) Terms {
				if atoms != test.params.SecretBits/256 || stored != 42 {
					t.Errorf("terms are asked for %d atoms where %d are stored", atoms, stored)
				}
				return Terms{Epoch: -5, Owners: "abab"}
			}
			a, b, err, bobErr := e.run(newPipe())
			if err != nil || bobErr != nil {
				t.Fatalf("Alice: %v, Bob: %v", err, bobErr)
			}
			if !bytes.Equal(a.Bits, b.Bits) || len(a.Bits) != packedBytes(test.params.SecretBits) {
				t.Fatalf("the secrets differ, or are of %d and %d bytes", len(a.Bits), len(b.Bits))
			}
			if bytes.Equal(a.Bits, make([]byte, len(a.Bits))) {
				t.Fatal("the secret is zero")
			}
			want := []string{StageSift, StageEstimate, StageReconcile, StageVerify, StageAmplify}
			if !slices.Equal(stages, want) {
				t.Errorf("stages: got %v, want %v", stages, want)
			}
			if a.Efficiency == 0 || a.Efficiency > test.limit {
				t.Errorf("efficiency: %v", a.Efficiency)
			}
			t.Logf("QBER %.4f, of the key %.4f, leak %d, f %.4f, %d rounds", a.QBER, a.KeyQBER, a.Leak, a.Efficiency, a.Rounds)
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
			if aliceErr != nil || bobErr != nil || !cmp.Equal(atAlice, atBob) {
				t.Errorf("the next block: Alice %v, Bob %v", aliceErr, bobErr)
			}
		})
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
	var bits []byte
	e.alice.Sent = func(ctx context.Context, gates []int64) (_, values []byte, err error) {
		bases, values, err := l.sent(ctx, gates)
		bits = values
		return bases, values, err
	}
	e.bob.Detections = func(context.Context, int64, int64) ([]Detection, error) { return l.detections, nil }
	if _, _, aliceErr, bobErr := e.run(newPipe()); aliceErr != nil || bobErr != nil {
		t.Fatalf("Alice %v, Bob %v", aliceErr, bobErr)
	}
	if !bytes.Equal(bits, make([]byte, len(bits))) {
		t.Error("Alice's bits are left in memory")
	}
	if slices.ContainsFunc(l.detections, func(d Detection) bool { return d.Bit != 0 }) {
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
	for _, p := range []Params{textbook, noisy, small} {
		if err := p.Validate(); err != nil {
			t.Errorf("%+v: %v", p, err)
		}
	}
	for name, change := range map[string]func(*Params){
		"key bits no power of two": func(p *Params) { p.KeyBits-- },
		"no test bits":             func(p *Params) { p.TestBits = 0 },
		"too few gates":            func(p *Params) { p.Gates = 1000 },
		"tolerance":                func(p *Params) { p.QTol = 0.12 },
		"secret":                   func(p *Params) { p.SecretBits = 0 },
		"leak":                     func(p *Params) { p.LeakLimit = p.KeyBits },
		"basis":                    func(p *Params) { p.PX = 1 },
		"epsilon":                  func(p *Params) { p.EpsSec = 0 },
	} {
		p := textbook
		change(&p)
		if p.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func BenchmarkBlock(b *testing.B) {
	l := shine(rand.New(rand.NewPCG(6, 6)), textbook, 0.126, 0.01)
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		e := newEnds(textbook, l, uint64(i))
		if _, _, aliceErr, bobErr := e.run(newPipe()); aliceErr != nil || bobErr != nil {
			b.Fatal(aliceErr, bobErr)
		}
	}
	b.ReportMetric(float64(textbook.SecretBits)*float64(b.N)/b.Elapsed().Seconds()/1e6, "secret-Mbit/s")
}
