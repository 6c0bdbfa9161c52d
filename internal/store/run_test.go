package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// TestFencing gives a node a new run: the process of the old one can commit
// nothing from then on, whatever it tries.
func TestFencing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	b := s.fill(db, 64, mine)
	if _, err := db.Lease(ctx, linkName, 1); err != nil {
		t.Fatal(err)
	}
	select {
	case <-db.Fenced():
		t.Fatal("fenced before its time")
	default:
	}

	heir, err := Open(ctx, s.config("n1"))
	if err != nil {
		t.Fatal(err)
	}
	defer heir.Close()
	run, err := heir.BumpRun(ctx, "n1", 6)
	if run != 7 || err != nil {
		t.Fatalf("BumpRun above 6: %d, %v; want 7", run, err)
	}
	if err := heir.Begin(ctx, 6); !errors.Is(err, ErrFenced) {
		t.Errorf("beginning a run that is not the node's: %v, want ErrFenced", err)
	}
	if err := heir.Begin(ctx, run); err != nil {
		t.Fatal(err)
	}
	if err := db.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1]), Events: []audit.Event{served("zombie", b.BlockRef, b.Atoms[0])}}); !errors.Is(err, ErrFenced) {
		t.Errorf("the zombie's Serve: %v, want ErrFenced", err)
	}
	<-db.Fenced()
	if err := db.Record(ctx, audit.Event{Action: audit.Stop}); !errors.Is(err, ErrFenced) {
		t.Errorf("the zombie's Record: %v, want ErrFenced", err)
	}
	if err := db.Healthy(); !errors.Is(err, ErrFenced) {
		t.Errorf("the zombie's health: %v, want ErrFenced", err)
	}

	const stale = "SELECT advance_run('n1', run, mark - 1, mark, head, seq, head) FROM node_run WHERE node = 'n1'"
	if _, err := heir.pool.Exec(ctx, stale); sqlState(err) != "KME01" {
		t.Errorf("a commit that another has overtaken: %v, want KME01", err)
	}

	if left, err := heir.LeftBy(ctx, NodeRun{"n1", 7}); !cmp.Equal(left, Left{Earlier: []string{linkName}}) || err != nil {
		t.Errorf("before the takeover: %+v, %v", left, err)
	}
	if err := heir.EndTakeover(ctx, NodeRun{"n1", run}, []string{linkName}, audit.Event{Action: audit.Takeover, Outcome: audit.Done}); err != nil {
		t.Fatal(err)
	}
	leases, err := heir.Lease(ctx, linkName, 1)
	if err != nil || len(leases) != 1 || len(leases[0].Atoms) != 64 {
		t.Errorf("after the takeover: %d leases, %v; want the chunk whole", len(leases), err)
	}
	s.check()
}

// TestHearRunBesideTheCommitter: while what was assigned is looked for, which may take long,
// the node commits on.
func TestHearRunBesideTheCommitter(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	hear(t, db, 1)
	mustAssign(t, db, s.assignJob(1, 1, request("r", b.BlockRef, b.Atoms[0])), handover.Fresh, "")
	unlock := s.lock("LOCK TABLE " + dueTable(s.epoch()+2)) // nothing is written there
	got := make(chan handover.RunAnswer, 1)
	go func() {
		answer, ok, err := db.HearRun(t.Context(), kme("KM2"), handover.RunStarted{Node: "p1", Run: 2})
		if err != nil || !ok {
			t.Errorf("HearRun: %v, %v", ok, err)
		}
		got <- answer
	}()
	s.awaitLock()
	if err := db.Record(t.Context(), audit.Event{Action: audit.Status, Outcome: audit.Done}); err != nil {
		t.Error(err)
	}
	mustAssign(t, db, s.assignJob(1, 2), handover.Stale) // and nothing comes to what is looked for
	unlock()
	if answer := <-got; len(answer.Assigned) != 1 || answer.Assigned[0].Key != b.Atoms[0].ID {
		t.Errorf("listed: %+v", answer)
	}
	s.check()
}

