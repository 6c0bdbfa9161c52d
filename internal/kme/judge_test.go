package kme

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// network is four KMEs, of which km1 has a link to km2 alone.
const network = `
version: 1
trust_domain: lab.test
kmes:
  - {id: km1, nodes: [{name: km1-a, sae: "localhost:11", assign: "localhost:12", classical: "localhost:13", operator: "localhost:14"}]}
  - {id: km2, nodes: [{name: km2-a, sae: "localhost:21", assign: "localhost:22", classical: "localhost:23", operator: "localhost:24"}]}
  - {id: km3, nodes: [{name: km3-a, sae: "localhost:31", assign: "localhost:32", classical: "localhost:33", operator: "localhost:34"}]}
links:
  - {id: fibre, alice: km1, bob: km2}
saes:
  - {id: alice, homes: [km1], groups: [all, locals]}
  - {id: anna, homes: [km1], groups: [all, locals]}
  - {id: bob, homes: [km2], groups: [all]}
  - {id: both, homes: [km1, km2], groups: [all]}
  - {id: far, homes: [km3], groups: [all]}
  - {id: further, homes: [km3, km2], groups: [all]}
  - {id: stranger, homes: [km2], groups: []}
`

// rules let members of a group share keys, and the locals only if both are here.
const rules = `
@id("group") permit (principal is SAE, action, resource is SAE) when { principal.groups.containsAny(resource.groups) };
@id("local") forbid (principal is SAE, action, resource is SAE) when { principal in Group::"locals" && resource in Group::"locals" && !context.same_kme };
@id("small") forbid (principal is SAE, action == Action::"enc_keys", resource is SAE) when { context.number > 100 || context.bits > 4096 };
@id("light") forbid (principal is SAE, action, resource is SAE) when { resource == SAE::"both" && context.provenance == "local-rng" && !context.same_kme };
`

// core is km1 as far as its rules go: without database, HSM and peers.
func core(t *testing.T) (*KME, *link) {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, policies.Shipped); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		policies.NetworkFile: network, "default.cedar": rules, policies.PrincipalsFile: "version: 1\nrequire: {keys: [ed25519], max_lifetime: 1h}\nrules: []\nprincipals: []\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set, err := policies.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := &KME{Config: Config{
		Self: kmeID(t, "km1"), Now: newClock().now, EpochLength: time.Hour, DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour,
		Policies: func() *policies.Set { return set },
	}}
	l := &link{LinkConfig: LinkConfig{ID: "fibre", Peer: kmeID(t, "km2"), End: handover.Alice, Provenance: key.Simulated}, k: k}
	k.links = map[string]*link{"fibre": l}
	return k, l
}

func (k *KME) callOf(t *testing.T, sae string, a audit.Action) *call {
	t.Helper()
	c := &call{k: k, ev: audit.Event{Action: a}}
	if sae != "" {
		c.sae = saeID(t, sae)
	}
	return c
}

// TestRoute: a key for a slave is kept at a home of his that is not ours, if he has one.
func TestRoute(t *testing.T) {
	t.Parallel()
	k, l := core(t)
	for slave, want := range map[string]*link{"alice": nil, "bob": l, "both": l, "stranger": l} {
		if got, err := k.route(saeID(t, slave)); got != want || err != nil {
			t.Errorf("route to %s: %v, %v", slave, got, err)
		}
	}
	for _, slave := range []string{"far", "further", "nobody"} { // further's first home outweighs that there is a link to his second
		if got, err := k.route(saeID(t, slave)); got != nil || problem.KindOf(err) != problem.Invalid {
			t.Errorf("route to %s: %v, %v, want an invalid request", slave, got, err)
		}
	}
}

// TestJudge: who may not ask is told nothing of why.
func TestJudge(t *testing.T) {
	t.Parallel()
	k, _ := core(t)
	for _, tt := range []struct {
		caller, other string
		number, bits  int
		policies      string
		why           string // "" if it is allowed
	}{
		{"alice", "bob", 1, 256, "group", ""},
		{"alice", "both", 1, 256, "group", ""},
		{"alice", "anna", 1, 256, "group", ""},
		{"alice", "far", 1, 256, "group", ""}, // that no link leads there is told to those who may ask
		{"alice", "bob", 101, 256, "small", "policy (forbidden) does not let alice do enc_keys with bob"},
		{"alice", "bob", 1, 8192, "small", "policy (forbidden)"},
		{"alice", "stranger", 1, 256, "", "policy (no-policy)"},
		{"alice", "nobody", 1, 256, "", "policy (unknown-sae)"},
		{"bob", "alice", 1, 256, "", "SAE bob is not homed at km1"},
		{"nobody", "alice", 1, 256, "", "SAE nobody is not homed at km1"},
		{"", "alice", 1, 256, "", "names no SAE"},
	} {
		c := k.callOf(t, tt.caller, audit.EncKeys)
		err := c.judge(saeID(t, tt.other), tt.number, tt.bits)
		if got := strings.Join(c.ev.Policy, " "); got != tt.policies {
			t.Errorf("%s for %s: recorded the policies %q, want %q", tt.caller, tt.other, got, tt.policies)
		}
		switch {
		case err == nil && tt.why == "":
		case err == nil || tt.why == "" || !strings.Contains(err.Error(), tt.why):
			t.Errorf("%s for %s: %v, want %q", tt.caller, tt.other, err, tt.why)
		case err.Kind != problem.Unauthorized || err.Detail != "" || err.RetryAfter != 0:
			t.Errorf("%s for %s: the caller is told %s %q", tt.caller, tt.other, err.Kind, err.Detail)
		}
	}
}

// TestClassify: what an organ cannot do now is unavailable; what nobody foresaw is
// a fault of ours.
func TestClassify(t *testing.T) {
	t.Parallel()
	for _, err := range []error{hsm.ErrTampered, hsm.ErrUnavailable, store.ErrUnavailable, store.ErrDropped, store.ErrDoubt} {
		if got := new(KME).classify(errors.Join(errors.New("taking"), err)); got.Kind != problem.Unavailable || got.Detail != "" || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
	if got := new(KME).classify(fs.ErrInvalid); got.Kind != problem.Internal || got.Detail != "" {
		t.Errorf("a fault: %v", got)
	}
}

// TestRanges: the audit names exactly the atoms that were lent, in order, in as few
// runs as can be.
func TestRanges(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		refs := []handover.BlockRef{{Link: "a", Session: 1, Block: 1}, {Link: "a", Session: 1, Block: 2}, {Link: "a", Session: 2, Block: 1}, {Link: "b", Session: 1, Block: 1}}
		var lends []lent
		var want []audit.Atoms
		for range rapid.IntRange(0, 12).Draw(t, "atoms") {
			index := rapid.IntRange(0, 3).Draw(t, "index")
			ref := rapid.SampledFrom(refs).Draw(t, "block")
			lends = append(lends, lent{store.Atom{Index: index}, &store.Lease{BlockRef: ref}})
			want = append(want, audit.Atoms{Link: ref.Link, Session: ref.Session, Block: ref.Block, First: index, Count: 1})
		}
		follows := func(a, b audit.Atoms) bool {
			a.First, a.Count = a.First+a.Count, b.Count
			return a == b
		}
		var got []audit.Atoms
		rs := ranges(lends)
		for i, r := range rs {
			if i > 0 && follows(rs[i-1], r) {
				t.Fatalf("two ranges that are one: %+v", rs)
			}
			for n := range r.Count {
				one := r
				one.First, one.Count = r.First+n, 1
				got = append(got, one)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("atoms (-want +got):\n%s", diff)
		}
	})
}
