package kme

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/store"
)

// tally counts the events that could not be recorded for one reason, in a file that is
// fsynced, so that one summary can follow when they can again. The file holds one
// number, so it cannot grow.
type tally struct {
	mu   sync.Mutex
	path string
	n    int64
	open int64 // of them, those in doubt
	kept int64 // what the file says
	err  error // of the last write
}

// openTallies opens those of a node: of the events that came while the database was
// away, and of those that came while too many waited.
func openTallies(dir string) (outage, overflow *tally, err error) {
	if outage, err = openTally(filepath.Join(dir, "outage")); err != nil {
		return nil, nil, err
	}
	overflow, err = openTally(filepath.Join(dir, "overflow"))
	return outage, overflow, err
}

func openTally(path string) (*tally, error) {
	n, err := readNumber(path)
	if err != nil {
		return nil, err
	}
	return &tally{path: path, n: n, kept: n}, nil
}

// count adds events. If the process dies before the file is written, the caller has
// not been answered either.
func (o *tally) count(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n += int64(n)
	o.save()
}

// doubt adds an event that is part of a commit under way. No summary of this process
// tells of it before learn is called; if the process dies first, one of the next does.
func (o *tally) doubt() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n++
	o.open++
	o.save()
}

// learn ends a doubt: whether the event is in the log, or counted anew, or is to be told
// of by a summary like the others.
func (o *tally) learn(told bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.open--
	if told {
		o.n--
		o.save()
	}
}

// counted is how many events wait for their summary.
func (o *tally) counted() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.n - o.open
}

// settle subtracts what a summary has told of. If the process dies before it, they are
// told of twice, and not lost.
func (o *tally) settle(n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n -= n
	o.save()
}

// save writes the number. A disk that does not take it leaves the number in
// memory: refusing goes on, which is all there is to do until keep is called.
func (o *tally) save() {
	if o.err = writeDurably(o.path, []byte(strconv.FormatInt(o.n, 10)+"\n")); o.err == nil {
		o.kept = o.n
	}
}

// keep writes a number that is not in the file yet, or may not be since the last write
// failed, and says why if it cannot.
func (o *tally) keep() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.n != o.kept || o.err != nil {
		o.save()
	}
	return o.err
}

// miss counts a request whose outcome could not be recorded, by why it could not. With
// store.ErrDoubt it may be yet: whoever learns that calls k.outage.learn.
func (k *KME) miss(err error) {
	switch {
	case errors.Is(err, store.ErrDoubt):
		k.outage.doubt()
	case errors.Is(err, store.ErrOverflow):
		k.overflow.count(1)
	default:
		k.outage.count(1)
	}
}

// keepTallies has what was counted kept in its files, and says why it cannot.
func (k *KME) keepTallies() error { return errors.Join(k.outage.keep(), k.overflow.keep()) }

// summarise writes the summaries of an outage and of a flood that are over.
func (k *KME) summarise(ctx context.Context) {
	for _, s := range []struct {
		of     *tally
		action audit.Action
		reason string
	}{
		{k.outage, audit.Outage, "refused while the database was away"},
		{k.overflow, audit.AuditOverflow, "refused without events of their own: too many waited to be recorded"},
	} {
		n := s.of.counted()
		if n == 0 {
			continue
		}
		ev := k.own(s.action)
		ev.Outcome, ev.Count, ev.Reason = audit.Refused, int(n), s.reason
		if err := k.Store.Record(ctx, ev); err != nil {
			k.Log.Warn("recording a summary", "action", s.action, "events", n, "err", err)
			continue
		}
		s.of.settle(n)
	}
}

// writeDurably replaces a small file so that after a crash it holds either the old
// or the new content: write beside, fsync, rename, fsync the folder.
func writeDurably(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	_, werr := f.Write(content)
	err = errors.Join(werr, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("writing %s: %w", path, err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
