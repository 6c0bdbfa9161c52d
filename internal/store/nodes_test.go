package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

// deposed is the event of a run that is ended.
var deposed = audit.Event{Action: audit.Takeover, Outcome: audit.Done, Reason: "a node shows no sign of life"}

// TestBeat: a run shows itself until it is over, and a run that is over shows nothing.
func TestBeat(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	beat := func(db *DB) {
		t.Helper()
		if err := db.Beat(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	wantNodes := func(want ...NodeBeat) {
		t.Helper()
		got, err := two.Nodes(t.Context())
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("nodes: %v (-want +got):\n%s", err, diff)
		}
	}
	wantNodes(NodeBeat{NodeRun{"n1", 1}, 0}, NodeBeat{NodeRun{"n2", 1}, 0})
	beat(one)
	beat(one)
	beat(two)
	wantNodes(NodeBeat{NodeRun{"n1", 1}, 2}, NodeBeat{NodeRun{"n2", 1}, 1})

	heir, err := two.Depose(t.Context(), NodeRun{"n1", 1}, deposed)
	if heir != (NodeRun{"n1", 2}) || err != nil {
		t.Fatalf("deposing: %v, %v", heir, err)
	}
	if _, err := two.Depose(t.Context(), NodeRun{"n1", 1}, deposed); !errors.Is(err, ErrOvertaken) {
		t.Errorf("deposing the run that was: %v, want ErrOvertaken", err)
	}
	if err := one.Beat(t.Context()); !errors.Is(err, ErrFenced) {
		t.Errorf("a beat of the deposed run: %v, want ErrFenced", err)
	}
	wantNodes(NodeBeat{NodeRun{"n1", 2}, 0}, NodeBeat{NodeRun{"n2", 1}, 1})

	again := s.open("n1")
	beat(again)
	if err := one.Beat(t.Context()); !errors.Is(err, ErrFenced) {
		t.Errorf("a beat of the deposed run: %v, want ErrFenced", err)
	}
	wantNodes(NodeBeat{NodeRun{"n1", 3}, 3}, NodeBeat{NodeRun{"n2", 1}, 1})
	if err := again.Stop(t.Context(), nil, true, audit.Event{Action: audit.Stop, Outcome: audit.Done}); err != nil {
		t.Fatal(err)
	}
	wantNodes(NodeBeat{NodeRun{"n1", 3}, 0}, NodeBeat{NodeRun{"n2", 1}, 1})
	if n := countOf(s.check(), audit.Takeover); n != 1 {
		t.Errorf("%d ends of runs are recorded, want the one that was done", n)
	}
}

// TestGiveBack: a chunk is given back if all that is left of it is in its holder's
// hand, and by its holder alone.
func TestGiveBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	one, two := s.open("n1"), s.open("n2")
	b := s.fill(one, 256, mine)
	leases, err := one.Lease(ctx, linkName, 3)
	if err != nil || len(leases) != 3 {
		t.Fatalf("leased %d, %v", len(leases), err)
	}
	if err := one.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:2]), Events: []audit.Event{served("r", b.BlockRef, b.Atoms[:2]...)}}); err != nil {
		t.Fatal(err)
	}
	chunk := func(i int) int64 { return leases[i].Chunk }
	back := []Leased{{chunk(0), 62}, {chunk(1), 63}, {chunk(2), 64}}
	if freed, err := two.GiveBack(ctx, back); len(freed) != 0 || err != nil {
		t.Errorf("another node gave back %v, %v", freed, err)
	}
	freed, err := one.GiveBack(ctx, back)
	if diff := cmp.Diff([]int64{chunk(0), chunk(2)}, freed); diff != "" || err != nil {
		t.Errorf("given back: %v (-want +got):\n%s", err, diff)
	}
	wantChunks := func(want ...string) {
		t.Helper()
		got := ask[[]string](s, "SELECT array_agg(coalesce(node, 'free') ORDER BY first) FROM chunk")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("chunks (-want +got):\n%s", diff)
		}
	}
	wantChunks("free", "n1", "free", "free")
	if got, err := two.Lease(ctx, linkName, 1); err != nil || len(got) != 1 || len(got[0].Atoms) != 62 {
		t.Errorf("the chunk that was given back: %+v, %v", got, err)
	}
	if left, err := two.LeftBy(ctx, NodeRun{"n1", 1}); !cmp.Equal(left, Left{Now: []string{linkName}}) || err != nil {
		t.Errorf("left by n1: %+v, %v", left, err)
	}
	if err := one.Stop(ctx, []Leased{{chunk(1), 64}, {chunk(0), 62}}, true); err != nil {
		t.Fatal(err)
	}
	wantChunks("n2", "free", "free", "free")
	if left, err := two.LeftBy(ctx, NodeRun{"n1", 1}); !cmp.Equal(left, Left{}) || err != nil {
		t.Errorf("left by n1 after its end: %+v, %v", left, err)
	}
	s.check()
}

