package kme

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
)

// wayOut is where the sinks read the log.
type wayOut struct{ k *KME }

// Leaves implements siem.Source.
func (w wayOut) Leaves(ctx context.Context, origin, first int64, limit int, do func(audit.Row) error) (siem.Log, error) {
	state, following, err := w.k.Trail.Reader.Leaves(ctx, origin, first, limit, do)
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
	return k.every(ctx, time.Hour, nil, func(ctx context.Context) {
		err := k.archiveDays(ctx)
		if err != nil && ctx.Err() == nil {
			k.raise(ctx, "audit-archive", err.Error())
		} else {
			k.clear(ctx, "audit-archive")
		}
	})
}

// archiveDays archives all days that are due, oldest first, and that no sink may have to
// be sent any more.
func (k *KME) archiveDays(ctx context.Context) error {
	before := k.Now().UTC().Add(-k.Trail.Keep).Truncate(24 * time.Hour)
	var due []auditlog.Day
	var state auditlog.LogState
	err := k.Trail.Reader.Snapshot(ctx, 0, func(l *auditlog.Snapshot) (err error) {
		state = l.LogState
		due, err = l.Days(ctx, before)
		return err
	})
	if errors.Is(err, auditlog.ErrNoLog) {
		return nil
	}
	for _, d := range due {
		if err == nil {
			err = k.archiveDay(ctx, state.Origin, d)
		}
	}
	return err
}

// archiveDay writes a day's leaves into a bundle, verifies it there, and only then
// drops the events. If the process dies on the way, the bundle is written again.
func (k *KME) archiveDay(ctx context.Context, origin int64, d auditlog.Day) error {
	for _, f := range k.sinks {
		c, err := k.Store.Cursor(ctx, f.Name())
		if err != nil {
			return err
		}
		if c.Origin < origin || c.Origin == origin && c.Next <= d.Last {
			return fmt.Errorf("day %s of the audit log stays: sink %s has not been sent it, or may not have read it", d.Day.Format(time.DateOnly), f.Name())
		}
	}
	name := filepath.Join(k.Trail.Archive, fmt.Sprintf("%s-%d-%s.bundle", k.Self, origin, d.Day.Format(time.DateOnly)))
	key, err := audit.ParseLogKey(k.logKeyText(origin))
	if err != nil {
		return err
	}
	sum, err := k.writeBundle(ctx, name, origin, key, d)
	if err != nil {
		return fmt.Errorf("archiving day %s of the audit log: %w", d.Day.Format(time.DateOnly), err)
	}
	a := store.Archived{Origin: origin, Day: d.Day, First: d.First, Last: d.Last, File: filepath.Base(name), Sum: sum}
	ev := k.own(audit.AuditDropped)
	ev.Count = int(d.Last - d.First + 1)
	ev.Reason = audit.Archived{Day: d.Day, First: d.First, Last: d.Last, Log: key.Name(), File: a.File, Sum: sum}.String()
	return k.Store.DropAuditDay(ctx, a, ev)
}

// writeBundle writes the bundle durably and reads it again as a stranger would.
func (k *KME) writeBundle(ctx context.Context, name string, origin int64, key audit.LogKey, d auditlog.Day) (sum [32]byte, err error) {
	f, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	err = k.Trail.Reader.Snapshot(ctx, origin, func(l *auditlog.Snapshot) error {
		signed, err := l.Cosigned(ctx, d.Last+1)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, key)
		if err != nil {
			return err
		}
		return audit.WriteBundle(ctx, io.MultiWriter(f, h), audit.BundleSpec{
			Key: k.logKeyText(origin), Signed: signed, Checkpoint: c, First: d.First, End: d.Last + 1, At: k.Now(),
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
	if err != nil {
		return sum, err
	}
	if err := os.Rename(name+".new", name); err != nil {
		return sum, err
	}
	dir, err := os.Open(k.Trail.Archive)
	if err != nil {
		return sum, err
	}
	return [32]byte(h.Sum(nil)), errors.Join(dir.Sync(), dir.Close())
}
