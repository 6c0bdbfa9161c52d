package qlink

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// channel is a Server that runs for the length of a test.
type channel struct {
	Config
	server *Server
	stop   func() // ends it and checks that it ended well; may be called more than once
}

// newChannel starts the lab's link with a fixed physics seed.
func newChannel(t testing.TB, change func(*Config)) *channel {
	t.Helper()
	dir := shortDir(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	cfg := Config{
		AliceSocket: path("a"), BobSocket: path("b"), ControlSocket: path("c"),
		AliceSecretFile: path("a.secret"), BobSecretFile: path("b.secret"),
		Params: bb84.Standard(), PhysicsSeed: 1, Log: slog.New(slog.DiscardHandler),
	}
	writeSecret(t, cfg.AliceSecretFile, "alice's secret, long enough\n", 0o600)
	writeSecret(t, cfg.BobSecretFile, "bob's secret, long enough\n", 0o600)
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	server, err := Listen(ctx, cfg)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx) }()
	c := &channel{Config: cfg, server: server}
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(c.stop)
	return c
}

// shortDir is a private folder with a name that leaves room for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qlink")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func writeSecret(t testing.TB, path, secret string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(secret), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func (c *channel) open(t testing.TB, end handover.End) *Box {
	t.Helper()
	socket, secret := c.AliceSocket, c.AliceSecretFile
	if end == handover.Bob {
		socket, secret = c.BobSocket, c.BobSecretFile
	}
	b, err := OpenBox(t.Context(), socket, secret, end)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// seeded opens both ends and seeds them for a session.
func (c *channel) seeded(t *testing.T, session int64) (alice, bob *Box) {
	t.Helper()
	alice, bob = c.open(t, handover.Alice), c.open(t, handover.Bob)
	ok(t, alice.Seed(t.Context(), seedOf(1), session))
	ok(t, bob.Seed(t.Context(), seedOf(2), session))
	return alice, bob
}

func seedOf(b byte) (seed [bb84.SeedSize]byte) {
	for i := range seed {
		seed[i] = b
	}
	return seed
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func refused(t *testing.T, what string, err error) {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) {
		t.Errorf("%s: got %v, want a refusal", what, err)
	}
}

func (c *channel) tell(t testing.TB, line string) string {
	t.Helper()
	answer, err := Command(t.Context(), c.ControlSocket, line)
	ok(t, err)
	return answer
}

// exchange fires a block, fetches both halves and counts what two ends would.
func exchange(t *testing.T, alice, bob *Box, session, block, gates int64) (detections []bb84.Detection, qber float64) {
	t.Helper()
	ok(t, alice.Fire(t.Context(), session, block, gates))
	seen, err := bob.Detections(t.Context(), session, block)
	ok(t, err)
	sent, err := alice.Sent(t.Context(), session, block, seen.Gates)
	ok(t, err)
	same, wrong := 0, 0
	for i, d := range listOf(seen) {
		if bit(sent.Bases, i) == byte(d.Basis) {
			same++
			wrong += int(bit(sent.Bits, i) ^ d.Bit)
		}
	}
	return listOf(seen), float64(wrong) / float64(same)
}

// bit is bit i of a packed string.
func bit(b []byte, i int) byte { return b[i/8] >> (i % 8) & 1 }

func listOf(d distill.Detections) (list []bb84.Detection) {
	for i, gate := range d.Gates.All() {
		list = append(list, bb84.Detection{Gate: gate, Basis: bb84.Basis(bit(d.Bases, i)), Bit: bit(d.Bits, i), Double: bit(d.Doubles, i) == 1})
	}
	return list
}

func gatesOf(list ...int64) (g distill.Gates) {
	for _, gate := range list {
		g.Add(gate)
	}
	return g
}

