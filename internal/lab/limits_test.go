package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/policies"
)

// TestLimits: a master whose slave takes nothing is refused at the slave's cap, and
// an SAE that has spent its bucket until it has filled again. Nothing is consumed by
// either, nobody else is held up, and neither is a disagreement of the sites.
func TestLimits(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) {
		c.Filler, c.PoolLimit = 4096, 8192
		c.Limits = Limits{AtomsPerSecond: 1, Burst: 2048, Untaken: 300}
	})
	keysStored(t, l, 2000)
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	var waiting keySet
	refused := func(detail string, retry time.Duration) {
		t.Helper()
		before := stored(t, alice, bob)
		eventually(t, "a refusal", func(ctx context.Context) error { // a peer may be late, now and then
			_, err := alice.Client.EncKeys(ctx, bob.ID, etsi014.KeyRequest{Number: 128})
			if answer := away(err); answer == nil || answer.RetryAfter < retry || !strings.Contains(err.Error(), detail) {
				return fmt.Errorf("answered %w, want 503, %q and to come again after %v or more", err, detail, retry)
			}
			return nil
		})
		settled(t, l)
		if n := stored(t, alice, bob); n < before { // a block may have come
			t.Errorf("%d keys are stored, and %d were: a refusal has consumed some", n, before)
		}
	}
	first := get(t, alice, bob, 128)
	waiting = get(t, alice, bob, 128)
	for range 3 { // at the cap of 300
		refused("too many keys wait", 10*time.Second)
	}
	take(t, bob, alice, first)
	get(t, alice, bob, 128) // there is room again
	refused("too many keys wait", 10*time.Second)
	mails := get(t, sae(t, l, "alice@qutemail.example"), sae(t, l, "bob@qutemail.example"), 128) // another pair
	if len(mails) != 128 {
		t.Errorf("another pair got %d keys", len(mails))
	}
	if n := recorded(t, l.KM2, `e->>'action' = 'assign' AND e->>'outcome' = 'refused'`); n < 4 {
		t.Errorf("the slave's KME has recorded %d refusals, and there were 4", n)
	}

	spent := errors.New("no answer yet")
	for tries := 0; tries < 20 && !strings.Contains(spent.Error(), "in a short time"); tries++ {
		_, spent = alice.Client.EncKeys(t.Context(), bob.ID, etsi014.KeyRequest{Number: 128})
		if spent == nil {
			t.Fatal("keys beyond the cap")
		}
	}
	if answer := away(spent); answer == nil || !strings.Contains(spent.Error(), "in a short time") {
		t.Errorf("after a bucketful: %v, want 503, and to come again when it has filled", spent)
	}
	take(t, bob, alice, waiting) // his bucket is his own
	quota(t, l, sae(t, l, "alice@qutemail.example"), sae(t, l, "bob@qutemail.example"))
	get(t, sae(t, l, "erin"), alice, 10)
	alarms, err := operator(t, l.KM2).Alarms(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range alarms {
		if strings.HasPrefix(a.Name, "refused-") {
			t.Errorf("a limit has raised an alarm: %s", a.Text)
		}
	}
}

// quota: once network.yaml bounds how many keys an SAE may ask for in a day, it gets so
// many, and then is told to come again when the day is over.
func quota(t *testing.T, l *Lab, master, slave *Person) {
	t.Helper()
	file := l.path("policies", policies.NetworkFile)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bounded := bytes.Replace(text, []byte("quotas: []"), fmt.Appendf(nil, "quotas:\n  - {sae: %q, keys_per_day: 5}", master.ID), 1)
	if err := os.WriteFile(file, bounded, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := operator(t, l.KM1).ReloadPolicies(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	get(t, master, slave, 5)
	eventually(t, "the quota is spent", func(ctx context.Context) error { // there is another one when it is midnight meanwhile
		got, err := master.Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{Number: 5})
		got.Wipe()
		if err == nil {
			return errNotYet
		}
		if answer := away(err); answer == nil || !strings.Contains(answer.Message, "too many keys were asked for") || answer.RetryAfter > 24*time.Hour {
			t.Fatalf("beyond the quota: %v, want 503, and to come again tomorrow", err)
		}
		return nil
	})
}
