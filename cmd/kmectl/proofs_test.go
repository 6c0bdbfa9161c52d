package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/audit/audittest"
	"github.com/qutemail/kme/internal/key"
)

// siteLog is the log of a site's origin, whose events are of one node. It is its own source.
type siteLog struct {
	t      *testing.T
	site   string
	signer *audit.LogSigner
	c      audit.Checkpoint
	note   []byte
	rows   []audit.Row
	tiles  map[[2]int64][]byte
	dir    string
}

func newSiteLog(t *testing.T, site string, origin int64, k audittest.Key, begins audit.Head, events ...audit.Event) *siteLog {
	t.Helper()
	signer, err := audit.NewLogSigner(audit.LogName("qutemail.example", site, origin), k)
	if err != nil {
		t.Fatal(err)
	}
	l := &siteLog{t: t, site: site, signer: signer, tiles: make(map[[2]int64][]byte), dir: t.TempDir()}
	var tree audit.Tree
	head := begins
	for i, e := range events {
		e.Site, e.Node, e.Run, e.At = site, site+"-a", 1, time.UnixMilli(int64(i))
		prev := head.Hash
		var body []byte
		body, head = head.Append(nil, &e)
		l.rows = append(l.rows, audit.Row{Leaf: int64(i), Node: e.Node, Seq: head.Seq, Prev: prev[:], Body: body})
		tree.Append(tlog.RecordHash(body))
	}
	for _, tile := range tree.Tiles() {
		l.tiles[[2]int64{int64(tile.Level), tile.N}] = tile.Data
	}
	l.c = audit.Checkpoint{Origin: signer.Name(), Size: tree.Size(), Root: tree.Root()}
	if l.note, err = note.Sign(&note.Note{Text: l.c.Text()}, signer); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *siteLog) Tile(level int, n int64, width int) ([]byte, error) {
	return l.tiles[[2]int64{int64(level), n}][:width*tlog.HashSize], nil
}

func (l *siteLog) Rows(_ context.Context, first, end int64, do func(audit.Row) error) error {
	for _, r := range l.rows[first:end] {
		if err := do(r); err != nil {
			return err
		}
	}
	return nil
}

func (l *siteLog) NodeKeys(context.Context) (map[string]string, error) { return nil, nil }

func (l *siteLog) Tail(context.Context, func(audit.Row) error) error { return nil }

func (l *siteLog) key() string { return l.signer.VerifierKey() }

// bundle writes leaves into a file of the log's archive.
func (l *siteLog) bundle(name string, first, end int64) string {
	l.t.Helper()
	var b bytes.Buffer
	if err := audit.WriteBundle(l.t.Context(), &b, audit.BundleSpec{Key: l.key(), Signed: l.note, Checkpoint: l.c, First: first, End: end}, l); err != nil {
		l.t.Fatal(err)
	}
	path := filepath.Join(l.dir, name)
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		l.t.Fatal(err)
	}
	return path
}

// kmectl runs a command line, and returns all that it has said.
func kmectl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(t.Context(), args, &out, &out)
	return out.String(), err
}

// wants is a command line and what is to come of it.
type wants struct {
	args []string
	says string // part of what it says; of its error, if that is bad
	bad  bool
}

func (w wants) check(t *testing.T) {
	t.Helper()
	out, err := kmectl(t, w.args...)
	if (err != nil) != w.bad || !strings.Contains(out+fmt.Sprint(err), w.says) {
		t.Errorf("kmectl %s: %v\n%s\nwant %q", strings.Join(w.args, " "), err, out, w.says)
	}
}

