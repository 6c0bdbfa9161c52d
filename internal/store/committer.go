package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// Limits of a batch and of the queue before it.
const (
	maxBatchJobs  = 256
	maxBatchAtoms = 4096
	maxQueue      = 4096 // jobs; beyond it ErrUnavailable at once
	// Events alone wait in a queue of their own, and a batch takes fewer of them: a
	// caller whose requests are refused as fast as they come delays nobody's keys.
	maxBatchRecords = 64
	maxRecords      = 1024 // beyond it ErrOverflow
)

// act is what a job does within the transaction of its batch. Its methods are
// called in the order below, by the committer alone, and again from the first if
// the batch is tried again: they must not change anything outside but the act's
// own result. A *refusal ends the job and has the others tried again; any other
// error is the database's.
type act interface {
	// claims names what no two jobs of a batch may share.
	claims(func(claim))
	// weight is the number of atoms or rows that the job touches.
	weight() int
	// ask adds what the batch's first round trip is to delete, empty or read.
	ask(*attempt) error
	// settle looks at what came back, and adds what the second one is to write.
	settle(context.Context, *attempt) error
}

// claim is an atom, a key due to an SAE, or a name.
type claim struct {
	id   key.ID
	name string
}

// solo is an act that has a batch to itself. Its statements run one by one.
type solo func(context.Context, *attempt) error

func (solo) claims(func(claim)) {}
func (solo) weight() int        { return maxBatchAtoms }
func (solo) ask(*attempt) error { return nil }
func (s solo) settle(ctx context.Context, a *attempt) error {
	if err := a.begin(ctx); err != nil {
		return err
	}
	return s(ctx, a)
}

// refusal is an act's reason why it is not to be done.
type refusal struct{ err error }

func (r *refusal) Error() string { return r.err.Error() }

func refuse(err error) error { return &refusal{err} }

// job is an act on its way through the committer.
type job struct {
	act   act
	late  func(committed bool)
	stage atomic.Int32
	done  chan struct{} // closed at the stage settled
	err   error         // to be read after done
}

// The stages of a job. The committer moves it on, but for those that the waiting
// caller enters when its context ends: dropped from queued, doubted from begun.
const (
	queued int32 = iota
	dropped
	begun
	doubted
	settled
)

// committer is the one goroutine that changes keys. It owns the fields below the
// line; the others are for everybody.
type committer struct {
	db     *DB
	queue  chan *job
	events chan *job     // those of record
	fenced chan struct{} // closed: ErrFenced
	down   atomic.Pointer[downReason]
	full   atomic.Pointer[downReason] // the database answers, and could not do the last batch: until it does one
	stop   context.Context            // ends with Close; what is under way with the database goes on
	cancel context.CancelFunc
	ended  sync.WaitGroup
	begun  atomic.Bool
	busy   atomic.Pointer[time.Time] // since when the batch under way is

	// ---
	failed time.Time // when the last batch failed: see full
	config *pgx.ConnConfig
	conn   *pgx.Conn
	run    int64
	mark   int64      // of this run's last commit, as it stands in node_run
	marks  int64      // the highest mark given out
	head   audit.Head // after that commit
	back   string     // how the database is behind mark; to be read by others after fenced
	days   map[string]bool
	moved  bool // the batch's atoms were not found at their places

	warning string // the server's last, if it may be about a commit
}

type downReason struct{ err error }

func newCommitter(db *DB, config *pgx.ConnConfig) *committer {
	c := &committer{
		db: db, config: config, queue: make(chan *job, maxQueue), events: make(chan *job, maxRecords),
		fenced: make(chan struct{}), days: make(map[string]bool),
	}
	c.stop, c.cancel = context.WithCancel(context.Background())
	c.down.Store(&downReason{fmt.Errorf("%w: no run has begun", ErrUnavailable)})
	return c
}

// hangTime is how long a batch may be under way before the database is said not to
// answer. It is less than a request may take, so that what comes later is refused
// at once, and more than any batch takes.
const hangTime = 4 * time.Second

// health is why jobs are refused at once, or nil.
func (c *committer) health() error {
	if d := c.full.Load(); d != nil {
		return cmp.Or(c.connected(), d.err)
	}
	return c.connected()
}

// connected is health, but for a database that answers and can do nothing: its disk
// is full, say. There, an event alone is tried all the same, which shows when it can
// again and costs nobody a key.
func (c *committer) connected() error {
	if d := c.down.Load(); d != nil {
		return d.err
	}
	if began := c.busy.Load(); began != nil && time.Since(*began) > hangTime {
		return fmt.Errorf("%w: it has not answered since %s", ErrUnavailable, began.UTC().Format(time.RFC3339))
	}
	return nil
}

