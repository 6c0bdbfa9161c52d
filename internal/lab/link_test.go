package lab

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"testing"

	"github.com/qutemail/kme/deploy/runbooks"
	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// What happens to the light happens to one lab: the fibre is cut, then Eve comes. Then
// keys of it are looked for where none may be.
func TestLightInTrouble(t *testing.T) {
	t.Parallel()
	variable, marker := planted()
	l := start(t, func(c *Config) {
		c.Bin = binaries(t, true) // whose memory may be looked into
		c.Env = map[string][]string{"km1": {variable}, "km2": {variable}}
	})
	keysStored(t, l, 200)
	t.Run("fibre cut", func(t *testing.T) { fibreCut(t, l) })
	t.Run("Eve", func(t *testing.T) { eve(t, l) })
	t.Run("no plaintext", func(t *testing.T) { noPlaintext(t, l) })
	t.Run("not in memory", func(t *testing.T) { notInMemory(t, l, marker) })
}

// fibre sends a command to the quantum channel.
func fibre(t testing.TB, l *Lab, command string) {
	t.Helper()
	if _, err := l.Fibres[0].Tell(t.Context(), command); err != nil {
		t.Fatalf("fibre: %s: %v", command, err)
	}
}

var forecast = regexp.MustCompile(`[1-9][0-9]* keys are left, for about [0-9hms]+$`)

func fibreCut(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	fibre(t, l, "cut")
	untilAlarm(t, l.KM1, "link-km1-km2", true)
	untilAlarm(t, l.KM2, "link-km1-km2", true)
	take(t, bob, alice, get(t, alice, bob, 2)) // there are keys
	eventually(t, "a forecast", func(ctx context.Context) error {
		alarms, err := operator(t, l.KM1).Alarms(ctx)
		if err != nil || slices.ContainsFunc(alarms, func(a admin.Alarm) bool { return forecast.MatchString(a.Text) }) {
			return err
		}
		return fmt.Errorf("alarms: %v", alarms)
	})

	number := most // take what there is, in ever smaller portions; of what there is at bob's end some comes over
	for stored(t, alice, bob) > 0 || stored(t, bob, alice) >= 2*key.ChunkAtoms {
		c, err := alice.Client.EncKeys(t.Context(), bob.ID, etsi014.KeyRequest{Number: number})
		c.Wipe()
		if away(err) != nil {
			number = max(1, number/2)
		} else if err != nil {
			t.Fatalf("emptying the pool: %v", err)
		}
	}
	untilAway(t, alice, bob) // the last chunk may be on its way from bob's end
	for _, s := range []*Site{l.KM1, l.KM2} {
		op := operator(t, s)
		eventually(t, "the link is down at "+s.Name, func(ctx context.Context) error {
			now, err := link(ctx, op)
			if err == nil && (now.State != admin.LinkDown || now.Why == "") {
				err = fmt.Errorf("it is %s because %q", now.State, now.Why)
			}
			return err
		})
	}

	fibre(t, l, "mend")
	untilServed(t, alice, bob)
	take(t, bob, alice, get(t, alice, bob, 2))
	untilAlarm(t, l.KM1, "link-km1-km2", false)
	untilAlarm(t, l.KM2, "link-km1-km2", false)
}

func eve(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	fibre(t, l, "eve 0.5")
	before := untilAborted(t, l, 1) // the first block that she is in; one under way may have been spared
	here, there := stored(t, alice, bob), stored(t, bob, alice)
	after := untilAborted(t, l, 2)
	for i, s := range []*Site{l.KM1, l.KM2} {
		if after[i].Blocks != before[i].Blocks {
			t.Errorf("%s has accepted %d blocks with Eve in them", s.Name, after[i].Blocks-before[i].Blocks)
		}
		if q := after[i].Last.QBER; q < 0.08 || q > 0.18 {
			t.Errorf("QBER at %s is %.3f, want about 1/8 and the fibre's own", s.Name, q)
		}
		untilAlarm(t, s, "qber-km1-km2", true)
		if recorded(t, s, "e->>'action' = 'link-abort'") < 3 {
			t.Errorf("the audit of %s does not record each abort", s.Name)
		}
	}
	if a, b := stored(t, alice, bob), stored(t, bob, alice); a != here || b != there {
		t.Errorf("%d and %d keys are stored, and %d and %d were: key that Eve knows of has come in", a, b, here, there)
	}
	take(t, bob, alice, get(t, alice, bob, 2)) // the keys from before are none of hers
	olga, err := l.Operator("olga", "km1")     // who may only look: no key is burned for it
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "doctor to tell of Eve", func(ctx context.Context) error {
		found, err := olga.Doctor(ctx)
		told := runbooks.Complaints(runbooks.Node)["somebody on the line"]
		if err == nil && !slices.ContainsFunc(found, func(f admin.Finding) bool { return told.Is(f.About, f.Says, f.Do) == nil }) {
			err = fmt.Errorf("found %+v", found)
		}
		return err
	})

	fibre(t, l, "eve 0")
	for i, s := range []*Site{l.KM1, l.KM2} {
		c := operator(t, s)
		eventually(t, "a block after Eve has left", func(ctx context.Context) error {
			now, err := link(ctx, c)
			if err == nil && now.Blocks == after[i].Blocks {
				err = errors.New(now.Why)
			}
			return err
		})
		untilAlarm(t, s, "qber-km1-km2", false)
	}
}

// untilAborted returns how the link stands at KM1 and KM2 once each has given up n
// more blocks.
func untilAborted(t testing.TB, l *Lab, n int) [2]admin.Link {
	t.Helper()
	var links [2]admin.Link
	for i, s := range []*Site{l.KM1, l.KM2} {
		c := operator(t, s)
		first, err := link(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprintf("%d aborts at %s", n, s.Name), func(ctx context.Context) error {
			links[i], err = link(ctx, c)
			if err == nil && (links[i].Aborts < first.Aborts+n || links[i].Last == nil) {
				err = fmt.Errorf("%d aborts", links[i].Aborts-first.Aborts)
			}
			return err
		})
	}
	return links
}
