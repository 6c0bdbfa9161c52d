package store

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// giveJob gives n chunks, of any epoch.
func giveJob(n int) GiveJob {
	return GiveJob{
		Link: linkName, Most: 1000, Decide: func(int, int) int { return n },
		Event: func(chunks []audit.Atoms) audit.Event {
			return audit.Event{Action: audit.GiveChunks, Outcome: audit.Done, Link: linkName, Atoms: chunks}
		},
	}
}

func (s *site) give(db *DB, n int) Balance {
	s.t.Helper()
	b, err := db.GiveChunks(s.t.Context(), giveJob(n))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func (s *site) hearGrant(db *DB, g handover.Grant) handover.GrantAnswer {
	s.t.Helper()
	answer, err := db.TakeGrant(s.t.Context(), kme("KM2"), g, func(_ string, taken []audit.Atoms) audit.Event {
		return audit.Event{Action: audit.TakeChunks, Outcome: audit.Done, Count: len(taken)}
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if diff := cmp.Diff(handover.GrantAnswer(g), answer); diff != "" {
		s.t.Errorf("the acknowledgement (-told +named):\n%s", diff)
	}
	return answer
}

func (s *site) pending(db *DB) handover.Grant {
	s.t.Helper()
	g, err := db.PendingGrants(s.t.Context(), kme("KM2"))
	if err != nil {
		s.t.Fatal(err)
	}
	return g
}

func (s *site) ack(db *DB, g handover.Grant) {
	s.t.Helper()
	if err := db.AckGrants(s.t.Context(), g.Chunks); err != nil {
		s.t.Fatal(err)
	}
}

func grantOf(b Block, first, grants int) handover.Grant {
	return handover.Grant{Chunks: []handover.Granted{{ChunkRef: handover.ChunkRef{BlockRef: b.BlockRef, First: first}, Grants: grants}}}
}

// TestGiveChunks: what is leased, empty, another's, or of a block that is not READY
// stays; the oldest goes first.
func TestGiveChunks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	leased := s.fill(db, 64, mine)
	leases, err := db.Lease(ctx, linkName, 1)
	if err != nil || len(leases) != 1 {
		t.Fatal(leases, err)
	}
	empty := s.fill(db, 64, mine)
	if err := db.Burn(ctx, BurnJob{Atoms: ids(empty.Atoms), Event: func(gone []key.ID) audit.Event {
		return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: rangeOf(empty.BlockRef, 0, len(gone))}
	}}); err != nil {
		t.Fatal(err)
	}
	s.fill(db, 64, theirs)
	held := s.block(1, 64, mine)
	if err := db.HoldBlock(ctx, held, holdEvent(held)); err != nil {
		t.Fatal(err)
	}
	if got := s.give(db, 10); got != (Balance{Here: 128, There: 64}) {
		t.Errorf("of nothing that may be given: %+v", got)
	}
	if n := countOf(s.check(), audit.GiveChunks); n != 0 {
		t.Errorf("%d events of nothing", n)
	}

	s.step(hour)
	young := s.fill(db, 130, mine)
	if _, err := db.GiveBack(ctx, []Leased{{leases[0].Chunk, 64}}); err != nil {
		t.Fatal(err)
	}
	job := giveJob(10)
	job.From = s.epoch()
	job.Most = 1
	job.Decide = func(here, there int) int {
		if here != 130 || there != 0 {
			t.Errorf("of this epoch there are %d and %d left, want 130 and 0", here, there)
		}
		return 3
	}
	if got, err := db.GiveChunks(ctx, job); got != (Balance{Here: 66, There: 64, Given: 1}) || err != nil {
		t.Errorf("at most one, of this epoch: %+v, %v", got, err)
	}
	if got := s.give(db, 2); got != (Balance{Here: 64 + 2, There: 4 * 64, Given: 2}) {
		t.Errorf("two more: %+v", got)
	}
	want := handover.Grant{Chunks: slices.Concat(grantOf(leased, 0, 1).Chunks, grantOf(young, 0, 1).Chunks, grantOf(young, 64, 1).Chunks)}
	if diff := cmp.Diff(want, s.pending(db)); diff != "" {
		t.Errorf("to be told (-want +got):\n%s", diff)
	}
	if leases, err := db.Lease(ctx, linkName, 10); err != nil || len(leases) != 1 || leases[0].First != 128 {
		t.Errorf("what is given was leased: %+v, %v", leases, err)
	}
	events := s.check()
	if n := countOf(events, audit.GiveChunks); n != 2 {
		t.Errorf("%d events, want 2", n)
	}
}

// twoEnds are two sites that hold the same READY block of two chunks, each the
// owner of one. Each is "KM2" to the other: only the databases differ.
func twoEnds(t *testing.T) (sites [2]*site, dbs [2]*DB, b Block) {
	t.Helper()
	for i := range sites {
		sites[i] = newSite(t)
		dbs[i] = sites[i].open("n1")
		openSession(t, dbs[i], 1)
	}
	b = sites[0].block(1, 128, func(i int) handover.End { return []handover.End{handover.Alice, handover.Bob}[i] })
	for i, db := range dbs {
		b.Mine = []handover.End{handover.Alice, handover.Bob}[i]
		if err := db.HoldBlock(t.Context(), b, holdEvent(b)); err != nil {
			t.Fatal(err)
		}
		if err := db.HeardHeldAnswer(t.Context(), b.BlockRef, handover.Equal, blockEvents(b.BlockRef)); err != nil {
			t.Fatal(err)
		}
	}
	return sites, dbs, b
}

// owner is who owns the chunk that begins at first, by each database.
func owner(sites [2]*site, first int) (owners [2]string) {
	for i, s := range sites {
		owners[i] = ask[string](s, "SELECT owner || ' ' || grants FROM chunk WHERE first = $1", first)
	}
	return owners
}

// TestGrants passes a chunk on, back and on again, with every message repeated and
// an old one of each kind late.
func TestGrants(t *testing.T) {
	t.Parallel()
	sites, dbs, b := twoEnds(t)
	one, two := sites[0], sites[1]
	expect := func(what string, want [2]string) {
		t.Helper()
		if got := owner(sites, 0); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	one.give(dbs[0], 1)
	expect("given", [2]string{"peer 1", "peer 0"})
	first := one.pending(dbs[0])
	if diff := cmp.Diff(grantOf(b, 0, 1), first); diff != "" {
		t.Errorf("to be told (-want +got):\n%s", diff)
	}
	two.hearGrant(dbs[1], first)
	expect("heard", [2]string{"peer 1", "here 1"})
	two.hearGrant(dbs[1], first)
	expect("heard again", [2]string{"peer 1", "here 1"})

	// The answer was lost, and meanwhile the chunk comes back, and goes again.
	two.give(dbs[1], 1)
	back := two.pending(dbs[1])
	one.hearGrant(dbs[0], back)
	expect("given back", [2]string{"here 2", "peer 2"})
	two.hearGrant(dbs[1], first)
	expect("an old grant", [2]string{"here 2", "peer 2"})
	two.ack(dbs[1], back)
	if got := two.pending(dbs[1]); len(got.Chunks) != 0 {
		t.Errorf("still to be told: %+v", got)
	}
	one.give(dbs[0], 1)
	one.ack(dbs[0], first)
	if diff := cmp.Diff(grantOf(b, 0, 3), one.pending(dbs[0])); diff != "" {
		t.Errorf("after the first grant was acknowledged at last (-want +got):\n%s", diff)
	}
	one.hearGrant(dbs[0], back)
	expect("the other's old grant", [2]string{"peer 3", "peer 2"})
	two.hearGrant(dbs[1], one.pending(dbs[0]))
	expect("at last", [2]string{"peer 3", "here 3"})

	// What that means: the other end assigns from it, and this one no more.
	leases, err := dbs[1].Lease(t.Context(), linkName, 2)
	if err != nil || len(leases) != 2 || leases[0].First != 0 || len(leases[0].Atoms) != 64 {
		t.Fatalf("leased at the new owner: %+v, %v", leases, err)
	}
	for i, db := range dbs {
		hear(t, db, 1)
		answer := mustAssignTo(t, db, sites[i].assignJob(1, 1, request("r", b.BlockRef, b.Atoms[0])))
		if want := i == 0; answer.Results[0].Accepted != want {
			t.Errorf("announced to site %d: %+v, want accepted %v", i, answer.Results[0], want)
		}
		if leases, err := db.Lease(t.Context(), linkName, 2); len(leases) != 0 || err != nil {
			t.Errorf("site %d has leased %+v, %v", i, leases, err)
		}
	}
	for i, s := range sites {
		events := s.check()
		if given, taken := countOf(events, audit.GiveChunks), countOf(events, audit.TakeChunks); given != 2-i || taken != 1+i {
			t.Errorf("site %d: %d events of chunks given and %d of chunks taken, want %d and %d", i, given, taken, 2-i, 1+i)
		}
	}
}

func mustAssignTo(t *testing.T, db *DB, job AssignJob) handover.AnnounceAnswer {
	t.Helper()
	answer, err := db.Assign(t.Context(), job)
	if err != nil || answer.Standing != handover.Fresh {
		t.Fatalf("Assign: %+v, %v", answer, err)
	}
	return answer
}

// TestGrantOfABlockNotReady: a grant may come before this end has heard that its
// block is READY. It counts, and is used once it has.
func TestGrantOfABlockNotReady(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	openSession(t, db, 1)
	b := s.block(1, 64, theirs)
	if err := db.HoldBlock(t.Context(), b, holdEvent(b)); err != nil {
		t.Fatal(err)
	}
	s.hearGrant(db, grantOf(b, 0, 1))
	if leases, err := db.Lease(t.Context(), linkName, 1); len(leases) != 0 || err != nil {
		t.Errorf("leased of a HELD block: %+v, %v", leases, err)
	}
	if err := db.HeardHeldAnswer(t.Context(), b.BlockRef, handover.Equal, blockEvents(b.BlockRef)); err != nil {
		t.Fatal(err)
	}
	if leases, err := db.Lease(t.Context(), linkName, 1); len(leases) != 1 || err != nil {
		t.Errorf("leased once it is READY: %+v, %v", leases, err)
	}
	s.check()
}

// TestGrantOfNothing: a chunk that is not here is acknowledged, and so is one of a
// link to somebody else, which stays as it is.
func TestGrantOfNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	s.hearGrant(db, grantOf(b, 64, 1))
	_, err := db.TakeGrant(t.Context(), kme("KM3"), grantOf(b, 0, 1), func(string, []audit.Atoms) audit.Event {
		t.Error("a stranger has given a chunk")
		return audit.Event{}
	})
	if err != nil {
		t.Error(err)
	}
	if got := ask[string](s, "SELECT owner || ' ' || grants FROM chunk"); got != "peer 0" {
		t.Errorf("the chunk's owner is %s", got)
	}
}

// TestGrantsGoWithTheirEpoch: what has expired need not be told any more.
func TestGrantsGoWithTheirEpoch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.fill(db, 64, mine)
	s.give(db, 1)
	e := s.epoch()
	s.step(hour)
	if _, err := db.ExpirePool(t.Context(), linkName, s.epoch(), func(link string, atoms []audit.Atoms) audit.Event {
		return audit.Event{Action: audit.Expire, Outcome: audit.Done, Link: link, Atoms: atoms}
	}); err != nil {
		t.Fatal(err)
	}
	if got := s.pending(db); len(got.Chunks) != 1 {
		t.Errorf("before its epoch is dropped: %+v", got)
	}
	if !s.end(db, e) {
		t.Fatal("the epoch was not dropped")
	}
	if n := ask[int](s, "SELECT count(*) FROM grant_out"); n != 0 {
		t.Errorf("%d grants are left", n)
	}
}