// TestEndTakeoverFreesLowerRuns: what the current run has leased and parked stays.
func TestEndTakeoverFreesLowerRuns(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	one := s.open("n1")
	b := s.fill(one, 192, mine)
	if _, err := one.Lease(ctx, linkName, 1); err != nil {
		t.Fatal(err)
	}
	if err := one.Park(ctx, ids(b.Atoms[:2]), 5); err != nil {
		t.Fatal(err)
	}
	one.Close()
	again := s.open("n1") // run 2
	if _, err := again.Lease(ctx, linkName, 1); err != nil {
		t.Fatal(err)
	}
	if err := again.Park(ctx, ids(b.Atoms[64:66]), 1); err != nil {
		t.Fatal(err)
	}
	two := s.open("n2")
	if _, err := two.Lease(ctx, linkName, 1); err != nil {
		t.Fatal(err)
	}
	for _, run := range []int64{1, 3} {
		if err := two.EndTakeover(ctx, NodeRun{"n1", run}, []string{linkName}); !errors.Is(err, ErrOvertaken) {
			t.Errorf("ending a takeover of run %d: %v, want ErrOvertaken", run, err)
		}
	}
	if err := two.EndTakeover(ctx, NodeRun{"n1", 2}, []string{linkName}, audit.Event{Action: audit.Takeover, Outcome: audit.Done}); err != nil {
		t.Fatal(err)
	}
	got := ask[[]string](s, "SELECT array_agg(coalesce(node || ' ' || run, 'free') ORDER BY first) FROM chunk")
	if diff := cmp.Diff([]string{"free", "n1 2", "n2 1"}, got); diff != "" {
		t.Errorf("chunks (-want +got):\n%s", diff)
	}
	if n := ask[int](s, "SELECT count(*) FROM parked WHERE run = 2"); n != 2 || ask[int](s, "SELECT count(*) FROM parked") != 2 {
		t.Errorf("%d keys of the current run are parked, want 2 and no others", n)
	}
	if left, err := two.LeftBy(ctx, NodeRun{"n1", 2}); !cmp.Equal(left, Left{Now: []string{linkName}}) || err != nil {
		t.Errorf("after the takeover: %+v, %v", left, err)
	}
	if err := again.Unpark(ctx, ids(b.Atoms[64:65])); err != nil {
		t.Fatal(err)
	}
	if n := ask[int](s, "SELECT count(*) FROM parked"); n != 1 {
		t.Errorf("after Unpark: %d parked, want 1", n)
	}
}

// TestEndTakeoverOfOneLink: what a dead run had leased and parked of other links stays for
// whoever asks their peers, and says so; what it had parked and is lost goes.
func TestEndTakeoverOfOneLink(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	dead, heir := s.open("n1"), s.open("n2")
	const long = "long"
	if err := dead.EnsureLink(ctx, long, kme("KM3"), handover.Alice); err != nil {
		t.Fatal(err)
	}
	if err := dead.OpenSession(ctx, long, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
		t.Fatal(err)
	}
	near, lost, far := s.fill(dead, 64, mine), s.fill(dead, 64, mine), s.block(1, 64, mine)
	far.Link = long
	if err := dead.HoldBlock(ctx, far, holdEvent(far)); err != nil {
		t.Fatal(err)
	}
	if err := dead.HeardHeldAnswer(ctx, far.BlockRef, handover.Equal, blockEvents(far.BlockRef)); err != nil {
		t.Fatal(err)
	}
	for link, want := range map[string]int{linkName: 2, long: 1} {
		if leases, err := dead.Lease(ctx, link, 2); err != nil || len(leases) != want {
			t.Fatalf("leased %d chunks of %s, %v", len(leases), link, err)
		}
	}
	for i, b := range []Block{near, lost, far} {
		if err := dead.Park(ctx, ids(b.Atoms[:i+1]), 5); err != nil {
			t.Fatal(err)
		}
	}
	if err := dead.HeardHeldAnswer(ctx, lost.BlockRef, handover.Different, blockEvents(lost.BlockRef)); err != nil {
		t.Fatal(err)
	}
	run, err := heir.Depose(ctx, NodeRun{"n1", 1}, deposed)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		links  []string
		left   Left
		parked []string
	}{
		{nil, Left{Earlier: []string{linkName, long}}, []string{linkName, long, long, long}},
		{[]string{long}, Left{Earlier: []string{linkName}}, []string{linkName}},
		{[]string{long}, Left{Earlier: []string{linkName}}, []string{linkName}}, // again
		{[]string{linkName}, Left{}, nil},
	} {
		if err := heir.EndTakeover(ctx, run, step.links, audit.Event{Action: audit.Takeover, Outcome: audit.Done}); err != nil {
			t.Fatal(err)
		}
		if left, err := heir.LeftBy(ctx, run); !cmp.Equal(left, step.left) || err != nil {
			t.Errorf("dealt with at %v: left %+v, %v, want %+v", step.links, left, err, step.left)
		}
		parked := ask[[]string](s, "SELECT array_agg(coalesce(c.link, 'lost') ORDER BY c.link) FROM parked p LEFT JOIN key k ON k.id = p.key_id LEFT JOIN chunk c ON c.id = k.chunk")
		if diff := cmp.Diff(step.parked, parked); diff != "" {
			t.Errorf("dealt with at %v: parked (-want +got):\n%s", step.links, diff)
		}
	}
	s.check()
}

