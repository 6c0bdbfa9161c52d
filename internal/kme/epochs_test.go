package kme

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/hsm/hsmtest"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

func names2(t *testing.T, ids ...string) (saes []identity.SAE) {
	for _, id := range ids {
		saes = append(saes, saeID(t, id))
	}
	return saes
}

// blob is a row of a backup.
type blob struct {
	id      key.ID
	kek     int64
	iv, ct  []byte
	expires time.Time
}

// TestEndOfEpoch: what was delivered in an epoch cannot be opened when the epoch has
// ended, by nobody: not with the database as it was when the keys waited (a base backup
// and the WAL since, restored into another Postgres), the token and its PIN, and not by
// any node. With a copy of the token of that time it can, which shows that the blobs are
// those.
func TestEndOfEpoch(t *testing.T) {
	t.Parallel()
	s := newSiteApart(t)
	base := s.baseBackup()
	dir := tokenDir(t)
	nodes := []*KME{s.withToken(dir)}
	nodes = append(nodes, s.beside(nodes[0], "b"))
	var stop []func()
	secrets := make(map[string]bool)
	var ids []key.ID
	for _, k := range nodes {
		stop = append(stop, run(t, k))
		keys, err := get(t, k, 2, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		for _, served := range keys {
			ids = append(ids, served.ID)
			secrets[string(served.Material.Reveal())] = true
		}
	}
	rows := s.backup() // anna has not taken her keys yet
	s.exec(s.name, "SELECT pg_create_restore_point('keys wait')")
	oldToken := t.TempDir()
	if err := errors.Join(os.CopyFS(oldToken, os.DirFS(dir)), os.Chmod(filepath.Join(oldToken, "pin"), 0o600)); err != nil {
		t.Fatal(err)
	}
	k := nodes[0]
	if _, err := takes(t, k, ids[0]); err != nil {
		t.Fatal(err)
	}
	expiry := key.EpochAt(s.now().Add(time.Hour), time.Hour)
	epochs, err := k.Store.Epochs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(epochs, func(e store.Epoch) bool { return e.Epoch == expiry })
	kek := epochs[i].KEKs[0].KEK
	var copies []*hsm.KEK // what each node has in its hands
	for _, k := range nodes {
		open, ok := k.keks.snapshot.Load(kek.ID)
		if !ok {
			t.Fatalf("node %s has no copy of the KEK that it has sealed under", k.Config.Node)
		}
		copies = append(copies, open.(*hsm.KEK))
	}

	for range 3 { // the other keys expire by themselves
		s.step(time.Hour)
		k.expire(t.Context())
	}
	eventually(t, "the epoch to be dropped", func() bool { _, ok := states(t, k)[expiry]; return !ok })
	for i, k := range nodes {
		for _, id := range ids {
			if _, err := takes(t, k, id); problem.KindOf(err) != problem.Invalid {
				t.Errorf("taking what has gone with its epoch from node %s: %v, want that it is not found", k.Config.Node, err)
			}
		}
		if _, err := k.keks.byID(t.Context(), kek.ID); !errors.Is(err, hsm.ErrNoKEK) {
			t.Errorf("node %s still has the KEK, or: %v", k.Config.Node, err)
		}
		for _, b := range rows {
			if _, err := copies[i].Unwrap(t.Context(), [12]byte(b.iv), b.ct, b.aad(t)); !errors.Is(err, hsm.ErrNoKEK) {
				t.Errorf("node %s opens blobs with what it had in its hands, or: %v", k.Config.Node, err)
			}
		}
	}
	var steps []string
	for _, ev := range s.audit() {
		for _, a := range []audit.Action{audit.EpochSealed, audit.EpochDraining, audit.CopyClosed, audit.KEKGone, audit.EpochDropped} {
			if ev.Action == string(a) && strings.Contains(ev.Reason, fmt.Sprint("epoch ", expiry)) {
				steps = append(steps, ev.Action)
			}
		}
	}
	slices.Sort(steps) // those of two nodes: audit tells a's first
	if want := "epoch-draining epoch-dropped epoch-sealed kek-copy-closed kek-copy-closed kek-destroyed"; strings.Join(steps, " ") != want {
		t.Errorf("recorded: %s, want %s", steps, want)
	}
	for _, stop := range stop {
		stop()
	}
	_ = k.Token.Close()

	if n := len(s.backup()); n > 0 {
		t.Errorf("%d blobs are left in the database", n)
	}
	restored := s.restored(base, "keys wait")
	if diff := cmp.Diff(rows, restored.backup(), cmp.AllowUnexported(blob{})); diff != "" || len(rows) != len(ids) {
		t.Errorf("%d blobs were there, and otherwise restored (-was +restored):\n%s", len(rows), diff)
	}
	rows = restored.backup()
	if opened, objects := openAll(t, dir, rows); len(opened) > 0 || objects == 0 {
		t.Errorf("%d of the blobs in the backup were opened with the %d objects of the token", len(opened), objects)
	}
	opened, _ := openAll(t, oldToken, rows)
	for _, plain := range opened {
		delete(secrets, string(plain))
	}
	if len(opened) != len(ids) || len(secrets) > 0 {
		t.Errorf("with a copy of the token from before, %d of %d blobs were opened, and %d are other keys", len(opened), len(ids), len(secrets))
	}
}

// aad is what a blob was sealed with: whoever has the row knows it.
func (b blob) aad(t testing.TB) []byte {
	return DueAAD(nil, kmeID(t, "km1"), store.Due{
		KEK: b.kek, Key: b.id, Master: saeID(t, "alice"), SAE: saeID(t, "anna"), Bits: 256, Provenance: key.LocalRNG, ExpiresAt: b.expires, Version: dueVersion,
	})
}

// backup reads the blobs that wait to be taken, as whoever has a copy of the database can.
func (s *site) backup() (rows []blob) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	found, _ := conn.Query(s.t.Context(), "SELECT key_id, kek, iv, ct, expires_at FROM kme.due WHERE ct IS NOT NULL ORDER BY key_id")
	rows, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (b blob, err error) {
		return b, row.Scan((*[16]byte)(&b.id), &b.kek, &b.iv, &b.ct, &b.expires)
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return rows
}

// until calls do every so often, until ctx ends.
func until(ctx context.Context, every time.Duration, do func()) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for ctx.Err() == nil {
		do()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// TestRotation: an epoch a second, and KEKs that are replaced every few dozen blobs:
// whoever asks for keys and takes them notices nothing, and no blob is left under a KEK
// that is gone.
func TestRotation(t *testing.T) {
	t.Parallel()
	const seconds = 6
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir, func(c *Config) { c.MaxWraps = 60 })
	stop := run(t, k)
	began := key.EpochAt(s.now(), time.Hour)
	over, cancel := context.WithCancel(t.Context())
	defer cancel()
	var served atomic.Int64
	var all sync.WaitGroup
	all.Go(func() { // sixty minutes a second, on a machine that has the time
		minutes := 0
		until(over, time.Second/60, func() {
			s.step(time.Minute)
			if minutes++; minutes >= seconds*60 && (served.Load() >= 100 || t.Failed()) {
				cancel()
			}
		})
	})
	all.Go(func() {
		until(over, time.Second/10, func() { k.expire(t.Context()) })
	})
	for range 4 {
		all.Go(func() {
			for over.Err() == nil {
				keys, err := get(t, k, 4, 3*time.Hour)
				if err != nil {
					t.Errorf("getting keys: %v", err)
					return
				}
				taken, err := takes(t, k, keys[0].ID, keys[1].ID, keys[2].ID, keys[3].ID)
				if err != nil {
					t.Errorf("taking keys: %v", err)
					return
				}
				for i := range taken {
					if !bytes.Equal(taken[i].material.Reveal(), keys[i].Material.Reveal()) {
						t.Errorf("key %s is another one", keys[i].ID)
					}
				}
				served.Add(4)
			}
		})
	}
	all.Wait()
	ended := key.EpochAt(s.now(), time.Hour)
	gone := ended - 2
	if _, held := states(t, k)[ended]; !held {
		t.Errorf("the present epoch %d is not there", ended)
	}
	eventually(t, "the epochs to be dropped", func() bool {
		k.expire(t.Context())
		for e := range states(t, k) {
			if e < gone {
				return false
			}
		}
		return true
	})
	stop()
	made, destroyed := 0, 0
	for _, ev := range s.audit() {
		switch {
		case ev.Action == string(audit.KEKMade):
			made++
		case ev.Action == string(audit.KEKGone):
			destroyed++
		case ev.Action == string(audit.Alarm) && (strings.HasPrefix(ev.Reason, "kek") || strings.HasPrefix(ev.Reason, "epoch") || strings.HasPrefix(ev.Reason, "hsm:")):
			t.Errorf("alarm: %+v", ev)
		}
	}
	epochs := int(ended - began)
	if epochs < seconds-1 || destroyed < epochs-2 || made <= epochs {
		t.Errorf("%d keys in %d epochs, %d KEKs made and %d destroyed", served.Load(), epochs, made, destroyed)
	}
	t.Logf("%d keys in %d epochs, %d KEKs made and %d destroyed", served.Load(), epochs, made, destroyed)
	if n := s.ask("SELECT count(*) FROM kme.due d JOIN kme.kek k ON k.id = d.kek WHERE d.ct IS NOT NULL AND k.state = 'destroyed'"); n != 0 {
		t.Errorf("%d blobs are left under KEKs that are gone", n)
	}
	if n := s.ask("SELECT max(wraps) FROM kme.kek"); n < 60 {
		t.Errorf("no KEK has sealed more than %d times: none was replaced for that", n)
	}
}

// ask runs a query of one number.
func (s *site) ask(sql string) (n int64) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(s.t.Context(), sql).Scan(&n); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// TestPrepare: the KEKs that blocks and keys of the default lifetime will need next are
// there before, and those of the epochs in between are not, however many they are.
func TestPrepare(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t), func(c *Config) { c.DefaultTTL = 12 * time.Hour })
	stand(t, k)
	want := make(map[key.Epoch]store.EpochState)
	for _, need := range []time.Duration{0, k.DefaultTTL} {
		from := s.now().Add(need)
		for e := key.EpochAt(from, time.Hour); e <= key.EpochAt(from.Add(aheadOfNeed), time.Hour)+1; e++ {
			want[e] = store.EpochOpen
		}
	}
	if diff := cmp.Diff(want, states(t, k)); diff != "" || len(want) < 4 {
		t.Errorf("epochs (-want +got):\n%s", diff)
	}
	made := s.ask("SELECT count(*) FROM kme.kek")
	if _, err := get(t, k, 1, 0); err != nil {
		t.Fatal(err)
	}
	if n := s.ask("SELECT count(*) FROM kme.kek"); n != made {
		t.Errorf("%d KEKs, and %d were made before: a request waited for one", n, made)
	}
}