// TestEpochOfAnotherNode: what lies in partitions that another node of the site has
// made, since this one looked, is served, read, taken, burned and dropped like anything
// else.
func TestEpochOfAnotherNode(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	two, one := s.open("n2"), s.open("n1")
	s.step(5 * hour)
	if _, err := one.EnsureEpoch(ctx, s.epoch()); err != nil {
		t.Fatal(err)
	}
	if _, err := one.EnsureEpoch(ctx, s.epoch()+1); err != nil {
		t.Fatal(err)
	}
	forget := func() { // as a node is that has just been idle
		two.epochs.mu.Lock()
		defer two.epochs.mu.Unlock()
		clear(two.epochs.open)
	}
	b := s.fill(one, 64, mine)
	due := s.due(b.Atoms[0].ID, "bob", "alice")
	due.Reread = true
	if err := one.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1]), Due: []Due{due}, Events: []audit.Event{served("r", b.BlockRef, b.Atoms[0])}}); err != nil {
		t.Fatal(err)
	}
	forget()
	if err := two.Read(ctx, ReadJob{SAE: sae("bob"), Row: due.ref(), Events: []audit.Event{{Action: audit.DecKeys, Outcome: audit.Done, Keys: ids(b.Atoms[:1]), Reread: true}}}); err != nil {
		t.Errorf("reading: %v", err)
	}
	forget()
	if err := two.Take(ctx, TakeJob{
		SAE: sae("bob"), Rows: []DueRef{due.ref()}, How: GoneTaken,
		Events: []audit.Event{{Action: audit.DecKeys, Outcome: audit.Done, Keys: ids(b.Atoms[:1])}},
	}); err != nil {
		t.Errorf("taking: %v", err)
	}
	forget()
	if err := two.Burn(ctx, BurnJob{Atoms: ids(b.Atoms[1:2]), Event: func(ids []key.ID) audit.Event {
		return audit.Event{Action: audit.Burn, Outcome: audit.Done, Keys: ids, Atoms: rangeOf(b.BlockRef, 1, len(ids))}
	}}); err != nil {
		t.Errorf("burning: %v", err)
	}
	forget()
	leases, err := two.Lease(ctx, linkName, 1)
	if err != nil || len(leases) != 1 || len(leases[0].Atoms) != 62 {
		t.Fatalf("leased %+v, %v", leases, err)
	}
	if err := two.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[2:3]), Events: []audit.Event{served("r2", b.BlockRef, b.Atoms[2])}}); err != nil {
		t.Errorf("serving: %v", err)
	}
	lost := s.block(1, 64, mine)
	if err := one.HoldBlock(ctx, lost, holdEvent(lost)); err != nil {
		t.Fatal(err)
	}
	forget()
	if err := two.HeardHeldAnswer(ctx, lost.BlockRef, handover.Different, blockEvents(lost.BlockRef)); err != nil {
		t.Errorf("dropping a block: %v", err)
	}
	s.check()
}

// TestStopGivesUnclaimedBack: what a Lease had leased and could not return is free
// again after the run's end.
func TestStopGivesUnclaimedBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.fill(db, 64, mine)
	leases, err := db.Lease(t.Context(), linkName, 1)
	if err != nil {
		t.Fatal(err)
	}
	db.setAside(linkName, []int64{leases[0].Chunk})
	if err := db.Stop(t.Context(), nil, true); err != nil {
		t.Fatal(err)
	}
	if n := ask[int](s, "SELECT count(*) FROM chunk WHERE node IS NULL"); n != 1 {
		t.Error("an unclaimed chunk is still leased")
	}
}

