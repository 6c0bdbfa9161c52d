package lab

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/pgdev"
)

// twoNodes is a lab of two nodes a site with traffic over all four.
func twoNodes(t *testing.T, failpoints bool) (*Lab, *traffic) {
	t.Helper()
	l := start(t, func(c *Config) {
		c.Bin = binaries(t, failpoints)
		c.Nodes, c.Filler, c.Interval, c.PoolLimit = 2, 512, 200*time.Millisecond, 8192
	})
	keysStored(t, l, 2000)
	f := begin(t, l)
	f.flows(t)
	return l, f
}

// Any node of a site hands out its keys, and any of the other site what is due
// there, whichever of them has made the KEK that seals it.
func TestEveryNodeServes(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Nodes, c.Filler = 2, 2048 })
	keysStored(t, l, 1000)
	for i, at := range l.KM1.Nodes {
		for j, from := range l.KM2.Nodes {
			alice, bob := saeAt(t, l, "alice", at.Name), saeAt(t, l, "bob", from.Name)
			take(t, bob, alice, get(t, alice, bob, 100))
			take(t, alice, bob, get(t, bob, alice, 1))

			// A lifetime that ends in an epoch for which no node has a KEK yet.
			sender, reader := saeAt(t, l, "alice@qutemail.example", at.Name), saeAt(t, l, "bob@qutemail.example", from.Name)
			sent, err := sender.Legacy.RequestKey(t.Context(), sender.ID, reader.ID, 0, time.Duration(5+2*i+j)*time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := reader.Legacy.RetrieveKey(t.Context(), reader.ID, sent.ID); err != nil {
				t.Errorf("reader at %s: %v", from.Name, err)
			}
		}
	}
}