// TestStuckEpoch: an epoch with a key that nobody can end holds up no later one for longer
// than it should have ended itself: from then on it is an alarm, and theirs end.
func TestStuckEpoch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	n := newEnding(k)
	stuck := key.EpochAt(s.now(), time.Hour)
	s.exec(s.name, fmt.Sprintf("INSERT INTO kme.key (id, chunk, index, kek, iv, ct) SELECT '%s', 0, 0, min(id), '', '' FROM kme.kek", key.MinID(stuck.Start(time.Hour))))
	until := func(what string, want map[key.Epoch]store.EpochState) (last error) {
		t.Helper()
		eventually(t, what, func() bool { // a step that does not get its locks at once is taken next time
			last = n.advance(t.Context())
			k.tendEpochs(t.Context()) // the node gives up its copies
			got := states(t, k)
			for e, state := range want {
				if got[e] != state {
					return false
				}
			}
			return true
		})
		return errors.Join(last, n.advance(t.Context()))
	}
	s.step(3 * time.Hour)
	inOrder := map[key.Epoch]store.EpochState{stuck: store.EpochSealed, stuck + 1: store.EpochSealed}
	if err := until("both to be sealed", inOrder); err != nil {
		t.Errorf("in order: %v", err)
	}
	if got := states(t, k); got[stuck+1] != store.EpochSealed {
		t.Errorf("the second is %s before the first is late", got[stuck+1])
	}
	s.step(k.unrecoverableAfter() - 3*time.Hour)
	err := until("the second to end", map[key.Epoch]store.EpochState{stuck: store.EpochSealed, stuck + 1: ""})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("epoch %d, of ", stuck)) || strings.Contains(err.Error(), fmt.Sprint("epoch ", stuck+1)) {
		t.Errorf("when one is late: %v", err)
	}
	s.exec(s.name, "DELETE FROM kme.key")
	if n.tried[stuck].IsZero() {
		t.Error("it is not known when the one that is late was looked through")
	}
	n.tried[stuck] = time.Now()
	if _ = n.advance(t.Context()); states(t, k)[stuck] != store.EpochSealed {
		t.Error("one that is late is looked through again at once")
	}
	clear(n.tried) // a minute passes
	_ = until("the first to end", map[key.Epoch]store.EpochState{stuck: ""})
	if err := n.advance(t.Context()); err != nil {
		t.Errorf("when nothing is late any more: %v", err)
	}
}