// TestTakeoverRaces: two survivors depose a node at once, finish each other's
// takeover, and the node starts again meanwhile. One run comes of each bump, the
// chunks are free at the end, and what a new run has leased stays its own.
func TestTakeoverRaces(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	survivors := []*DB{s.open("n1"), s.open("n2")}
	dead := s.open("n3")
	b := s.fill(dead, 4*64, mine)
	for round := range 10 {
		leases, err := dead.Lease(ctx, linkName, 2)
		if err != nil || len(leases) != 2 {
			t.Fatalf("round %d: leased %d, %v", round, len(leases), err)
		}
		if err := dead.Park(ctx, ids(b.Atoms[:2]), 1); err != nil {
			t.Fatal(err)
		}
		was := NodeRun{"n3", dead.committer.run}
		var all sync.WaitGroup
		var mu sync.Mutex
		var heirs []NodeRun
		for _, db := range survivors {
			all.Go(func() {
				heir, err := db.Depose(ctx, was, deposed)
				if err == nil {
					mu.Lock()
					heirs = append(heirs, heir)
					mu.Unlock()
				} else if !errors.Is(err, ErrOvertaken) {
					t.Error(err)
				}
				nodes, err := db.Nodes(ctx)
				if err != nil {
					t.Error(err)
				}
				now := nodes[2].NodeRun
				err = db.EndTakeover(ctx, now, []string{linkName}, audit.Event{Action: audit.Takeover, Outcome: audit.Done})
				if err != nil && !errors.Is(err, ErrOvertaken) {
					t.Error(err)
				}
			})
		}
		if round%2 == 1 {
			all.Go(func() { dead = s.open("n3") })
		}
		all.Wait()
		if round%2 == 0 {
			if len(heirs) != 1 || heirs[0].Run != was.Run+1 {
				t.Fatalf("round %d: run %d was deposed by %v", round, was.Run, heirs)
			}
			dead = s.open("n3")
		}
		now := NodeRun{"n3", dead.committer.run}
		if err := survivors[0].EndTakeover(ctx, now, []string{linkName}); err != nil {
			t.Fatal(err)
		}
		if left, err := survivors[1].LeftBy(ctx, now); !cmp.Equal(left, Left{}) || err != nil {
			t.Fatalf("round %d: left %+v, %v", round, left, err)
		}
		if n := ask[int](s, "SELECT count(*) FROM chunk WHERE node IS NOT NULL"); n != 0 {
			t.Fatalf("round %d: %d chunks are leased", round, n)
		}
	}
	s.check()
}

// TestDisconnect: a node that is stopped in the middle of a transaction keeps its
// locks until its sessions are ended, whatever role they are of.
func TestDisconnect(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, node := range []string{"d1", "d2"} {
		s.makeRole("kme_node_"+node, "IN ROLE kme_app ROLE kme_owner") // as deploy/AUDIT.md says
	}
	for name, roles := range map[string]struct{ dead, survivor string }{
		"one role":      {AppRole, AppRole},
		"roles of own":  {"kme_node_d1", "kme_node_d2"},
		"some have one": {AppRole, "kme_node_d2"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cfg := s.config("d2")
			cfg.DSN = s.dsn(roles.survivor)
			db := s.openWith(cfg)
			s.fill(db, 64, mine)
			paused, psql := s.session(roles.dead, appName("d1")), s.session(roles.dead, "psql")
			exec(t, paused, "BEGIN; SELECT FROM chunk FOR UPDATE")
			disconnect := func(dead time.Duration, want int) {
				t.Helper()
				if left, err := db.Disconnect(t.Context(), "d1", dead); err != nil || left != want {
					t.Fatalf("%d sessions are left, %v; want %d", left, err, want)
				}
			}
			disconnect(time.Minute, 0) // it is younger than its node is dead
			beat := func(at string) {
				s.super(func(conn *pgx.Conn) error {
					_, err := conn.Exec(t.Context(), "ALTER TABLE node_beat DISABLE TRIGGER stamp; DELETE FROM node_beat; INSERT INTO node_beat VALUES ('d1', 1, 1, "+at+"); ALTER TABLE node_beat ENABLE TRIGGER stamp")
					return err
				})
			}
			beat("now() + interval '1 hour'")
			disconnect(0, 1) // it lives
			exec(t, paused, "SELECT")
			exec(t, paused, "COMMIT; UPDATE node_beat SET at = 'epoch', beat = 0") // nobody makes another look dead
			if ask[bool](s, "SELECT at < '2001-01-01' FROM node_beat") {
				t.Error("a sign of life is of when its writer says")
			}
			exec(t, paused, "BEGIN; SELECT FROM chunk FOR UPDATE")

			busy, worked := s.session(roles.dead, appName("d1")), make(chan error, 1)
			go func() {
				_, err := busy.Exec(context.Background(), "BEGIN; SELECT FROM chunk FOR UPDATE")
				worked <- err
			}()
			s.awaitLock()
			beat("now() - interval '1 hour'")
			disconnect(0, 2)
			if err := <-worked; err != nil {
				t.Errorf("a session that was at work: %v", err)
			}
			s.await("no session to be left", func() bool {
				left, err := db.Disconnect(t.Context(), "d1", 0)
				return err == nil && left == 0
			})
			leases, err := db.Lease(t.Context(), linkName, 1)
			if err != nil || len(leases) != 1 {
				t.Errorf("%d leases, %v: the lock is not free", len(leases), err)
			}
			for name, conn := range map[string]*pgx.Conn{"paused": paused, "busy": busy} {
				if err := conn.Ping(t.Context()); err == nil {
					t.Errorf("the %s session lives", name)
				}
			}
			exec(t, psql, "SELECT") // a session by hand is not the node's
			if err := db.Beat(t.Context()); err != nil {
				t.Errorf("our own sessions: %v", err)
			}
		})
	}
}