func TestBlockOverSockets(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 7)
	const gates = 20_000_000
	rates := c.Params.Rates(bb84.Eve{})
	for block := int64(1); block <= 3; block++ {
		detections, qber := exchange(t, alice, bob, 7, block, gates)
		n := float64(len(detections))
		if sigma := math.Sqrt(gates * rates.Gain * (1 - rates.Gain)); math.Abs(n-gates*rates.Gain) > 4*sigma {
			t.Errorf("block %d: %v detections, want %v", block, n, gates*rates.Gain)
		}
		if same := n * .6; math.Abs(qber-rates.QBER) > 4*math.Sqrt(rates.QBER/same) {
			t.Errorf("block %d: QBER %v, want %v", block, qber, rates.QBER)
		}
	}
	if want, got := "blocks=3 lost=0 gates=60000000", c.tell(t, "status"); !strings.Contains(got, want) {
		t.Errorf("status %q does not say %q", got, want)
	}
}

// The seeds decide what is chosen, the physics seed what is seen, and nothing else
// decides anything.
func TestSeedsDecide(t *testing.T) {
	gatesOf := func(physics uint64, aliceSeed, bobSeed byte) (gates, outcomes []int64) {
		c := newChannel(t, func(cfg *Config) { cfg.PhysicsSeed = physics })
		alice, bob := c.open(t, handover.Alice), c.open(t, handover.Bob)
		ok(t, alice.Seed(t.Context(), seedOf(aliceSeed), 1))
		ok(t, bob.Seed(t.Context(), seedOf(bobSeed), 1))
		detections, _ := exchange(t, alice, bob, 1, 1, 100_000)
		for _, d := range detections {
			gates, outcomes = append(gates, d.Gate), append(outcomes, d.Gate<<2|int64(d.Basis)<<1|int64(d.Bit))
		}
		return gates, outcomes
	}
	gates, outcomes := gatesOf(1, 1, 2)
	if _, again := gatesOf(1, 1, 2); !slices.Equal(outcomes, again) {
		t.Error("the same seeds gave another block")
	}
	if g, o := gatesOf(1, 3, 4); !slices.Equal(gates, g) || slices.Equal(outcomes, o) {
		t.Error("other choices: want the same gates and other outcomes")
	}
	if g, _ := gatesOf(2, 1, 2); slices.Equal(gates, g) {
		t.Error("another physics seed gave the same gates")
	}
	g1, _ := gatesOf(0, 1, 2)
	if g2, _ := gatesOf(0, 1, 2); slices.Equal(g1, g2) {
		t.Error("without a physics seed two blocks had the same gates")
	}
}

func TestTransmitterAnswersOnce(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 1)
	ctx := t.Context()
	sent := func(block int64, gates ...int64) error {
		_, err := alice.Sent(ctx, 1, block, gatesOf(gates...))
		return err
	}
	refused(t, "before the first block", sent(1, 0))
	ok(t, alice.Fire(ctx, 1, 1, 1000))
	ok(t, sent(1))
	ok(t, sent(1, 0, 5, 9))
	refused(t, "a gate asked before", sent(1, 9))
	refused(t, "a gate below", sent(1, 3, 20))
	ok(t, sent(1, 10, 20))
	refused(t, "a gate beyond the block", sent(1, 30, 1000))
	ok(t, sent(1, 30, 999))
	refused(t, "another block", sent(2, 999))
	if _, err := alice.Sent(ctx, 2, 1, distill.Gates{}); err == nil {
		t.Error("another session was answered")
	}
	refused(t, "a block number again", alice.Fire(ctx, 1, 1, 1000))
	refused(t, "another session", alice.Fire(ctx, 2, 2, 1000))
	refused(t, "no gates", alice.Fire(ctx, 1, 2, 0))
	refused(t, "more than the receiver holds", alice.Fire(ctx, 1, 2, 1<<40))
	ok(t, alice.Fire(ctx, 1, 5, 1000))
	ok(t, sent(5, 0))
	refused(t, "the block before", sent(1, 999))
	if _, err := bob.Detections(ctx, 1, 5); err != nil {
		t.Error(err)
	}
	if _, err := bob.Detections(ctx, 1, 5); !errors.Is(err, ErrLost) {
		t.Errorf("asking again: %v, want ErrLost", err)
	}
}