// A node of each site dies, is paused, is stopped: the other one takes over what it
// had, and keys go on being handed out meanwhile. One that was paused ends by itself
// when it goes on.
func TestNodeGone(t *testing.T) {
	t.Parallel()
	l, f := twoNodes(t, false)
	gone := []*Node{l.KM1.Nodes[0], l.KM2.Nodes[1]}
	each := func(do func(*Node)) {
		for _, n := range gone {
			do(n)
		}
	}
	survivors := func(check func(survivor, gone *Node)) {
		check(l.KM1.Nodes[1], gone[0])
		check(l.KM2.Nodes[0], gone[1])
	}
	back := func(t *testing.T) {
		each(func(n *Node) {
			if err := n.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
		survivors(func(survivor, gone *Node) { untilNodeAlarm(t, survivor, "node-"+gone.Name, false) })
		well(t, f)
	}
	t.Run("killed", func(t *testing.T) {
		each(func(n *Node) { untilLeased(t, n) })
		each((*Node).Kill)
		survivors(func(survivor, gone *Node) { untilNodeAlarm(t, survivor, "node-"+gone.Name, true) })
		survivors(func(survivor, gone *Node) { untilSettled(t, survivor, gone) })
		well(t, f)
		back(t)
	})
	t.Run("paused", func(t *testing.T) {
		each(func(n *Node) { untilLeased(t, n) })
		each(func(n *Node) { signal(t, n, syscall.SIGSTOP) })
		survivors(func(survivor, gone *Node) { untilSettled(t, survivor, gone) })
		well(t, f)
		each(func(n *Node) { signal(t, n, syscall.SIGCONT) })
		each(func(n *Node) {
			select {
			case <-n.Exited():
			case <-time.After(30 * time.Second):
				t.Fatalf("%s has been taken over and goes on", n.Name)
			}
			if !n.Fenced() {
				t.Errorf("%s ended with %v:\n%s", n.Name, n.kmed.err, n.kmed.lastWords())
			}
		})
		back(t)
	})
	t.Run("stopped", func(t *testing.T) {
		each(func(n *Node) { untilLeased(t, n) })
		took := takeovers(t, l)
		each(func(n *Node) {
			if err := n.Stop(); err != nil {
				t.Error(err)
			}
		})
		survivors(func(survivor, gone *Node) { untilSettled(t, survivor, gone) })
		well(t, f)
		if n := takeovers(t, l); n != took {
			t.Errorf("%d takeovers from nodes that had given everything back", n-took)
		}
		back(t)
	})
	t.Run("both of a site", func(t *testing.T) {
		for _, n := range l.KM1.Nodes {
			n.Kill()
		}
		for _, n := range l.KM1.Nodes {
			if err := n.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		well(t, f)
	})
	f.close(t)
}

// A node dies while no node of the peer can be asked what it had announced: its
// chunks wait for that, and the survivor serves from others.
func TestTakeoverWithoutPeer(t *testing.T) {
	t.Parallel()
	l, f := twoNodes(t, false)
	for _, n := range l.KM2.Nodes {
		n.Kill()
	}
	dead, survivor := l.KM1.Nodes[0], l.KM1.Nodes[1]
	if leased(t, dead, "=") == 0 {
		t.Fatal("a node that has leased nothing")
	}
	dead.Kill()
	untilNodeAlarm(t, survivor, "takeover-"+dead.Name, true)
	if n := takeovers(t, l); n != 4 {
		t.Errorf("%d takeovers, want each node's own at its start", n)
	}
	for _, n := range l.KM2.Nodes {
		if err := n.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	untilSettled(t, survivor, dead)
	untilNodeAlarm(t, survivor, "takeover-"+dead.Name, false)
	well(t, f)
	f.close(t)
}

// The survivor dies in the middle of a takeover. Whoever is next finishes it: the
// survivor's next process, or the node that was taken over from.
func TestKilledInTakeover(t *testing.T) {
	t.Parallel()
	l, f := twoNodes(t, true)
	dead, survivor := l.KM1.Nodes[0], l.KM1.Nodes[1]
	for _, test := range []struct {
		name string // of the failpoint
		next *Node
	}{{failpoint.TakeoverBumped, survivor}, {failpoint.TakeoverBurned, dead}} {
		t.Run(fmt.Sprintf("%s then %s", test.name, test.next.Name), func(t *testing.T) {
			survivor.Kill()
			if err := survivor.Restart(t.Context(), "KME_FAILPOINT="+test.name+":2"); err != nil { // the first is that of its own start
				t.Fatal(err)
			}
			well(t, f)
			untilLeased(t, dead)
			dead.Kill()
			select {
			case <-survivor.Exited():
			case <-time.After(time.Minute):
				t.Fatalf("%s never came to %s", survivor.Name, test.name)
			}
			killedItself(t, survivor, test.name)
			if leased(t, dead, "<") == 0 {
				t.Error("nothing of the takeover is left to be done")
			}
			other := survivor
			if test.next == survivor {
				other = dead
			}
			if err := test.next.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if test.next == survivor {
				untilSettled(t, survivor, dead)
			}
			if err := other.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			well(t, f)
		})
	}
	f.close(t)
}

func signal(t *testing.T, n *Node, s syscall.Signal) {
	t.Helper()
	if err := n.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// takeovers counts those that have ended, at both sites.
func takeovers(t *testing.T, l *Lab) int {
	t.Helper()
	return recorded(t, l.KM1, "e->>'action' = 'takeover'") + recorded(t, l.KM2, "e->>'action' = 'takeover'")
}

// leased counts the chunks with keys that a node has leased in its current run, or
// in lower ones.
func leased(t *testing.T, n *Node, compare string) (chunks int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), n.site.DSN(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM kme.chunk c JOIN kme.node_run n ON n.node = c.node
		WHERE c.node = $1 AND c.run `+compare+` n.run AND c.remaining > 0`, n.Name).Scan(&chunks); err != nil {
		t.Fatal(err)
	}
	return chunks
}

// untilLeased returns when a node has chunks to lose.
func untilLeased(t *testing.T, n *Node) {
	t.Helper()
	eventually(t, n.Name+" to lease", func(context.Context) error {
		if leased(t, n, "=") == 0 {
			return errors.New("it has nothing")
		}
		return nil
	})
}

// untilNodeAlarm is untilAlarm of one node.
func untilNodeAlarm(t *testing.T, n *Node, name string, standing bool) {
	t.Helper()
	c, err := n.site.lab.Operator("root", n.Name)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, fmt.Sprintf("alarm %s at %s: %t", name, n.Name, standing), func(ctx context.Context) error {
		alarms, err := c.Alarms(ctx)
		if err != nil {
			return err
		}
		for _, a := range alarms {
			if a.Name == name {
				if standing {
					return nil
				}
				return fmt.Errorf("%s", a.Text)
			}
		}
		if standing {
			return fmt.Errorf("alarms: %v", alarms)
		}
		return nil
	})
}

// untilSettled returns when the survivor sees nothing left of a node that has gone.
func untilSettled(t *testing.T, survivor, gone *Node) {
	t.Helper()
	c, err := survivor.site.lab.Operator("root", survivor.Name)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, survivor.Name+" to take over from "+gone.Name, func(ctx context.Context) error {
		n, err := c.Node(ctx)
		if err != nil {
			return err
		}
		if len(n.Others) != 1 || n.Others[0].Node != gone.Name {
			return fmt.Errorf("it sees %+v", n.Others)
		}
		if o := n.Others[0]; o != (admin.Other{Node: o.Node, Run: o.Run, Since: o.Since, Settled: true}) {
			return fmt.Errorf("it sees %+v", o)
		}
		return nil
	})
}
