package lab

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
)

// BenchmarkFairness has a few SAEs at KM2 ask for keys now and then, which their slaves
// at KM1 take, first alone and then beside somebody who does as it pleases: an SAE of
// KM2 that asks and whose slave never takes, one that asks as fast as it is answered,
// and a peer (KM1, by its certificate) that says announces by the hundred. times-alone
// is what the bully costs the others: how many times their p99 without it.
func BenchmarkFairness(b *testing.B) {
	l := start(b, func(c *Config) {
		c.Proxy, c.Filler, c.PoolLimit, c.Interval = true, 1<<16, 1<<17+1, 50*time.Millisecond
		c.Limits = Limits{AtomsPerSecond: 500, Burst: 2048, Untaken: 1000}
	})
	keysStored(b, l, 50_000)
	for _, who := range []struct {
		name  string
		start func(*testing.B, *Lab) *bully
	}{
		{"never-takes", neverTakes},
		{"floods", floods},
		{"peer-floods", peerFloods},
	} {
		b.Run(who.name, func(b *testing.B) {
			besides(b, l, func() func() int64 { return who.start(b, l).end }, "turned-away/s")
		})
	}
}

// besides has others ask alone and then beside a bully, and reports what that costs them,
// and in unit how often he was at it.
func besides(b *testing.B, l *Lab, start func() (end func() int64), unit string) {
	b.Helper()
	r := &rig{Lab: l}
	alone := others(b, l)
	end := start()
	before := r.cpu(b)
	b.ResetTimer()
	beside := others(b, l)
	b.StopTimer()
	acts := end()
	b.ReportMetric(r.cpu(b).less(before).kmed[1].Seconds()/b.Elapsed().Seconds(), "km2-cores")
	b.ReportMetric(alone.at(0.99), "p99-alone-ms")
	b.ReportMetric(beside.at(0.99), "p99-ms")
	b.ReportMetric(beside.at(0.99)/alone.at(0.99), "times-alone")
	b.ReportMetric(float64(acts)/b.Elapsed().Seconds(), unit)
}

// others make b.N requests for a key, four at a time, with a rest after each.
func others(b *testing.B, l *Lab) measured {
	b.Helper()
	m := measured{took: make([]time.Duration, b.N)}
	var next atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		master, err := l.SAEAt("bob@qutemail.example", l.KM2.Node.Name)
		if err != nil {
			b.Fatal(err)
		}
		slave, err := l.SAEAt("alice@qutemail.example", l.KM1.Node.Name)
		if err != nil {
			b.Fatal(err)
		}
		all.Go(func() {
			defer master.HTTP.CloseIdleConnections()
			defer slave.HTTP.CloseIdleConnections()
			if _, err := master.Client.Status(b.Context(), slave.ID); err != nil { // the connection is there
				b.Error(err)
				return
			}
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				asked := time.Now()
				got, err := master.Client.EncKeys(context.Background(), slave.ID, etsi014.KeyRequest{})
				m.took[i] = time.Since(asked)
				if err == nil {
					_, err = slave.Client.DecKeys(context.Background(), master.ID, keySetOf(got).ids())
				}
				if err != nil {
					b.Errorf("somebody else's request: %v", err)
					return
				}
				<-time.After(20 * time.Millisecond)
			}
		})
	}
	all.Wait()
	slices.Sort(m.took)
	return m
}

func keySetOf(c etsi014.Container) keySet {
	s := make(keySet)
	s.add(c)
	return s
}

// bully is somebody who says the same thing again and again, from many connections.
type bully struct {
	stop  context.CancelFunc
	ended sync.WaitGroup
	acts  atomic.Int64
}

// newBully returns when it has been at it for the first time: say says whether it was.
func newBully(b *testing.B, connections int, say func(context.Context) bool) *bully {
	b.Helper()
	ctx, stop := context.WithCancel(context.Background())
	bad := &bully{stop: stop}
	for range connections {
		bad.ended.Go(func() {
			for ctx.Err() == nil {
				if say(ctx) {
					bad.acts.Add(1)
				}
			}
		})
	}
	b.Cleanup(func() { stop(); bad.ended.Wait() })
	eventually(b, "the bully", func(context.Context) error {
		if bad.acts.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	bad.acts.Store(0)
	return bad
}

func (bad *bully) end() (acts int64) {
	acts = bad.acts.Load()
	bad.stop()
	bad.ended.Wait()
	return acts
}

func neverTakes(b *testing.B, l *Lab) *bully {
	return asks(b, l, 4, 16)
}

func floods(b *testing.B, l *Lab) *bully {
	return asks(b, l, 64, 1)
}

// asks is bob at KM2, who asks for alice, who takes nothing.
func asks(b *testing.B, l *Lab, connections, number int) *bully {
	bob := sae(b, l, "bob")
	return newBully(b, connections, func(ctx context.Context) bool {
		got, err := bob.Client.EncKeys(ctx, SAEID("alice"), etsi014.KeyRequest{Number: number})
		got.Wipe()
		answer, ok := errors.AsType[*etsi014.APIError](err)
		return ok && answer.Status == http.StatusServiceUnavailable
	})
}

func peerFloods(b *testing.B, l *Lab) *bully {
	cfg, err := l.KM2.Proxy.clientTLS()
	if err != nil {
		b.Fatal(err)
	}
	liar, err := peer.NewClient(peer.ClientConfig{Addresses: []string{l.KM2.Proxy.behind(0)}, TLS: cfg, Still: func(*x509.Certificate) error { return nil }, Log: l.Log})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(liar.Close)
	ahead := handover.Announce{Node: l.KM1.Node.Name, Run: 1 << 40, Batch: 1, Requests: []handover.Request{{
		ID: "r", Link: linkID, Master: SAEID("alice"), Slaves: []identity.SAE{SAEID("bob")}, Bits: key.AtomBits, TTL: 1000,
		Keys: []handover.Key{{Session: 1, Block: 1, Atoms: []key.ID{key.NewLocalID(time.Now())}}},
	}}}
	return newBully(b, 200, func(ctx context.Context) bool {
		answer, err := liar.Announce(ctx, ahead)
		_, refused := errors.AsType[*peer.Refused](err)
		return refused || answer.Standing == handover.Ahead
	})
}
