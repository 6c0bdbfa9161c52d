package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// tripTime bounds one attempt, and one question: whatever takes longer is a
	// broken connection, or a COMMIT that waits for a standby. Giving up on that one
	// leaves it waiting, and asks on another connection, perhaps to another primary.
	tripTime = 10 * time.Second
	// maxTries bounds how often a batch is tried again as it is.
	maxTries = 5

	// fullTime is how long a database that could not do a batch is not well at the
	// least: an event may find a place where a batch of keys does not.
	fullTime = time.Second

	reconnectMin = 20 * time.Millisecond
	reconnectMax = time.Second
)

// unknown is the error of a COMMIT that was sent and not answered.
type unknown struct{ err error }

func (u *unknown) Error() string { return "the commit was not answered: " + u.err.Error() }

// errConflict: another committer changed what the batch had read. Again.
var errConflict = errors.New("a row changed between two statements")

// commit gets jobs committed or refused, each.
func (c *committer) commit(jobs []*job) {
	c.moved = false
	for tries := 1; len(jobs) > 0; tries++ {
		if errors.Is(c.health(), ErrFenced) {
			c.finish(ErrFenced, jobs...)
			return
		}
		a := c.newAttempt()
		refused, err := a.try(jobs)
		if err == nil && len(refused) == 0 {
			c.advance(a)
			c.finish(nil, jobs...)
			return
		}
		if err == nil {
			jobs = c.refuse(jobs, refused)
			tries--
			continue
		}
		if u := (*unknown)(nil); errors.As(err, &u) {
			c.db.cfg.Log.Warn("commit not answered: asking what became of it", "err", u.err, "jobs", len(jobs))
			switch f := c.resolve(a, err); {
			case f == fateCommitted:
				c.finish(nil, jobs...)
				return
			case f == fateStopped:
				c.leaveInDoubt(fmt.Errorf("%w: closed", ErrDoubt), jobs)
				return
			case f == fateFenced:
				c.fence()
				c.leaveInDoubt(ErrFenced, jobs)
				return
			}
			// Not committed, and it never will be: the same batch again.
			if tries < maxTries {
				continue
			}
			c.finish(fmt.Errorf("%w: %w", ErrUnavailable, err), jobs...)
			return
		}
		switch c.verdict(err, tries) {
		case verdictAgain:
		case verdictFenced:
			c.fence()
			c.finish(ErrFenced, jobs...)
			return
		case verdictSplit:
			if half := len(jobs) / 2; half > 0 {
				c.commit(jobs[:half])
				c.commit(jobs[half:])
				return
			}
			c.finish(alone(err), jobs...)
			return
		case verdictFail:
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
			c.failed = time.Now()
			c.full.Store(&downReason{err})
			c.finish(err, jobs...)
			return
		case verdictLost:
			c.setDown(err)
			c.finish(c.health(), jobs...)
			c.reconnect()
			return
		}
	}
}

// refuse settles the refused jobs and returns the others.
func (c *committer) refuse(jobs []*job, refused map[*job]error) []*job {
	var rest []*job
	for _, j := range jobs {
		if err, ok := refused[j]; ok {
			c.finish(err, j)
		} else {
			rest = append(rest, j)
		}
	}
	return rest
}

// advance makes a's commit the last one.
func (c *committer) advance(a *attempt) {
	c.mark, c.head = a.mark, a.head
	c.db.untaken.add(a.untaken)
	if time.Since(c.failed) > fullTime {
		c.full.Store(nil)
	}
	c.db.cfg.Witness.note(c.run, c.head, a.sig)
	for e := range a.due {
		c.db.epochs.refill(e)
	}
}

// fence ends everything: the run is another's, or the database is in the past.
func (c *committer) fence() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if c.back == "" {
		_ = c.checkPast(ctx) // who cannot be asked is not known to be in the past
	}
	c.db.cfg.Log.Error("this node's run is not its own any more", "node", c.db.cfg.Node, "run", c.run, "set back", c.back)
	c.down.Store(&downReason{ErrFenced})
	close(c.fenced)
	c.cancel()
	c.abandon(nil, ErrFenced)
}

// leaveInDoubt ends jobs whose outcome nobody will learn in this process: err is
// what waiting callers get, and no Late is called.
func (c *committer) leaveInDoubt(err error, jobs []*job) {
	for _, j := range jobs {
		j.err = err
		if j.stage.CompareAndSwap(begun, settled) {
			close(j.done)
		}
	}
}

type verdict byte

const (
	verdictAgain verdict = iota // nothing happened: the same batch again
	verdictSplit                // one of the jobs cannot be done: find it
	verdictFail                 // the database cannot now
	verdictLost                 // the connection is gone, and cannot be had again at once
	verdictFenced
)

// verdict says what to do about an error that came before anything was committed.
func (c *committer) verdict(err error, tries int) verdict {
	code := sqlState(err)
	switch {
	case c.conn.IsClosed() || code == "25006": // 25006: read only, no longer the primary
		if tries < maxTries && c.stop.Err() == nil && c.connect() == nil {
			return verdictAgain
		}
		return verdictLost
	case errors.Is(err, errConflict), code == "40001", code == "40P01": // serialization failure, deadlock
		if tries < maxTries {
			return verdictAgain
		}
		return verdictSplit // the database is well: the fewer jobs, the fewer that others can be in the way of
	case code == "": // ours: a row that cannot be read
		return verdictSplit
	}
	switch code {
	case "KME01":
		return verdictFenced
	case "42P01", "42501": // no such partition, or a sealed one: what was believed of them is old
		clear(c.days)
		ctx, cancel := context.WithTimeout(context.Background(), tripTime)
		defer cancel()
		if tries < 2 && c.db.epochs.refresh(ctx, c.db.pool) == nil {
			return verdictAgain
		}
		return verdictSplit
	}
	switch code[:2] {
	case "21", "22", "23", "42", "P0": // of one job's data or statement
		return verdictSplit
	}
	return verdictFail
}

