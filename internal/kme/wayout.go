package kme

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
)

// wayOut is where the sinks read the log.
type wayOut struct{ k *KME }

// Leaves implements siem.Source. What was changed in the database since it was signed is
// sent nobody.
func (w wayOut) Leaves(ctx context.Context, origin, first int64, limit int, do func(audit.Row) error) (siem.Log, error) {
	state, following, err := w.k.Trail.Reader.Leaves(ctx, w.k.logKeyOf, origin, first, limit, do)
	if bad, ok := errors.AsType[*audit.BadLeaf](err); ok {
		w.k.distrust(ctx, bad.Error())
	}
	return siem.Log{Name: state.Name, Origin: state.Origin, Size: state.Size, Following: following}, err
}

// Cursor implements siem.Source.
func (w wayOut) Cursor(ctx context.Context, sink string) (origin, next int64, err error) {
	c, err := w.k.Store.Cursor(ctx, sink)
	return c.Origin, c.Next, err
}

// MoveCursor implements siem.Source.
func (w wayOut) MoveCursor(ctx context.Context, sink string, origin, next int64) error {
	return w.k.Store.MoveCursor(ctx, sink, store.Cursor{Origin: origin, Next: next})
}

// forward sends the log to the sinks, as long as this node is the one of its site
// that does. A sink that is away is an alarm, and holds up nobody.
func (k *KME) forward(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range k.sinks {
		g.Go(func() error { return f.Run(ctx, wayOut{k}) })
	}
	g.Go(func() error {
		return k.every(ctx, time.Second, nil, func(ctx context.Context) {
			for _, f := range k.sinks {
				if why := f.Trouble(); why != "" {
					k.suspect(ctx, "audit-sink-"+f.Name(), fmt.Sprintf("audit sink %s takes nothing, %d events wait: %s", f.Name(), f.Lag(), why))
				} else {
					k.clear(ctx, "audit-sink-"+f.Name())
				}
			}
		})
	})
	return g.Wait()
}

// retain moves days that are older than Keep into bundles, as long as this node is the
// one of its site that does.
func (k *KME) retain(ctx context.Context) error {
	return k.every(ctx, time.Hour, nil, k.retainOnce)
}

func (k *KME) retainOnce(ctx context.Context) {
	err := k.archiveDays(ctx)
	if bad, ok := errors.AsType[*audit.BadLeaf](err); ok {
		k.distrust(ctx, bad.Error())
	}
	if err != nil && ctx.Err() == nil {
		k.raise(ctx, "audit-archive", err.Error())
	} else {
		k.clear(ctx, "audit-archive")
	}
}

// archiveDays archives all days that are due, oldest first, of the logs of all origins,
// and that no sink may have to be sent any more.
func (k *KME) archiveDays(ctx context.Context) error {
	before := k.Now().UTC().Add(-k.Trail.Keep).Truncate(24 * time.Hour)
	days, err := k.Trail.Reader.Days(ctx, before.Add(clockBack))
	if err != nil {
		return err
	}
	for _, together := range interwoven(days) {
		if slices.ContainsFunc(together, func(d auditlog.Day) bool { return !d.Day.Before(before) }) {
			continue // one of them is not due yet
		}
		if err := k.archive(ctx, together); err != nil {
			return err
		}
	}
	return nil
}

// clockBack is how far a clock that was set back over midnight may have mixed the events
// of days that are due with those of later ones.
const clockBack = 48 * time.Hour

// interwoven puts days together that can only be archived together: a day in which a
// recovery began another log is of both logs, and a clock that was set back over
// midnight leaves the events of a day among those of the day before.
func interwoven(days []auditlog.Day) (all [][]auditlog.Day) {
	for len(days) > 0 {
		together := []auditlog.Day{days[0]}
		days = slices.Clone(days[1:])
		for i := 0; i < len(together); i++ {
			days = slices.DeleteFunc(days, func(d auditlog.Day) bool {
				is := together[i]
				with := d.Day.Equal(is.Day) || d.Origin == is.Origin && d.First <= is.Last && is.First <= d.Last
				if with {
					together = append(together, d)
				}
				return with
			})
		}
		all = append(all, together)
	}
	return all
}

// archive writes the leaves of days into bundles, one for each day and log, verifies them
// there, and only then drops the events. If the process dies on the way, it is done
// again, with the bundles that there are.
func (k *KME) archive(ctx context.Context, days []auditlog.Day) error {
	var bundles []store.Archived
	var events []audit.Event
	for _, d := range days {
		if err := k.sentToSinks(ctx, d); err != nil {
			return err
		}
	}
	for _, d := range days {
		key, err := k.keyForArchive(ctx, days, d.Origin)
		if err != nil {
			return err
		}
		name, sum, err := k.bundleOf(ctx, key, d)
		if err != nil {
			return fmt.Errorf("archiving day %s of the audit log: %w", d.Day.Format(time.DateOnly), err)
		}
		bundles = append(bundles, store.Archived{Origin: d.Origin, Day: d.Day, First: d.First, Last: d.Last, File: name, Sum: sum})
		ev := k.own(audit.AuditDropped)
		ev.Count = int(d.Last - d.First + 1)
		ev.Reason = audit.Archived{Day: d.Day, First: d.First, Last: d.Last, Log: key.Name(), File: name, Sum: sum}.String()
		events = append(events, ev)
	}
	return k.Store.DropAuditDays(ctx, bundles, events...)
}