// TestDeposedCopies: a node that shows no sign of life any more, and has nothing but copies
// of KEKs that are to be destroyed, holds up the end of no epoch; and that its run was ended
// stands in the audit, though no peer is asked about it.
func TestDeposedCopies(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.withToken(tokenDir(t))
	b := s.beside(a, "b")
	for _, k := range []*KME{a, b} {
		stand(t, k)
	}
	over, n := key.EpochAt(s.now(), time.Hour), newEnding(a)
	if _, err := b.keks.forEpoch(t.Context(), over); err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		if err := a.lookAround(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.step(3 * time.Hour)
	if err := b.Store.Beat(t.Context()); err != nil {
		t.Fatal(err)
	}
	look()
	for range 2 {
		if err := n.advance(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.tendEpochs(t.Context()) // gives up its own copy
	}
	if got := states(t, a)[over]; got != store.EpochDraining {
		t.Fatalf("the epoch is %s while the other node lives", got)
	}
	if err := b.Store.Stop(t.Context(), nil, false); err != nil { // as if it had shown nothing for long, with its copies
		t.Fatal(err)
	}
	look()
	eventually(t, "the epoch to be dropped", func() bool { // a step that does not get its locks at once is taken next time
		if err := n.advance(t.Context()); err != nil {
			t.Log(err)
		}
		_, there := states(t, a)[over]
		return !there
	})
	var took []string
	for _, ev := range s.audit() {
		if ev.Action == string(audit.Takeover) {
			took = append(took, ev.Reason)
		}
	}
	want := []string{"run 1 of b is ended: the node shows no sign of life, and it has copies of KEKs that are to be destroyed"}
	if diff := cmp.Diff(want, took); diff != "" {
		t.Errorf("takeovers that are recorded (-want +got):\n%s", diff)
	}
}

// TestStrays: keys of the token that the register does not know are an alarm: a copy of
// a KEK under another label above all, which would open what the KEK had sealed when
// that is destroyed. What a process has left that died while it made a KEK is cleared
// away, and no alarm.
func TestStrays(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	if err := k.beginRun(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := k.keks.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := newEnding(k)
	alarms := func() (names string) {
		t.Helper()
		if err := n.check(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, a := range k.Alarms() {
			names += a.Name + " "
		}
		return names
	}
	if got := alarms(); got != "" {
		t.Errorf("alarms of a token that is as it should be: %s", got)
	}
	e := key.EpochAt(s.now(), time.Hour)
	if _, err := k.Store.PlanKEK(t.Context(), e, "never made"); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Store.PlanKEK(t.Context(), e, "made and not registered"); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Token.NewKEK(t.Context(), "made and not registered"); err != nil {
		t.Fatal(err)
	}
	if got := alarms(); got != "" {
		t.Errorf("alarms of what a dead process has left: %s", got)
	}
	if n := s.ask("SELECT count(*) FROM kme.kek WHERE state = 'planned'"); n != 0 {
		t.Errorf("%d plans are left", n)
	}

	// The module was at it when nobody waited for it any more, and comes back now.
	if _, err := k.Token.NewKEK(t.Context(), "never made"); err != nil {
		t.Fatal(err)
	}
	if got := alarms(); got != "" {
		t.Errorf("alarms of what was made for a plan that was given up: %s", got)
	}
	if list, err := k.Token.ListKEKs(t.Context()); err != nil || slices.ContainsFunc(list, func(info hsm.KeyStatus) bool { return strings.Contains(info.Label, "made") }) {
		t.Errorf("it is still in the token: %v, %v", list, err)
	}
	gone := 0
	for _, ev := range s.audit() {
		if ev.Action == string(audit.KEKGone) && strings.HasSuffix(ev.Reason, "it was never used") && strings.Contains(ev.Reason, "made") {
			gone++
		}
	}
	if gone != 2 {
		t.Errorf("%d keys that were never used are recorded as destroyed, want 2", gone)
	}

	o, _ := k.keks.current.Load(e)
	kek := o.(openKEK).kek.Info()
	copied := copyInToken(t, kek, "innocent")
	if got := alarms(); got != "kek-unknown " {
		t.Errorf("alarms with a copy of a KEK: %q", got)
	}
	if text := k.Alarms()[0].Text; !strings.Contains(text, "innocent") || !strings.Contains(text, fmt.Sprintf("check value of KEK %d", o.(openKEK).id)) {
		t.Errorf("the alarm does not say what it is: %s", text)
	}
	if err := k.Token.DestroyKEK(t.Context(), hsm.KEKInfo{Label: "innocent", ID: copied, CheckValue: kek.CheckValue}); err != nil {
		t.Fatal(err)
	}
	copyInToken(t, kek, kek.Label)
	if got := alarms(); got != "kek-doubled " && got != "kek-unknown " {
		t.Errorf("alarms with two objects of one KEK: %q", got)
	}
	for _, ev := range s.audit() {
		if ev.Action == string(audit.Alarm) && strings.Contains(ev.Reason, "innocent") && ev.Outcome == string(audit.Failed) {
			return
		}
	}
	t.Error("the copy is not in the audit")
}

// TestRotationByWraps: a KEK that has sealed enough is replaced within its epoch, again
// and again, and nobody waits for that: until the other one is there, which is held up
// here, it seals on.
func TestRotationByWraps(t *testing.T) {
	t.Parallel()
	const most = 20
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir, func(c *Config) { c.MaxWraps = most })
	stand(t, k)
	var held []etsi014.Key
	serve := func(keys int) {
		t.Helper()
		for range keys {
			got, err := get(t, k, 1, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, got...)
		}
	}
	sealers := func(want int64) {
		t.Helper()
		if n := s.ask("SELECT count(DISTINCT kek) FROM kme.due"); n != want {
			t.Errorf("after %d keys: %d KEKs have sealed, want %d", len(held), n, want)
		}
	}

	release, holding := make(chan struct{}), make(chan struct{})
	var busy sync.WaitGroup
	busy.Go(func() {
		err := k.Store.Alone(t.Context(), tokenWriters, func(context.Context) error {
			close(holding)
			<-release
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	<-holding
	serve(most)
	busy.Go(func() { k.tendEpochs(t.Context()) })
	eventually(t, "another KEK to be wanted", func() bool {
		return s.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())") == 1
	})
	serve(most)
	sealers(1)
	close(release)
	busy.Wait()
	serve(1)
	sealers(2)
	for range 3 { // and so on
		k.tendEpochs(t.Context()) // there is nothing to be done
		serve(most)
		k.tendEpochs(t.Context())
	}
	serve(1)
	sealers(5)
	if n := s.ask("SELECT count(*) FROM kme.kek WHERE state = 'open' AND epoch = (SELECT max(expiry_epoch) FROM kme.due)"); n != 1 {
		t.Errorf("%d KEKs of the epoch are to seal, want 1", n)
	}
	for _, served := range held { // whichever KEK has sealed it
		got, err := takes(t, k, served.ID)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[0].material.Reveal(), served.Material.Reveal()) {
			t.Errorf("key %s is another one", served.ID)
		}
	}
	if alarms := k.Alarms(); len(alarms) != 0 {
		t.Errorf("alarms: %v", alarms)
	}
}

// TestWaitForKEK: while a KEK is made or opened, which takes as long as the HSM does,
// whoever needs one waits for no longer than his request lives.
func TestWaitForKEK(t *testing.T) {
	t.Parallel()
	r := newKeyring(&KME{})
	if err := r.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	held := time.AfterFunc(10*time.Second, r.leave)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for name, wait := range map[string]func() error{
		"sealing":   func() error { _, err := r.forEpoch(over, 1); return err },
		"opening":   func() error { _, err := r.byID(over, 1); return err },
		"giving up": func() error { return r.giveUp(over, store.KEK{}) },
	} {
		if err := wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want that the request is over", name, err)
		}
	}
	if !held.Stop() {
		t.Error("somebody waited beyond the end of his request")
	}
}

// TestSweepLeavesWhatIsUsed: what was a plan when the register was read, and is in use by
// now, stays in the token; and so does a copy of a KEK, whatever its label says.
func TestSweepLeavesWhatIsUsed(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	if err := k.beginRun(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := key.EpochAt(s.now(), time.Hour)
	if _, err := k.Store.EnsureEpoch(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	const label = "slow"
	id, err := k.Store.PlanKEK(t.Context(), e, label)
	if err != nil {
		t.Fatal(err)
	}
	before, err := k.Store.KEKs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	info, err := k.Token.NewKEK(t.Context(), label)
	if err != nil {
		t.Fatal(err)
	}
	list, err := k.Token.ListKEKs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Store.OpenKEK(t.Context(), store.KEK{ID: id, Epoch: e, PKCS11ID: info.ID, CheckValue: info.CheckValue[:]}, 0, k.own(audit.KEKMade)); err != nil {
		t.Fatal(err)
	}
	if swept, err := k.keks.sweep(t.Context(), before, list); err != nil || swept {
		t.Errorf("swept: %t, %v", swept, err)
	}
	kek, err := k.keks.forEpoch(t.Context(), e)
	if err != nil || kek.id != id {
		t.Errorf("KEK %d is in use, and not %d: %v", kek.id, id, err)
	}

	given, err := k.Store.PlanKEK(t.Context(), e, "given up")
	if err == nil {
		_, err = k.Store.AbandonKEK(t.Context(), given)
	}
	if err != nil {
		t.Fatal(err)
	}
	copyInToken(t, info, "given up")
	n := ending{k: k}
	if err := n.check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if list, err = k.Token.ListKEKs(t.Context()); err != nil || len(list) != 2 || !k.stands("kek-unknown") {
		t.Errorf("%v, %v, alarms %v: want the copy there, and an alarm of it", list, err, k.Alarms())
	}
}

// TestFencedWhileMaking: a node that was taken over while its token made a KEK neither uses
// it nor destroys it: whether it was registered is not for that node to say any more. The
// node that has taken over clears it away, and what a commit that was not answered has
// registered stays.
func TestFencedWhileMaking(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	token, faults := faultyToken(t, dir)
	a := s.withToken(dir, func(c *Config) { c.Token = token })
	b := s.beside(a, "b")
	for _, k := range []*KME{a, b} {
		if err := k.beginRun(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	e := key.EpochAt(s.now(), time.Hour)
	faults.Hold(hsmtest.GenerateKey, true)
	made := make(chan error, 1)
	go func() {
		_, err := a.keks.forEpoch(t.Context(), e)
		made <- err
	}()
	eventually(t, "the token to be at it", func() bool { return faults.Inside(hsmtest.GenerateKey) == 1 })
	if _, err := b.depose(t.Context(), store.NodeRun{Node: a.Node, Run: a.run.Load()}, "it hangs"); err != nil {
		t.Fatal(err)
	}
	faults.Hold(hsmtest.GenerateKey, false)
	if err := <-made; !errors.Is(err, store.ErrFenced) {
		t.Errorf("a KEK of a node that was taken over: %v, want ErrFenced", err)
	}
	if _, ok := a.keks.current.Load(e); ok || s.ask("SELECT count(*) FROM kme.kek_copy WHERE node = 'a'") > 0 {
		t.Error("it is used")
	}
	list, err := b.Token.ListKEKs(t.Context())
	if err != nil || len(list) != 1 || s.ask("SELECT count(*) FROM kme.kek WHERE state = 'planned'") != 1 {
		t.Errorf("%v in the token, %v: want what was made, and the register as it was", list, err)
	}

	other, err := b.keks.forEpoch(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	if err := newEnding(b).check(t.Context()); err != nil {
		t.Error(err)
	}
	list, err = b.Token.ListKEKs(t.Context())
	if err != nil || len(list) != 1 || list[0].Label != other.kek.Info().Label || len(b.Alarms()) != 0 {
		t.Errorf("%v in the token, %v, alarms %v: want that of the node that has taken over", list, err, b.Alarms())
	}
	if n := s.ask("SELECT count(*) FROM kme.kek WHERE state = 'destroyed' AND check_value = ''"); n != 1 {
		t.Errorf("%d KEKs are given up, want 1", n)
	}
}

// TestAbandonedLate: a KEK that was made and is not needed goes also if the process dies
// when the register knows so and the token does not.
func TestAbandonedLate(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	token, faults := faultyToken(t, dir)
	k := s.withToken(dir, func(c *Config) { c.Token = token })
	if err := k.beginRun(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := key.EpochAt(s.now(), time.Hour)
	if _, err := k.Store.EnsureEpoch(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	s.change("UPDATE epoch SET state = 'sealed'") // so that the register refuses what is made
	faults.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
	if _, err := k.keks.makeAlone(t.Context(), e, 0); !errors.Is(err, store.ErrExpired) {
		t.Errorf("making a KEK of a sealed epoch: %v", err)
	}
	if n := s.ask("SELECT count(*) FROM kme.kek WHERE state = 'destroyed' AND check_value = ''"); n != 1 {
		t.Errorf("%d KEKs are given up, want 1", n)
	}
	n := ending{k: k}
	if err := n.check(t.Context()); err == nil || !k.stands("kek-unknown") {
		t.Errorf("while it cannot be destroyed: %v, alarms %v", err, k.Alarms())
	}
	faults.Heal()
	err := n.check(t.Context())
	if list, e := k.Token.ListKEKs(t.Context()); err != nil || e != nil || len(list) != 0 || len(k.Alarms()) != 0 {
		t.Errorf("%v, %v, %v, alarms %v: want nothing left", err, list, e, k.Alarms())
	}
}
