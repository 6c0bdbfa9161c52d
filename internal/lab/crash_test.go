package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/store"
)

// Whatever line a kmed dies on, nothing is handed out twice, nothing that was
// handed out is lost, and the other site and the next process clear up. Each site
// dies at each failpoint once, under traffic in both directions.
func TestKilledAtEveryFailpoint(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) {
		c.Bin = binaries(t, true)
		c.Filler, c.Interval, c.PoolLimit = 512, 200*time.Millisecond, 4096 // there is always room for a block soon
	})
	keysStored(t, l, 1000)
	f := begin(t, l)
	sites := [2]*Site{l.KM1, l.KM2}
	for _, name := range failpoint.Names {
		if name == failpoint.GrantCommitted || name == failpoint.PeerGrantCommitted {
			continue // the ends use their shares alike here: TestOneSidedLoad
		}
		if strings.HasPrefix(name, "epoch") {
			continue // the epochs are too long here: TestKilledAtEpochsEnd
		}
		if name == failpoint.PadSpent {
			continue // there is no light here: TestKilledLink
		}
		t.Run(name, func(t *testing.T) {
			for i, s := range sites { // the second dies while the first one's next process clears up
				if name == failpoint.PeerVoidReceived {
					diesOfVoid(t, s, sites[1-i])
				} else {
					dies(t, s, name)
				}
				if err := s.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			well(t, f)
		})
		if t.Failed() {
			break // what follows would only say so again
		}
	}
	f.close(t)
}

// hits is at which of its hits a failpoint kills: late enough that the process has
// come to serve, for those that every request passes.
func hits(name string) int {
	switch {
	case strings.HasPrefix(name, "intake"), name == failpoint.PadSpent:
		return 2
	case name == failpoint.PeerVoidReceived, name == failpoint.GrantCommitted, name == failpoint.PeerGrantCommitted,
		strings.HasPrefix(name, "takeover"), strings.HasPrefix(name, "epoch"): // those of its own start
		return 1
	}
	return 20
}

// arm has the site's kmed die at a failpoint.
func arm(t *testing.T, s *Site, name string) {
	t.Helper()
	s.Kill()
	err := s.Restart(t.Context(), fmt.Sprintf("KME_FAILPOINT=%s:%d", name, hits(name)))
	if err != nil && s.Running() {
		t.Fatal(err)
	}
}

// dies returns when the site's kmed has died at a failpoint.
func dies(t *testing.T, s *Site, name string) {
	t.Helper()
	arm(t, s, name)
	select {
	case <-s.Exited():
	case <-time.After(time.Minute):
		t.Fatalf("%s never came to %s", s.Name, name)
	}
	killedItself(t, s.Node, name)
}

// killedItself says that the node, which has ended, died of a SIGKILL.
func killedItself(t *testing.T, s *Node, name string) {
	t.Helper()
	exit := (*exec.ExitError)(nil)
	if !errors.As(s.kmed.err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("%s was to die at %s, and ended with %v:\n%s", s.Name, name, s.kmed.err, s.kmed.lastWords())
	}
}

// diesOfVoid returns when the site's kmed has died at a void. There is one once the
// other site has died between an announce's answer and its own commit; the arming
// itself may have made one.
func diesOfVoid(t *testing.T, s, other *Site) {
	t.Helper()
	arm(t, s, failpoint.PeerVoidReceived)
	arm(t, other, failpoint.EncAnnounceAnswered)
	select {
	case <-other.Exited():
		killedItself(t, other.Node, failpoint.EncAnnounceAnswered)
	case <-s.Exited():
		other.Kill()
	case <-time.After(time.Minute):
		t.Fatalf("neither did %s come to %s nor %s to a void", other.Name, failpoint.EncAnnounceAnswered, s.Name)
	}
	if err := other.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Exited():
	case <-time.After(time.Minute):
		t.Fatalf("%s never came to a void", s.Name)
	}
	killedItself(t, s.Node, failpoint.PeerVoidReceived)
}

// well waits until keys flow on every route, has the clients rest until nothing is
// left in doubt, and holds the invariants against the lab.
func well(t *testing.T, f *traffic) {
	t.Helper()
	f.flows(t)
	f.rest.Lock()
	defer f.rest.Unlock()
	settled(t, f.lab)
	check(t, f.lab, f.lab.checkTables)
	comparePools(t, f.lab, f.recovered, f.tooOld)
	compareOwners(t, f.lab)
}