// alone is what the job gets that cannot be done even in a batch of its own.
func alone(err error) error {
	if missingTable(err) {
		return fmt.Errorf("%w: %w", ErrExpired, err)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// setDown has jobs refused until setUp.
func (c *committer) setDown(err error) {
	if c.down.Swap(&downReason{fmt.Errorf("%w: %w", ErrUnavailable, err)}) == nil {
		c.db.cfg.Log.Error("database lost", "err", err)
	}
}

func (c *committer) setUp() {
	if c.down.Swap(nil) != nil {
		c.db.cfg.Log.Info("database connected", "node", c.db.cfg.Node, "run", c.run)
	}
}

// ping tries an idle connection.
func (c *committer) ping() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := c.conn.Ping(ctx); err != nil {
		c.setDown(err)
		c.reconnect()
	}
}

// connect makes a new connection, in one try, and ends the old one at both ends: a
// server that has not noticed that it is broken would keep its locks. But one whose
// COMMIT waits for a standby waits on: ending it would end the wait.
func (c *committer) connect() error {
	old := c.conn
	if old != nil {
		ctx, cancel := context.WithTimeout(c.stop, 100*time.Millisecond)
		_ = old.Close(ctx) // it is broken, or it is replaced
		cancel()
	}
	conn, err := c.dial()
	if err != nil {
		return err
	}
	c.conn = conn
	if old == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.stop, hostTime)
	defer cancel()
	_, err = conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE pid = $1 AND application_name = current_setting('application_name') AND pid <> pg_backend_pid()
		AND wait_event IS DISTINCT FROM 'SyncRep'`, old.PgConn().PID())
	if err != nil {
		return err
	}
	return c.checkPast(ctx)
}

// reconnect connects, however long it takes, and refuses whatever comes meanwhile.
// It says false if it was stopped.
func (c *committer) reconnect() bool {
	for wait := reconnectMin; ; wait = min(2*wait, reconnectMax) {
		err := c.connect()
		if err == nil {
			c.setUp()
			return true
		}
		if errors.Is(err, errSetBack) {
			c.fence()
			return false
		}
		c.setDown(err)
		c.abandon(nil, c.health())
		select {
		case <-c.stop.Done():
			return false
		case <-time.After(wait):
		}
	}
}

// fate is what became of a commit that was not answered.
type fate byte

const (
	fateCommitted fate = iota
	fateNot            // and it cannot be any more
	fateFenced
	fateStopped // nobody knows
)

// resolve finds out what became of a's commit. The row is read FOR UPDATE, so that
// a commit still under way has ended; if it was not committed, this transaction
// moves the row itself, so that a COMMIT still on its way will fail; and in either
// case it writes, so that what it saw is as durable as its own commit.
func (c *committer) resolve(a *attempt, cause error) fate {
	c.setDown(cause)
	for {
		if !c.reconnect() {
			return fateStopped
		}
		f, err := c.askFate(a)
		if err == nil {
			c.db.cfg.Log.Info("what became of the commit", "committed", f == fateCommitted, "fenced", f == fateFenced)
			return f
		}
		c.setDown(err)
	}
}

func (c *committer) askFate(a *attempt) (fate, error) {
	ctx, cancel := context.WithTimeout(context.Background(), tripTime)
	defer cancel()
	tx, err := c.conn.Begin(ctx)
	if err != nil {
		return fateNot, err
	}
	defer func() { _ = tx.Rollback(ctx) }() // after a commit: nothing
	var run, mark int64
	err = tx.QueryRow(ctx, "SELECT run, mark FROM node_run WHERE node = $1 FOR UPDATE", c.db.cfg.Node).Scan(&run, &mark)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && run != c.run {
		return fateFenced, nil
	}
	if err != nil {
		return fateNot, err
	}
	f, next := fateNot, c.nextMark()
	switch {
	case mark == a.mark:
		f, next = fateCommitted, mark
	case mark != c.mark && mark < a.mark: // not ours: the database was set back
		return fateFenced, nil
	}
	if _, err := tx.Exec(ctx, "UPDATE node_run SET mark = $2 WHERE node = $1", c.db.cfg.Node, next); err != nil {
		return fateNot, err
	}
	c.warning = ""
	if err := tx.Commit(ctx); err != nil {
		return fateNot, err // whatever became of this one: a's mark stands there or it does not
	}
	if c.warning != "" {
		return fateNot, errors.New(c.warning)
	}
	if c.mark = next; f == fateCommitted {
		c.advance(a)
	}
	return f, nil
}

// nextMark gives out each number once.
func (c *committer) nextMark() int64 {
	c.marks++
	return c.marks
}

// sqlState is the SQLSTATE of an error that the server raised, or "".
func sqlState(err error) string {
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}
