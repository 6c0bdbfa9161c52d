package store

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// TestOneTakerWins has fifty requests at two nodes take the same key at once.
func TestOneTakerWins(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	nodes := []*DB{s.open("n1"), s.open("n2")}
	for round := range 5 {
		due := s.due(key.NewLocalID(s.epoch().Start(hour)), "bob", "alice")
		if err := nodes[0].Serve(t.Context(), ServeJob{Due: []Due{due}}); err != nil {
			t.Fatal(err)
		}
		won := make(chan bool)
		for i := range 50 {
			go func() {
				request := fmt.Sprint(round, "/", i)
				err := nodes[i%2].Take(t.Context(), TakeJob{
					SAE: sae("bob"), Rows: []DueRef{due.ref()}, How: GoneTaken,
					Events: []audit.Event{{Action: audit.DecKeys, Outcome: audit.Done, Request: request}},
				})
				if err != nil && !errors.Is(err, ErrShort) {
					t.Errorf("take %s: %v", request, err)
				}
				won <- err == nil
			}()
		}
		winners := 0
		for range 50 {
			if <-won {
				winners++
			}
		}
		if winners != 1 {
			t.Errorf("round %d: %d takes succeeded, want 1", round, winners)
		}
	}
	if n := countOf(s.check(), audit.DecKeys); n != 5 {
		t.Errorf("%d takes were recorded, want 5", n)
	}
}

// TestOverlappingServes has requests whose atoms overlap come at once, so that they
// would share batches: each atom goes to at most one, and no request gets a part.
func TestOverlappingServes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	nodes := []*DB{s.open("n1"), s.open("n2")}
	b := s.fill(nodes[0], 64, mine)
	var mu sync.Mutex
	got := make(map[key.ID]string)
	var all sync.WaitGroup
	for i := range 60 {
		all.Go(func() { // atoms i, i+1, .. i+4: each overlaps with its neighbours
			atoms := b.Atoms[i : i+5]
			request := fmt.Sprint(i)
			err := nodes[i%2].Serve(t.Context(), ServeJob{Atoms: ids(atoms), Events: []audit.Event{served(request, b.BlockRef, atoms...)}})
			if err != nil {
				if !errors.Is(err, ErrShort) {
					t.Errorf("request %s: %v", request, err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, a := range atoms {
				if other, taken := got[a.ID]; taken {
					t.Errorf("atom %d went to request %s and to %s", a.Index, other, request)
				}
				got[a.ID] = request
			}
		})
	}
	all.Wait()
	if n := ask[int](s, "SELECT count(*) FROM key"); n != 64-len(got) {
		t.Errorf("%d atoms are in the pool and %d were served, of 64", n, len(got))
	}
	if len(got) == 0 {
		t.Error("nobody got anything")
	}
	s.check()
}

// TestTwiceInOneRequest: a request that names an atom twice does not get it twice.
func TestTwiceInOneRequest(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, mine)
	twice := []key.ID{b.Atoms[0].ID, b.Atoms[0].ID}
	if err := db.Serve(t.Context(), ServeJob{Atoms: twice}); !errors.Is(err, ErrShort) {
		t.Errorf("Serve: %v, want ErrShort", err)
	}
	due := s.due(b.Atoms[1].ID, "bob", "alice")
	if err := db.Serve(t.Context(), ServeJob{Due: []Due{due}}); err != nil {
		t.Fatal(err)
	}
	if err := db.Take(t.Context(), TakeJob{SAE: sae("bob"), Rows: []DueRef{due.ref(), due.ref()}, How: GoneTaken}); !errors.Is(err, ErrShort) {
		t.Errorf("Take: %v, want ErrShort", err)
	}
	s.check()
}

// TestServeAgainstAssign: whichever of a Serve here and an announce of the peer
// comes first gets the atom, in one batch or in two.
func TestServeAgainstAssign(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	b := s.fill(one, 64, theirs) // served from all the same, as by a node that is wrong about the owner
	hear(t, one, 1)
	for i := range 20 {
		a := b.Atoms[i]
		job := s.assignJob(1, int64(i+1), request(fmt.Sprint("assign", i), b.BlockRef, a))
		var all sync.WaitGroup
		var errServe, errAssign error
		var answer handover.AnnounceAnswer
		all.Go(func() {
			errServe = []*DB{one, two}[i%2].Serve(t.Context(), ServeJob{Atoms: []key.ID{a.ID}, Events: []audit.Event{served(fmt.Sprint("serve", i), b.BlockRef, a)}})
		})
		all.Go(func() { answer, errAssign = one.Assign(t.Context(), job) })
		all.Wait()
		if errAssign != nil {
			t.Fatal(errAssign)
		}
		if served := errServe == nil; served == answer.Results[0].Accepted {
			t.Errorf("atom %d: Serve %v, Assign %+v; want exactly one to get it", i, errServe, answer.Results[0])
		}
	}
	s.check()
}

// TestBatchesShare shows that what waits together is committed together, and that
// a request that comes up short does not take the others with it.
func TestBatchesShare(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 128, mine)
	if err := db.Serve(t.Context(), ServeJob{Atoms: ids(b.Atoms[:1]), Events: []audit.Event{served("before", b.BlockRef, b.Atoms[0])}}); err != nil {
		t.Fatal(err)
	}
	before := ask[int64](s, "SELECT mark FROM node_run")
	release := s.holdUp(db)
	type result struct {
		i   int
		err error
	}
	results := make(chan result)
	for i := range 64 {
		go func() { // the first finds its atom gone
			two := b.Atoms[2*i : 2*i+2]
			results <- result{i, db.Serve(t.Context(), ServeJob{Atoms: ids(two), Events: []audit.Event{served(fmt.Sprint(i), b.BlockRef, two...)}})}
		}()
	}
	s.await("all requests to wait", func() bool { return len(db.committer.queue) == 64 })
	release()
	for range 64 {
		r := <-results
		if r.i == 0 && !errors.Is(r.err, ErrShort) || r.i > 0 && r.err != nil {
			t.Errorf("request %d: %v", r.i, r.err)
		}
	}
	if used := ask[int64](s, "SELECT mark FROM node_run") - before; used > 4 { // the one held up, a batch, the batch again
		t.Errorf("64 requests took %d transactions", used)
	}
	if left := ask[[]int](s, "SELECT array_agg(index ORDER BY index) FROM key"); !cmp.Equal(left, []int{1}) {
		t.Errorf("left in the pool: %v, want the atom that the short request gave back", left)
	}
	s.check()
}

