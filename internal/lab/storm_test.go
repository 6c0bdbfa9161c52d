package lab

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// What a longer storm is made of, in the environment: `make storm` sets them.
const (
	stormTime   = "KME_STORM_TIME"   // how long it blows; 20s if not set
	stormSeed   = "KME_STORM_SEED"   // of its troubles; another each time if not set
	stormFiller = "KME_STORM_FILLER" // atoms of a random block; without it the keys are made of light
)

// A storm: 64 clients at two nodes a site, keys of many sizes, several slaves, some
// at their master's KME, rereads, and requests that are to be refused, while every few
// seconds a part dies or is away: a kmed, a Postgres, the quantum channel, an HSM, the
// network between the sites. At its end nothing has been handed out twice or to a
// stranger, nothing is unaccounted for, and every client's own record agrees with the
// audit: every answer has its outcome event, and no event tells of a request that
// nobody made.
func TestStorm(t *testing.T) {
	t.Parallel()
	s, n := newStorm(t), newNotes()
	s.l = start(t, func(c *Config) {
		c.Nodes, c.PoolLimit, c.Watch = 2, 20_000, n.over
		if c.Filler, _ = strconv.Atoi(os.Getenv(stormFiller)); c.Filler > 0 {
			c.PoolLimit, c.Interval = 4*c.Filler, 50*time.Millisecond
		}
		c.Proxy = true
	})
	keysStored(t, s.l, 1000)
	f := stormTraffic(t, s.l, s.mix, n)
	f.begin(t)
	f.flows(t)
	s.blow(t)
	well(t, f)
	f.close(t)
	f.onlyAnswers(t)
}

// stormMix are 66 clients.
var stormMix = mix{clients: 6, number: 16, bits: []int{256, 256, 256, 64, 128, 512, 1024, 4096}, pace: 2 * time.Millisecond, patient: true, aside: 12}

// stormTraffic is between all kinds of SAEs: in both directions, to several slaves, at
// their master's KME, by QuteMail's routes.
func stormTraffic(t *testing.T, l *Lab, m mix, n *notes) *traffic {
	t.Helper()
	f := newTraffic(l, m, n)
	also := newRoute(t, l, "alice", "erin")
	for _, r := range []*route{
		newRoute(t, l, "alice", "bob"), newRoute(t, l, "bob", "alice"), newRoute(t, l, "erin", "bob"),
		newRoute(t, l, "alice@qutemail.example", "bob@qutemail.example"), newRoute(t, l, "bob@qutemail.example", "alice@qutemail.example"),
	} {
		switch {
		case r.master.ID == also.master.ID:
			r.also = append(r.also, also)
		case r.from != r.at && r.master.ID != SAEID("bob"):
			r.legacy = true
		}
		f.add(r)
	}
	return f
}

// storm is a run of troubles.
type storm struct {
	l    *Lab
	mix  mix
	time time.Duration
	rand *rand.Rand
}

func newStorm(t *testing.T) *storm {
	t.Helper()
	s := &storm{time: 20 * time.Second, mix: stormMix}
	seed := rand.Uint64()
	var err error
	if text := os.Getenv(stormTime); text != "" {
		if s.time, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	if text := os.Getenv(stormSeed); text != "" {
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", stormSeed, seed)
	s.rand = rand.New(rand.NewPCG(seed, 0))
	return s
}

// blow makes one trouble after the other. Whatever it takes away it gives back.
func (s *storm) blow(t *testing.T) {
	t.Helper()
	troubles := []struct {
		name string
		make func(context.Context) error
	}{
		{"a node killed", s.killNode},
		{"a node killed", s.killNode},
		{"both nodes of a site killed", s.killSite},
		{"a database killed", s.killDatabase},
		{"the quantum channel killed", s.killFibre},
		{"an HSM away", s.hideToken},
		{"the network slow, cut or dead", s.disturb},
		{"the network slow, cut or dead", s.disturb},
	}
	made := make(map[string]int)
	for began := time.Now(); time.Since(began) < s.time; {
		trouble := troubles[s.rand.IntN(len(troubles))]
		made[trouble.name]++
		if err := trouble.make(t.Context()); err != nil {
			t.Fatalf("%s: %v", trouble.name, err)
		}
		s.rest(500*time.Millisecond, 3*time.Second)
	}
	t.Logf("troubles: %v", made)
}

// rest waits for a time between two.
func (s *storm) rest(least, most time.Duration) {
	<-time.After(least + time.Duration(s.rand.Int64N(int64(most-least))))
}

func (s *storm) site() *Site { return []*Site{s.l.KM1, s.l.KM2}[s.rand.IntN(2)] }

func (s *storm) killNode(ctx context.Context) error {
	site := s.site()
	n := site.Nodes[s.rand.IntN(len(site.Nodes))]
	n.Kill()
	s.rest(0, 8*time.Second) // long enough, sometimes, for the other one to take over
	return n.Restart(ctx)
}

func (s *storm) killSite(ctx context.Context) error {
	site := s.site()
	for _, n := range site.Nodes {
		n.Kill()
	}
	s.rest(0, 2*time.Second)
	for _, n := range site.Nodes {
		if err := n.Restart(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *storm) killDatabase(ctx context.Context) error {
	site := s.site()
	if err := site.KillDatabase(); err != nil {
		return err
	}
	s.rest(0, 2*time.Second)
	return site.StartDatabase(ctx)
}

func (s *storm) killFibre(ctx context.Context) error {
	s.l.Fibres[0].Kill()
	s.rest(0, 2*time.Second)
	return s.l.Fibres[0].Start(ctx)
}

func (s *storm) hideToken(context.Context) error {
	dir := s.site().TokenDir()
	if err := os.Rename(dir, dir+".away"); err != nil {
		return err
	}
	s.rest(500*time.Millisecond, 3*time.Second)
	return os.Rename(dir+".away", dir)
}

// disturb has the way to a node be bad for a while.
func (s *storm) disturb(context.Context) error {
	site := s.site()
	proxy := site.Nodes[s.rand.IntN(len(site.Nodes))].Proxy
	troubles := []Trouble{
		{Delay: 10 * time.Millisecond},
		{Delay: 100 * time.Millisecond},
		{Delay: time.Second},
		{Cut: true},
		{Hole: true},
		{Lose: true},
		{Twice: true},
		{Swap: true},
	}
	proxy.Set(troubles[s.rand.IntN(len(troubles))])
	s.rest(500*time.Millisecond, 4*time.Second)
	proxy.Set(Trouble{})
	return nil
}