// TestBurn deletes what is there, and leaves a void to be told until it is
// acknowledged.
func TestBurn(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	b := s.fill(db, 64, mine)
	if err := db.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1]), Events: []audit.Event{served("r", b.BlockRef, b.Atoms[0])}}); err != nil {
		t.Fatal(err)
	}
	if err := db.Park(ctx, ids(b.Atoms[:3]), 9); err != nil {
		t.Fatal(err)
	}
	void := handover.Void{Node: "n1", Run: 1, Batch: 9, Keys: ids(b.Atoms[:3])}
	var burned []key.ID
	job := BurnJob{Atoms: void.Keys, Void: &void, Peer: kme("KM2"), Event: func(ids []key.ID) audit.Event {
		burned = ids
		ev := audit.Event{Action: audit.Burn, Outcome: audit.Done, Keys: ids}
		if len(ids) > 0 {
			ev.Atoms = rangeOf(b.BlockRef, 1, len(ids))
		}
		return ev
	}}
	if err := db.Burn(ctx, job); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ids(b.Atoms[1:3]), burned); diff != "" {
		t.Errorf("burned, when the first was served (-want +got):\n%s", diff)
	}
	if n := ask[int](s, "SELECT count(*) FROM parked"); n != 0 {
		t.Errorf("%d burned keys are still parked", n)
	}
	job.Void = nil
	if err := db.Burn(ctx, job); err != nil || len(burned) != 0 {
		t.Errorf("again: %v, burned %v", err, burned)
	}
	voids, err := db.Voids(ctx)
	if err != nil || len(voids) != 1 {
		t.Fatalf("Voids: %v, %v", voids, err)
	}
	if diff := cmp.Diff(PendingVoid{ID: voids[0].ID, Peer: kme("KM2"), Void: void}, voids[0], cmpOpts); diff != "" {
		t.Errorf("the void (-want +got):\n%s", diff)
	}
	if err := db.AckVoid(ctx, voids[0]); err != nil {
		t.Fatal(err)
	}
	if voids, err := db.Voids(ctx); len(voids) != 0 || err != nil {
		t.Errorf("after the acknowledgement: %v, %v", voids, err)
	}
	s.check()
}

