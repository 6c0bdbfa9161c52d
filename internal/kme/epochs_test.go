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

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/hsm"
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
// ended, by nobody: not with a copy of the blobs from when the key was there, the token and
// its PIN, nor by the node. With a copy of the token of that time it can,
// which shows that the blob is the one.
func TestEndOfEpoch(t *testing.T) {
	t.Parallel()
	dir := tokenDir(t)
	s := newSite(t)
	k := s.withToken(dir)
	stop := run(t, k)
	keys, err := get(t, k, 2, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	secret := bytes.Clone(keys[0].Material.Reveal())
	rows := s.backup() // anna has not taken her keys yet
	oldToken := t.TempDir()
	if err := errors.Join(os.CopyFS(oldToken, os.DirFS(dir)), os.Chmod(filepath.Join(oldToken, "pin"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := takes(t, k, keys[0].ID); err != nil {
		t.Fatal(err)
	}
	expiry := key.EpochAt(s.now().Add(time.Hour), time.Hour)
	epochs, err := k.Store.Epochs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(epochs, func(e store.Epoch) bool { return e.Epoch == expiry })
	kek := epochs[i].KEKs[0].KEK

	for range 3 { // the second key expires by itself
		s.step(time.Hour)
		k.expire(t.Context())
	}
	eventually(t, "the epoch to be dropped", func() bool { _, ok := states(t, k)[expiry]; return !ok })
	if _, err := takes(t, k, keys[1].ID); problem.KindOf(err) != problem.Invalid {
		t.Errorf("taking what has gone with its epoch: %v, want that it is not found", err)
	}
	if _, err := k.keks.byID(t.Context(), kek.ID); !errors.Is(err, hsm.ErrNoKEK) {
		t.Errorf("the node still has the KEK, or: %v", err)
	}
	var steps []string
	for _, ev := range s.audit() {
		for _, a := range []audit.Action{audit.EpochSealed, audit.EpochDraining, audit.CopyClosed, audit.KEKGone, audit.EpochDropped} {
			if ev.Action == string(a) && strings.Contains(ev.Reason, fmt.Sprint("epoch ", expiry)) {
				steps = append(steps, ev.Action)
			}
		}
	}
	if want := "epoch-sealed epoch-draining kek-copy-closed kek-destroyed epoch-dropped"; strings.Join(steps, " ") != want {
		t.Errorf("recorded: %s, want %s", steps, want)
	}
	stop()
	_ = k.Token.Close()

	if len(rows) != 2 {
		t.Fatalf("the backup has %d blobs, want 2", len(rows))
	}
	try := func(tokens string) (opened [][]byte, keks int) {
		useTokens(t, tokens)
		token := openToken(t, tokens)
		defer token.Close()
		list, err := token.ListKEKs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range list {
			object, err := token.OpenKEK(t.Context(), info)
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range rows {
				aad := DueAAD(nil, k.Self, b.kek, b.id, saeID(t, "alice"), saeID(t, "anna"), 256, key.LocalRNG, b.expires, false)
				if plain, err := object.Unwrap(t.Context(), [12]byte(b.iv), b.ct, aad); err == nil {
					opened = append(opened, plain)
				}
			}
		}
		return opened, len(list)
	}
	if opened, keks := try(dir); len(opened) > 0 || keks == 0 {
		t.Errorf("%d of the blobs in the backup were opened with the %d keys of the token", len(opened), keks)
	}
	if opened, _ := try(oldToken); len(opened) != 2 || !bytes.Equal(opened[0], secret) && !bytes.Equal(opened[1], secret) {
		t.Errorf("with a copy of the token from before, %d of 2 blobs were opened", len(opened))
	}
}

// backup reads the blobs that wait to be taken, as whoever has a copy of the database can.
func (s *site) backup() (rows []blob) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	found, _ := conn.Query(s.t.Context(), "SELECT key_id, kek, iv, ct, expires_at FROM kme.due WHERE ct IS NOT NULL")
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
	dir := tokenDir(t)
	s := newSite(t)
	k := s.withToken(dir, func(c *Config) { c.MaxWraps = 60 })
	stop := run(t, k)
	began := key.EpochAt(s.now(), time.Hour)
	over, cancel := context.WithTimeout(t.Context(), seconds*time.Second)
	defer cancel()
	var all sync.WaitGroup
	all.Go(func() { // sixty minutes a second
		until(over, time.Second/60, func() { s.step(time.Minute) })
	})
	all.Go(func() {
		until(over, time.Second/10, func() { k.expire(t.Context()) })
	})
	var served atomic.Int64
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
	if int(served.Load()) < 100 || epochs < seconds-1 || destroyed < epochs-2 || made <= epochs {
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
	conn, err := pgx.Connect(s.t.Context(), cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(s.t.Context(), sql).Scan(&n); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// TestStrays: keys of the token that the register does not know are an alarm: a copy of
// a KEK under another label above all, which would open what the KEK had sealed when
// that is destroyed. What a process has left that died while it made a KEK is cleared
// away, and no alarm.
func TestStrays(t *testing.T) {
	t.Parallel()
	dir := tokenDir(t)
	s := newSite(t)
	k := s.withToken(dir)
	if err := k.beginRun(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := k.keks.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := ending{k: k}
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
	dir := tokenDir(t)
	s := newSite(t)
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