// settled returns when no key is parked and no void or grant unacknowledged at either site.
func settled(t testing.TB, l *Lab) {
	t.Helper()
	for _, s := range []*Site{l.KM1, l.KM2} {
		eventually(t, s.Name+" to settle", func(ctx context.Context) error {
			conn, done, err := s.super(ctx)
			if err != nil {
				return err
			}
			defer done()
			var parked, voids, grants, chunks int
			err = conn.QueryRow(ctx, `SELECT (SELECT count(*) FROM kme.parked), (SELECT count(*) FROM kme.void_out WHERE acked_at IS NULL),
				(SELECT count(*) FROM kme.grant_out WHERE acked_at IS NULL),
				(SELECT count(*) FROM kme.chunk c JOIN kme.node_run n ON n.node = c.node WHERE c.run < n.run AND c.remaining > 0)`).Scan(&parked, &voids, &grants, &chunks)
			if err == nil && parked+voids+grants+chunks > 0 {
				err = fmt.Errorf("%d keys parked, %d voids and %d grants not acknowledged, %d chunks leased by dead runs", parked, voids, grants, chunks)
			}
			return err
		})
	}
}

// A power cut, or a Postgres that dies alone: kmed goes on by itself when its
// database is back, and nothing that was answered is forgotten.
func TestKilledTogether(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.Interval, c.PoolLimit = 8192, 200*time.Millisecond, 32_000 })
	keysStored(t, l, 14_000)
	untaken(t, l, 2*handover.MaxAssigned)
	f := begin(t, l)
	one, two := l.KM1, l.KM2
	for _, victims := range []struct {
		name            string
		kmed, databases []*Site
	}{
		{"database of km1", nil, []*Site{one}},
		{"database of km2", nil, []*Site{two}},
		{"both databases", nil, []*Site{one, two}},
		{"site km1", []*Site{one}, []*Site{one}},
		{"site km2", []*Site{two}, []*Site{two}},
		{"both kmed", []*Site{one, two}, nil},
		{"everything", []*Site{one, two}, []*Site{one, two}},
	} {
		t.Run(victims.name, func(t *testing.T) {
			f.flows(t)
			for _, s := range victims.kmed {
				s.Kill()
			}
			for _, s := range victims.databases {
				if err := s.KillDatabase(); err != nil {
					t.Fatal(err)
				}
			}
			for _, s := range victims.databases {
				if err := s.StartDatabase(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for _, s := range victims.kmed {
				if err := s.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			well(t, f)
			for _, s := range []*Site{one, two} {
				if !s.Running() {
					t.Errorf("%s has ended: %v", s.Name, s.kmed.err)
				}
			}
		})
	}
	f.close(t)
}

// untaken has alice ask for more than n keys that bob leaves where they are: her
// KME, started again, is told of all of them, and of no more at once than fit.
func untaken(t *testing.T, l *Lab, n int) {
	t.Helper()
	get(t, sae(t, l, "alice"), sae(t, l, "bob"), n+1)
}

// The link picks itself up when the quantum channel has died in the middle of a block, or
// either KME when it has spent a pad and not yet sent the tag that it made with it; and keys
// go on being handed out meanwhile.
func TestKilledLink(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Bin, c.PoolLimit = binaries(t, true), 1<<20 }) // there is always room for a block
	keysStored(t, l, 500)
	f := begin(t, l)
	op, err := l.Operator("root", "km1")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var before int64
		eventually(t, "a block under way", func(ctx context.Context) error {
			links, err := op.Links(ctx)
			if err != nil {
				return err
			}
			if before = links[0].Session; links[0].Current == nil {
				return errors.New("no block is under way")
			}
			return nil
		})
		l.Fibres[0].Kill()
		if err := l.Fibres[0].Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a block after the channel died", func(ctx context.Context) error {
			links, err := op.Links(ctx)
			if err != nil {
				return err
			}
			if n := links[0]; n.Last == nil || n.Last.Session <= before || n.Last.Aborted != "" {
				return fmt.Errorf("session %d is %s (%s)", n.Session, n.State, n.Why)
			}
			return nil
		})
		f.flows(t)
	}
	for _, s := range []*Site{l.KM1, l.KM2} {
		dies(t, s, failpoint.PadSpent)
		dead := [2]store.PadName{spentPad(t, l.KM1), spentPad(t, l.KM2)}
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "pads above those that were spent when "+s.Name+" died", func(context.Context) error {
			for i, end := range []*Site{l.KM1, l.KM2} {
				if now := spentPad(t, end); !above(now, dead[0]) || !above(now, dead[1]) {
					return fmt.Errorf("%s has spent %v; then it was %v, and %v at the other end", end.Name, now, dead[i], dead[1-i])
				}
			}
			return nil
		})
		f.flows(t)
	}
	settled(t, l)
	f.close(t)
}

// spentPad is the highest pad that a site has spent.
func spentPad(t *testing.T, s *Site) (name store.PadName) {
	t.Helper()
	conn, done, err := s.super(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	err = conn.QueryRow(t.Context(), "SELECT session, block, index FROM kme.link_auth").Scan(&name.Session, &name.Block, &name.Index)
	if err != nil {
		t.Fatalf("reading what %s has spent: %v", s.Name, err)
	}
	return name
}

func above(a, b store.PadName) bool { return distill.PadName(a).Compare(distill.PadName(b)) > 0 }
