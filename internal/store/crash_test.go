package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

// load is clients that write down what they were told.
type load struct {
	s        *site
	db       *DB
	told     sync.Map // request -> true: what was answered with success
	answered atomic.Int64
	refused  atomic.Int64
	all      sync.WaitGroup
}

// insist does a verb until it succeeds. When the database is away nothing has
// happened, so the same may be tried again; nothing else may go wrong.
func (l *load) insist(request string, do func(context.Context) error) bool {
	for {
		err := do(context.Background())
		switch {
		case err == nil:
			if _, again := l.told.LoadOrStore(request, true); again {
				l.s.t.Errorf("request %s was answered twice", request)
			}
			l.answered.Add(1)
			return true
		case errors.Is(err, ErrUnavailable):
			l.refused.Add(1)
			l.s.await("the database", func() bool { return l.db.Healthy() == nil })
		default:
			l.s.t.Errorf("request %s: %v", request, err)
			return false
		}
	}
}

// serve hands out the atoms of a block two by two.
func (l *load) serve(b Block, from, to int) {
	for i := from; i+2 <= to; i += 2 {
		atoms := b.Atoms[i : i+2]
		request := fmt.Sprint("serve", i)
		ok := l.insist(request, func(ctx context.Context) error {
			return l.db.Serve(ctx, ServeJob{Atoms: ids(atoms), Events: []audit.Event{served(request, b.BlockRef, atoms...)}})
		})
		if !ok {
			return
		}
	}
}

// pairs makes keys for two SAEs of this site and takes them.
func (l *load) pairs(worker, n int) {
	for i := range n {
		due := l.s.due(key.NewLocalID(l.s.epoch().Start(hour)), "bob", "alice")
		request := fmt.Sprint("pair", worker, "/", i)
		event := func(a audit.Action, request string) []audit.Event {
			return []audit.Event{{Action: a, Outcome: audit.Done, Request: request, Keys: []key.ID{due.Key}}}
		}
		ok := l.insist(request, func(ctx context.Context) error {
			return l.db.Serve(ctx, ServeJob{Due: []Due{due}, Events: event(audit.EncKeys, request)})
		})
		ok = ok && l.insist(request+"t", func(ctx context.Context) error {
			return l.db.Take(ctx, TakeJob{SAE: due.SAE, Rows: []DueRef{due.ref()}, How: GoneTaken, Events: event(audit.DecKeys, request+"t")})
		})
		if !ok {
			return
		}
	}
}

// announces assigns a block's atoms one by one, each batch until it is answered.
func (l *load) announces(b Block) {
	for i, a := range b.Atoms {
		request := request(fmt.Sprint("assign", i), b.BlockRef, a)
		ok := l.insist(request.ID, func(ctx context.Context) error {
			answer, err := l.db.Assign(ctx, l.s.assignJob(1, int64(i+1), request))
			if err == nil && (answer.Standing != handover.Fresh || !answer.Results[0].Accepted) {
				err = fmt.Errorf("%+v", answer)
			}
			return err
		})
		if !ok {
			return
		}
	}
}

// TestCrash kills the server under load, three times. The committer finds out what
// became of the commit that was under way, so every client is told the truth:
// what it was told is done is there once, and nothing else is.
func TestCrash(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "kme-crash-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	server, err := startCluster(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	s := newSiteOn(t, server)
	defer func() {
		if err := errors.Join(s.cluster.Kill(), s.cluster.Remove()); err != nil {
			t.Error(err)
		}
	}()
	db := s.open("n1")
	defer db.Close()
	hear(t, db, 1)
	l := &load{s: s, db: db}
	ours, peers := s.fill(db, 2048, mine), s.fill(db, 256, theirs)
	const workers = 8
	for w := range workers {
		l.all.Go(func() { l.serve(ours, w*2048/workers, (w+1)*2048/workers) })
		l.all.Go(func() { l.pairs(w, 64) })
	}
	l.all.Go(func() { l.announces(peers) })
	for _, after := range []int64{300, 800, 1300} {
		s.await("requests to be answered", func() bool { return l.answered.Load() >= after })
		if err := s.cluster.Kill(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		s.cluster, err = pgdev.Start(ctx, pgdev.Config{Dir: dir})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
	l.all.Wait()
	t.Logf("%d requests answered, %d refused while the server was away", l.answered.Load(), l.refused.Load())

	recorded := make(map[string]int)
	for _, e := range s.check() {
		if e.Request != "" {
			recorded[e.Request]++
		}
	}
	l.told.Range(func(request, _ any) bool {
		if n := recorded[request.(string)]; n != 1 {
			t.Errorf("request %s was answered, and recorded %d times", request, n)
		}
		delete(recorded, request.(string))
		return true
	})
	for request := range recorded {
		t.Errorf("request %s was recorded, and not answered", request)
	}
	if n := ask[int](s, "SELECT count(*) FROM due WHERE gone_how = 'taken'"); n != workers*64 {
		t.Errorf("%d keys are taken, want %d", n, workers*64)
	}
	if n := ask[int](s, "SELECT count(*) FROM key"); n != 0 {
		t.Errorf("%d atoms are left, want none", n)
	}
}