// TestExpire ends what has outlived its time, in steps, and leaves the rest.
func TestExpire(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	var live []Due
	for i := range 5 {
		d := s.due(key.NewLocalID(s.epoch().Start(hour)), "bob", "alice")
		d.ExpiresAt = s.now().Add(time.Duration(i) * 10 * time.Minute)
		d.ExpiryEpoch = key.EpochAt(d.ExpiresAt, hour)
		live = append(live, d)
	}
	if err := db.Serve(ctx, ServeJob{Due: live}); err != nil {
		t.Fatal(err)
	}
	if err := db.Take(ctx, TakeJob{SAE: sae("bob"), Rows: []DueRef{live[1].ref()}, How: GoneConsumed}); err != nil {
		t.Fatal(err)
	}
	expire := func(limit int) (n int, gone []key.ID) {
		t.Helper()
		n, err := db.ExpireDue(ctx, s.now(), limit, func(rows []DueRef) audit.Event {
			gone = nil
			for _, r := range rows {
				gone = append(gone, r.Key)
			}
			return audit.Event{Action: audit.Expire, Outcome: audit.Done, Keys: gone}
		})
		if err != nil {
			t.Fatal(err)
		}
		return n, gone
	}
	s.step(30 * time.Minute) // into the next epoch; the first four are over, one of them taken
	if n, gone := expire(2); n != 2 || len(gone) != 2 {
		t.Errorf("a step of 2 expired %d", n)
	}
	if n, gone := expire(2); n != 1 || len(gone) != 1 {
		t.Errorf("the second step expired %d, want 1", n)
	}
	if n, gone := expire(2); n != 0 || gone != nil {
		t.Errorf("the third step expired %d %v, want none and no event", n, gone)
	}
	rows, _, err := db.FindDue(ctx, sae("bob"), []key.ID{live[0].Key, live[1].Key, live[4].Key})
	if err != nil || rows[live[0].Key].Gone != GoneExpired || rows[live[1].Key].Gone != GoneConsumed || rows[live[4].Key].Gone != "" {
		t.Errorf("the rows: %+v, %v", rows, err)
	}
	s.step(2 * hour)
	if n, _ := expire(10); n != 1 {
		t.Errorf("at last %d expired, want 1", n)
	}
	if n, _ := expire(10); n != 0 || !db.epochs.isDrained(live[0].ExpiryEpoch) {
		t.Errorf("%d more, and the first epoch is read again each time", n)
	}
	if err := db.Serve(ctx, ServeJob{Due: []Due{func() Due { d := live[0]; d.Key[15] ^= 1; return d }()}}); err != nil {
		t.Fatal(err)
	}
	if n, _ := expire(10); n != 1 {
		t.Errorf("a row that came late to a past epoch: %d expired, want 1", n)
	}
	s.check()
}

func TestExpirePool(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	old := s.fill(db, 256, func(i int) handover.End {
		return []handover.End{handover.Alice, handover.Bob, handover.Alice, handover.Alice}[i]
	})
	for _, node := range []*DB{db, s.open("n2")} { // the first chunk, and the third
		if _, err := node.Lease(ctx, linkName, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Serve(ctx, ServeJob{Atoms: ids(old.Atoms[214:215]), Events: []audit.Event{served("r", old.BlockRef, old.Atoms[214])}}); err != nil {
		t.Fatal(err)
	}
	s.step(hour)
	s.fill(db, 64, mine)
	var gone []audit.Atoms
	n, err := db.ExpirePool(ctx, linkName, s.epoch(), func(link string, atoms []audit.Atoms) audit.Event {
		gone = atoms
		return audit.Event{Action: audit.Expire, Outcome: audit.Done, Link: link, Atoms: atoms}
	})
	want := append(append(rangeOf(old.BlockRef, 0, 128), rangeOf(old.BlockRef, 192, 22)...), rangeOf(old.BlockRef, 215, 41)...)
	if diff := cmp.Diff(want, gone); diff != "" || n != 191 || err != nil {
		t.Errorf("expired %d, %v (-want +got):\n%s", n, err, diff)
	}
	n, err = db.ExpirePool(ctx, linkName, s.epoch(), func(string, []audit.Atoms) audit.Event {
		t.Error("an event of nothing")
		return audit.Event{}
	})
	if n != 0 || err != nil {
		t.Errorf("again: %d, %v", n, err)
	}
	s.check()
}

// TestExpirePoolOfTheDead: what a run has leased that was taken over expires, also while the
// takeover waits for the peer, which may be for ever: the link may be gone. What a run has
// that may still commit stays, and none of its own are taken for it.
func TestExpirePoolOfTheDead(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	db, living := s.open("n1"), s.open("n2")
	b := s.fill(db, 256, mine)
	dead := s.open("n3")
	for _, node := range []*DB{dead, living, db} { // the first chunk, the second, the third
		if leases, err := node.Lease(ctx, linkName, 1); err != nil || len(leases) != 1 {
			t.Fatalf("leased %d chunks, %v", len(leases), err)
		}
	}
	if err := dead.Park(ctx, ids(b.Atoms[:2]), 1); err != nil {
		t.Fatal(err)
	}
	s.step(hour)
	var gone []audit.Atoms
	expire := func() int {
		t.Helper()
		gone = nil
		n, err := db.ExpirePool(ctx, linkName, s.epoch(), func(link string, atoms []audit.Atoms) audit.Event {
			gone = atoms
			return audit.Event{Action: audit.Expire, Outcome: audit.Done, Link: link, Atoms: atoms}
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := expire(); n != 128 {
		t.Errorf("%d expired beside two that live, want what is ours and what is nobody's, 128", n)
	}
	heir, err := living.Depose(ctx, NodeRun{"n3", 1}, deposed)
	if err != nil {
		t.Fatal(err)
	}
	if n := expire(); n != 64 {
		t.Errorf("%d expired when one was taken over, want its 64", n)
	}
	if diff := cmp.Diff(rangeOf(b.BlockRef, 0, 64), gone); diff != "" {
		t.Errorf("expired (-want +got):\n%s", diff)
	}
	if err := dead.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[5:6])}); !errors.Is(err, ErrShort) {
		t.Errorf("serving what has expired: %v, want ErrShort", err)
	}
	if err := living.EndTakeover(ctx, heir, nil); err != nil {
		t.Fatal(err)
	}
	if n := ask[int](s, "SELECT count(*) FROM parked"); n != 0 {
		t.Errorf("%d keys are parked that have expired", n)
	}
	before := ask[int64](s, "SELECT mark FROM node_run WHERE node = 'n1'")
	if n := expire(); n != 0 || ask[int64](s, "SELECT mark FROM node_run WHERE node = 'n1'") != before {
		t.Errorf("%d expired in a commit of nothing", n)
	}
	s.check()
}

// TestDropped: a job whose caller has gone before its batch began is not done.
func TestDropped(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, mine)
	release := s.holdUp(db)
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() {
		got <- db.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1]), Late: func(bool) { t.Error("Late of a dropped job") }})
	}()
	s.await("the job to wait", func() bool { return len(db.committer.queue) == 1 })
	cancel()
	if err := <-got; !errors.Is(err, ErrDropped) {
		t.Errorf("Serve: %v, want ErrDropped", err)
	}
	release()
	if err := db.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1])}); !errors.Is(err, ErrDropped) {
		t.Errorf("Serve with a context that has ended: %v, want ErrDropped", err)
	}
	if n, _ := db.Stored(t.Context(), linkName); n != 64 {
		t.Errorf("%d atoms are left, want all 64", n)
	}
}

