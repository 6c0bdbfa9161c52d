package lab

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/key"
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
			sent := request(t, sender, reader, time.Duration(5+2*i+j)*time.Hour)
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
	l, f := twoNodes(t, true)
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
			case <-time.After(time.Minute):
				t.Fatalf("%s has been taken over and goes on", n.Name)
			}
			if !n.Fenced() {
				t.Errorf("%s ended with %v:\n%s", n.Name, n.kmed.err, n.kmed.lastWords())
			}
		})
		back(t)
	})
	t.Run("stopped", func(t *testing.T) {
		restartInTurn(t, l, f)
		well(t, f)
	})
	t.Run("stopped with requests under way", func(t *testing.T) {
		stopUnderWay(t, l, f)
		well(t, f)
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

// restartInTurn stops each node of both sites in good order, and starts it again. Nobody
// takes over from it, and clients that turn to the other node when one does not serve
// them are always served.
func restartInTurn(t *testing.T, l *Lab, f *traffic) {
	t.Helper()
	f.rest.Lock() // its clients wait for the node that they asked
	defer f.rest.Unlock()
	clients := []*insistent{insist(t, f, f.routes[0]), insist(t, f, f.routes[1])} // alice and bob, both ways
	served := func(t *testing.T) {
		for _, c := range clients {
			c.flows(t)
		}
	}
	for _, s := range []*Site{l.KM1, l.KM2} {
		for i, n := range s.Nodes {
			survivor := s.Nodes[1-i]
			untilLeased(t, n)
			took := takeovers(t, l)
			if err := n.Stop(); err != nil {
				t.Error(err)
			}
			untilSettled(t, survivor, n)
			served(t)
			if now := takeovers(t, l); now != took {
				t.Errorf("%d takeovers from %s, which had given everything back", now-took, n.Name)
			}
			if err := n.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			untilNodeAlarm(t, survivor, "node-"+n.Name, false)
			served(t)
		}
	}
	for _, c := range clients {
		c.end()
		for _, why := range c.refused {
			t.Error(why)
		}
	}
}

// stopUnderWay: a node that is told to stop while requests are under way first answers
// them: a key that is assigned at the other site is handed out, and one that was taken
// out of the database too.
func stopUnderWay(t *testing.T, l *Lab, f *traffic) {
	f.rest.Lock()
	defer f.rest.Unlock()
	n := l.KM1.Nodes[0]
	out, back := f.routes[0], f.routes[1] // alice and bob, both ways; alice is at this node
	ask := func(ctx context.Context, r *route) (ids []key.ID, err error) {
		got, err := r.masters[0].Client.EncKeys(ctx, r.slave.ID, etsi014.KeyRequest{})
		return f.give(r, got), err
	}
	take := func(r *route, ids []key.ID) {
		got, err := r.slaves[0].Client.DecKeys(t.Context(), r.master.ID, ids)
		if err != nil {
			t.Errorf("%v: a key that is taken: %v", r, err)
		}
		defer got.Wipe()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.took(r, got)
	}
	var due []key.ID
	eventually(t, "keys at either end", func(ctx context.Context) (err error) {
		if _, err = ask(ctx, out); err == nil {
			due, err = ask(ctx, back)
		}
		return err
	})

	const hold = " 1s" // a request may take five
	if err := n.Faults(failpoint.EncAnnounceAnswered+hold, failpoint.DecCommitted+hold); err != nil {
		t.Fatal(err)
	}
	waiting := func(s *Site) (count int) { // rows of alice's and bob's that wait to be taken
		sql(t, s, func(conn *pgx.Conn) error {
			return conn.QueryRow(t.Context(), "SELECT count(*) FROM kme.due WHERE ct IS NOT NULL AND master IN ('alice', 'bob') AND sae IN ('alice', 'bob')").Scan(&count)
		})
		return count
	}
	assigned, untaken := waiting(l.KM2), waiting(l.KM1)
	var promised []key.ID
	var all sync.WaitGroup
	all.Go(func() {
		var err error
		if promised, err = ask(t.Context(), out); err != nil {
			t.Errorf("%v: a key that was assigned: %v", out, err)
		}
	})
	all.Go(func() { take(back, due) })
	eventually(t, "both requests to be past the point of no return", func(context.Context) error {
		if a, u := waiting(l.KM2)-assigned, waiting(l.KM1)-untaken; a != 1 || u != -1 {
			return fmt.Errorf("%d keys more are assigned to bob, and %d more wait for alice", a, u)
		}
		return nil
	})
	if err := n.Stop(); err != nil {
		t.Error(err)
	}
	all.Wait()
	take(out, promised)
	if err := errors.Join(n.Faults(), n.Restart(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// insistent is a client that asks for keys and has them taken, one after the other, on
// a route of the traffic. What one node does not serve it asks of the next.
type insistent struct {
	f       *traffic
	r       *route
	turn    int // whose turn it is to be asked first
	served  atomic.Int64
	refused []string // by every node
	end     func()   // stops it, after the request that it is at
}

func insist(t *testing.T, f *traffic, r *route) *insistent {
	t.Helper()
	c := &insistent{f: f, r: r}
	stop, ended := make(chan struct{}), make(chan struct{})
	c.end = sync.OnceFunc(func() {
		close(stop)
		<-ended
	})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(light.pace):
			}
			c.exchange()
		}
	}()
	t.Cleanup(c.end)
	return c
}

// exchange asks for a key and has it taken.
func (c *insistent) exchange() {
	c.turn++
	got, err := c.either(c.r.masters, func(p *Person) (etsi014.Container, error) {
		return p.Client.EncKeys(context.Background(), c.r.slave.ID, etsi014.KeyRequest{})
	})
	if err != nil {
		c.refused = append(c.refused, fmt.Sprintf("%v: a request for a key was refused by all nodes: %v", c.r, err))
		return
	}
	ids := c.f.give(c.r, got)
	got, err = c.either(c.r.slaves, func(p *Person) (etsi014.Container, error) {
		return p.Client.DecKeys(context.Background(), c.r.master.ID, ids)
	})
	if err != nil {
		c.refused = append(c.refused, fmt.Sprintf("%v: a key could be taken from no node: %v", c.r, err))
		return
	}
	defer got.Wipe()
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	c.f.took(c.r, got)
	c.served.Add(1)
}

// either asks the nodes in turn until one of them serves.
func (c *insistent) either(nodes []*Person, do func(*Person) (etsi014.Container, error)) (etsi014.Container, error) {
	var errs []error
	for i := range nodes {
		got, err := do(nodes[(c.turn+i)%len(nodes)])
		if err == nil {
			return got, nil
		}
		errs = append(errs, err)
	}
	return etsi014.Container{}, errors.Join(errs...)
}

// flows returns when it has been served some more.
func (c *insistent) flows(t *testing.T) {
	t.Helper()
	want := c.served.Load() + 10
	eventually(t, fmt.Sprintf("keys from %v", c.r), func(context.Context) error {
		if n := c.served.Load(); n < want {
			return fmt.Errorf("%d exchanges more, want 10", n-want+10)
		}
		return nil
	})
}

// A node dies while no node of the peer can be asked what it had announced: its
// chunks wait for that, and the survivor serves from others.
func TestTakeoverWithoutPeer(t *testing.T) {
	t.Parallel()
	l, f := twoNodes(t, false)
	dead, survivor := l.KM1.Nodes[0], l.KM1.Nodes[1]
	untilLeased(t, dead)
	for _, n := range l.KM2.Nodes {
		n.Kill()
	}
	dead.Kill()
	untilNodeAlarm(t, survivor, "takeover-"+dead.Name+"-km2", true)
	if n := takeovers(t, l); n != 5 {
		t.Errorf("%d takeovers, want each node's own at its start, and that the run of %s is ended", n, dead.Name)
	}
	for _, n := range l.KM2.Nodes {
		if err := n.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	untilSettled(t, survivor, dead)
	untilNodeAlarm(t, survivor, "takeover-"+dead.Name+"-km2", false)
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
	conn, done, err := n.site.super(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
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
