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
	"github.com/qutemail/kme/internal/key"
)

// rotation, in the environment (make rotation), is for how long TestRotationUnderLoad goes on.
const rotation = "KME_ROTATION"

// shortEpochs starts a lab whose clocks go sixty times as fast: an epoch is a minute,
// and ends each second.
func shortEpochs(t *testing.T) *Lab {
	t.Helper()
	const settings = "ttl: 20m\nmax_ttl: 20m\npool_ttl: 5m\n" // 20 s, and 5: a machine that is held up is no reason to refuse anything
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
	text := os.Getenv(rotation)
	if text == "" {
		rotatesByQuickClocks(t)
		return
	}
	long, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	rotatesEachSecond(t, int(long/time.Second))
}

// rotatesByQuickClocks sees the first epochs end of a lab with quick clocks.
func rotatesByQuickClocks(t *testing.T) {
	l := shortEpochs(t)
	keysStored(t, l, 1000)
	f := begin(t, l)
	f.tooOld = true
	f.flows(t)
	lives := newLives(t, l)
	lives.pass(t, 5, 3)
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
	lives.held(t, expiries)
}

// rotatesEachSecond is the same by the machine's clock: epochs that are a second long, and
// the storm's clients, who ask for more as soon as they have been answered. A key may be
// taken for a minute: its KEK, that of the epoch in which it expires, is made as long
// before. An epoch is sealed 35 s after its end, when nothing can come into it any more, and
// goes when its last key has, which waits in the pool for a minute at most: from when the
// first one has gone, one begins and one goes each second.
func rotatesEachSecond(t *testing.T, seconds int) {
	const settings = "ttl: 1m\nmax_ttl: 1m\npool_ttl: 1m\n"
	n := newNotes()
	l := start(t, func(c *Config) {
		c.Watch = n.over
		c.Epoch, c.Filler, c.Interval, c.PoolLimit = time.Second, 4096, 200*time.Millisecond, 8*4096
		c.Settings = map[string]string{"km1": settings, "km2": settings}
	})
	keysStored(t, l, 10_000)
	m := stormMix
	m.pace, m.aside = 0, 0
	f := stormTraffic(t, l, m, n)
	for _, r := range f.routes {
		for _, to := range r.all() { // what waits at the end is taken one by one, within the minute
			to.asked = make(chan []key.ID, 4)
		}
	}
	f.begin(t)
	f.flows(t)
	for _, s := range []*Site{l.KM1, l.KM2} {
		dropped(t, s, 1)
	}
	lives := newLives(t, l)
	lives.pass(t, seconds, seconds)
	f.close(t)
	losses := []string{expiries, burns}
	for _, r := range f.routes {
		for said, n := range r.why {
			switch {
			case said == "not enough keys are stored": // the link makes them on the same two processors
			case said == "the other KME does not answer" && n < int(r.served.Load())/20:
				// Within its 2 s: the machine has more to do than this. What is in doubt then is burned.
				losses = []string{expiries}
			default:
				t.Errorf("%v: %d requests were refused: %s", r, n, said)
			}
		}
	}
	lives.held(t, losses...)
}

// lives is how the epochs and the keys of both sites come and go.
type lives struct {
	sites         []*Site
	opened, ended map[*Site]int // epochs when it began
}

const (
	openedEpochs  = "SELECT count(*) FROM kme.epoch"
	droppedEpochs = "SELECT count(*) FROM kme.epoch WHERE state = 'dropped'"
	// blobs whose KEK is gone, by one snapshot
	orphans = `SELECT (SELECT count(*) FROM kme.due d JOIN kme.kek k ON k.id = d.kek WHERE d.ct IS NOT NULL AND k.state = 'destroyed')
		+ (SELECT count(*) FROM kme.key a JOIN kme.kek k ON k.id = a.kek WHERE k.state = 'destroyed')`
	// events of keys that were lost
	expiries = "SELECT count(*) FROM kme.audit WHERE body::jsonb @> '{\"action\": \"expire\", \"reason\": \"not taken in time\"}'"
	burns    = "SELECT count(*) FROM kme.audit WHERE body::jsonb @> '{\"action\": \"burn\"}'"
)

func newLives(t *testing.T, l *Lab) *lives {
	t.Helper()
	v := &lives{sites: []*Site{l.KM1, l.KM2}, opened: make(map[*Site]int), ended: make(map[*Site]int)}
	for _, s := range v.sites {
		v.opened[s], v.ended[s] = numberOf(t, s, openedEpochs), numberOf(t, s, droppedEpochs)
	}
	return v
}

// numberOf is number, for a database that is there.
func numberOf(t *testing.T, s *Site, sql string) int {
	t.Helper()
	n, err := number(t.Context(), s, sql)
	if err != nil {
		t.Fatalf("%s: %v", s.Name, err)
	}
	return n
}

// pass returns when so many epochs have begun at each site, and so many have gone. At no
// moment does a blob lie under a KEK that is destroyed.
func (v *lives) pass(t *testing.T, begun, gone int) {
	t.Helper()
	for {
		passed := true
		for _, s := range v.sites {
			if n := numberOf(t, s, orphans); n != 0 {
				t.Fatalf("%s: %d blobs lie under KEKs that are destroyed", s.Name, n)
			}
			passed = passed && numberOf(t, s, openedEpochs) >= v.opened[s]+begun && numberOf(t, s, droppedEpochs) >= v.ended[s]+gone
		}
		if passed {
			return
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(2 * time.Second): // it costs those that are asked something
		}
	}
}

// held fails the test if a site has lost keys, in one of these ways, or if its token is
// not what its register says.
func (v *lives) held(t *testing.T, losses ...string) {
	t.Helper()
	for _, s := range v.sites {
		for _, lost := range losses {
			if n := numberOf(t, s, lost); n != 0 {
				t.Errorf("%s has lost keys, in %d events: %s", s.Name, n, lost)
			}
		}
		alarms, err := operator(t, s).Alarms(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range alarms {
			if strings.HasPrefix(a.Name, "kek-") {
				t.Errorf("%s: alarm %+v", s.Name, a)
			}
		}
		t.Logf("%s: %d epochs begun and %d gone under load", s.Name, numberOf(t, s, openedEpochs)-v.opened[s], numberOf(t, s, droppedEpochs)-v.ended[s])
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