func (c *committer) close() {
	c.cancel()
	c.ended.Wait()
}

// do hands an act to the committer and waits until it is committed or refused, or
// until ctx ends: then the act is dropped, or in doubt if its batch has begun.
func (db *DB) do(ctx context.Context, a act, late func(bool)) error {
	c := db.committer
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrDropped, err)
	}
	_, event := a.(record)
	health := c.health
	if event {
		health = c.connected
	}
	if err := health(); err != nil {
		return err
	}
	j := &job{act: a, late: late, done: make(chan struct{})}
	queue, full := c.queue, ErrUnavailable
	if event {
		queue, full = c.events, ErrOverflow
	}
	select {
	case queue <- j:
	default:
		return fmt.Errorf("%w: %d jobs wait", full, cap(queue))
	}
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
	case <-c.stop.Done():
		// The committer settles what it has begun before it ends; what it has not
		// begun nobody will.
		c.ended.Wait()
	}
	switch {
	case j.stage.CompareAndSwap(queued, dropped):
		if ctx.Err() == nil {
			return c.health()
		}
		return fmt.Errorf("%w: %w", ErrDropped, ctx.Err())
	case j.stage.CompareAndSwap(begun, doubted):
		return fmt.Errorf("%w: %w", ErrDoubt, context.Cause(ctx))
	}
	<-j.done
	return j.err
}

// finish settles jobs: err is what their callers get.
func (c *committer) finish(err error, jobs ...*job) {
	for _, j := range jobs {
		j.err = err
		if j.stage.CompareAndSwap(begun, settled) {
			close(j.done)
		} else if j.late != nil {
			c.db.late.Go(func() { j.late(err == nil) })
		}
	}
}

// idlePing is how often an idle connection is tried, so that a database that has
// gone is noticed without a job.
const idlePing = time.Second

// loop takes what waits, commits it, and takes again what waits, until stop.
func (c *committer) loop() {
	idle := time.NewTicker(idlePing)
	defer idle.Stop()
	var waiting []*job
	for c.stop.Err() == nil {
		if len(waiting) == 0 {
			select {
			case <-c.stop.Done():
				continue
			case <-idle.C:
				c.ping()
				continue
			case j := <-c.queue:
				waiting = append(waiting, j)
			case j := <-c.events:
				waiting = append(waiting, j)
			}
		}
		waiting = gather(waiting, c.events, maxBatchRecords)
		runtime.Gosched() // whoever is about to hand in a job, woken together with the first, does so now
		waiting = gather(waiting, c.queue, maxBatchJobs-len(waiting))
		var batch []*job
		batch, waiting = pick(waiting)
		began := time.Now()
		c.busy.Store(&began)
		c.commit(batch)
		c.busy.Store(nil)
	}
	if !errors.Is(c.health(), ErrFenced) {
		c.down.Store(&downReason{fmt.Errorf("%w: closed", ErrUnavailable)})
	}
	c.abandon(waiting, c.health())
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.conn.Close(ctx) // nothing is under way on it
}

// gather adds what is in a queue, up to a limit.
func gather(waiting []*job, queue chan *job, limit int) []*job {
	for range limit {
		select {
		case j := <-queue:
			waiting = append(waiting, j)
		default:
			return waiting
		}
	}
	return waiting
}

// pick begins a batch: the jobs that have not been dropped, in order, within the
// limits, and none that shares a claim with one before it. The rest waits on.
func pick(waiting []*job) (batch, rest []*job) {
	claimed := make(map[claim]*job)
	weight := 0
	for _, j := range waiting {
		w := j.act.weight()
		free := len(batch) == 0 || weight+w <= maxBatchAtoms
		if free {
			j.act.claims(func(cl claim) { free = free && (claimed[cl] == nil || claimed[cl] == j) })
		}
		if !free {
			rest = append(rest, j)
			j.act.claims(func(cl claim) { claimed[cl] = first(claimed[cl], j) }) // those behind it keep their place
			continue
		}
		if !j.stage.CompareAndSwap(queued, begun) {
			continue // dropped
		}
		j.act.claims(func(cl claim) { claimed[cl] = j })
		batch, weight = append(batch, j), weight+w
	}
	return batch, rest
}

func first(a, b *job) *job {
	if a != nil {
		return a
	}
	return b
}

// abandon refuses jobs that have not begun, and all that are in the queue.
func (c *committer) abandon(waiting []*job, err error) {
	for {
		for _, j := range waiting {
			if j.stage.CompareAndSwap(queued, begun) {
				c.finish(err, j)
			}
		}
		select {
		case j := <-c.queue:
			waiting = []*job{j}
		case j := <-c.events:
			waiting = []*job{j}
		default:
			return
		}
	}
}
