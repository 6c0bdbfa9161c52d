package lab

import (
	"testing"

	"github.com/qutemail/kme/internal/etsi014"
)

// Any node of a site hands out its keys, and any of the other site what is due there.
func TestEveryNodeServes(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Nodes, c.Filler = 2, 2048 })
	keysStored(t, l, 1000)
	for _, at := range l.KM1.Nodes {
		for _, from := range l.KM2.Nodes {
			alice, bob := saeAt(t, l, "alice", at.Name), saeAt(t, l, "bob", from.Name)
			take(t, bob, alice, get(t, alice, bob, 100))
			if _, err := bob.Client.EncKeys(t.Context(), alice.ID, etsi014.KeyRequest{}); err != nil {
				t.Errorf("bob at %s: %v", from.Name, err)
			}
		}
	}
}
