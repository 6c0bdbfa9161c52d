package kme

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// TestReplayedRow: whoever has the whole database can put back the row of a key that has
// gone, and the key leaves again: its blob was not changed, and the HSM remembers nothing.
// The events do, of which none can be taken back: reconciliation names each such key,
// however it had gone, and no other.
func TestReplayedRow(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	stand(t, k)
	reader, err := auditlog.NewReader(t.Context(), s.cluster.DSN(store.AuditorRole, s.name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reader.Close)
	fold, err := auditlog.NewSequencer(auditlog.Config{
		DSN: s.cluster.DSN(store.SequencerRole, s.name), TrustDomain: k.Trail.TrustDomain, Site: "km1", Key: k.trail.logKey, Now: s.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fold.Close)

	keys, err := get(t, k, 4, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	taken, erased, voided, honest := keys[0], keys[1], keys[2], keys[3]
	s.change("CREATE TABLE saved AS SELECT * FROM due")
	anna := asSAE(t, "anna", s.now())
	take := func(ids ...key.ID) (etsi014.Container, error) {
		return k.DecKeys(t.Context(), anna, "", saeID(t, "alice"), ids)
	}
	if _, err := take(taken.ID, honest.ID); err != nil {
		t.Fatal(err)
	}
	if err := k.ConsumeKey(t.Context(), anna, "r", erased.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Store.VoidDue(t.Context(), 10, func(rows []store.DueRef) audit.Event {
		ev := k.dueExpired(rows)
		ev.Action = audit.VoidKeys
		return ev
	}); err != nil {
		t.Fatal(err)
	}
	if findings := reconciled(t, k, fold, reader); len(findings) != 0 {
		t.Errorf("before: %q", findings)
	}

	for _, gone := range []key.ID{taken.ID, erased.ID, voided.ID} {
		if _, err := take(gone); err == nil {
			t.Errorf("key %s is taken, and had gone", gone)
		}
		s.change("UPDATE due SET ct = saved.ct, iv = saved.iv, gone_at = NULL, gone_how = NULL FROM saved WHERE due.key_id = saved.key_id AND due.key_id = $1", [16]byte(gone))
		again, err := take(gone)
		if err != nil {
			t.Fatalf("this test is of no use: the key does not leave again: %v", err)
		}
		i := slices.IndexFunc(keys, func(k etsi014.Key) bool { return k.ID == gone })
		if !bytes.Equal(again.Keys[0].Material.Reveal(), keys[i].Material.Reveal()) {
			t.Errorf("key %s is another one", gone)
		}
	}
	findings := reconciled(t, k, fold, reader)
	for _, gone := range []key.ID{taken.ID, erased.ID, voided.ID} {
		if want := fmt.Sprintf("key %s was assigned at km1 to 1, and has ended there 2 times: a row was put back", gone); !slices.Contains(findings, want) {
			t.Errorf("%q is not found: %q", want, findings)
		}
	}
	if all := strings.Join(findings, "\n"); strings.Contains(all, honest.ID.String()) || !strings.Contains(all, fmt.Sprintf("key %s was taken at km1 by anna 2 times", taken.ID)) {
		t.Errorf("found: %q", findings)
	}
}

// reconciled is what kmectl audit reconcile finds in the log of a site whose other end has
// none: the log is verified first.
func reconciled(t *testing.T, k *KME, fold *auditlog.Sequencer, reader *auditlog.Reader) (findings []string) {
	t.Helper()
	for more := true; more; {
		f, err := fold.Step(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		more = f.More
	}
	logKey, err := audit.ParseLogKey(k.logKeyText(1))
	if err != nil {
		t.Fatal(err)
	}
	account := audit.NewAccount()
	add := func(r audit.Row) error {
		e, err := audit.ParseEvent(r.Body)
		account.Add(e)
		return err
	}
	err = reader.Snapshot(t.Context(), 1, func(l *auditlog.Snapshot) error {
		signed, err := l.Checkpoint(t.Context(), 0)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, logKey)
		if err != nil {
			return err
		}
		if _, err := audit.Verify(t.Context(), logKey, c, 0, audit.Known{}, l); err != nil {
			return err
		}
		return errors.Join(l.Rows(t.Context(), 0, l.Size, add), l.Tail(t.Context(), add))
	})
	if err != nil {
		t.Fatal(err)
	}
	return audit.Reconcile(account, audit.NewAccount())
}
