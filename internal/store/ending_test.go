package store

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// end takes an epoch without live keys and copies through all steps of its end, and
// says whether it has come to the last one now.
func (s *site) end(db *DB, e key.Epoch) bool {
	s.t.Helper()
	var done bool
	for _, step := range []func(context.Context, key.Epoch, audit.Event) (bool, error){
		db.SealEpoch, db.DrainEpoch,
		func(ctx context.Context, e key.Epoch, _ audit.Event) (bool, error) { return db.EndEpoch(ctx, e) },
		db.DropEpoch,
	} {
		var err error
		if done, err = step(s.t.Context(), e, audit.Event{Action: audit.EpochSealed, Outcome: audit.Done}); err != nil {
			s.t.Fatal(err)
		}
	}
	return done
}

// TestSteps: an epoch ends in steps, none of which is left out, done twice, or done
// while something is in the way, and each is recorded.
func TestSteps(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db, other := s.open("n1"), s.open("n2")
	ctx := t.Context()
	e := s.epoch()
	b := s.fill(db, 64, mine)
	due := s.due(key.NewLocalID(s.now()), "bob", "alice")
	due.ExpiryEpoch = e
	if err := db.Serve(ctx, ServeJob{Due: []Due{due}}); err != nil {
		t.Fatal(err)
	}
	kek := s.kek(db, e)
	must := func(what string, want bool) func(bool, error) {
		return func(done bool, err error) {
			t.Helper()
			if err != nil || done != want {
				t.Errorf("%s: %v, %v, want %v", what, done, err, want)
			}
		}
	}
	ev := func(a audit.Action) audit.Event { return audit.Event{Action: a, Outcome: audit.Done} }
	must("draining an open epoch", false)(db.DrainEpoch(ctx, e, ev(audit.EpochDraining)))
	must("dropping an open epoch", false)(db.DropEpoch(ctx, e, ev(audit.EpochDropped)))
	must("sealing", true)(db.SealEpoch(ctx, e, ev(audit.EpochSealed)))
	must("sealing again", false)(other.SealEpoch(ctx, e, ev(audit.EpochSealed)))
	if err := other.HoldKEK(ctx, kek.ID); err != nil { // what is in it still opens
		t.Fatal(err)
	}
	must("draining what has a pool", false)(db.DrainEpoch(ctx, e, ev(audit.EpochDraining)))
	if err := db.Burn(ctx, BurnJob{Atoms: ids(b.Atoms), Event: func(burned []key.ID) audit.Event {
		return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: rangeOf(b.BlockRef, 0, len(burned))}
	}}); err != nil {
		t.Fatal(err)
	}
	must("draining what has a key that waits", false)(db.DrainEpoch(ctx, e, ev(audit.EpochDraining)))
	if err := db.Take(ctx, TakeJob{SAE: due.SAE, Rows: []DueRef{due.ref()}, How: GoneTaken}); err != nil {
		t.Fatal(err)
	}
	must("draining", true)(db.DrainEpoch(ctx, e, ev(audit.EpochDraining)))
	if err := db.HoldKEK(ctx, kek.ID); !errors.Is(err, ErrExpired) {
		t.Errorf("holding a KEK of a draining epoch: %v, want ErrExpired", err)
	}
	all, err := db.Epochs(ctx)
	if err != nil || len(all) != 3 || len(all[0].KEKs) != 1 {
		t.Fatalf("epochs: %+v, %v", all, err)
	}
	if diff := cmp.Diff([]NodeRun{{"n2", 1}}, all[0].KEKs[0].Copies); diff != "" || all[0].State != EpochDraining {
		t.Errorf("a %s epoch's copies (-want +got):\n%s", all[0].State, diff)
	}
	if _, err := db.EndEpoch(ctx, e); err == nil {
		t.Error("a KEK was destroyed of which there is a copy")
	}
	if err := other.GiveUpKEK(ctx, kek.ID, ev(audit.CopyClosed)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // recorded once
		if err := db.EndKEK(ctx, kek.ID, ev(audit.KEKGone)); err != nil {
			t.Fatal(err)
		}
	}
	must("ending", true)(db.EndEpoch(ctx, e))
	must("dropping", true)(db.DropEpoch(ctx, e, ev(audit.EpochDropped)))
	must("dropping again", false)(other.DropEpoch(ctx, e, ev(audit.EpochDropped)))
	events := s.check()
	for action, want := range map[audit.Action]int{
		audit.EpochSealed: 1, audit.EpochDraining: 1, audit.CopyClosed: 1, audit.KEKGone: 1, audit.EpochDropped: 1,
	} {
		if n := countOf(events, action); n != want {
			t.Errorf("%d events %s, want %d", n, action, want)
		}
	}
}

// kek registers a KEK, without a token.
func (s *site) kek(db *DB, e key.Epoch) KEK {
	s.t.Helper()
	id, err := db.PlanKEK(s.t.Context(), e, "kek")
	if err != nil {
		s.t.Fatal(err)
	}
	k, err := db.OpenKEK(s.t.Context(), KEK{ID: id, Epoch: e, PKCS11ID: []byte("kek"), CheckValue: []byte{1, 2, 3}}, 0, audit.Event{Action: audit.KEKMade, Outcome: audit.Done})
	if err != nil {
		s.t.Fatal(err)
	}
	return k
}