// Two logs are compared that are what their keys have signed; whose they are is told only by
// keys that somebody was given, and without them it is said that this was not looked at.
func TestReconcileKeys(t *testing.T) {
	t.Parallel()
	id, err := key.ParseID("01a20a35-6080-7d42-a9b0-32f7aade4f11")
	if err != nil {
		t.Fatal(err)
	}
	served := audit.Event{Action: audit.EncKeys, Outcome: audit.Done, Request: "r1", Master: "alice", Slaves: []string{"bob"}, Keys: []key.ID{id}}
	assigned := audit.Event{Action: audit.Assign, Outcome: audit.Done, Master: "alice", Slaves: []string{"bob"}, Keys: []key.ID{id}}
	k1, k2 := audittest.NewKey(t), audittest.NewKey(t)
	km1, km2 := newSiteLog(t, "km1", 1, k1, audit.Head{}, served), newSiteLog(t, "km2", 1, k2, audit.Head{}, assigned)
	a, b := km1.bundle("a.bundle", 0, 1), km2.bundle("b.bundle", 0, 1)
	w, err := audit.NewCosigner("witness.example", audittest.NewKey(t))
	if err != nil {
		t.Fatal(err)
	}
	// Whoever has the whole of a site's database, and not its token, makes a log of his own.
	forged := newSiteLog(t, "km2", 1, audittest.NewKey(t), audit.Head{}, assigned).bundle("forged.bundle", 0, 1)
	unsaid := func(log string, side string) string {
		return fmt.Sprintf("NOT CHECKED: whose log qutemail.example/%s/audit/1 is. It was verified with the key that it names itself: give --vkey-%s", log, side)
	}
	for _, w := range []wants{
		{[]string{a, b}, "km1 and km2 agree", false},
		{[]string{a, b}, unsaid("km1", "a"), false},
		{[]string{a, b}, unsaid("km2", "b"), false},
		{[]string{a, b, "--vkey-a", km1.key()}, unsaid("km2", "b"), false},
		{[]string{a, b, "--vkey-a", km1.key(), "--vkey-b", km2.key()}, "km1 and km2 agree", false},
		{[]string{a, forged}, unsaid("km2", "b"), false},
		{[]string{a, forged, "--vkey-b", km2.key()}, "forged.bundle", true},
		{[]string{a, b, "--vkey-a", km2.key()}, "a.bundle", true},
		{[]string{a, b, "--vkey-a", km1.key(), "--witness-a", w.VerifierKey()}, "witness witness.example has not signed", true},
		{[]string{a, a}, "of one log", true},
		{[]string{a, newSiteLog(t, "km2", 1, k2, audit.Head{}, audit.Event{Action: audit.Alarm}).bundle("less.bundle", 0, 1)}, "1 findings", true},
	} {
		w.args = append([]string{"audit", "reconcile"}, w.args...)
		w.check(t)
	}
	if out, err := kmectl(t, "audit", "reconcile", a, b, "--vkey-a", km1.key(), "--vkey-b", km2.key()); err != nil || strings.Contains(out, "NOT CHECKED") {
		t.Errorf("with both keys: %v\n%s", err, out)
	}
}

