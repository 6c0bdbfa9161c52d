package lab

import (
	"cmp"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
)

// TestUpstream: two KMEs whose link has no light, but a device at each end: the KMEs of
// another lab, to which they are SAEs. What alice and bob are given by the ones was handed
// out by the others before, and is as simulated as it was there; when the device is gone, so is the link.
func TestUpstream(t *testing.T) {
	t.Parallel()
	device := start(t, func(c *Config) { c.Filler, c.PoolLimit, c.Interval = 512, 1024, 50*time.Millisecond })
	keysStored(t, device, 128)
	beside := func(site *Site, as, peer string) string {
		return fmt.Sprintf("{url: [%q], tls: %q, peer: %s, keys: 70}", site.URL(), device.profileDir("sae", as), peer)
	}
	l := start(t, func(c *Config) {
		c.Upstream = map[string]string{"km1": beside(device.KM1, "alice", "bob"), "km2": beside(device.KM2, "bob", "alice")}
		c.Interval, c.PoolLimit = 50*time.Millisecond, 200
	})
	keysStored(t, l, 64)
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	take(t, bob, alice, get(t, alice, bob, 20))
	for _, s := range []*Site{l.KM1, l.KM2} {
		if n := recorded(t, s, `e->>'action' = 'block-held' AND e->>'provenance' = 'simulated' AND e->>'reason' LIKE 'handed out by the device%'`); n == 0 {
			t.Errorf("%s holds no block of the device's", s.Name)
		}
		if n := recorded(t, s, `e->>'action' IN ('enc_keys', 'dec_keys') AND e->>'outcome' = 'done' AND e->>'provenance' <> 'simulated'`); n != 0 {
			t.Errorf("%s has handed out keys %d times that do not say where they are from", s.Name, n)
		}
	}

	op := operator(t, l.KM1)
	state := func(ctx context.Context, want ...string) error {
		now, err := link(ctx, op)
		for _, w := range want {
			if now.State == w {
				return err
			}
		}
		return cmp.Or(err, fmt.Errorf("it is %s (%s)", now.State, now.Why))
	}
	if err := device.KM1.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the link says that the device is gone", func(ctx context.Context) error {
		got, err := alice.Client.EncKeys(ctx, bob.ID, etsi014.KeyRequest{Number: 10}) // until there is room in the pool
		if got.Wipe(); err != nil && away(err) == nil {
			t.Fatal(err)
		}
		return state(ctx, "down")
	})
	if err := device.KM1.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the link is open again", func(ctx context.Context) error { return state(ctx, "open", "full") })
	take(t, bob, alice, get(t, alice, bob, 20))
}
