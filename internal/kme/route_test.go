package kme

import (
	"slices"
	"strings"
	"testing"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// beside adds another link to km2, of keys of qkd.
func (k *KME) beside(id string) *link {
	l := newLink(k, LinkConfig{ID: id, Peer: k.links["fibre"].Peer, Provenance: key.QKD})
	k.links[id] = l
	return l
}

// TestRouteChoosesLink: of the links to a peer, those that are down come last, and of the
// others the one with most keys first. Those to other peers have no part in it.
func TestRouteChoosesLink(t *testing.T) {
	t.Parallel()
	k, fibre := core(t)
	second, third := k.beside("second"), k.beside("third")
	long := newLink(k, LinkConfig{ID: "long", Peer: kmeID(t, "km3"), Provenance: key.QKD})
	long.balance.here.Store(1000)
	k.links["long"] = long
	for _, tt := range []struct {
		keys [3]int64 // of fibre, second, third
		down string   // those that are
		want string
	}{
		{[3]int64{0, 0, 0}, "", "fibre second third"},
		{[3]int64{5, 7, 6}, "", "second third fibre"},
		{[3]int64{-1, 0, -2}, "", "second fibre third"}, // more was lent since than there seemed to be
		{[3]int64{5, 7, 6}, "second", "third fibre second"},
		{[3]int64{5, 7, 6}, "fibre third", "second third fibre"},
		{[3]int64{5, 7, 6}, "fibre second third", "second third fibre"}, // what they have is handed out all the same
	} {
		for i, l := range []*link{fibre, second, third} {
			l.balance.here.Store(tt.keys[i])
			l.state.State = admin.LinkStandby // another node runs it, and knows better
			l.dry.since = k.Now()
			if slices.Contains(strings.Fields(tt.down), l.ID) {
				l.state.State = admin.LinkDown
				if l == third {
					l.state.State = "open" // it tries another block, and has given none since
				}
			}
		}
		ways, err := k.route(saeID(t, "bob"), saeID(t, "anna"))
		var got []string
		for _, w := range ways {
			got = append(got, w.link.ID)
			if len(w.there) != 1 || len(w.here) != 1 {
				t.Errorf("by %s %v there and %v here", w.link.ID, w.there, w.here)
			}
		}
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("keys %v, down %q: %v, %v; want %q", tt.keys, tt.down, got, err, tt.want)
		}
	}
}

// TestPolicyOfEachLink: policy is asked about each link to the peer; it is in the audit by
// what it says of the one that is used.
func TestPolicyOfEachLink(t *testing.T) {
	t.Parallel()
	k, fibre := coreOf(t, rules+`
		@id("not-second") forbid (principal is SAE, action, resource is SAE) when { context.link == "second" };
		@id("only-second") forbid (principal is SAE, action, resource == SAE::"both") unless { context.link == "second" };`)
	second := k.beside("second")
	second.balance.here.Store(10)
	for _, tt := range []struct{ slave, ways, policies, why string }{
		{"bob", "fibre", "group", ""}, // though the other has more
		{"both", "", "not-second only-second", "policy (forbidden)"},
	} {
		c := k.callOf(t, "alice", audit.EncKeys)
		ways, err := c.judge(names2(t, tt.slave), 1, 256)
		var got []string
		for _, w := range ways {
			got = append(got, w.link.ID)
		}
		if strings.Join(got, " ") != tt.ways || strings.Join(c.ev.Policy, " ") != tt.policies || (err == nil) != (tt.why == "") {
			t.Errorf("%s: over %v by %v, %v; want %+v", tt.slave, got, c.ev.Policy, err, tt)
		}
		if err != nil && (problem.KindOf(err) != problem.Unauthorized || !strings.Contains(err.Error(), tt.why)) {
			t.Errorf("%s: %v, want %q", tt.slave, err, tt.why)
		}
	}

	o := order{provenance: key.QKD}
	ways := []way{{link: fibre}, {link: second}}
	if fit, err := o.suitable(slices.Clone(ways)); err != nil || len(fit) != 1 || fit[0].link != second {
		t.Errorf("for keys of qkd: %+v, %v", fit, err)
	}
	o.provenance = key.Upstream
	if fit, err := o.suitable(ways); problem.KindOf(err) != problem.Invalid {
		t.Errorf("for upstream keys: %+v, %v", fit, err)
	}
}

// TestLendOfTheNextLink: an order is filled from one link's pool alone, the next one's
// where the best has too little, or nothing that the order may have.
func TestLendOfTheNextLink(t *testing.T) {
	t.Parallel()
	k, _ := coreOf(t, rules+`@id("no-light") forbid (principal is SAE, action, resource is SAE) when { context.provenance == "simulated" };`)
	atoms := map[string]uint64{"first": 0b1111, "second": 0b111111, "former": 0b11}
	var ways []way
	for _, id := range []string{"former", "first", "second"} {
		l := k.beside(id)
		f := newFibre()
		f.grow(1, atoms[id])
		for _, c := range f.chunks {
			if c.Provenance = key.QKD; id == "former" {
				c.Provenance = key.Simulated // what is left in it, of before it was another's
			}
		}
		l.pool.lease, l.pool.free, l.pool.fresh, l.pool.nodes = f.lease, f.free, f.fresh, one
		ways = append(ways, way{link: l, policies: []string{id}})
	}
	lend := func(number int, want, why string) {
		t.Helper()
		c := k.callOf(t, "alice", audit.EncKeys)
		w, lends, err := c.lend(t.Context(), order{slaves: names2(t, "bob"), number: number, bits: 256}, ways)
		if want == "" {
			if problem.KindOf(err) == 0 || !strings.Contains(err.Error(), why) {
				t.Errorf("%d keys: %v, want %q", number, err, why)
			}
			return
		}
		if err != nil || w.link.ID != want || len(lends) != number || c.ev.Link != want || c.ev.Policy[0] != want {
			t.Fatalf("%d keys: %d of link %v, recorded as of %s by %v, %v; want %s", number, len(lends), w.link, c.ev.Link, c.ev.Policy, err, want)
		}
		if n := w.link.balance.here.Load(); n != -int64(number) {
			t.Errorf("%d keys: link %s counts %d", number, want, n)
		}
		w.link.balance.here.Store(0)
		w.link.pool.give(lends)
	}
	lend(1, "first", "") // former's are not allowed
	lend(4, "first", "")
	lend(5, "second", "")
	lend(7, "", "link former, and link first, and link second has fewer than 7 keys of 256 bits")
	ways = ways[:1]
	lend(1, "", "policy (forbidden)")
	if n := ways[0].link.inPool(); n != 2 {
		t.Errorf("%d atoms are in the pool that nobody may have, want 2", n)
	}
	k.Production, ways[0].link.Provenance = true, key.Simulated
	lend(1, "", "set to production")
}
