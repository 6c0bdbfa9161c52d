package kme

import (
	"slices"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// What a pool holds from before its link was another's is judged for what it is.

// noLight is a rule against keys of simulated light.
const noLight = `@id("no-light") forbid (principal is SAE, action, resource is SAE) when { context.provenance == "simulated" };`

// TestFormerPolicy: policy is asked about the provenance of the very atoms, at both ends.
func TestFormerPolicy(t *testing.T) {
	t.Parallel()
	k, l := coreOf(t, rules+noLight)
	l.Provenance = key.Upstream
	c := k.callOf(t, "alice", audit.EncKeys)
	o := order{slaves: names2(t, "bob"), number: 1, bits: 256}
	ways, err := c.judge(o.slaves, o.number, o.bits)
	if err != nil {
		t.Fatalf("keys of the link as it is: %v", err)
	}
	r := handover.Request{Link: l.ID, Master: saeID(t, "bob"), Slaves: names2(t, "alice"), Bits: 256, Keys: make([]handover.Key, 1)}
	for p, allowed := range map[key.Provenance]bool{key.Upstream: true, key.QKD: true, key.Simulated: false} {
		lends := []lent{{from: &store.Lease{Provenance: key.Upstream}}, {from: &store.Lease{Provenance: p}}}
		if err := c.fit(lends, o, &ways[0]); (err == nil) != allowed || err != nil && problem.KindOf(err) != problem.Unauthorized {
			t.Errorf("%s atoms among upstream ones: %v", p, err)
		}
		if why := l.fits(r, p); (why == "") != allowed {
			t.Errorf("the peer's %s atoms: %q", p, why)
		}
	}
}

// TestFormerOrder: who asks for keys gets none of what came before the link was another's
// if policy is against it, or if they asked for others; and it stays in the pool.
func TestFormerOrder(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	judge, _ := coreOf(t, rules+noLight)
	k := s.withToken(dir, func(c *Config) { c.Policies, c.Live = judge.Policies, policies.NewCurrent(judge.Policies()) })
	l := litLink(t, k)
	const atoms = key.ChunkAtoms
	b := qlink.Block{Provenance: key.Simulated, Outcome: distill.Outcome{
		Session: 1, Block: 1, Terms: distill.Terms{Epoch: int64(key.EpochAt(s.now(), k.EpochLength)), Owners: "a"},
		Bits: make([]byte, atoms*key.AtomBytes), Length: atoms * key.AtomBits,
	}}
	if err := l.intake(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	l.Provenance = key.Upstream
	s.change("UPDATE block SET state = 'ready'")
	for _, wanted := range []struct {
		provenance key.Provenance
		kind       problem.Kind
	}{{"", problem.Unauthorized}, {key.Upstream, problem.Invalid}} {
		o := order{slaves: names2(t, "bob"), number: 1, bits: 256, provenance: wanted.provenance}
		if _, err := k.initiate(t.Context(), k.callOf(t, "alice", audit.EncKeys), o); problem.KindOf(err) != wanted.kind {
			t.Errorf("of provenance %q: %v, want %v", wanted.provenance, err, wanted.kind)
		}
	}
	if got, err := l.pool.take(t.Context(), atoms, 1); err != nil || len(got) != atoms {
		t.Errorf("%d atoms are in the pool, %v; want %d", len(got), err, atoms)
	}
}

// TestFormerLight: once a node is set to production, what is left of simulated light is
// burned if it is ours, and assigned to nobody if it is the peer's.
func TestFormerLight(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	km2 := kmeID(t, "km2")
	l := litLink(t, k)
	block := func(id int64, owners string, p key.Provenance) {
		t.Helper()
		atoms := len(owners) * key.ChunkAtoms
		b := qlink.Block{Provenance: p, Outcome: distill.Outcome{
			Session: 1, Block: id, Terms: distill.Terms{Epoch: int64(key.EpochAt(s.now(), k.EpochLength)), Owners: owners},
			Bits: make([]byte, atoms*key.AtomBytes), Length: atoms * key.AtomBits,
		}}
		if err := l.intake(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	block(1, "aab", key.Simulated)
	k.Production, l.Provenance = true, key.Upstream
	block(2, "a", key.Upstream)
	s.change("UPDATE block SET state = 'ready'")

	got, err := l.pool.take(t.Context(), key.ChunkAtoms, 1)
	if err != nil || len(got) != key.ChunkAtoms {
		t.Fatalf("%d atoms are lent, %v", len(got), err)
	}
	for _, a := range got {
		if a.from.Provenance != key.Upstream {
			t.Fatalf("an atom that is %s is lent", a.from.Provenance)
		}
	}
	if more, err := l.pool.take(t.Context(), 1, 1); more != nil || err != nil {
		t.Errorf("%d more atoms are lent, %v", len(more), err)
	}
	owed := 0
	for _, d := range k.debts.queue {
		owed += len(d.lends)
	}
	if owed != 2*key.ChunkAtoms {
		t.Errorf("%d atoms are to be burned, want %d", owed, 2*key.ChunkAtoms)
	}

	if _, err := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: "km2-a", Run: 1}); err != nil {
		t.Fatal(err)
	}
	s.change("DELETE FROM key USING chunk c WHERE c.id = key.chunk AND c.block = 2") // else an index names two
	id := s.atom(2 * key.ChunkAtoms)
	answer, err := k.PeerDoor().Announce(t.Context(), km2, handover.Announce{Node: "km2-a", Run: 1, Batch: 1, Requests: []handover.Request{{
		ID: "r", Link: l.ID, Master: saeID(t, "bob"), Slaves: names2(t, "alice"), Bits: key.AtomBits, TTL: time.Minute.Milliseconds(),
		Keys: []handover.Key{{Session: 1, Block: 1, First: 2 * key.ChunkAtoms, Atoms: []key.ID{id}}},
	}}})
	if err != nil || len(answer.Results) != 1 || answer.Results[0].Accepted || !slices.Equal(answer.Results[0].Lacking, []key.ID{id}) {
		t.Errorf("an atom of simulated light, which the peer owns: %+v, %v; want it refused for good", answer, err)
	}
}
