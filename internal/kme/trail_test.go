package kme

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/audit/audittest"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
)

// otherLog is the log of a peer, which may say whatever it likes.
type otherLog struct {
	t      *testing.T
	signer *audit.LogSigner
	leaves []tlog.Hash // hashes stored, as tlog has them
	size   int64
}

func newOtherLog(t *testing.T, key audittest.Key, origin int64) *otherLog {
	t.Helper()
	signer, err := audit.NewLogSigner(audit.LogName("qutemail.example", "km2", origin), key)
	if err != nil {
		t.Fatal(err)
	}
	return &otherLog{t: t, signer: signer}
}

// ReadHashes implements tlog.HashReader.
func (l *otherLog) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	hashes := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		hashes[i] = l.leaves[x]
	}
	return hashes, nil
}

func (l *otherLog) add(texts ...string) *otherLog {
	l.t.Helper()
	for _, text := range texts {
		more, err := tlog.StoredHashes(l.size, []byte(text), l)
		if err != nil {
			l.t.Fatal(err)
		}
		l.leaves = append(l.leaves, more...)
		l.size++
	}
	return l
}

func (l *otherLog) fork() *otherLog {
	return &otherLog{t: l.t, signer: l.signer, leaves: append([]tlog.Hash(nil), l.leaves...), size: l.size}
}

// submission is what the log asks its witness, which it believes to have seen old.
func (l *otherLog) submission(old int64) audit.Submission {
	l.t.Helper()
	root, err := tlog.TreeHash(l.size, l)
	if err != nil {
		l.t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: audit.Checkpoint{Origin: l.signer.Name(), Size: l.size, Root: root}.Text()}, l.signer)
	if err != nil {
		l.t.Fatal(err)
	}
	s := audit.Submission{Key: l.signer.VerifierKey(), Old: old, Note: string(signed)}
	if old > 0 && old < l.size {
		if s.Proof, err = tlog.ProveTree(l.size, old, l); err != nil {
			l.t.Fatal(err)
		}
	}
	return s
}

// A witness signs what follows all that it has signed before, once it is kept; what
// does not is an alarm, and the end of deliveries with that peer.
func TestWitness(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.Trail.TrustDomain = "qutemail.example"
	k.trail.witnessKey = audittest.NewKey(t)
	km2, key := kmeID(t, "km2"), audittest.NewKey(t)
	ask := func(sub audit.Submission) (audit.Cosigned, error) {
		return k.PeerDoor().Checkpoint(t.Context(), km2, sub)
	}

	log := newOtherLog(t, key, 1).add("a", "b", "c")
	answer, err := ask(log.submission(0))
	if err != nil || answer.Size != 3 {
		t.Fatalf("the first checkpoint: %+v, %v", answer, err)
	}
	me, err := audit.NewWitness(answer.Witness)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := audit.CheckCosignature(log.submission(0).Note, answer.Line, me); err != nil || c.Size != 3 {
		t.Errorf("its cosignature: %+v, %v", c, err)
	}
	for _, test := range []struct {
		name string
		sub  audit.Submission
		size int64 // that the witness has seen after it
		line bool
	}{
		{"the same again", log.submission(3), 3, true},
		{"one that grew", log.add("d", "e").submission(3), 5, true},
		{"an old size that is wrong", log.add("f").submission(2), 5, false},
		{"and then right", log.submission(5), 6, true},
		{"what is long past", newOtherLog(t, key, 1).add("a", "b").submission(0), 6, false},
		{"the log of a later origin", newOtherLog(t, key, 2).add("x").submission(0), 1, true},
	} {
		answer, err := ask(test.sub)
		if err != nil || answer.Size != test.size || (answer.Line != "") != test.line {
			t.Errorf("%s: %+v, %v", test.name, answer, err)
		}
	}
	if err := k.servingPeer(km2); err != nil {
		t.Fatalf("before any fork: %v", err)
	}
	foreign := newOtherLog(t, key, 1)
	foreign.signer, _ = audit.NewLogSigner("qutemail.example/km3/audit/1", key)
	if _, err := ask(foreign.add("a").submission(0)); problem.KindOf(err) != problem.Invalid {
		t.Errorf("the log of another KME: %v", err)
	}
	for name, sub := range map[string]audit.Submission{
		"another tree of that size": log.fork().add().forge("f2").submission(6),
		"another past":              newOtherLog(t, key, 1).add("a", "b", "c", "d", "e", "F", "g").submission(6),
		"another key":               newOtherLog(t, audittest.NewKey(t), 1).add("a").submission(0),
	} {
		k.trail.peers = nil
		_, err := ask(sub)
		if problem.KindOf(err) != problem.Forbidden {
			t.Errorf("%s: %v", name, err)
		}
		if err := k.servingPeer(km2); problem.KindOf(err) != problem.Unavailable {
			t.Errorf("after %s, keys are shared with the peer: %v", name, err)
		}
		k.Trail.ForkAlarmOnly = true
		if err := k.servingPeer(km2); err != nil {
			t.Errorf("after %s, where that is an alarm only: %v", name, err)
		}
		k.Trail.ForkAlarmOnly = false
	}
	if alarms := k.Alarms(); len(alarms) != 1 || alarms[0].Name != "audit-log-km2" {
		t.Errorf("alarms: %+v", alarms)
	}
}