// The devices hold a few blocks while light goes on. Bob fetches them in any order, each
// once; what Alice asks about ascends over all of them.
func TestBlocksAreHeld(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 1)
	ctx := t.Context()
	const first, last = 2, 1 + maxHeld
	for block := range int64(last) {
		ok(t, alice.Fire(ctx, 1, block+1, 100_000))
	}
	seen := make(map[int64]distill.Detections)
	for block := int64(last); block >= first; block-- {
		d, err := bob.Detections(ctx, 1, block)
		ok(t, err)
		if seen[block] = d; d.Gates.Len() == 0 || d.Gates.Equal(seen[block+1].Gates) {
			t.Errorf("block %d: %d detections", block, d.Gates.Len())
		}
	}
	if _, err := bob.Detections(ctx, 1, 1); !errors.Is(err, ErrLost) {
		t.Errorf("a block too many: %v, want ErrLost", err)
	}
	_, err := alice.Sent(ctx, 1, 1, gatesOf(99_999))
	refused(t, "a block too many", err)
	for _, block := range []int64{first, last - 1} { // what lies between is passed
		sent, err := alice.Sent(ctx, 1, block, seen[block].Gates)
		ok(t, err)
		same, wrong := 0, 0
		for i, d := range listOf(seen[block]) {
			if bit(sent.Bases, i) == byte(d.Basis) {
				same++
				wrong += int(bit(sent.Bits, i) ^ d.Bit)
			}
		}
		if same < 100 || wrong > same/10 {
			t.Errorf("block %d: %d of %d bits in equal bases are wrong", block, wrong, same)
		}
	}
	_, err = alice.Sent(ctx, 1, first, gatesOf(99_999))
	refused(t, "a block that was passed", err)
	if maxHeld > 3 {
		_, err = alice.Sent(ctx, 1, first+1, gatesOf(99_999))
		refused(t, "a block that was passed over", err)
	}
	ok(t, alice.Fire(ctx, 1, last+1, 100_000))
	_, err = alice.Sent(ctx, 1, last, seen[last].Gates)
	ok(t, err)
}

// What the receiver has not handed over when a few more blocks were fired is gone, and it
// has nothing of a block that was not fired.
func TestStaleBlockIsDropped(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 1)
	ctx := t.Context()
	if _, err := bob.Detections(ctx, 1, 1); !errors.Is(err, ErrLost) {
		t.Errorf("before the block: %v, want ErrLost", err)
	}
	for block := range int64(maxHeld + 1) {
		ok(t, alice.Fire(ctx, 1, block+1, 1000))
	}
	if _, err := bob.Detections(ctx, 1, 1); !errors.Is(err, ErrLost) {
		t.Errorf("a block behind: %v, want ErrLost", err)
	}
	if _, err := bob.Detections(ctx, 2, 2); err == nil {
		t.Error("another session was answered")
	}
	if _, err := bob.Detections(ctx, 1, 2); err != nil {
		t.Errorf("the last blocks: %v", err)
	}
}

