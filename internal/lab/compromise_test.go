package lab

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// TestCompromise: keys of a suspect time cannot be used any more at either end, those
// that their masters have and their slaves have not taken are void, and operators can
// see it in each key's story. Keys that are made later are as good as ever.
func TestCompromise(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.Interval, c.PoolLimit = 512, 200*time.Millisecond, 4096 })
	keysStored(t, l, 1000)
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	used := get(t, alice, bob, 1)
	take(t, bob, alice, used)
	waiting, others := get(t, alice, bob, 2), get(t, bob, alice, 1)
	op := operator(t, l.KM1)
	suspect := admin.Suspicion{Since: time.Now().Add(-time.Minute)}
	if _, err := op.Compromise(t.Context(), suspect); err == nil {
		t.Fatal("keys were burned at the word of one officer")
	}
	since := key.EpochAt(suspect.Since, time.Hour).Start(time.Hour).UTC().Format(time.RFC3339)
	done, err := op.Compromise(t.Context(), suspect, l.approvals(t, l.KM1, approval.Act("compromise-keys "+since+" now"))...)
	if err != nil {
		t.Fatal(err)
	}
	if done.Burned < 1000 || done.Voided != len(others) || len(done.Untold) > 0 {
		t.Errorf("burned: %+v", done)
	}
	for _, tt := range []struct {
		slave, master *Person
		keys          keySet
	}{{bob, alice, waiting}, {alice, bob, others}} {
		for _, id := range tt.keys.ids() {
			_, err := tt.slave.Client.DecKeys(t.Context(), tt.master.ID, []key.ID{id})
			if answer := (*etsi014.APIError)(nil); !errors.As(err, &answer) || answer.Status != http.StatusBadRequest {
				t.Errorf("%s takes key %s of a suspect time: %v, want that it is not found", tt.slave.ID, id, err)
			}
		}
	}
	for state, keys := range map[string]keySet{"CONSUMED": used, "VOID": waiting} {
		for _, id := range keys.ids() {
			story, err := operator(t, l.KM2).KeyStory(t.Context(), id)
			if err != nil || story.State != state || len(story.Events) < 2 || len(story.Due) != 1 {
				t.Errorf("key %s at km2: %+v, %v, want it %s", id, story, err, state)
			}
		}
	}
	eventually(t, "what the officers have signed is verified out of the log", func(context.Context) error {
		out, err := kmectl(t, l, "audit approvals --officers "+l.path("ca", "operator", "intermediate.pem"))
		if err == nil && !strings.Contains(out, `"compromise-keys `+since+` now", approved by `) { // it may not be in the tree yet
			err = errors.New(out)
		}
		return err
	})
	works(t, l)
	settled(t, l)
	comparePools(t, l, time.Time{}, false)
}

// approvals are the words of root and olga for an act at the first node of a site.
func (l *Lab) approvals(t *testing.T, at *Site, act approval.Act) (all []approval.Approval) {
	t.Helper()
	for _, who := range operators {
		dir := filepath.Join(l.Dir, "operators", who)
		c, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		a, err := approval.Sign(act, at.Name+"/"+at.Nodes[0].Name, time.Now().Add(time.Minute), c.Leaf, c.PrivateKey.(crypto.Signer))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	return all
}
