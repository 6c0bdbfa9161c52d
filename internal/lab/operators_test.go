package lab

import (
	"testing"

	"github.com/qutemail/kme/internal/etsi014"
)

// TestOperators: what those see who run a KME, and those whose programs use it, in one
// lab after some traffic.
func TestOperators(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 4096, 20_000 })
	keysStored(t, l, 1000)
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	got, err := alice.Client.EncKeys(t.Context(), bob.ID, etsi014.KeyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got.Wipe()
	t.Run("dashboard", func(t *testing.T) { dashboard(t, l) })
	t.Run("clients", func(t *testing.T) { clients(t, l) })
}
