package lab

import (
	"context"
	"errors"
	"fmt"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
)

// checkTrail is I5 as an auditor sees it: the tree of the site's log has all of its
// events, each as its node has signed it. A site whose sequencer has not run has none.
func (s *Site) checkTrail(ctx context.Context, r *Report) error {
	reader, err := auditlog.NewReader(ctx, s.DSN("kme_auditor"))
	if err != nil {
		return err
	}
	defer reader.Close()
	err = reader.Snapshot(ctx, 0, func(l *auditlog.Snapshot) error {
		key, err := audit.ParseLogKey(l.Key)
		if err != nil || l.Size == 0 {
			return err
		}
		signed, err := l.Checkpoint(ctx, 0)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, key)
		if err != nil {
			return err
		}
		heads, err := l.Heads(ctx)
		if err != nil {
			return err
		}
		report, err := audit.Verify(ctx, key, c, 0, audit.Known{Heads: heads}, l)
		r.Leaves += int(report.Leaves)
		return err
	})
	if bad := (*audit.BadLeaf)(nil); errors.As(err, &bad) {
		r.fail("I5", s.Name, "%v", bad)
		return nil
	}
	if err != nil && !errors.Is(err, auditlog.ErrNoLog) {
		return fmt.Errorf("I5 at %s: %w", s.Name, err)
	}
	return nil
}
