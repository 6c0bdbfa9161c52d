package lab

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// With SAEs that ask at one end alone, and nothing new from the link, the other
// end's keys come over, whichever end it is; and whoever dies on the way, each chunk
// stays one end's.
func TestOneSidedLoad(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) {
		c.Bin = binaries(t, true)
		// One block a session, so that nothing comes while a test does not ask for it.
		c.Filler, c.Interval, c.PoolLimit = 2048, time.Hour, 1_000_000
	})
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	for _, way := range []struct {
		master, slave *Person
		taker, giver  *Site
	}{
		{alice, bob, l.KM1, l.KM2},
		{bob, alice, l.KM2, l.KM1},
	} {
		keysStored(t, l, 900)
		t.Run(way.master.ID.String()+" takes all", func(t *testing.T) {
			drain(t, l, []*Person{way.master}, []*Person{way.slave})
		})
		for _, victim := range []struct {
			site *Site
			name string
		}{
			{way.giver, failpoint.GrantCommitted},
			{way.taker, failpoint.PeerGrantCommitted},
		} {
			t.Run(victim.site.Name+"/"+victim.name, func(t *testing.T) {
				l.KM1.Kill()
				arm(t, victim.site, victim.name)
				if !l.KM1.Running() {
					if err := l.KM1.Restart(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				keysStored(t, l, 900) // Alice's end has opened a session, and with it come new keys
				askUntil(t, way.master, way.slave, victim.site)
				killedItself(t, victim.site.Node, victim.name)
				if err := victim.site.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				untilServed(t, way.master, way.slave)
				balanced(t, l)
			})
		}
	}
}

// The same with two nodes a site, of which each has leased some of its end's chunks.
func TestOneSidedLoadOfManyNodes(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Nodes, c.Filler, c.Interval, c.PoolLimit = 2, 4096, time.Hour, 4096 })
	keysStored(t, l, 2000)
	var alices, bobs []*Person
	for i := range 2 {
		alices = append(alices, saeAt(t, l, "alice", l.KM1.Nodes[i].Name))
		bobs = append(bobs, saeAt(t, l, "bob", l.KM2.Nodes[i].Name))
	}
	drain(t, l, alices, bobs)
}

// portion is how many keys a master asks for at once, here.
const portion = 16

// drain has a master get all keys that there are at both ends, but what the other end
// keeps for its own: no more than a chunk or two for each of its nodes.
func drain(t *testing.T, l *Lab, masters, slaves []*Person) {
	master, slave := masters[0], slaves[0]
	for _, s := range slaves {
		get(t, s, master, 1) // the other end has leased some of its chunks, and will not use them
	}
	all := stored(t, master, slave) + stored(t, slave, master)
	got, longest := 0, time.Duration(0)
	for served, turn := time.Now(), 0; got < all-(1+2*len(slaves))*key.ChunkAtoms; {
		eventually(t, fmt.Sprintf("keys for %s, who has %d of %d", master.ID, got, all), func(ctx context.Context) error {
			turn++
			c, err := masters[turn%len(masters)].Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{Number: portion})
			c.Wipe()
			got += len(c.Keys)
			return err
		})
		longest, served = max(longest, time.Since(served)), time.Now()
	}
	t.Logf("%d of %d keys; %s waited %v at the longest", got, all, master.ID, longest.Round(time.Millisecond))
	if longest > 5*time.Second+stall {
		t.Errorf("%s waited %v for the other end's keys, want about a second at most", master.ID, longest)
	}
	take(t, master, slave, get(t, slave, master, portion)) // the other end has kept some
	balanced(t, l)
}

// askUntil has master ask for keys until a site's kmed has ended.
func askUntil(t *testing.T, master, slave *Person, victim *Site) {
	t.Helper()
	eventually(t, victim.Name+" to die", func(ctx context.Context) error {
		for {
			select {
			case <-victim.Exited():
				return nil
			default:
			}
			c, err := master.Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{Number: portion})
			c.Wipe()
			if err != nil {
				return err
			}
		}
	})
}

// balanced waits until nothing is in doubt, and holds the invariants against the lab.
func balanced(t *testing.T, l *Lab) {
	t.Helper()
	settled(t, l)
	check(t, l, l.checkTables)
	comparePools(t, l, time.Time{}, false)
	compareOwners(t, l)
}

// compareOwners waits until each chunk that both ends may use has one owner: at rest
// none is on its way for long.
func compareOwners(t testing.TB, l *Lab) {
	t.Helper()
	eventually(t, "each chunk to have an owner", func(ctx context.Context) error {
		var ends [2]map[handover.ChunkRef]bool // whether the chunk is owned there
		for i, s := range []*Site{l.KM1, l.KM2} {
			conn, done, err := s.super(ctx)
			if err != nil {
				return err
			}
			defer done()
			rows, _ := conn.Query(ctx, `SELECT c.link, c.session, c.block, c.first, c.owner = 'here' FROM kme.chunk c
				JOIN kme.block b ON b.link = c.link AND b.session = c.session AND b.id = c.block WHERE b.state = 'ready' AND c.remaining > 0`)
			ends[i] = make(map[handover.ChunkRef]bool)
			var ref handover.ChunkRef
			var here bool
			if _, err := pgx.ForEachRow(rows, []any{&ref.Link, &ref.Session, &ref.Block, &ref.First, &here}, func() error {
				ends[i][ref] = here
				return nil
			}); err != nil {
				return err
			}
		}
		for ref, here := range ends[0] {
			if there, ok := ends[1][ref]; ok && here == there {
				return fmt.Errorf("chunk %s: owned at %s %v, at %s %v", ref, l.KM1.Name, here, l.KM2.Name, there)
			}
		}
		return nil
	})
}

// TestCheckOwners: what Check calls two owners, and what it does not, given that the
// other site was read later.
func TestCheckOwners(t *testing.T) {
	t.Parallel()
	ref := handover.ChunkRef{BlockRef: handover.BlockRef{Link: linkID, Session: 1, Block: 1}, First: 64}
	for name, tc := range map[string]struct {
		here, later handover.Chunk
		bad         bool
	}{
		"from the first":         {handover.Chunk{Mine: true}, handover.Chunk{}, false},
		"given meanwhile":        {handover.Chunk{Mine: true, Grants: 2}, handover.Chunk{Mine: true, Grants: 3}, false},
		"on its way":             {handover.Chunk{Grants: 3}, handover.Chunk{Grants: 2}, false},
		"both from the first":    {handover.Chunk{Mine: true}, handover.Chunk{Mine: true}, true},
		"both by the same grant": {handover.Chunk{Mine: true, Grants: 2}, handover.Chunk{Mine: true, Grants: 2}, true},
		"taken and never given":  {handover.Chunk{Mine: true, Grants: 3}, handover.Chunk{Mine: true, Grants: 2}, true},
		"given by nobody":        {handover.Chunk{Mine: true, Grants: 3}, handover.Chunk{Grants: 2}, true},
	} {
		e := &evidence{site: &Site{Name: "km1"}, chunks: map[handover.ChunkRef]handover.Chunk{ref: tc.here}}
		var r Report
		e.checkOwners(&r, map[handover.ChunkRef]handover.Chunk{ref: tc.later}, &evidence{site: &Site{Name: "km2"}})
		if bad := len(r.Violations) > 0; bad != tc.bad {
			t.Errorf("%s: %v", name, r.Violations)
		}
	}
}