// TestRoleNotGranted: a role whose sessions nobody could end is found out by migrate, by
// the node's start and, if it is taken away later, by whoever disconnects the node. Not
// beside others: roles are the server's, and so are what they are members of.
func TestRoleNotGranted(t *testing.T) {
	s := newSite(t)
	s.makeRole("kme_node_lone", "IN ROLE kme_app")
	const want = `GRANT "kme_node_lone" TO kme_owner`
	if err := Migrate(t.Context(), s.dsn(OwnerRole), hour, quiet); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("migrate: %v, want %q", err, want)
	}
	cfg := s.config("lone")
	cfg.DSN = s.dsn("kme_node_lone")
	if db, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Open: %v, want %q", err, want)
		if err == nil {
			db.Close()
		}
	}
	db := s.open("n2")
	paused := s.session("kme_node_lone", appName("lone"))
	disconnect := func() int {
		t.Helper()
		left, err := db.Disconnect(t.Context(), "lone", 0)
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	if left := disconnect(); left != 1 {
		t.Errorf("%d sessions are said to be left, want 1", left)
	}
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), "GRANT pg_read_all_stats TO kme_owner")
		return err
	})
	left := disconnect() // it sees what it may not end
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), "REVOKE pg_read_all_stats FROM kme_owner")
		return err
	})
	if left != 1 {
		t.Errorf("%d sessions that it sees are said to be left, want 1", left)
	}
	exec(t, paused, "SELECT")

	if err := Migrate(t.Context(), s.dsn(pgdev.Superuser), hour, quiet); err != nil {
		t.Fatal(err)
	}
	s.openWith(cfg)
	s.await("no session to be left", func() bool { return disconnect() == 0 })
	if err := paused.Ping(t.Context()); err == nil {
		t.Error("the session lives")
	}
}

// makeRole makes a role that may log in, until the test ends.
func (s *site) makeRole(name, options string) {
	s.t.Helper()
	do := func(sql string) {
		s.super(func(conn *pgx.Conn) error { _, err := conn.Exec(context.Background(), sql); return err })
	}
	do("CREATE ROLE " + name + " LOGIN " + options)
	s.t.Cleanup(func() { do("DROP ROLE " + name) })
}

// session is one at the server, of a role and by a name.
func (s *site) session(role, name string) *pgx.Conn {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.dsn(role)+" search_path=kme application_name='"+name+"'")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func exec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// TestLead: one of several leads at a time, the next one when it has gone, however
// it went.
func TestLead(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx, cancel := context.WithCancel(t.Context())
	type word struct {
		node  string
		leads bool
	}
	words := make(chan word, 16)
	var all sync.WaitGroup
	lead := func(ctx context.Context, db *DB) {
		all.Go(func() {
			err := db.Lead(ctx, "test", func(ctx context.Context) error {
				words <- word{db.cfg.Node, true}
				<-ctx.Done()
				words <- word{db.cfg.Node, false}
				return ctx.Err()
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", db.cfg.Node, err)
			}
		})
	}
	want := func(w word) {
		t.Helper()
		select {
		case got := <-words:
			if got != w {
				t.Fatalf("%+v, want %+v", got, w)
			}
		case <-time.After(time.Minute):
			t.Fatalf("not in time: %+v", w)
		}
	}
	one, two := s.open("n1"), s.open("n2")
	oneCtx, stopOne := context.WithCancel(ctx)
	defer stopOne()
	lead(oneCtx, one)
	want(word{"n1", true})
	lead(ctx, two)
	stopOne()
	want(word{"n1", false})
	want(word{"n2", true})
	if _, err := one.Disconnect(ctx, "n2", 0); err != nil { // as if it were paused
		t.Fatal(err)
	}
	want(word{"n2", false})
	want(word{"n2", true})
	cancel()
	all.Wait()

	broken := errors.New("broken")
	if err := one.Lead(t.Context(), "other", func(context.Context) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("what failed while it led: %v", err)
	}
	if err := two.Lead(t.Context(), "other", func(context.Context) error { return fmt.Errorf("also %w", broken) }); !errors.Is(err, broken) {
		t.Errorf("the next: %v", err)
	}
}

// TestAlone: two nodes never do it at once.
func TestAlone(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	var inside atomic.Int32
	var all sync.WaitGroup
	for _, db := range []*DB{s.open("n1"), s.open("n2")} {
		for range 2 {
			all.Go(func() {
				for range 10 {
					err := db.Alone(t.Context(), "test", func(ctx context.Context) error {
						if inside.Add(1) > 1 {
							t.Error("two at once")
						}
						defer inside.Add(-1)
						_, err := db.Nodes(ctx)
						return err
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	all.Wait()
}
