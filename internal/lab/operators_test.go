package lab

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	programs "github.com/qutemail/kme/internal/lab/binaries"
)

// TestOperators: what those see who run a KME, and those whose programs use it, in one
// lab after some traffic.
func TestOperators(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 4096, 20_000 })
	keysStored(t, l, 1000)
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	get(t, alice, bob, 1)
	t.Run("dashboard", func(t *testing.T) { dashboard(t, l) })
	t.Run("clients", func(t *testing.T) { clients(t, l) })
	t.Run("release", func(t *testing.T) { release(t, l) })
	t.Run("doctor", func(t *testing.T) { doctor(t, l) })
}

// release: a node says everywhere which release it is.
func release(t *testing.T, l *Lab) {
	if v := node(t, l.KM1).Version; v != programs.Version {
		t.Errorf("kmectl node shows version %q, want %q", v, programs.Version)
	}
	text, err := metricsOf(t.Context(), l, l.KM1.Nodes[0])
	if err != nil || !strings.Contains(text, `kme_build_info{go="go`) || !strings.Contains(text, `version="`+programs.Version+`"`) {
		t.Errorf("no kme_build_info of version %s: %v", programs.Version, err)
	}
	if n := recorded(t, l.KM1, `e->>'action' = 'start' AND e->'facts'->>'build' LIKE $1`, programs.Version+" go1.%"); n == 0 {
		t.Error("no start in the audit says which release it is")
	}
}

// doctor: a node of which all is well says so; one whose peer, link or database is gone
// finds that out at once, whatever the last heartbeat said.
func doctor(t *testing.T, l *Lab) {
	op := operator(t, l.KM1)
	bad := func(ctx context.Context) (about []string, err error) {
		found, err := op.Doctor(ctx)
		for _, f := range found {
			if !f.OK {
				about = append(about, f.About)
				t.Log(f)
			}
		}
		return about, err
	}
	expect := func(what string, want ...string) {
		t.Helper()
		eventually(t, what, func(ctx context.Context) error {
			got, err := bad(ctx)
			for _, w := range want {
				if !slices.Contains(got, w) {
					return fmt.Errorf("%v: %q is not among %q", err, w, got)
				}
			}
			if len(want) == 0 && len(got) > 0 {
				return fmt.Errorf("not well: %q", got)
			}
			return err
		})
	}
	expect("all is well")
	for _, s := range []*Site{l.KM1, l.KM2} { // each time a key was compared, which is burned at both ends
		if n := recorded(t, s, "e->>'action' = 'burn' AND e->>'reason' LIKE 'compared%' AND e->>'count' = '1'"); n == 0 {
			t.Errorf("%s has burned nothing for the doctor", s.Name)
		}
	}
	if err := l.KM2.Stop(); err != nil {
		t.Fatal(err)
	}
	if got, err := bad(t.Context()); err != nil || !slices.Contains(got, "peer km2") {
		t.Errorf("the peer has just gone: %q, %v", got, err)
	}
	if err := l.KM1.stopDatabase(); err != nil {
		t.Fatal(err)
	}
	expect("the database is gone", "peer km2", "database", "migrations", "link km1-km2")
	if err := l.KM1.StartDatabase(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range l.KM2.Nodes {
		if err := n.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	expect("all is well again")
}
