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
	"github.com/qutemail/kme/internal/identity"
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
  - {id: km4, nodes: [{name: km4-a, sae: "localhost:41", assign: "localhost:42", classical: "localhost:43", operator: "localhost:44"}]}
links:
  - {id: fibre, alice: km1, bob: km2}
saes:
  - {id: alice, homes: [km1], groups: [all, locals]}
  - {id: anna, homes: [km1], groups: [all, locals]}
  - {id: bob, homes: [km2], groups: [all]}
  - {id: both, homes: [km1, km2], groups: [all]}
  - {id: far, homes: [km3], groups: [all]}
  - {id: further, homes: [km3, km2], groups: [all]}
  - {id: lost, homes: [km4, km1], groups: [all]}
  - {id: nowhere, homes: [km4], groups: [all]}
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
func core(t testing.TB) (*KME, *link) {
	t.Helper()
	return coreOf(t, rules)
}

// coreOf is core with other rules.
func coreOf(t testing.TB, rules string) (*KME, *link) {
	t.Helper()
	set := policySet(t, network, rules)
	k := &KME{metrics: newMetrics(), Config: Config{
		Self: kmeID(t, "km1"), Now: newClock().now, EpochLength: time.Hour, DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour,
		Policies: func() *policies.Set { return set },
	}}
	l := &link{LinkConfig: LinkConfig{ID: "fibre", Peer: kmeID(t, "km2"), End: handover.Alice, Provenance: key.Simulated}, k: k}
	k.links = map[string]*link{"fibre": l}
	return k, l
}

// policySet is the policies of a network and rules.
func policySet(t testing.TB, network, rules string) *policies.Set {
	t.Helper()
	set, err := policies.Load(policyFiles(t, network, rules, ""))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// policyFiles is a folder of them, and of acts that take two officers.
func policyFiles(t testing.TB, network, rules, ofTwo string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, policies.Shipped); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		policies.NetworkFile: network, "default.cedar": rules, policies.PrincipalsFile: "version: 1\nrequire: {keys: [ed25519], max_lifetime: 1h}\nrules: []\nprincipals: []\ntwo_officers: [" + ofTwo + "]\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func (k *KME) callOf(t *testing.T, sae string, a audit.Action) *call {
	t.Helper()
	c := &call{k: k, ev: audit.Event{Action: a}}
	if sae != "" {
		c.sae = saeID(t, sae)
	}
	return c
}

// TestRoute: a key for a slave is kept at a home of his that is not ours, if he has
// one that a link leads to; and there is one way to all slaves of a request.
func TestRoute(t *testing.T) {
	t.Parallel()
	k, _ := core(t)
	k.links["long"] = &link{LinkConfig: LinkConfig{ID: "long", Peer: kmeID(t, "km3"), Provenance: key.QKD}, k: k}
	for _, tt := range []struct{ slaves, link, there, here string }{
		{"alice", "", "", "alice"},
		{"alice anna", "", "", "alice anna"},
		{"bob", "fibre", "bob", ""},
		{"both", "fibre", "both", ""},
		{"bob alice", "fibre", "bob", "alice"},
		{"alice bob", "fibre", "bob", "alice"},
		{"anna bob both stranger alice", "fibre", "bob both stranger", "anna alice"},
		{"far", "long", "far", ""},
		{"further", "long", "further", ""},          // the home named first
		{"further bob", "fibre", "further bob", ""}, // the one that serves both
		{"both far", "long", "far", "both"},         // both is served here, since the other link does not serve far
		{"far further both", "long", "far further", "both"},
		{"lost", "", "", "lost"}, // no link leads to the home that is not ours
		{"bob far", "none", "", ""},
		{"alice nobody", "none", "", ""},
		{"nowhere", "none", "", ""},
	} {
		var slaves []identity.SAE
		for _, name := range strings.Fields(tt.slaves) {
			slaves = append(slaves, saeID(t, name))
		}
		ways, err := k.route(slaves...)
		if tt.link == "none" {
			if problem.KindOf(err) != problem.Invalid {
				t.Errorf("route to %s: %+v, %v, want an invalid request", tt.slaves, ways, err)
			}
			continue
		}
		if err != nil || len(ways) != 1 {
			t.Errorf("route to %s: %+v, %v, want one way", tt.slaves, ways, err)
			continue
		}
		w := ways[0]
		there, here := strings.Join(names(w.there), " "), strings.Join(names(w.here), " ")
		if w.link != k.links[tt.link] || there != tt.there || here != tt.here {
			t.Errorf("route to %s: over %v there %q, here %q; want %+v", tt.slaves, w.link, there, here, tt)
		}
	}
}

