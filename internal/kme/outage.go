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
)

// outage counts the refusals that could not be recorded because the database was
// away, in a file that is fsynced, so that one summary can follow when it is
// back. The file holds one number, so it cannot grow.
type outage struct {
	mu   sync.Mutex
	path string
	n    int64
	kept int64 // what the file says
	err  error // of the last write
}

func openOutage(dir string) (*outage, error) {
	o := &outage{path: filepath.Join(dir, "outage")}
	n, err := readNumber(o.path)
	if err != nil {
		return nil, err
	}
	o.n, o.kept = n, n
	return o, nil
}

// count adds one refusal. If the process dies before the file is written, the
// caller has not been answered either.
func (o *outage) count() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n++
	o.save()
}

// counted is how many refusals wait for their summary.
func (o *outage) counted() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.n
}

// settle subtracts what a summary has told of, or one whose own event was in doubt
// and has been committed after all. If the process dies before it, they are told of
// twice, and not lost.
func (o *outage) settle(n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n = max(0, o.n-n)
	o.save()
}

// save writes the number. A disk that does not take it leaves the number in
// memory: refusing goes on, which is all there is to do until keep is called.
func (o *outage) save() {
	if o.err = writeDurably(o.path, []byte(strconv.FormatInt(o.n, 10)+"\n")); o.err == nil {
		o.kept = o.n
	}
}

// keep writes a number that is not in the file yet, or may not be since the last write
// failed, and says why if it cannot.
func (o *outage) keep() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.n != o.kept || o.err != nil {
		o.save()
	}
	return o.err
}

// summarise writes the summary of an outage that is over.
func (k *KME) summarise(ctx context.Context) {
	n := k.outage.counted()
	if n == 0 {
		return
	}
	ev := k.own(audit.Outage)
	ev.Outcome, ev.Count, ev.Reason = audit.Refused, int(n), "refused while the database was away"
	if err := k.Store.Record(ctx, ev); err != nil {
		k.Log.Warn("recording an outage", "refusals", n, "err", err)
		return
	}
	k.outage.settle(n)
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