// Of so many logs of one peer it is kept what was seen, and of no more: a peer that begins one
// after the other fills nobody's database. Those that are known are witnessed as before, and
// so are those of other peers.
func TestWitnessedLogsAreBounded(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.Trail.TrustDomain = "qutemail.example"
	k.trail.witnessKey = audittest.NewKey(t)
	km2, key := kmeID(t, "km2"), audittest.NewKey(t)
	ask := func(sub audit.Submission) problem.Kind {
		t.Helper()
		answer, err := k.PeerDoor().Checkpoint(t.Context(), km2, sub)
		if (err == nil) != (answer.Line != "") {
			t.Errorf("answered %+v, %v", answer, err)
		}
		return problem.KindOf(err)
	}
	first := newOtherLog(t, key, 1).add("a")
	if kind := ask(first.submission(0)); kind != 0 {
		t.Fatalf("the first log: %v", kind)
	}
	s.exec(s.name, fmt.Sprintf(`INSERT INTO kme.audit_witnessed (log, kme, vkey, size, note, at)
		SELECT 'qutemail.example/km2/audit/' || n, kme, vkey, size, note, at FROM kme.audit_witnessed, generate_series(2, %d) n`, maxWitnessedLogs-1))
	if kind := ask(newOtherLog(t, key, 5000).add("a").submission(0)); kind != 0 {
		t.Errorf("the last one that is kept: %v", kind)
	}
	if kind := ask(newOtherLog(t, key, 5001).add("a").submission(0)); kind != problem.Invalid {
		t.Errorf("one more: %v, want it refused", kind)
	}
	if n := s.ask("SELECT count(*) FROM kme.audit_witnessed"); n != maxWitnessedLogs {
		t.Errorf("%d logs are kept, want %d", n, maxWitnessedLogs)
	}
	if kind := ask(first.add("b").submission(1)); kind != 0 {
		t.Errorf("one that is known, and has grown: %v", kind)
	}
	km2, key = kmeID(t, "km3"), audittest.NewKey(t)
	other := newOtherLog(t, key, 1)
	var err error
	if other.signer, err = audit.NewLogSigner(audit.LogName("qutemail.example", "km3", 1), key); err != nil {
		t.Fatal(err)
	}
	if kind := ask(other.add("a").submission(0)); kind != 0 {
		t.Errorf("the log of another peer: %v", kind)
	}
	refused := 0
	for _, ev := range s.audit() {
		if ev.Action == string(audit.Malformed) && strings.Contains(ev.Reason, "has not been recovered so often") {
			refused++
		}
	}
	if refused != 1 {
		t.Errorf("%d refusals are recorded, want 1", refused)
	}
}

// forge replaces the log's last leaf.
func (l *otherLog) forge(text string) *otherLog {
	l.size--
	l.leaves = l.leaves[:tlog.StoredHashCount(l.size)]
	return l.add(text)
}