// TestJudge: who may not ask is told nothing of why.
func TestJudge(t *testing.T) {
	t.Parallel()
	k, _ := core(t)
	for _, tt := range []struct {
		caller, others string
		number, bits   int
		policies       string
		kind           problem.Kind
		why            string // "" if it is allowed
	}{
		{"alice", "bob", 1, 256, "group", 0, ""},
		{"alice", "both", 1, 256, "group", 0, ""},
		{"alice", "anna", 1, 256, "group", 0, ""},
		{"alice", "bob anna both", 1, 256, "group", 0, ""},
		{"alice", "far", 1, 256, "group", problem.Invalid, "no link leads"}, // which is told to those who may ask
		{"alice", "bob far", 1, 256, "group", problem.Invalid, "no link leads"},
		{"alice", "bob", 101, 256, "small", problem.Unauthorized, "policy (forbidden) does not let alice do enc_keys with bob"},
		{"alice", "bob", 1, 8192, "small", problem.Unauthorized, "policy (forbidden)"},
		{"alice", "stranger", 1, 256, "", problem.Unauthorized, "policy (no-policy)"},
		{"alice", "nobody", 1, 256, "", problem.Unauthorized, "policy (unknown-sae)"},
		{"alice", "bob stranger", 1, 256, "group", problem.Unauthorized, "does not let alice do enc_keys with stranger"},
		{"alice", "nobody far", 1, 256, "", problem.Unauthorized, "does not let alice do enc_keys with nobody"},
		{"alice", "anna far", 1, 256, "group", problem.Invalid, "no link leads"}, // anna is here all the same
		{"bob", "alice", 1, 256, "", problem.Unauthorized, "SAE bob is not homed at km1"},
		{"nobody", "alice", 1, 256, "", problem.Unauthorized, "SAE nobody is not homed at km1"},
		{"", "alice", 1, 256, "", problem.Unauthorized, "names no SAE"},
	} {
		c := k.callOf(t, tt.caller, audit.EncKeys)
		var others []identity.SAE
		for _, name := range strings.Fields(tt.others) {
			others = append(others, saeID(t, name))
		}
		_, err := c.judge(others, tt.number, tt.bits)
		if got := strings.Join(c.ev.Policy, " "); got != tt.policies {
			t.Errorf("%s for %s: recorded the policies %q, want %q", tt.caller, tt.others, got, tt.policies)
		}
		if (err == nil) != (tt.why == "") || err != nil && !strings.Contains(err.Error(), tt.why) {
			t.Errorf("%s for %s: %v, want %q", tt.caller, tt.others, err, tt.why)
		}
		var p *problem.Error
		if errors.As(err, &p) && (p.Kind != tt.kind || p.Kind == problem.Unauthorized && p.Detail != "" || p.RetryAfter != 0) {
			t.Errorf("%s for %s: the caller is told %s %q", tt.caller, tt.others, p.Kind, p.Detail)
		}
	}
}

// TestClassify: what an organ cannot do now is unavailable; what nobody foresaw is
// a fault of ours.
func TestClassify(t *testing.T) {
	t.Parallel()
	for _, err := range []error{hsm.ErrTampered, hsm.ErrUnavailable, store.ErrUnavailable, store.ErrDropped, store.ErrDoubt, store.ErrShort, store.ErrExpired, hsm.ErrNoKEK} {
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