// Either KME may vanish and come back at any moment.
func TestKMEsRestart(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 1)
	ctx := t.Context()
	ok(t, alice.Fire(ctx, 1, 1, 1000))

	// Bob's KME comes back after the block: the new one knows nothing of it.
	bob2 := c.open(t, handover.Bob)
	if _, err := bob.Detections(ctx, 1, 1); err == nil {
		t.Error("the connection that was replaced is still answered")
	}
	_, err := bob2.Detections(ctx, 1, 1)
	refused(t, "an end without a seed", err)
	ok(t, alice.Fire(ctx, 1, 2, 1000)) // nobody looks
	ok(t, bob2.Seed(ctx, seedOf(3), 1))
	if _, err := bob2.Detections(ctx, 1, 2); !errors.Is(err, ErrLost) {
		t.Errorf("a block fired into the dark: %v, want ErrLost", err)
	}
	_, qber := exchange(t, alice, bob2, 1, 3, 1_000_000)
	if qber > .05 {
		t.Errorf("QBER %v after Bob's restart", qber)
	}

	// Bob's KME leaves without a word.
	ok(t, bob2.Close())
	waitStatus(t, c, "bob=away")
	ok(t, alice.Fire(ctx, 1, 4, 1000))

	// Alice's KME comes back with a new session while Bob's is in the old one.
	bob3 := c.open(t, handover.Bob)
	ok(t, bob3.Seed(ctx, seedOf(4), 1))
	alice2 := c.open(t, handover.Alice)
	ok(t, alice2.Seed(ctx, seedOf(5), 2))
	if err := alice.Fire(ctx, 1, 5, 1000); err == nil {
		t.Error("the transmitter still obeys the connection that was replaced")
	}
	ok(t, alice2.Fire(ctx, 2, 1, 1000))
	if _, err := bob3.Detections(ctx, 1, 1); !errors.Is(err, ErrLost) {
		t.Errorf("light of another session: %v, want ErrLost", err)
	}
	ok(t, bob3.Seed(ctx, seedOf(6), 2))
	if _, qber := exchange(t, alice2, bob3, 2, 2, 1_000_000); qber > .05 {
		t.Errorf("QBER %v after Alice's restart", qber)
	}
}

// waitStatus asks until the status says want.
func waitStatus(t *testing.T, c *channel, want string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !strings.Contains(c.tell(t, "status"), want); {
		if time.Now().After(deadline) {
			t.Fatalf("status never said %q", want)
		}
	}
}

func TestEveCutMend(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 1)
	ctx := t.Context()
	c.tell(t, "eve 1")
	if _, qber := exchange(t, alice, bob, 1, 1, 2_000_000); math.Abs(qber-.26) > .02 {
		t.Errorf("QBER with Eve on every photon: %v, want .26", qber)
	}
	c.tell(t, "eve 0")
	if _, qber := exchange(t, alice, bob, 1, 2, 2_000_000); qber > .03 {
		t.Errorf("QBER after Eve left: %v", qber)
	}
	ok(t, alice.Fire(ctx, 1, 3, 1000))
	c.tell(t, "cut")
	if _, err := bob.Detections(ctx, 1, 3); err != nil {
		t.Errorf("a block measured before the cut: %v", err)
	}
	if err := alice.Fire(ctx, 1, 4, 1000); !errors.Is(err, ErrCut) {
		t.Errorf("Fire through a cut fibre: %v, want ErrCut", err)
	}
	if _, err := bob.Detections(ctx, 1, 4); !errors.Is(err, ErrCut) {
		t.Errorf("Detections behind a cut fibre: %v, want ErrCut", err)
	}
	_, err := alice.Sent(ctx, 1, 4, gatesOf(0))
	refused(t, "gates of a block that failed", err)
	if got := c.tell(t, "status"); !strings.Contains(got, "fibre=cut") {
		t.Errorf("status %q, want fibre=cut", got)
	}
	c.tell(t, "mend")
	refused(t, "the number of a block that failed", alice.Fire(ctx, 1, 4, 1000))
	if _, qber := exchange(t, alice, bob, 1, 5, 2_000_000); qber > .03 {
		t.Errorf("QBER after the fibre was mended: %v", qber)
	}
}