// TestOneNodeGives: while one node gives, another gives nothing, and does not wait;
// then it decides by what the first has left.
func TestOneNodeGives(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	s.fill(one, 256, mine)
	unlock := s.lockNode("n1")
	given := make(chan Balance, 1)
	go func() { given <- s.give(one, 2) }()
	s.awaitLock()
	if got := s.give(two, 2); got != (Balance{Here: 256}) {
		t.Errorf("meanwhile another node has given: %+v", got)
	}
	unlock()
	if got := <-given; got.Given != 2 {
		t.Errorf("%+v", got)
	}
	job := giveJob(0)
	job.Decide = handover.Surplus
	if got, err := two.GiveChunks(t.Context(), job); got != (Balance{Here: 128, There: 128}) || err != nil {
		t.Errorf("and then: %+v, %v", got, err)
	}
	s.check()
}

// TestGiveLeased has nodes lease and give the same chunks at once: each chunk is
// leased or given.
func TestGiveLeased(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	s.fill(one, 64*64, mine)
	leased := make(chan int)
	go func() {
		n := 0
		for range 20 {
			leases, err := one.Lease(t.Context(), linkName, 2)
			if err != nil {
				t.Error(err)
			}
			n += len(leases)
		}
		leased <- n
	}()
	given := 0
	for range 20 {
		given += s.give(two, 2).Given
	}
	if n := <-leased + given; n != 64 {
		t.Errorf("%d chunks were leased or given, want all 64", n)
	}
	if n := ask[int](s, "SELECT count(*) FROM chunk WHERE owner = 'peer' AND node IS NOT NULL"); n != 0 {
		t.Errorf("%d chunks are both", n)
	}
	s.check()
}

