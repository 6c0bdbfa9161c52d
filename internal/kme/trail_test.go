package kme

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
)

// softKey is the key of a log or a witness whose token is this test.
type softKey struct{ ed25519.PrivateKey }

func newSoftKey(t testing.TB) softKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return softKey{private}
}

func (k softKey) Public() ed25519.PublicKey { return k.PrivateKey.Public().(ed25519.PublicKey) }

func (k softKey) Sign(_ context.Context, message []byte) ([]byte, error) {
	return ed25519.Sign(k.PrivateKey, message), nil
}

// otherLog is the log of a peer, which may say whatever it likes.
type otherLog struct {
	t      *testing.T
	signer *audit.LogSigner
	leaves []tlog.Hash // hashes stored, as tlog has them
	size   int64
}

func newOtherLog(t *testing.T, key softKey, origin int64) *otherLog {
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
	k.trail.witnessKey = newSoftKey(t)
	km2, key := kmeID(t, "km2"), newSoftKey(t)
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
		"another key":               newOtherLog(t, newSoftKey(t), 1).add("a").submission(0),
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
	key := newSoftKey(s.t)
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
	key, err := audit.ParseLogKey(k.logKeyText(1))
	if err != nil {
		s.t.Fatal(err)
	}
	var text bytes.Buffer
	err = k.TrailDoor(k.Trail.Reader).Bundle(s.t.Context(), identity.Caller{}, "rid", 0, 0, 0, func() io.Writer { return &text })
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := audit.OpenBundle(bytes.NewReader(text.Bytes()))
	if err != nil {
		s.t.Fatal(err)
	}
	r, _, cosigned, err = audit.VerifyBundle(s.t.Context(), key, witnesses, audit.Known{}, true, b)
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
			_, _, err := k.Trail.Reader.Leaves(t.Context(), 1, c.Next, 100, func(audit.Row) error { n++; return nil })
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
	key := newSoftKey(t)
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
		k.note(t.Context(), k.own(audit.Alarm))
		if _, err := q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
		now, err := k.Store.LastCheckpoint(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		k.submit(t.Context(), "witness.example", now, other.add)
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
	proof, err := k.TrailDoor(k.Trail.Reader).Proof(t.Context(), identity.Caller{}, "rid", 1)
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
	k.judgeRewound(t.Context(), "witness.example", last, last.Size)
	trusted(true)
	prove(true)
	s.change("UPDATE audit_log SET size = $1", last.Size)
	k.judgeRewound(t.Context(), "witness.example", last, last.Size)
	published(2)
	trusted(true)

	s.change("UPDATE audit_log SET size = $1", first.Size) // and now it was cut
	k.judgeRewound(t.Context(), "witness.example", last, last.Size)
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