// A cut during a block, mended before its end, still loses it; so does a receiver
// that was replaced or seeded anew meanwhile.
func TestInFlight(t *testing.T) {
	for _, tc := range []struct {
		name     string
		meantime func(t *testing.T, f *fibre, bob *receiver)
		lost     bool
		err      error
	}{
		{"nothing happens", func(*testing.T, *fibre, *receiver) {}, false, nil},
		{"cut and mended", func(t *testing.T, f *fibre, _ *receiver) {
			for _, line := range []string{"cut", "mend"} {
				if _, err := f.command(line); err != nil {
					t.Fatal(err)
				}
			}
		}, false, ErrCut},
		{"receiver replaced", func(_ *testing.T, f *fibre, _ *receiver) { f.attachBob(&receiver{}) }, true, nil},
		{"receiver gone", func(_ *testing.T, f *fibre, bob *receiver) { f.detachBob(bob) }, true, nil},
		{"receiver seeded anew", func(t *testing.T, f *fibre, bob *receiver) {
			seed := seedOf(9)
			ok(t, f.seedBob(bob, 1, &seed))
		}, true, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &fibre{params: bb84.Standard(), log: slog.New(slog.DiscardHandler)}
			alice, bob := &transmitter{last: -1}, &receiver{}
			f.attachAlice(alice)
			f.attachBob(bob)
			seed := seedOf(1)
			ok(t, f.seedAlice(alice, 1, &seed))
			ok(t, f.seedBob(bob, 1, &seed))
			s, err := f.begin(alice, blockName{1, 1}, 1000)
			ok(t, err)
			left, err := f.fly(t.Context(), alice, s)
			ok(t, err)
			tc.meantime(t, f, bob)
			lost, err := f.land(alice, s, left)
			if lost != tc.lost || !errors.Is(err, tc.err) {
				t.Fatalf("lost %v, %v; want %v, %v", lost, err, tc.lost, tc.err)
			}
			if got := len(bob.held) > 0; got != (tc.err == nil && !tc.lost) {
				t.Errorf("receiver holds a block: %v", got)
			}
		})
	}
}

// A block under way ends when its KME goes or the process does.
func TestFlightIsBroken(t *testing.T) {
	f := &fibre{params: bb84.Standard(), log: slog.New(slog.DiscardHandler)}
	alice, bob := &transmitter{last: -1}, &receiver{}
	f.attachAlice(alice)
	f.attachBob(bob)
	seed := seedOf(1)
	ok(t, f.seedAlice(alice, 1, &seed))
	ok(t, f.seedBob(bob, 1, &seed))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.fire(ctx, alice, blockName{1, 1}, 1000); !errors.Is(err, context.Canceled) {
		t.Errorf("a block of a process that ends: %v", err)
	}
	s, err := f.begin(alice, blockName{1, 2}, 1000)
	ok(t, err)
	f.attachAlice(&transmitter{last: -1})
	if _, err := f.fly(t.Context(), alice, s); err == nil {
		t.Error("a block of a connection that was replaced went on")
	}
	if len(bob.held) > 0 {
		t.Error("a broken block reached the receiver")
	}
}

func TestClosesCleanly(t *testing.T) {
	c := newChannel(t, nil)
	alice, bob := c.seeded(t, 1)
	ok(t, alice.Fire(t.Context(), 1, 1, 1000))
	idle, err := net.Dial("unix", c.AliceSocket) // says nothing
	ok(t, err)
	defer idle.Close()
	control, err := net.Dial("unix", c.ControlSocket)
	ok(t, err)
	defer control.Close()
	c.stop()
	if _, err := bob.Detections(t.Context(), 1, 1); err == nil {
		t.Error("a channel that has closed still answers")
	}
	for _, path := range []string{c.AliceSocket, c.BobSocket, c.ControlSocket} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
}

// A call that is given up breaks the Box rather than leaving it out of step.
func TestCallGivenUp(t *testing.T) {
	c := newChannel(t, nil)
	alice, _ := c.seeded(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := alice.Fire(ctx, 1, 1, 1000); !errors.Is(err, context.Canceled) {
		t.Errorf("a call without time: %v", err)
	}
	ok(t, alice.Fire(t.Context(), 1, 1, 1000)) // it was never sent

	near, far := net.Pipe() // far never reads
	defer far.Close()
	stuck := &Box{end: handover.Alice, conn: near}
	ctx, cancel = context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- stuck.Fire(ctx, 1, 1, 1000) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("a call that was given up: %v", err)
	}

	near, deaf := net.Pipe()
	defer deaf.Close()
	stuck = &Box{end: handover.Alice, conn: near, patience: time.Millisecond}
	if err := stuck.Seed(t.Context(), seedOf(1), 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a call that is not answered: %v", err)
	}
}