// TestUnknownGive cuts the connection at the COMMIT of a grant: it is given once,
// and to be told.
func TestUnknownGive(t *testing.T) {
	t.Parallel()
	for name, how := range map[string]cutHow{"request lost": loseRequest, "answer lost": loseAnswer} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			p, dsn := newProxy(t, s)
			cfg := s.config("n1")
			cfg.DSN = dsn
			db := s.openWith(cfg)
			b := s.fill(db, 64, mine)
			p.arm(how)
			if got := s.give(db, 1); got.Given != 1 || p.cuts != 1 {
				t.Errorf("given %+v, with %d cuts", got, p.cuts)
			}
			if diff := cmp.Diff(grantOf(b, 0, 1), s.pending(db)); diff != "" {
				t.Errorf("to be told (-want +got):\n%s", diff)
			}
			if n := countOf(s.check(), audit.GiveChunks); n != 1 {
				t.Errorf("%d events, want 1", n)
			}
		})
	}
}

// TestGiverKilled: a process that dies after its commit leaves the grant to its
// next run, or to another node; before it, nothing has happened.
func TestGiverKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, mine)
	unlock := s.lockNode("n1")
	got := make(chan error, 1)
	go func() {
		_, err := db.GiveChunks(t.Context(), giveJob(1))
		got <- err
	}()
	s.awaitLock()
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
		return err
	})
	unlock("UPDATE node_run SET run = run + 1 WHERE node = 'n1'") // its heir has come
	if err := <-got; err == nil {
		t.Error("a zombie has given a chunk")
	}
	heir := s.open("n2")
	if got := s.pending(heir); len(got.Chunks) != 0 {
		t.Errorf("to be told: %+v", got)
	}
	s.give(heir, 1)
	heir.Close()
	if diff := cmp.Diff(grantOf(b, 0, 1), s.pending(s.open("n3"))); diff != "" {
		t.Errorf("to be told by another node (-want +got):\n%s", diff)
	}
	s.check()
}