// keyForArchive is the key of the log of an origin of which days go into bundles. What is
// before them must have gone before: leaves that are nowhere were taken away.
func (k *KME) keyForArchive(ctx context.Context, days []auditlog.Day, origin int64) (key audit.LogKey, err error) {
	err = k.Trail.Reader.Snapshot(ctx, origin, func(l *auditlog.Snapshot) error {
		kept, err := l.Kept(ctx)
		if err != nil {
			return err
		}
		first := int64(math.MaxInt64)
		for _, d := range days {
			if d.Origin == origin {
				first = min(first, d.First)
			}
		}
		if first > kept {
			return &audit.BadLeaf{Leaf: kept, Why: fmt.Sprintf("it is missing, and so is all before leaf %d of %s", first, l.Name)}
		}
		key, err = audit.ParseLogKey(k.logKeyOf(l.LogState))
		return err
	})
	return key, err
}

// sentToSinks is nil if no sink may have to be sent the day any more.
func (k *KME) sentToSinks(ctx context.Context, d auditlog.Day) error {
	for _, f := range k.sinks {
		c, err := k.Store.Cursor(ctx, f.Name())
		if err != nil {
			return err
		}
		if c.Origin < d.Origin || c.Origin == d.Origin && c.Next <= d.Last {
			return fmt.Errorf("day %s of the audit log stays: sink %s has not been sent it, or may not have read it", d.Day.Format(time.DateOnly), f.Name())
		}
	}
	return nil
}

// bundleOf writes the bundle of a day, and returns its name and its sum. One that is there
// is never written over: it may have what a restore has taken out of the database since.
// If it has just what the day has now, it is the one.
func (k *KME) bundleOf(ctx context.Context, key audit.LogKey, d auditlog.Day) (name string, sum [32]byte, err error) {
	fresh := filepath.Join(k.Trail.Archive, fmt.Sprintf("%s-%d.bundle.new", k.Self, d.Origin))
	if sum, err = k.writeBundle(ctx, fresh, key, d); err != nil {
		return "", sum, err
	}
	for n := 1; ; n++ {
		name = fmt.Sprintf("%s-%d-%s.bundle", k.Self, d.Origin, d.Day.Format(time.DateOnly))
		if n > 1 {
			name = fmt.Sprintf("%s-%d-%s.%d.bundle", k.Self, d.Origin, d.Day.Format(time.DateOnly), n)
		}
		at := filepath.Join(k.Trail.Archive, name)
		switch was, same, err := sameEvents(ctx, at, fresh, key); {
		case ctx.Err() != nil:
			return "", sum, ctx.Err()
		case errors.Is(err, fs.ErrNotExist):
			if err := os.Rename(fresh, at); err != nil {
				return "", sum, err
			}
			return name, sum, syncDir(k.Trail.Archive)
		case err == nil && same:
			return name, was, os.Remove(fresh)
		case err != nil:
			k.Log.Warn("a bundle of the audit log cannot be read, and is left as it is", "file", at, "err", err)
		}
	}
}

// sameEvents says whether the bundle in a file is good and has the events that another
// has which is good, and its sum.
func sameEvents(ctx context.Context, name, other string, key audit.LogKey) (sum [32]byte, same bool, err error) {
	b, f, err := audit.OpenBundleFile(name)
	if err != nil {
		return sum, false, err
	}
	defer f.Close()
	o, g, err := audit.OpenBundleFile(other)
	if err != nil {
		return sum, false, err
	}
	defer g.Close()
	if b.First != o.First || b.Leaves != o.Leaves {
		return sum, false, nil
	}
	if _, _, _, err := audit.VerifyBundle(ctx, key, nil, audit.Known{}, false, b); err != nil {
		return sum, false, err
	}
	var sums [2][32]byte
	for i, one := range []*audit.Bundle{b, o} {
		h := sha256.New()
		if err := one.Rows(ctx, 0, 1<<62, func(r audit.Row) error { _, err := h.Write(r.AppendText(nil)); return err }); err != nil {
			return sum, false, err
		}
		sums[i] = [32]byte(h.Sum(nil))
	}
	h := sha256.New()
	if _, err = f.Seek(0, io.SeekStart); err == nil {
		_, err = io.Copy(h, f)
	}
	return [32]byte(h.Sum(nil)), sums[0] == sums[1], err
}

// writeBundle writes the bundle durably and reads it again as a stranger would.
func (k *KME) writeBundle(ctx context.Context, name string, key audit.LogKey, d auditlog.Day) (sum [32]byte, err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	err = k.Trail.Reader.Snapshot(ctx, d.Origin, func(l *auditlog.Snapshot) error {
		signed, err := l.Cosigned(ctx, d.Last+1)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, key)
		if err != nil {
			return err
		}
		return audit.WriteBundle(ctx, io.MultiWriter(f, h), audit.BundleSpec{
			Key: k.logKeyOf(l.LogState), Signed: signed, Checkpoint: c, First: d.First, End: d.Last + 1, At: k.Now(),
		}, l)
	})
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return sum, err
	}
	b, err := audit.OpenBundle(f)
	if err != nil {
		return sum, err
	}
	r, _, _, err := audit.VerifyBundle(ctx, key, nil, audit.Known{}, false, b)
	if err == nil && (b.First != d.First || r.Leaves != d.Last-d.First+1) {
		err = fmt.Errorf("the bundle has leaves %d to %d, not %d to %d", b.First, b.First+r.Leaves-1, d.First, d.Last)
	}
	return [32]byte(h.Sum(nil)), err
}

// syncDir makes durable which files a folder has.
func syncDir(name string) error {
	dir, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