// trailed is a node whose log is kept: it has a run, keys, a sequencer and a reader.
func (s *site) trailed() (*KME, *auditlog.Sequencer) {
	s.t.Helper()
	k := s.node()
	key := audittest.NewKey(s.t)
	k.trail.logKey, k.trail.witnessKey = key, key
	k.Trail = Trail{TrustDomain: "qutemail.example"}
	var err error
	if k.Trail.Reader, err = auditlog.NewReader(s.t.Context(), s.cluster.DSN(store.AuditorRole, s.name)); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(k.Trail.Reader.Close)
	voucher, err := audit.NewLogSigner(audit.VouchName(k.logName(1)), key)
	if err != nil {
		s.t.Fatal(err)
	}
	ev := k.own(audit.Start)
	if ev.Facts.Key, err = audit.SignNodeKey(voucher, "a", k.Store.Key().Public()); err != nil {
		s.t.Fatal(err)
	}
	k.note(s.t.Context(), ev)
	q, err := auditlog.NewSequencer(auditlog.Config{
		DSN: s.cluster.DSN(store.SequencerRole, s.name), TrustDomain: "qutemail.example", Site: "km1", Key: key, Now: s.now,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(q.Close)
	return k, q
}

// TestTrailLag: an event that nobody folds is an alarm, one after a quiet time is none.
func TestTrailLag(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	look := func(what string, want bool) {
		t.Helper()
		k.watchTrail(t.Context())
		is := slices.ContainsFunc(k.Alarms(), func(a Alarm) bool { return a.Name == "audit-lag" })
		if is != want {
			t.Errorf("%s: alarm %v, want %v", what, is, want)
		}
	}
	k.note(t.Context(), k.own(audit.Alarm))
	for _, what := range []string{"folded", "folded again, after the alarm and its event"} {
		for range 2 { // the alarm's end is an event too
			if _, err := q.Step(t.Context()); err != nil {
				t.Fatal(err)
			}
			look(what, false)
		}
		s.step(time.Minute)
		look("a minute later", false)
		k.note(t.Context(), k.own(audit.Alarm))
		look("and an event", false)
		s.step(lagAlarm + time.Second)
		look("that nobody folds", true)
	}
}

// TestForgedElsewhere: a node stops handing out keys when another sequencer, of another node
// or of none, has found the log forged.
func TestForgedElsewhere(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	k.note(t.Context(), k.own(audit.Alarm))
	if _, err := q.Step(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k.watchTrail(t.Context()); k.trailWell() != nil {
		t.Fatalf("before: %v", k.trailWell())
	}
	s.exec(s.name, "UPDATE kme.audit_log SET forged = 'event 7 of a: the node has not signed it'")
	k.watchTrail(t.Context())
	if err := k.trailWell(); err == nil || !strings.Contains(err.Error(), "event 7 of a") {
		t.Errorf("after: %v", err)
	}
	if !slices.ContainsFunc(k.Alarms(), func(a Alarm) bool { return a.Name == tamperAlarm }) {
		t.Error("no alarm")
	}
}

// Days that are old enough go into bundles; what was in them can still be proved, and
// the log be verified from there on.
func TestRetention(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	k.Trail.Keep, k.Trail.Archive = 7*24*time.Hour, t.TempDir()
	fold := func() {
		t.Helper()
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		for range 5 {
			k.note(t.Context(), k.own(audit.Alarm))
		}
		fold()
		s.step(24 * time.Hour)
	}
	s.step(6 * 24 * time.Hour) // the first two days are older than a week
	if err := k.archiveDays(t.Context()); err != nil {
		t.Fatal(err)
	}
	fold()
	names, err := filepath.Glob(filepath.Join(k.Trail.Archive, "*"))
	if err != nil || len(names) != 2 || filepath.Base(names[0]) != "km1-1-2026-03-01.bundle" {
		t.Fatalf("bundles %q, error %v", names, err)
	}
	key, err := audit.ParseLogKey(k.logKeyText(1))
	if err != nil {
		t.Fatal(err)
	}
	b, f, err := audit.OpenBundleFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, _, _, err := audit.VerifyBundle(t.Context(), key, nil, audit.Known{}, false, b); err != nil || r.Leaves != 6 {
		t.Errorf("the first day's bundle: %+v, %v", r, err)
	}
	p, err := b.Prove(3, key)
	if err != nil {
		t.Fatal(err)
	}
	if e, _, _, err := p.Verify(key); err != nil || e.Seq != 4 {
		t.Errorf("the proof of an event that is in a bundle: %+v, %v", e, err)
	}
	err = k.Trail.Reader.Snapshot(t.Context(), 1, func(l *auditlog.Snapshot) error {
		kept, err := l.Kept(t.Context())
		if err != nil || kept != 11 {
			t.Errorf("kept from leaf %d on, error %v", kept, err)
		}
		signed, err := l.Checkpoint(t.Context(), 0)
		if err != nil {
			return err
		}
		c, _, err := audit.OpenCheckpoint(signed, key)
		if err != nil {
			return err
		}
		var bad *audit.BadLeaf
		if _, err := audit.Verify(t.Context(), key, c, 0, audit.Known{}, l); !errors.As(err, &bad) || bad.Leaf != 0 {
			t.Errorf("the whole log, of which a part is away: %v", err)
		}
		_, err = audit.Verify(t.Context(), key, c, kept, audit.Known{}, l)
		return err
	})
	if err != nil {
		t.Errorf("the rest of the log: %v", err)
	}
	r, _, err := s.wholeLog(k)
	if err != nil || len(r.Archived) != 2 || r.Archived[1].Last != 10 || r.Archived[1].File != "km1-1-2026-03-02.bundle" {
		t.Errorf("the log as an auditor gets it: %+v, %v", r, err)
	}
	// Whoever has the database hides the next day by saying that it was archived, too.
	s.exec(s.name, `INSERT INTO kme.audit_archive SELECT 1, '2026-03-03', 11, 15, 'km1-1-2026-03-03.bundle', sha256 FROM kme.audit_archive LIMIT 1;
		DELETE FROM kme.audit WHERE day = '2026-03-03'`)
	var bad *audit.BadLeaf
	if _, _, err := s.wholeLog(k); !errors.As(err, &bad) || bad.Leaf != 15 {
		t.Errorf("a day was deleted that no event says is archived: %v", err)
	}
}

// recovered has a site's log begin anew, as kmed recover does.
func (s *site) recovered(k *KME, origin int64) {
	s.t.Helper()
	ev := k.own(audit.Recover)
	ev.Count = int(origin)
	k.Store.Witness().Start(origin)
	if err := k.Store.EndRecovery(s.t.Context(), origin, nil, ev); err != nil {
		s.t.Fatal(err)
	}
}

// archiving is a node that keeps events for a week, and records five a day for three days,
// of which the first two are over for more than a week in the end; between is called in the
// middle of the second.
func (s *site) archiving(between func(*KME)) (k *KME, fold func()) {
	s.t.Helper()
	k, q := s.trailed()
	k.Trail.Keep, k.Trail.Archive = 7*24*time.Hour, s.t.TempDir()
	fold = func() {
		s.t.Helper()
		if _, err := q.Step(s.t.Context()); err != nil {
			s.t.Fatal(err)
		}
	}
	for day := range 3 {
		for i := range 5 {
			if day == 1 && i == 2 {
				fold()
				between(k)
			}
			k.note(s.t.Context(), k.own(audit.Alarm))
		}
		fold()
		s.step(24 * time.Hour)
	}
	s.step(6 * 24 * time.Hour)
	return k, fold
}

// bundles are the names in a node's archive.
func (k *KME) bundles(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(k.Trail.Archive, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range names {
		names[i] = filepath.Base(names[i])
	}
	return names
}

// days are those whose events are in the database.
func (s *site) days(k *KME) (days []string) {
	s.t.Helper()
	list, err := k.Trail.Reader.Days(s.t.Context(), s.now().Add(24*time.Hour))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, d := range list {
		days = append(days, fmt.Sprintf("%d %s", d.Origin, d.Day.Format(time.DateOnly)))
	}
	return days
}

// Days of a log that a recovery has ended are archived as those of the present one are, and
// the day of the recovery as one of both; what was in them can still be proved, and each log
// be verified: the present one says where the days of the other went.
func TestRetentionOverRecovery(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, fold := s.archiving(func(k *KME) { s.recovered(k, 2) })
	if err := k.archiveDays(t.Context()); err != nil {
		t.Fatal(err)
	}
	fold()
	if diff := cmp.Diff([]string{"km1-1-2026-03-01.bundle", "km1-1-2026-03-02.bundle", "km1-2-2026-03-02.bundle"}, k.bundles(t)); diff != "" {
		t.Fatalf("bundles (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"2 2026-03-03", "2 2026-03-10"}, s.days(k)); diff != "" {
		t.Errorf("days in the database (-want +got):\n%s", diff)
	}
	if err := k.archiveDays(t.Context()); err != nil || len(k.bundles(t)) != 3 {
		t.Errorf("archived again: %v, %v", k.bundles(t), err)
	}

	// The present log, and the one before: of leaves 0 to 7, all in bundles.
	present, _, err := s.wholeLogOf(k, 2, audit.Known{})
	if err != nil || present.First != 4 || len(present.Archived) != 3 {
		t.Errorf("the present log: %+v, %v", present, err)
	}
	ended, _, err := s.wholeLogOf(k, 1, audit.Known{Archived: present.Archived})
	if err != nil || ended.First != 8 || ended.Leaves != 0 || ended.Tail != 0 {
		t.Errorf("the log before: %+v, %v", ended, err)
	}
	var bad *audit.BadLeaf
	if _, _, err := s.wholeLogOf(k, 1, audit.Known{}); !errors.As(err, &bad) || bad.Leaf != 7 {
		t.Errorf("the log before, of which nobody says where it went: %v", err)
	}

	for _, test := range []struct {
		bundle       string
		origin, leaf int64
		seq          int64
	}{
		{"km1-1-2026-03-01.bundle", 1, 5, 6},
		{"km1-1-2026-03-02.bundle", 1, 6, 7},
		{"km1-2-2026-03-02.bundle", 2, 0, 9},
	} {
		key, err := audit.ParseLogKey(k.logKeyText(test.origin))
		if err != nil {
			t.Fatal(err)
		}
		b, f, err := audit.OpenBundleFile(filepath.Join(k.Trail.Archive, test.bundle))
		if err != nil {
			t.Fatal(err)
		}
		p, err := b.Prove(test.leaf, key)
		if err != nil {
			t.Error(err)
		} else if e, _, _, err := p.Verify(key); err != nil || e.Seq != test.seq {
			t.Errorf("leaf %d of the log of origin %d is event %d, want %d: %v", test.leaf, test.origin, e.Seq, test.seq, err)
		}
		_ = f.Close()
		// And whoever asks the KME is told where it is.
		_, err = k.TrailDoor(k.Trail.Reader).Proof(t.Context(), identity.Caller{}, "rid", test.origin, test.leaf)
		var gone *problem.Error
		if !errors.As(err, &gone) || gone.Kind != problem.Gone || !strings.Contains(gone.Detail, fmt.Sprintf("kmectl audit prove %d --bundle %s", test.leaf, test.bundle)) {
			t.Errorf("leaf %d of the log of origin %d: %v", test.leaf, test.origin, err)
		}
	}
	key, err := audit.ParseLogKey(k.logKeyText(2))
	if err != nil {
		t.Fatal(err)
	}
	p, err := k.TrailDoor(k.Trail.Reader).Proof(t.Context(), identity.Caller{}, "rid", 0, 4)
	if err == nil {
		_, _, _, err = p.Verify(key)
	}
	if err != nil {
		t.Errorf("the proof of an event that is kept: %v", err)
	}
}

// A clock that is set back over midnight leaves the events of a day among those of the day
// before: they are archived together, or not yet.
func TestRetentionClockSetBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.ms.Store(time.Date(2026, 3, 1, 23, 59, 0, 0, time.UTC).UnixMilli())
	k, q := s.trailed()
	k.Trail.Keep, k.Trail.Archive = 7*24*time.Hour, t.TempDir()
	for _, step := range []time.Duration{0, 2 * time.Minute, -2 * time.Minute, 2 * time.Minute} {
		s.step(step)
		k.note(t.Context(), k.own(audit.Alarm))
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.step(7*24*time.Hour + 12*time.Hour) // the first day is older than a week, and not the second
	if err := k.archiveDays(t.Context()); err != nil || len(k.bundles(t)) != 0 {
		t.Fatalf("archived %v: %v", k.bundles(t), err)
	}
	s.step(24 * time.Hour)
	if err := k.archiveDays(t.Context()); err != nil || len(k.bundles(t)) != 2 {
		t.Fatalf("archived %v: %v", k.bundles(t), err)
	}
	if _, err := q.Step(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r, _, err := s.wholeLogOf(k, 1, audit.Known{}); err != nil || r.First != 5 || len(r.Archived) != 2 {
		t.Errorf("the log: %+v, %v", r, err)
	}
}

// A bundle is never written over, unless it is the same: it may have what a restore has
// taken out of the database.
func TestBundleStays(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, _ := s.archiving(func(*KME) {})
	name := filepath.Join(k.Trail.Archive, "km1-1-2026-03-01.bundle")
	if err := os.WriteFile(name, []byte("what it had before"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.exec(s.name, "REVOKE ALL ON FUNCTION kme.drop_audit_days FROM kme_app") // each time it fails in the end
	for range 2 {
		if err := k.archiveDays(t.Context()); err == nil {
			t.Fatal("days were dropped")
		}
		if diff := cmp.Diff([]string{"km1-1-2026-03-01.2.bundle", "km1-1-2026-03-01.bundle"}, k.bundles(t)); diff != "" {
			t.Errorf("bundles (-want +got):\n%s", diff)
		}
	}
	s.exec(s.name, "GRANT EXECUTE ON FUNCTION kme.drop_audit_days TO kme_app")
	if err := k.archiveDays(t.Context()); err != nil || len(k.bundles(t)) != 3 {
		t.Errorf("archived %v: %v", k.bundles(t), err)
	}
	if text, err := os.ReadFile(name); err != nil || string(text) != "what it had before" {
		t.Errorf("the file that was there is now %.40q: %v", text, err)
	}
}

// Nothing is archived, and no more is handed out, if what would be before it is nowhere, or
// is not what was signed: the bundles would be all there is.
func TestRetentionOfForged(t *testing.T) {
	t.Parallel()
	for name, forge := range map[string]string{
		"a day was deleted":   "DELETE FROM kme.audit WHERE day = '2026-03-01'; DELETE FROM kme.audit_range WHERE day = '2026-03-01'",
		"a day is not whole":  "DELETE FROM kme.audit WHERE day = '2026-03-01' AND seq = 3",
		"an event was edited": "UPDATE kme.audit SET body = replace(body, 'alarm', 'start') WHERE day = '2026-03-01' AND seq = 3",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			k, _ := s.archiving(func(*KME) {})
			s.exec(s.name, forge)
			k.retainOnce(t.Context())
			for _, file := range k.bundles(t) {
				if strings.HasSuffix(file, ".bundle") {
					t.Errorf("there is a bundle: %s", file)
				}
			}
			if k.distrusted() == "" || k.trailWell() == nil {
				t.Error("keys are handed out as if nothing was wrong")
			}
		})
	}
}

// The database itself refuses to drop a day that is not over for a week, or one of which an
// event is in no bundle: whoever asks it to.
func TestDropRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, _ := s.archiving(func(*KME) {})
	s.exec(s.name, "INSERT INTO kme.audit SELECT day, node, seq + 900, prev, body, at, sig FROM kme.audit WHERE day = '2026-03-01' AND seq = 3")
	if err := k.archiveDays(t.Context()); err == nil || !strings.Contains(err.Error(), "has 7 events, and the bundles 6 leaves of it") {
		t.Errorf("an event is in no log: %v", err)
	}
	s.exec(s.name, "DELETE FROM kme.audit WHERE seq > 900")
	today := time.Now().UTC().Truncate(24 * time.Hour)
	err := k.Store.DropAuditDays(t.Context(), []store.Archived{{Origin: 1, Day: today, File: "x"}})
	if err == nil || !strings.Contains(err.Error(), "is not over for a week") {
		t.Errorf("today was dropped: %v", err)
	}
	if got := s.days(k); !slices.Contains(got, "1 2026-03-01") {
		t.Errorf("of what was not dropped %q are left", got)
	}
	if err := k.archiveDays(t.Context()); err != nil || len(s.days(k)) != 1 {
		t.Errorf("archived, %q are left: %v", s.days(k), err)
	}
}

// What somebody has changed in the database since it was signed is not sent to those who
// watch over it.
func TestForgedIsNotSent(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	for range 5 {
		k.note(t.Context(), k.own(audit.Alarm))
	}
	if _, err := q.Step(t.Context()); err != nil {
		t.Fatal(err)
	}
	read := func() (n int, err error) {
		_, err = wayOut{k}.Leaves(t.Context(), 0, 0, 100, func(audit.Row) error { n++; return nil })
		return n, err
	}
	if n, err := read(); n != 6 || err != nil || k.distrusted() != "" {
		t.Fatalf("%d leaves: %v; distrusted %q", n, err, k.distrusted())
	}
	s.exec(s.name, "UPDATE kme.audit SET body = replace(body, 'alarm', 'start') WHERE seq = 4")
	if n, err := read(); n != 3 || err == nil || k.distrusted() == "" {
		t.Errorf("%d leaves: %v; distrusted %q", n, err, k.distrusted())
	}
}

// grown folds one event more, and returns the checkpoint with it.
func grown(t *testing.T, k *KME, q *auditlog.Sequencer) store.Signed {
	t.Helper()
	k.note(t.Context(), k.own(audit.Alarm))
	if _, err := q.Step(t.Context()); err != nil {
		t.Fatal(err)
	}
	now, err := k.Store.LastCheckpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// A peer that says that this site's log was forked or rewound must show it: a checkpoint
// that the log has signed and does not follow. Its word alone stops nothing.
func TestAccused(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	fold := func() store.Signed { return grown(t, k, q) }
	first, now := fold(), fold()
	sign := func(key audit.Key, size int64, root tlog.Hash) string {
		t.Helper()
		signer, err := audit.NewLogSigner(k.logName(1), key)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := note.Sign(&note.Note{Text: audit.Checkpoint{Origin: signer.Name(), Size: size, Root: root}.Text()}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return string(signed)
	}
	refuses := func(context.Context, audit.Submission) (audit.Cosigned, error) {
		return audit.Cosigned{}, &peer.Refused{Status: http.StatusForbidden}
	}
	claims := func(context.Context, audit.Submission) (audit.Cosigned, error) { return audit.Cosigned{Size: 99}, nil }
	for _, test := range []struct {
		name  string
		says  func(context.Context, audit.Submission) (audit.Cosigned, error)
		shows []string
		true  bool
	}{
		{"it shows nothing", refuses, nil, false},
		{"it shows what the log follows", refuses, []string{first.Note, now.Note}, false},
		{"it shows what others have signed", refuses, []string{sign(audittest.NewKey(t), 99, tlog.Hash{1})}, false},
		{"it shows no checkpoint", refuses, []string{"?"}, false},
		{"it shows another tree", refuses, []string{first.Note, sign(k.trail.logKey, 2, tlog.Hash{1})}, true},
		{"it shows more", refuses, []string{sign(k.trail.logKey, 99, tlog.Hash{1})}, true},
		{"it claims more, and shows nothing", claims, []string{now.Note}, false},
		{"it claims more, and shows it", claims, []string{sign(k.trail.logKey, 99, tlog.Hash{1})}, true},
	} {
		k.trail.broken, k.trail.chosen = atomic.Value{}, nil
		k.submit(t.Context(), now, cosigner{"km2", test.says, func(context.Context) (audit.Witnessed, error) { return audit.Witnessed{Notes: test.shows}, nil }})
		if is := k.distrusted() != "" && k.trailWell() != nil; is != test.true {
			t.Errorf("%s: distrusted %q", test.name, k.distrusted())
		}
		if told := k.stands("audit-witness-km2"); told == test.true {
			t.Errorf("%s: an alarm about the witness: %v", test.name, told)
		}
		k.clear(t.Context(), "audit-witness-km2")
	}
}

// A checkpoint a minute stands in the daemon's log, which the service manager keeps: whole,
// as the log has signed it.
func TestCheckpointInJournal(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	var journal bytes.Buffer
	k.Log = slog.New(slog.NewJSONHandler(&journal, nil))
	key, err := audit.ParseLogKey(k.logKeyText(1))
	if err != nil {
		t.Fatal(err)
	}
	var p published
	for i, step := range []struct {
		after time.Duration
		size  int64 // of the checkpoint that is told; 0: none is
	}{{0, 2}, {time.Second, 0}, {loudEvery - 2*time.Second, 0}, {time.Second, 5}, {time.Second, 0}} {
		s.step(step.after)
		k.note(t.Context(), k.own(audit.Alarm))
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
		journal.Reset()
		k.publishNew(t.Context(), &p)
		k.publishNew(t.Context(), &p)
		var told []int64
		for line := range strings.Lines(journal.String()) {
			var entry struct {
				Level, Msg, Checkpoint string
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatal(err)
			}
			if entry.Checkpoint == "" {
				continue
			}
			c, _, err := audit.OpenCheckpoint([]byte(entry.Checkpoint), key)
			if err != nil || entry.Level != "INFO" {
				t.Errorf("%s: %v", line, err)
			}
			told = append(told, c.Size)
		}
		if want := []int64{step.size}; step.size == 0 && len(told) > 0 || step.size > 0 && !slices.Equal(told, want) {
			t.Errorf("step %d: checkpoints %v are told, want %d", i, told, step.size)
		}
	}
}

// Whoever watches a log is told when it has ended and he has seen all of it, and not before.
func TestWatchedLogEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	if _, err := q.Step(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.note(t.Context(), k.own(audit.Alarm)) // in no log
	door := k.TrailDoor(k.Trail.Reader)
	look := func(origin, first int64) (int, problem.Kind) {
		t.Helper()
		found, err := door.Search(t.Context(), identity.Caller{}, "rid", admin.Query{Origin: origin, First: first, Limit: 100, Watch: true})
		return len(found.Events), problem.KindOf(err)
	}
	var none problem.Kind
	for _, step := range []struct {
		recovered     bool
		origin, first int64
		found         int
		kind          problem.Kind
	}{
		{false, 1, 0, 1, none},
		{false, 1, 1, 0, none},
		{true, 1, 0, 1, none},
		{true, 1, 1, 0, problem.Gone},
		{true, 2, 0, 0, none},
	} {
		if step.recovered {
			s.exec(s.name, "INSERT INTO kme.audit_log (origin, name, vkey, begun_at) VALUES (2, 'log/2', 'key', now()) ON CONFLICT DO NOTHING")
		}
		if found, kind := look(step.origin, step.first); found != step.found || kind != step.kind {
			t.Errorf("%+v: %d found, %v", step, found, kind)
		}
	}
}

// wholeLog has an auditor get the whole log of a node's site, and verify it.
func (s *site) wholeLog(k *KME, witnesses ...audit.Witness) (r audit.Report, cosigned []string, err error) {
	s.t.Helper()
	return s.wholeLogOf(k, 1, audit.Known{}, witnesses...)
}

// wholeLogOf is wholeLog of an origin, of which something is known from elsewhere.
func (s *site) wholeLogOf(k *KME, origin int64, known audit.Known, witnesses ...audit.Witness) (r audit.Report, cosigned []string, err error) {
	s.t.Helper()
	key, err := audit.ParseLogKey(k.logKeyText(origin))
	if err != nil {
		s.t.Fatal(err)
	}
	var text bytes.Buffer
	err = k.TrailDoor(k.Trail.Reader).Bundle(s.t.Context(), identity.Caller{}, "rid", origin, 0, 0, func() io.Writer { return &text })
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := audit.OpenBundle(bytes.NewReader(text.Bytes()))
	if err != nil {
		s.t.Fatal(err)
	}
	r, _, cosigned, err = audit.VerifyBundle(s.t.Context(), key, witnesses, known, true, b)
	return r, cosigned, err
}

// A day stays in the database until every sink has been sent the last of its leaves,
// however little a sink is behind.
func TestArchiveWaitsForSinks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	k.Trail.Keep, k.Trail.Archive = 7*24*time.Hour, t.TempDir()
	for range 3 { // days of leaves 0 to 5, 6 to 10 and 11 to 15
		for range 5 {
			k.note(t.Context(), k.own(audit.Alarm))
		}
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.step(24 * time.Hour)
	}
	s.step(6 * 24 * time.Hour) // the first two days are older than a week
	k.sinks = []*siem.Forwarder{siem.New(siem.Config{Name: "soc"}), siem.New(siem.Config{Name: "other"})}
	for _, step := range []struct {
		soc, other store.Cursor // of origin 0: it has been sent nothing
		days       int          // in bundles, and not in the database
		behind     string       // the sink that keeps the rest; "" if nothing is left to be archived
	}{
		{store.Cursor{}, store.Cursor{}, 0, "soc"},
		{store.Cursor{Origin: 1}, store.Cursor{Origin: 1, Next: 16}, 0, "soc"},
		{store.Cursor{Origin: 1, Next: 3}, store.Cursor{Origin: 1, Next: 16}, 0, "soc"},
		{store.Cursor{Origin: 1, Next: 5}, store.Cursor{Origin: 1, Next: 16}, 0, "soc"},
		{store.Cursor{Origin: 1, Next: 16}, store.Cursor{Origin: 1, Next: 5}, 0, "other"},
		{store.Cursor{Origin: 1, Next: 16}, store.Cursor{}, 0, "other"},
		{store.Cursor{Origin: 1, Next: 6}, store.Cursor{Origin: 1, Next: 16}, 1, "soc"},
		{store.Cursor{Origin: 1, Next: 10}, store.Cursor{Origin: 1, Next: 10}, 1, "soc"},
		{store.Cursor{Origin: 1, Next: 11}, store.Cursor{Origin: 1, Next: 11}, 2, ""},
	} {
		for name, c := range map[string]store.Cursor{"soc": step.soc, "other": step.other} {
			if err := k.Store.MoveCursor(t.Context(), name, c); err != nil {
				t.Fatal(err)
			}
		}
		err := k.archiveDays(t.Context())
		if (err == nil) != (step.behind == "") || err != nil && !strings.Contains(err.Error(), "sink "+step.behind+" ") {
			t.Errorf("soc at %v, other at %v: %v, want that %q is behind", step.soc, step.other, err, step.behind)
		}
		bundles, err := filepath.Glob(filepath.Join(k.Trail.Archive, "*.bundle"))
		if err != nil || len(bundles) != step.days {
			t.Errorf("soc at %v, other at %v: bundles %q, want %d; error %v", step.soc, step.other, bundles, step.days, err)
		}
		// What a sink has not been sent can still be read for it.
		for _, c := range []store.Cursor{step.soc, step.other} {
			n := 0
			_, _, err := k.Trail.Reader.Leaves(t.Context(), k.logKeyOf, 1, c.Next, 100, func(audit.Row) error { n++; return nil })
			if err != nil || int64(n) < 16-c.Next {
				t.Errorf("a sink at %v is sent %d leaves: %v", c, n, err)
			}
		}
	}
}

// A third party's witness that speaks C2SP tlog-witness is asked, told of growth, and
// believed when it finds a fork.
func TestOtherWitness(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	key := audittest.NewKey(t)
	me, err := audit.NewCosigner("witness.example", key)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := audit.NewWitness(me.VerifierKey())
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.ParseLogKey(k.logKeyText(1))
	if err != nil {
		t.Fatal(err)
	}
	var seen audit.Checkpoint
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		head, signed, _ := strings.Cut(string(body), "\n\n")
		lines := strings.Split(head, "\n")
		c, _, err := audit.OpenCheckpoint([]byte(signed), log)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		if lines[0] != fmt.Sprintf("old %d", seen.Size) {
			w.Header().Set("Content-Type", "text/x.tlog.size")
			w.WriteHeader(http.StatusConflict)
			fmt.Fprintf(w, "%d\n", seen.Size)
			return
		}
		var proof tlog.TreeProof
		for _, line := range lines[1:] {
			h, err := base64.StdEncoding.DecodeString(line)
			if err != nil {
				t.Error(err)
				return
			}
			proof = append(proof, tlog.Hash(h))
		}
		if err := audit.CheckGrowth(seen, c, proof); err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		line, err := me.Cosign(r.Context(), c, time.Now())
		if err != nil {
			t.Error(err)
		}
		seen = c
		_, _ = io.WriteString(w, line)
	}))
	defer server.Close()
	other := OtherWitness{URL: server.URL, Key: pub}
	publish := func() store.Signed {
		t.Helper()
		now := grown(t, k, q)
		k.submit(t.Context(), now, cosigner{name: "witness.example", add: other.add})
		return now
	}
	publish()
	now := publish()
	k.trail.chosen = nil // as after a restart
	now = publish()
	err = k.Trail.Reader.Snapshot(t.Context(), 1, func(l *auditlog.Snapshot) error {
		signed, err := l.Checkpoint(t.Context(), now.Size)
		if err != nil {
			return err
		}
		_, names, err := audit.OpenCheckpoint(signed, log, pub)
		if len(names) != 1 || names[0] != "witness.example" {
			t.Errorf("cosigned by %q", names)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// The witness has mostly not seen the very last checkpoint yet. Whoever asks for its
	// signature gets it all the same, on the one before.
	for range 2 {
		k.note(t.Context(), k.own(audit.Alarm))
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if r, names, err := s.wholeLog(k, pub); err != nil || len(names) != 1 || r.Cosigned != now.Size || r.Leaves <= now.Size {
		t.Errorf("the whole log: %+v, signed by %q, error %v", r, names, err)
	}
	proof, err := k.TrailDoor(k.Trail.Reader).Proof(t.Context(), identity.Caller{}, "rid", 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, c, names, err := proof.Verify(log, pub); err != nil || len(names) != 1 || c.Size != now.Size {
		t.Errorf("the proof of a leaf: by %+v, signed by %q, error %v", c, names, err)
	}
	seen.Root[0] ^= 1
	publish()
	if why := k.distrusted(); why == "" || k.trailWell() == nil {
		t.Errorf("a witness that has seen another tree: distrusted %q", why)
	}
}

// TestStaleCheckpoint: a checkpoint that the database shows, and does not prove to have, as
// an old primary does not, is shown to nobody, and nothing is held against the log for it.
func TestStaleCheckpoint(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, q := s.trailed()
	fold := func() {
		t.Helper()
		k.note(t.Context(), k.own(audit.Alarm))
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	prove := func(can bool) {
		const function = "EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text)"
		if can {
			s.exec(s.name, "GRANT "+function+" TO PUBLIC")
		} else {
			s.exec(s.name, "REVOKE "+function+" FROM PUBLIC")
		}
	}
	var p published
	published := func(want int) {
		t.Helper()
		k.publishNew(t.Context(), &p)
		text, err := os.ReadFile(filepath.Join(s.data, "checkpoints", "2026-03-01"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), "qutemail.example/km1/audit/1\n"); n != want {
			t.Errorf("%d checkpoints were given out, want %d:\n%s", n, want, text)
		}
	}
	trusted := func(want bool) {
		t.Helper()
		if why := k.distrusted(); (why == "") != want {
			t.Errorf("distrusted: %q", why)
		}
	}
	fold()
	prove(false)
	published(0)
	prove(true)
	published(1)
	first := p.last
	fold()
	published(2)
	last := p.last

	prove(false)
	published(2) // what was proven before is not asked about again
	fold()
	published(2)
	if p.last != last {
		t.Errorf("%d leaves count as given out, want %d", p.last.Size, last.Size)
	}
	s.change("UPDATE audit_log SET size = $1", first.Size) // as an old primary has it
	published(2)
	k.judgeRewound(t.Context(), last, cosigner{name: "witness.example"}, last.Size)
	trusted(true)
	prove(true)
	s.change("UPDATE audit_log SET size = $1", last.Size)
	k.judgeRewound(t.Context(), last, cosigner{name: "witness.example"}, last.Size)
	published(2)
	trusted(true)

	s.change("UPDATE audit_log SET size = $1", first.Size) // and now it was cut
	k.judgeRewound(t.Context(), last, cosigner{name: "witness.example"}, last.Size)
	trusted(false)
	k.trail.broken = atomic.Value{}
	published(2)
	trusted(false)
}

// The checkpoints of a day are in a file, each whole.
func TestCheckpointFile(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, _ := s.trailed()
	for _, text := range []string{"one\n\n— a b\n", "two\n\n— a c\n"} {
		if err := k.keepCheckpoint(text); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(filepath.Join(s.data, "checkpoints", "2026-03-01"))
	if want := "one\n\n— a b\n\ntwo\n\n— a c\n\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}