// TestReadAgainstTake: a key that may be read again is read until it is taken. A read
// that comes while a take is being committed, at another node, waits for it, and is
// short.
func TestReadAgainstTake(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	ctx := t.Context()
	due, once := s.due(key.NewLocalID(s.epoch().Start(hour)), "bob", "alice"), s.due(key.NewLocalID(s.epoch().Start(hour)), "bob", "alice")
	due.Reread = true
	if err := one.Serve(ctx, ServeJob{Due: []Due{due, once}}); err != nil {
		t.Fatal(err)
	}
	read := func(db *DB, who string, d Due) error {
		return db.Read(ctx, ReadJob{
			SAE: sae(who), Row: d.ref(), Events: []audit.Event{{Action: audit.DecKeys, Outcome: audit.Done, Keys: []key.ID{d.Key}, Reread: true}},
		})
	}
	for range 3 {
		if err := errors.Join(read(one, "bob", due), read(two, "bob", due)); err != nil {
			t.Fatal(err)
		}
	}
	if err := read(one, "carol", due); !errors.Is(err, ErrShort) {
		t.Errorf("reading another's key: %v, want ErrShort", err)
	}
	if err := read(one, "bob", once); !errors.Is(err, ErrShort) {
		t.Errorf("reading a key that may be taken only: %v, want ErrShort", err)
	}

	answered := make(chan error, 1)
	s.super(func(conn *pgx.Conn) error { // a take at another node, as far as its UPDATE
		_, err := conn.Exec(ctx, "BEGIN; UPDATE due SET ct = NULL, iv = NULL, gone_at = now(), gone_how = 'taken' WHERE key_id = '"+due.Key.String()+"'")
		if err != nil {
			return err
		}
		go func() { answered <- read(two, "bob", due) }()
		s.await("the read to wait", func() bool {
			return ask[int](s, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'kmed n2'") > 0
		})
		_, err = conn.Exec(ctx, "COMMIT")
		return err
	})
	if err := <-answered; !errors.Is(err, ErrShort) {
		t.Errorf("a read beside a take: %v, want ErrShort", err)
	}
	if err := read(one, "bob", due); !errors.Is(err, ErrShort) {
		t.Errorf("a read after the take: %v, want ErrShort", err)
	}
	s.super(func(conn *pgx.Conn) error { // what no verb of ours has counted
		_, err := conn.Exec(ctx, "UPDATE untaken SET n = n - 1 WHERE slave = 'bob' AND master = 'alice'")
		return err
	})
	if n := countOf(s.check(), audit.DecKeys); n != 6 {
		t.Errorf("%d reads were recorded, want 6", n)
	}
}
