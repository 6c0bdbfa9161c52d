package kme

import (
	"math"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/policies"
)

// sample sums up durations for a comparison of means.
type sample struct{ n, sum, squares float64 }

func (s *sample) add(d time.Duration) {
	x := d.Seconds()
	s.n, s.sum, s.squares = s.n+1, s.sum+x, s.squares+x*x
}

func (s *sample) mean() float64 { return s.sum / s.n }

func (s *sample) variance() float64 { return (s.squares - s.sum*s.sum/s.n) / (s.n - 1) }

// welch is Welch's t of two samples: beyond 4.5 they are taken to differ.
func welch(a, b *sample) float64 {
	return (a.mean() - b.mean()) / math.Sqrt(a.variance()/a.n+b.variance()/b.n)
}

// asSAE is the caller that a certificate of that SAE makes.
func asSAE(t testing.TB, name string, now time.Time) identity.Caller {
	t.Helper()
	return asOne(t, identity.RoleSAE, name, now)
}

// asOne is the caller that a certificate of that name and role makes, with duties if it is
// an operator's.
func asOne(t testing.TB, role identity.Role, name string, now time.Time, duties ...identity.Duty) identity.Caller {
	t.Helper()
	pool := string(role)
	uri := "qkd://" + pool + ".lab.test/"
	m, err := identity.NewMap(
		[]identity.Rule{{ID: pool, Pool: pool, Role: role, URI: uri + "{id}", Principal: "{id}"}},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 48 * time.Hour},
		map[string]identity.Principal{identity.PrincipalKey(role, name): {Enabled: true, Duties: duties}})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := policies.Recipe{Pool: pool, URIs: []string{uri + name}, DN: "CN=" + name}.Certificate(now)
	if err != nil {
		t.Fatal(err)
	}
	c, err := m.Judge(pool, leaf, now)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// BenchmarkNoOracle asks, in turns, for keys to share with an SAE that nobody knows,
// one that policy forbids and one that is disabled, and reports Welch's t between how
// long they were answered in, down to the commit of their records: over 100,000 of them with
// -benchtime 100000x. A 401 and the 400 of
// dec_keys can be told apart by whoever is named for keys: that is the standard's.
func BenchmarkNoOracle(b *testing.B) {
	s := newSite(b)
	k := s.guarded()
	alice := asSAE(b, "alice", k.Now())
	k.Live.SwitchOff(map[string]string{"sae/bob": "lost laptop"})
	others := []identity.SAE{saeID(b, "nobodyx"), saeID(b, "stranger"), saeID(b, "bob")}
	took := make([]sample, len(others))
	for i := 0; b.Loop(); i++ {
		which := i % len(others)
		began := time.Now()
		_, err := k.EncKeys(b.Context(), alice, "r", others[which], etsi014.KeyRequest{Number: 1, Bits: 256})
		took[which].add(time.Since(began))
		if err == nil {
			b.Fatal("allowed")
		}
	}
	b.ReportMetric(math.Abs(welch(&took[0], &took[1])), "t-forbidden")
	b.ReportMetric(math.Abs(welch(&took[0], &took[2])), "t-disabled")
}