// A log whose first days are in bundles is verified from its first event, if the bundles are
// there; none may be missing, none be another's, and each lead to the next. An event in one
// of them is proved without a KME.
func TestVerifyArchive(t *testing.T) {
	t.Parallel()
	k := audittest.NewKey(t)
	events := slices.Repeat([]audit.Event{{Action: audit.Alarm, Outcome: audit.Done}}, 700)
	log := newSiteLog(t, "km1", 1, k, audit.Head{}, events...)
	archived := func(first, last int64, file string) audit.Event {
		return audit.Event{Action: audit.AuditDropped, Outcome: audit.Done, Reason: audit.Archived{
			Day: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC), First: first, Last: last, Log: log.signer.Name(), File: file,
		}.String()}
	}
	log = newSiteLog(t, "km1", 1, k, audit.Head{}, append(events, archived(0, 299, "1.bundle"), archived(300, 599, "2.bundle"))...)
	whole := log.bundle("whole", 600, log.c.Size) // no bundle of the archive by its name
	one, two := log.bundle("1.bundle", 0, 300), log.bundle("2.bundle", 300, 600)
	verify := []string{"audit", "verify", "--offline", whole, "--vkey", log.key(), "--archive", log.dir}
	proof := filepath.Join(t.TempDir(), "proof")
	for _, w := range []wants{
		{verify, "verified: all leaves before 600, in 2 bundles", false},
		{verify[:len(verify)-2], "leaves 300 to 599 of qutemail.example/km1/audit/1 are in 2.bundle", false},
		{[]string{"audit", "prove", "299", "--bundle", one, "--out", proof}, "", false},
		{[]string{"audit", "check", proof, "--vkey", log.key()}, `"seq":300,`, false},
		{[]string{"audit", "prove", "300", "--bundle", one}, "the bundle does not have leaf 300", true},
	} {
		w.check(t)
	}

	// What somebody who has the log's own key puts in the place of an archived day.
	other := slices.Clone(events)
	other[10].Reason = "another"
	forged := newSiteLog(t, "km1", 1, k, audit.Head{}, other...)
	forged.dir = log.dir
	forged.bundle("1.bundle", 0, 300)
	wants{verify, "a witness has seen another event there, or before", true}.check(t)
	log.bundle("1.2.bundle", 0, 300) // and the true one is there, too
	wants{verify, "verified: all leaves before 600, in 2 bundles", false}.check(t)
	for _, name := range []string{one, filepath.Join(log.dir, "1.2.bundle")} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	wants{verify, "leaf 299: no bundle in", true}.check(t)
	log.bundle("1.bundle", 0, 299) // one that ends too early
	wants{verify, "leaf 299: no bundle in", true}.check(t)
	log.bundle("1.bundle", 0, 300)
	if err := os.Remove(two); err != nil {
		t.Fatal(err)
	}
	wants{verify, "leaf 599: no bundle in", true}.check(t)
}

// What became of the days of a log that a recovery has ended is said by the log after it.
func TestVerifyEndedLog(t *testing.T) {
	t.Parallel()
	k := audittest.NewKey(t)
	events := slices.Repeat([]audit.Event{{Action: audit.Alarm, Outcome: audit.Done}}, 10)
	ended := newSiteLog(t, "km1", 1, k, audit.Head{}, events...)
	last := ended.rows[9]
	head, err := audit.Head{Seq: last.Seq - 1, Hash: [32]byte(last.Prev)}.Next(last.Seq, last.Prev, last.Body)
	if err != nil {
		t.Fatal(err)
	}
	dropped := audit.Event{Action: audit.AuditDropped, Outcome: audit.Done, Reason: audit.Archived{
		Day: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC), Last: 9, Log: ended.signer.Name(), File: "1.bundle",
	}.String()}
	recovery := audit.Event{Action: audit.Recover, Outcome: audit.Done, Count: 2}
	later := newSiteLog(t, "km1", 2, k, head, recovery, dropped)
	offline := []string{"audit", "verify", "--offline", ended.bundle("ended", 10, 10), "--vkey", ended.key()}
	says := later.bundle("later", 0, 2)
	unkeyed := newSiteLog(t, "km1", 2, audittest.NewKey(t), head, recovery, dropped).bundle("later", 0, 2)
	for _, w := range []wants{
		{offline, "leaf 9: it is missing, and no event of the log says", true},
		{append(slices.Clone(offline), "--later", says), "no leaves, since all are in bundles, of qutemail.example/km1/audit/1", false},
		{append(slices.Clone(offline), "--later", unkeyed), "is not believed: it has another key", true},
		{append(slices.Clone(offline), "--later", newSiteLog(t, "km1", 2, k, head, recovery).bundle("later", 0, 1)), "leaf 9: it is missing", true},
		{append(slices.Clone(offline), "--later", newSiteLog(t, "km1", 2, k, head, dropped).bundle("later", 0, 1)), "no event of it is of the recovery", true},
		{append(slices.Clone(offline), "--later", says, "--archive", ended.dir), "leaf 9: no bundle in", true},
	} {
		w.check(t)
	}
	ended.bundle("1.bundle", 0, 10)
	wants{append(slices.Clone(offline), "--later", says, "--archive", ended.dir), "verified: all leaves before 10, in 1 bundles", false}.check(t)
}