// TestDoubt: a caller that goes while its batch is being committed is told later.
func TestDoubt(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		meanwhile []string
		committed bool
	}{
		"committed": {nil, true},
		"not":       {[]string{"UPDATE node_run SET run = run + 1"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			db := s.open("n1")
			b := s.fill(db, 64, mine)
			unlock := s.lockNode("n1")
			ctx, cancel := context.WithCancel(t.Context())
			got, late := make(chan error, 1), make(chan bool, 1)
			go func() {
				got <- db.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1]), Events: []audit.Event{served("r", b.BlockRef, b.Atoms[0])}, Late: func(c bool) { late <- c }})
			}()
			s.awaitLock()
			cancel()
			if err := <-got; !errors.Is(err, ErrDoubt) {
				t.Errorf("Serve: %v, want ErrDoubt", err)
			}
			unlock(test.meanwhile...)
			if committed := <-late; committed != test.committed {
				t.Errorf("Late said %v, want %v", committed, test.committed)
			}
			s.check()
		})
	}
}

// TestLeaseInDoubt: chunks whose Lease call had gone come with the next one.
func TestLeaseInDoubt(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.fill(db, 64, mine)
	unlock := s.lockNode("n1")
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() {
		_, err := db.Lease(ctx, linkName, 1)
		got <- err
	}()
	s.awaitLock()
	cancel()
	if err := <-got; !errors.Is(err, ErrDoubt) {
		t.Errorf("Lease: %v, want ErrDoubt", err)
	}
	unlock()
	s.await("the chunk to be set aside", func() bool {
		db.mu.Lock()
		defer db.mu.Unlock()
		return len(db.unclaimed[linkName]) == 1
	})
	leases, err := db.Lease(t.Context(), linkName, 1)
	if err != nil || len(leases) != 1 || len(leases[0].Atoms) != 64 {
		t.Errorf("the next Lease: %d chunks, %v; want the one in doubt", len(leases), err)
	}
}