// TestDeposedCopy: a copy of a run that was taken over is in nobody's way.
func TestDeposedCopy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db, dead := s.open("n1"), s.open("n2")
	ctx := t.Context()
	kek := s.kek(db, s.epoch())
	if err := dead.HoldKEK(ctx, kek.ID); err != nil {
		t.Fatal(err)
	}
	if s.end(db, s.epoch()+1); len(ask[string](s, "SELECT node FROM kek_copy")) == 0 {
		t.Error("the copy is forgotten")
	}
	ev := audit.Event{Action: audit.EpochSealed, Outcome: audit.Done}
	_, err := db.SealEpoch(ctx, s.epoch(), ev)
	_, err2 := db.DrainEpoch(ctx, s.epoch(), ev)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if _, err := db.EndEpoch(ctx, s.epoch()); err == nil {
		t.Error("ended while the other node may live")
	}
	if _, err := db.Depose(ctx, NodeRun{"n2", 1}, deposed); err != nil {
		t.Fatal(err)
	}
	if done, err := db.EndEpoch(ctx, s.epoch()); !done || err != nil {
		t.Errorf("ending after the takeover: %v, %v", done, err)
	}
	if n := ask[int](s, "SELECT count(*) FROM kek_copy"); n != 0 {
		t.Errorf("%d copies are left", n)
	}
	if n := countOf(s.check(), audit.Takeover); n != 1 {
		t.Errorf("%d takeovers are recorded, want 1", n)
	}
}

// TestReplacedKEK: a KEK that has sealed enough makes room for another one of its epoch.
func TestReplacedKEK(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db, other := s.open("n1"), s.open("n2")
	ctx := t.Context()
	old := s.kek(db, s.epoch())
	plan := func(label string) KEK {
		id, err := db.PlanKEK(ctx, s.epoch(), label)
		if err != nil {
			t.Fatal(err)
		}
		return KEK{ID: id, Epoch: s.epoch(), PKCS11ID: []byte(label), CheckValue: []byte{4, 5, 6}}
	}
	ev := audit.Event{Action: audit.KEKMade, Outcome: audit.Done}
	k, err := db.OpenKEK(ctx, plan("two"), old.ID, ev)
	if err != nil || k.State != KEKOpen || string(k.PKCS11ID) != "two" {
		t.Fatalf("the new one: %+v, %v", k, err)
	}
	if got, err := other.OpenKEK(ctx, plan("three"), old.ID, ev); err != nil || got.ID != k.ID {
		t.Errorf("replacing it again gave %+v, %v, want the one that is there", got, err)
	}
	if n := ask[int](s, "SELECT count(*) FROM kek WHERE state = 'sealed'"); n != 1 {
		t.Errorf("%d sealed KEKs, want 1", n)
	}
	if _, err := db.SealEpoch(ctx, s.epoch(), ev); err != nil {
		t.Fatal(err)
	}
	if _, err := db.OpenKEK(ctx, plan("four"), 0, ev); !errors.Is(err, ErrExpired) {
		t.Errorf("a KEK for a sealed epoch: %v, want ErrExpired", err)
	}
}

// TestSealedUnderLoad: whatever is being written while an epoch is sealed, by nodes
// that know of it or not, a row is committed before it or refused as expired; no
// other request suffers.
func TestSealedUnderLoad(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	nodes := []*DB{s.open("n1"), s.open("n2")}
	ctx := t.Context()
	const epochs = 5
	for e := s.epoch(); e < s.epoch()+epochs; e++ {
		for _, db := range nodes {
			if _, err := db.EnsureEpoch(ctx, e); err != nil {
				t.Fatal(err)
			}
		}
	}
	var oldest atomic.Int64 // the first epoch that is not being sealed
	oldest.Store(int64(s.epoch()))
	var committed [epochs]atomic.Int64
	var all sync.WaitGroup
	stop := make(chan struct{})
	for i := range 16 {
		all.Go(func() {
			db := nodes[i%2]
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				e := key.Epoch(oldest.Load())
				due := s.due(key.NewLocalID(s.now()), "bob", "alice")
				due.ExpiryEpoch = e
				switch err := db.Serve(ctx, ServeJob{Due: []Due{due}}); {
				case err == nil:
					committed[e-s.epoch()].Add(1)
				case !errors.Is(err, ErrExpired):
					t.Errorf("assigning into epoch %d: %v", e, err)
					return
				}
			}
		})
	}
	var sealed [epochs]int64
	for i := range epochs - 1 {
		e := s.epoch() + key.Epoch(i)
		s.await("rows in the epoch", func() bool { return committed[i].Load() > 50 })
		for done := false; !done; {
			var err error
			if done, err = nodes[i%2].SealEpoch(ctx, e, audit.Event{Action: audit.EpochSealed, Outcome: audit.Done}); err != nil {
				t.Fatal(err)
			}
		}
		sealed[i] = ask[int64](s, "SELECT count(*) FROM "+dueTable(e))
		oldest.Store(int64(e) + 1)
	}
	close(stop)
	all.Wait()
	for i := range epochs - 1 {
		e := s.epoch() + key.Epoch(i)
		if n := ask[int64](s, "SELECT count(*) FROM "+dueTable(e)); n != sealed[i] || n != committed[i].Load() {
			t.Errorf("epoch %d had %d rows when it was sealed, %d now, and %d were answered", i, sealed[i], n, committed[i].Load())
		}
	}
	s.step(time.Hour)
}
