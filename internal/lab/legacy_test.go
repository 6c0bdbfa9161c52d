package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
)

// legacyStatus is the status that a call of the legacy client was answered with.
func legacyStatus(err error) int {
	if answer, ok := errors.AsType[*legacy.APIError](err); ok {
		return answer.Status
	}
	if err == nil {
		return http.StatusOK
	}
	return 0
}

// What the vectors of the QuteMail routes cannot show: that which takes time, an
// operator, or requests at once. Rereads among others, which Check knows of.
func TestLegacy(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) {
		c.Filler, c.PoolLimit = 4096, 8192
		c.Settings = map[string]string{"km2": "legacy: {reread: once}\n"}
		c.Env = map[string][]string{"km1": {"QKD_KEY_SIZE=512", "QKD_KEY_TTL=600"}}
	})
	keysStored(t, l, 1000)
	if err := l.enrol(t.Context(), "sae", "dave", l.KM1.URL()); err != nil {
		t.Fatal(err)
	}
	alice, dave := sae(t, l, "alice"), at(t, l, "dave", "km1")
	t.Run("environment of the old service", func(t *testing.T) { legacyEnvironment(t, l, alice, dave) })
	t.Run("expiry", func(t *testing.T) { legacyExpiry(t, l, alice, dave) })
	t.Run("reads and a take at once", func(t *testing.T) { legacyReads(t, l, alice, dave) })
	t.Run("reread once", func(t *testing.T) {
		legacyOnce(t, sae(t, l, "alice@qutemail.example"), sae(t, l, "bob@qutemail.example"))
	})
}

// legacyEnvironment: what the old service's variables said of keys that are asked for
// without more is so, and the log says where it is from.
func legacyEnvironment(t *testing.T, l *Lab, alice, dave *Person) {
	sent := request(t, alice, dave, 0)
	defer sent.Material.Wipe()
	if left := time.Until(sent.ExpiresAt); sent.Bits != 512 || left > 10*time.Minute || left < time.Minute {
		t.Errorf("a key of %d bits for %v, want 512 and 10 minutes", sent.Bits, left)
	}
	log, err := os.ReadFile(l.KM1.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"QKD_KEY_SIZE", "QKD_KEY_TTL"} {
		if !strings.Contains(string(log), "of the environment: "+name+" is set: ") {
			t.Errorf("the log says nothing of %s", name)
		}
	}
}

// legacyExpiry: (e) a key that lived for a second is gone, and (f) an operator can have
// what is overdue ended and counted. The KME's own round may have been first, so it is
// tried until there is something to count.
func legacyExpiry(t *testing.T, l *Lab, alice, bob *Person) {
	root := operator(t, l.KM1)
	eventually(t, "a cleanup that removes something", func(ctx context.Context) error {
		sent, err := alice.Legacy.RequestKey(ctx, alice.ID, bob.ID, 0, time.Second)
		if err != nil {
			return err
		}
		sent.Material.Wipe()
		eventually(t, "410", func(ctx context.Context) error {
			got, err := bob.Legacy.RetrieveKey(ctx, bob.ID, sent.ID)
			got.Material.Wipe()
			if legacyStatus(err) != http.StatusGone {
				return fmt.Errorf("answered %d: %w", legacyStatus(err), err)
			}
			return nil
		})
		removed, err := root.Cleanup(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n := recorded(t, l.KM1, "e->>'action' = 'expire' AND e->'keys' ? $1", sent.ID.String()); n != 1 {
			t.Fatalf("key %s, overdue when it was cleaned up, has expired in %d events", sent.ID, n)
		}
		if removed == 0 {
			return errors.New("none was left")
		}
		return nil
	})
	if n := recorded(t, l.KM1, `e->>'action' = 'cleanup' AND e->>'outcome' = 'done' AND e->'actor'->>'id' = 'root' AND (e->>'count')::int > 0`); n != 1 {
		t.Errorf("%d cleanups that removed something are recorded, want 1", n)
	}
}

// at is an SAE speaking to the KME of a site, over connections of its own.
func at(t testing.TB, l *Lab, name, site string) *Person {
	t.Helper()
	p, err := l.SAEAt(name, site)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// legacyReads: a key is read by many at once until 014 takes it; from then on nobody
// reads it, whoever had begun.
func legacyReads(t *testing.T, l *Lab, alice, bob *Person) {
	sent := request(t, alice, bob, 0)
	var reads, gone atomic.Int64
	var taken atomic.Bool
	var all sync.WaitGroup
	for range 8 {
		reader := at(t, l, bob.ID.String(), "km1")
		all.Go(func() {
			for gone.Load() < 16 {
				late := taken.Load()
				got, err := reader.Legacy.RetrieveKey(t.Context(), bob.ID, sent.ID)
				switch legacyStatus(err) {
				case http.StatusOK:
					reads.Add(1)
					if late || !bytes.Equal(got.Material.Reveal(), sent.Material.Reveal()) {
						t.Errorf("read after it was taken (%v), or with other bytes", late)
					}
				case http.StatusGone:
					gone.Add(1)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	eventually(t, "reads", func(context.Context) error {
		if n := reads.Load(); n < 50 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	if _, err := bob.Client.DecKeys(t.Context(), alice.ID, []key.ID{sent.ID}); err != nil {
		t.Error(err)
	}
	taken.Store(true)
	all.Wait()
	done := `e->>'action' = 'dec_keys' AND e->>'outcome' = 'done' AND e->'keys' ? $1 AND coalesce((e->>'reread')::bool, false) = $2`
	if n := recorded(t, l.KM1, done, sent.ID.String(), true); n != int(reads.Load()) {
		t.Errorf("%d reads are recorded, and there were %d", n, reads.Load())
	}
	if n := recorded(t, l.KM1, done, sent.ID.String(), false); n != 1 {
		t.Errorf("%d takes are recorded, want 1", n)
	}
}

// legacyOnce: where the recipient's KME says reread: once, keys are read once.
func legacyOnce(t *testing.T, alice, bob *Person) {
	sent := request(t, alice, bob, 0)
	for i, want := range []int{http.StatusOK, http.StatusGone} {
		if _, err := bob.Legacy.RetrieveKey(t.Context(), bob.ID, sent.ID); legacyStatus(err) != want {
			t.Errorf("read %d: %v, want %d", i+1, err, want)
		}
	}
}
