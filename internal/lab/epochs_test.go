package lab

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/failpoint"
)

// rotation, in the environment (make rotation), is for how long TestRotationUnderLoad goes on.
const rotation = "KME_ROTATION"

// shortEpochs starts a lab whose clocks go sixty times as fast: an epoch is a minute,
// and ends each second.
func shortEpochs(t *testing.T) *Lab {
	t.Helper()
	const settings = "ttl: 5m\nmax_ttl: 5m\npool_ttl: 5m\n" // a link that is held up for five seconds is no reason to refuse anything
	l := start(t, func(c *Config) {
		c.Bin = binaries(t, true)
		c.Epoch, c.Filler, c.Interval, c.PoolLimit = time.Minute, 512, 200*time.Millisecond, 100_000
		c.Settings = map[string]string{"km1": settings, "km2": settings}
	})
	var ended sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	ended.Go(func() {
		const every = 100 * time.Millisecond
		tick := time.NewTicker(every)
		defer tick.Stop()
		for ahead := time.Duration(0); ctx.Err() == nil; ahead += 59 * every {
			for _, s := range []*Site{l.KM1, l.KM2} {
				if err := s.Faults("clock " + ahead.String()); err != nil {
					t.Error(err)
					return
				}
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	t.Cleanup(func() { stop(); ended.Wait() })
	return l
}

// number runs a query of one number at a site.
func number(ctx context.Context, s *Site, sql string) (n int, err error) {
	conn, done, err := s.super(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	return n, conn.QueryRow(ctx, sql).Scan(&n)
}

// dropped returns when a site has dropped so many epochs.
func dropped(t *testing.T, s *Site, atLeast int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d epochs of %s to be dropped", atLeast, s.Name), func(ctx context.Context) error {
		n, err := number(ctx, s, "SELECT count(*) FROM kme.epoch WHERE state = 'dropped'")
		if err == nil && n < atLeast {
			err = fmt.Errorf("%d are", n)
		}
		return err
	})
}

// TestRotationUnderLoad: an epoch a second at both sites, and whoever asks for keys and
// takes them notices nothing. The invariants hold when epochs are gone, and no blob lies
// under a KEK that is destroyed.
func TestRotationUnderLoad(t *testing.T) {
	t.Parallel()
	l := shortEpochs(t)
	keysStored(t, l, 1000)
	f := begin(t, l)
	f.flows(t)
	long := 6 * time.Second
	if text := os.Getenv(rotation); text != "" {
		var err error
		if long, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	first := make(map[*Site]int)
	for _, s := range []*Site{l.KM1, l.KM2} {
		var err error
		if first[s], err = number(t.Context(), s, "SELECT count(*) FROM kme.epoch"); err != nil {
			t.Fatal(err)
		}
	}
	<-time.After(long)
	for _, s := range []*Site{l.KM1, l.KM2} {
		eventually(t, "epochs of "+s.Name, func(ctx context.Context) error {
			n, err := number(ctx, s, "SELECT count(*) FROM kme.epoch")
			if err == nil && n-first[s] < int(long/time.Second)-1 {
				err = fmt.Errorf("it has opened %d in %v", n-first[s], long)
			}
			return err
		})
		dropped(t, s, 3)
	}
	f.close(t)
	for _, r := range f.routes {
		// On a machine that runs other tests too a peer may be late, and a request may
		// outlive the time that an epoch leaves to those under way: 0.17 s by this clock.
		for _, late := range []string{"the other KME does not answer", "not available at the moment"} {
			if r.why[late] < int(r.served.Load())/10 {
				delete(r.why, late)
			}
		}
		for said, n := range r.why {
			t.Errorf("%v: %d requests were refused: %s", r, n, said)
		}
	}
}

// TestKilledAtEpochsEnd: whatever line a kmed dies on while an epoch ends or a KEK is
// made, the next process goes on: the epoch ends, and the token holds what the register
// says. Both sites die again and again, each at another failpoint.
func TestKilledAtEpochsEnd(t *testing.T) {
	t.Parallel()
	l := shortEpochs(t)
	keysStored(t, l, 500)
	sites := [2]*Site{l.KM1, l.KM2}
	for _, names := range [][2]string{
		{failpoint.EpochKEKPlanned, failpoint.EpochKEKMade},
		{failpoint.EpochSealed, failpoint.EpochKEKDestroyed},
		{failpoint.EpochCopyClosed, failpoint.EpochDraining},
		{failpoint.EpochDropped, failpoint.EpochDestroyed},
	} {
		for i, s := range sites {
			arm(t, s, names[i])
		}
		for i, s := range sites {
			select {
			case <-s.Exited():
				killedItself(t, s.Node, names[i])
			case <-time.After(time.Minute):
				t.Fatalf("%s never came to %s", s.Name, names[i])
			}
		}
	}
	for _, s := range sites {
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	works(t, l)
	for _, s := range sites {
		last, err := number(t.Context(), s, "SELECT coalesce(max(epoch), 0) FROM kme.epoch WHERE state IN ('sealed', 'draining', 'destroyed')")
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprintf("epochs of %s up to %d to end", s.Name, last), func(ctx context.Context) error {
			n, err := number(ctx, s, fmt.Sprintf("SELECT count(*) FROM kme.epoch WHERE epoch <= %d AND state <> 'dropped'", last))
			if err == nil && n > 0 {
				err = fmt.Errorf("%d have not", n)
			}
			return err
		})
		if n, err := number(t.Context(), s, "SELECT count(*) FROM kme.kek k JOIN kme.epoch e USING (epoch) WHERE e.state = 'dropped' AND k.state <> 'destroyed'"); err != nil || n > 0 {
			t.Errorf("%s: %d KEKs of epochs that are over, %v", s.Name, n, err)
		}
		alarms, err := operator(t, s).Alarms(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range alarms {
			if strings.HasPrefix(a.Name, "kek-") { // the token is not what the register says
				t.Errorf("%s: alarm %+v", s.Name, a)
			}
		}
	}
}
