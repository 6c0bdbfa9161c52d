package pki

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// TestFailures: a network's failures are counted against it alone, and are forgiven as
// time goes by.
func TestFailures(t *testing.T) {
	t.Parallel()
	const perSecond, burst = 2, 5
	f := newFailures(perSecond, burst)
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	bad, good := netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("192.0.2.8/32")
	want := func(n netip.Prefix, tooMany bool, when string) {
		t.Helper()
		if f.tooMany(n, now) != tooMany {
			t.Errorf("%s, %s: too many is %v", when, n, !tooMany)
		}
	}
	for range burst {
		want(bad, false, "within the burst")
		f.add(bad, now)
	}
	want(bad, true, "after the burst")
	want(good, false, "after the burst of another")
	now = now.Add(time.Second / perSecond)
	want(bad, false, "when there is a token again")
	for range 1 + 3 { // of these three were under way when there was one
		f.add(bad, now)
	}
	now = now.Add(3 * time.Second / perSecond)
	want(bad, true, "while it makes up for three")
	now = now.Add(time.Second / perSecond)
	want(bad, false, "when it has")
	if n := f.known(now); n != 1 {
		t.Errorf("%d networks are known, want the one", n)
	}
	now = now.Add(burst * time.Second / perSecond)
	if n := f.known(now); n != 0 {
		t.Errorf("%d networks are known after a rest", n)
	}
	f = newFailures(0, 0)
	f.add(bad, now)
	want(bad, false, "without a bound")
}

// TestFailuresAreBounded: of more networks than are told apart, the rest shares a bucket;
// those that are known keep theirs, and all is as before when the others rest.
func TestFailuresAreBounded(t *testing.T) {
	t.Parallel()
	const burst = 5
	f := newFailures(1, burst)
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	network := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	for i := range maxFailing + burst - 1 {
		f.add(network(i), now)
	}
	strange := network(2 * maxFailing)
	if f.tooMany(strange, now) {
		t.Error("a stranger is kept out while the rest has a token")
	}
	for i := range 2 * maxFailing {
		f.add(network(maxFailing+burst+i), now)
	}
	if len(f.networks) != maxFailing {
		t.Errorf("%d networks are known, want at most %d", len(f.networks), maxFailing)
	}
	if !f.tooMany(strange, now) || f.tooMany(network(1), now) {
		t.Errorf("too many: a stranger %v, one that is known %v; want true, false", f.tooMany(strange, now), f.tooMany(network(1), now))
	}
	now = now.Add(time.Second) // each of those that are known has its one token back
	f.add(strange, now)
	if len(f.networks) != 1 || f.tooMany(strange, now) {
		t.Errorf("%d networks are known; too many of a stranger: %v; want 1, false", len(f.networks), f.tooMany(strange, now))
	}
}

// TestTurns: one at a time, in order, and not for longer than a handshake may take.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		places := make(chan struct{}, 1)
		over := make(chan struct{})
		time.AfterFunc(handshakeTime, func() { close(over) })
		first, second, third := turn{places: places, over: over}, turn{places: places, over: over}, turn{places: places, over: over}
		if err := first.begin(1); err != nil {
			t.Fatal(err)
		}
		got := make(chan error, 2)
		go func() { got <- second.begin(1) }()
		synctest.Wait()
		go func() { got <- third.begin(1) }()
		synctest.Wait()
		if len(got) > 0 {
			t.Fatal("two have their turn")
		}
		first.end()
		first.end() // it has none: nothing happens
		if err := <-got; err != nil || !second.taken || third.taken {
			t.Errorf("the second: %v, %v; the third: %v", err, second.taken, third.taken)
		}
		began := time.Now()
		if err := <-got; err != errBusy || time.Since(began) != handshakeTime {
			t.Errorf("the third: %v after %v", err, time.Since(began))
		}
		long := turn{places: make(chan struct{}, 1), over: over}
		if err := long.begin(maxHandshake + 1); err != errLong || long.taken {
			t.Errorf("who says too much: %v", err)
		}
	})
}
