package kme

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/hsm/hsmtest"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// drained serves a key, and brings its epoch to where the nodes give up their copies.
func (s *site) drained(k *KME, n *ending) store.Epoch {
	s.t.Helper()
	t := s.t.(*testing.T)
	if _, err := get(t, k, 1, time.Hour); err != nil {
		t.Fatal(err)
	}
	last := key.EpochAt(s.now().Add(time.Hour), time.Hour)
	for range 3 {
		s.step(time.Hour)
		k.expire(t.Context())
	}
	if err := n.advance(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := epochOf(t, k, last)
	if e.State != store.EpochDraining || len(e.KEKs) != 1 || len(e.KEKs[0].Copies) != 1 {
		t.Fatalf("%+v, want one that drains, and one copy", e)
	}
	return e
}

func epochOf(t *testing.T, k *KME, which key.Epoch) store.Epoch {
	t.Helper()
	epochs, err := k.Store.Epochs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range epochs {
		if e.Epoch == which {
			return e
		}
	}
	return store.Epoch{Epoch: which, State: store.EpochDropped}
}

// follow has the node do as the register says.
func follow(t *testing.T, k *KME) error {
	t.Helper()
	epochs, err := k.Store.Epochs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return k.keks.follow(t.Context(), epochs)
}

// recorded are the reasons of the events of an action that are about an epoch.
func (s *site) recorded(a audit.Action, e key.Epoch) (reasons []string) {
	for _, ev := range s.audit() {
		if ev.Action == string(a) && strings.Contains(ev.Reason, fmt.Sprint("epoch ", e)) {
			reasons = append(reasons, ev.Reason)
		}
	}
	return reasons
}

// TestCopyLives: a copy that the HSM does not destroy is not recorded as given up, and its
// KEK is not destroyed, until it is; other KEKs do not wait for that.
func TestCopyLives(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	token, faults := faultyToken(t, dir)
	k := s.withToken(dir, func(c *Config) { c.Token = token })
	stand(t, k)
	n := newEnding(k)
	first := s.drained(k, n)
	for range 2 {
		faults.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
		if err := follow(t, k); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("giving up what the HSM does not destroy: %v", err)
		}
		faults.Heal()
		if err := n.advance(t.Context()); err != nil {
			t.Error(err)
		}
		if e := epochOf(t, k, first.Epoch); e.State != store.EpochDraining || len(e.KEKs[0].Copies) != 1 {
			t.Errorf("%+v, want that it drains, and one copy", e)
		}
		if got := s.recorded(audit.CopyClosed, first.Epoch); len(got) > 0 {
			t.Errorf("recorded as given up: %q", got)
		}
	}
	if err := follow(t, k); err != nil {
		t.Error(err)
	}
	if err := n.advance(t.Context()); err != nil {
		t.Error(err)
	}
	if e := epochOf(t, k, first.Epoch); e.State != store.EpochDropped || len(s.recorded(audit.CopyClosed, first.Epoch)) == 0 {
		t.Errorf("%+v, want that it is dropped, and that the copy was given up", e)
	}
}

// TestKEKNotSeen: a KEK that a token does not show is not recorded as destroyed if it does
// not show either what is known to be in it: somebody is not logged in, or it is another.
func TestKEKNotSeen(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	n := newEnding(k)
	e := s.drained(k, n)
	if err := follow(t, k); err != nil {
		t.Fatal(err)
	}
	info, err := infoOf(e.KEKs[0].KEK)
	if err != nil {
		t.Fatal(err)
	}
	drains := func(why string) {
		t.Helper()
		if err := n.advance(t.Context()); !errors.Is(err, hsm.ErrUnavailable) && (err == nil || !strings.Contains(err.Error(), why)) {
			t.Errorf("%s: %v", why, err)
		}
		if got := epochOf(t, k, e.Epoch); got.State != store.EpochDraining || len(s.recorded(audit.KEKGone, e.Epoch)) > 0 {
			t.Errorf("%s: %+v, and recorded as destroyed: %q", why, got, s.recorded(audit.KEKGone, e.Epoch))
		}
	}
	now := key.EpochAt(s.now(), time.Hour)
	if _, err := k.Store.EnsureEpoch(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Store.PlanKEK(t.Context(), now, "planned"); err != nil {
		t.Fatal(err)
	}
	n.checked = time.Time{} // look for strays, and what dead processes have planned, too
	p, session := borrow(t)
	if err := p.Logout(session); err != nil {
		t.Fatal(err)
	}
	drains("not logged in")
	if err := k.Token.Heartbeat(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := k.Token.ListKEKs(t.Context())
	if err != nil || len(list) == 0 || s.ask("SELECT count(*) FROM kme.kek WHERE state = 'planned'") != 1 {
		t.Errorf("the KEK or the plan is gone: %v, %v", list, err)
	}

	// The KEK is away, and so is all that is known to be there.
	if err := k.Token.DestroyKEK(t.Context(), info); err != nil {
		t.Fatal(err)
	}
	p, session = borrow(t)
	counters := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_LABEL, runCounter(k.Node))}
	err = p.FindObjectsInit(session, counters)
	if err != nil {
		t.Fatal(err)
	}
	found, _, err := p.FindObjects(session, 10)
	if err = errors.Join(err, p.FindObjectsFinal(session)); err != nil || len(found) != 1 {
		t.Fatalf("%d counters of the run: %v", len(found), err)
	}
	if err := p.DestroyObject(session, found[0]); err != nil {
		t.Fatal(err)
	}
	drains("it shows run 0 of this node")
	if n := s.ask("SELECT count(*) FROM kme.kek WHERE state = 'planned'"); n != 1 {
		t.Error("the plan is gone")
	}
	if err := k.Token.SetCounter(t.Context(), runCounter(k.Node), k.run.Load()); err != nil {
		t.Fatal(err)
	}
	if err := n.advance(t.Context()); err != nil {
		t.Error(err)
	}
	if got := s.recorded(audit.KEKGone, e.Epoch); epochOf(t, k, e.Epoch).State != store.EpochDropped || len(got) != 1 || !strings.HasSuffix(got[0], "it was not in the token any more") {
		t.Errorf("recorded as destroyed: %q, want one that was not there any more", got)
	}
}

// TestUndestroyable: a KEK that cannot be destroyed keeps no other epoch from its end, nor
// the token from being looked at.
func TestUndestroyable(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	n := newEnding(k)
	old := s.drained(k, n)
	info, err := infoOf(old.KEKs[0].KEK)
	if err != nil {
		t.Fatal(err)
	}
	copyInToken(t, info, info.Label) // which of them is it?
	if _, err := get(t, k, 1, time.Hour); err != nil {
		t.Fatal(err)
	}
	later := key.EpochAt(s.now().Add(time.Hour), time.Hour)
	for range 3 {
		s.step(time.Hour)
		k.expire(t.Context())
	}
	n.checked = time.Time{}
	for range 2 {
		err := n.advance(t.Context())
		if err != nil && !strings.Contains(err.Error(), "2 keys have this label and ID") {
			t.Error(err)
		}
		if err := follow(t, k); err != nil {
			t.Error(err)
		}
	}
	if err := n.advance(t.Context()); err == nil || strings.Count(err.Error(), "2 keys") != 1 {
		t.Errorf("the end of epochs: %v, want that one KEK is said once to be undestroyable", err)
	}
	if a, b := epochOf(t, k, old.Epoch), epochOf(t, k, later); a.State != store.EpochDraining || b.State != store.EpochDropped {
		t.Errorf("the epoch whose KEK cannot be destroyed is %s, and a later one is %s", a.State, b.State)
	}
	if n.checked.IsZero() {
		t.Error("the token was not looked at")
	}
}

// TestSecondUndestroyable: of an epoch's KEKs each is recorded as destroyed when it was, once
// and by this process, though another one of them cannot be.
func TestSecondUndestroyable(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t), func(c *Config) { c.MaxWraps = 1 })
	stand(t, k)
	if _, err := get(t, k, 2, time.Hour); err != nil {
		t.Fatal(err)
	}
	last := key.EpochAt(s.now().Add(time.Hour), time.Hour)
	k.tendEpochs(t.Context()) // another KEK takes over
	n := &ending{k: k, over: make(map[key.Epoch]int64)}
	for range 3 {
		s.step(time.Hour)
		k.expire(t.Context())
	}
	if err := n.advance(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := follow(t, k); err != nil {
		t.Fatal(err)
	}
	e := epochOf(t, k, last)
	if len(e.KEKs) < 2 {
		t.Fatalf("%d KEKs, want 2", len(e.KEKs))
	}
	second, err := infoOf(e.KEKs[1].KEK)
	if err != nil {
		t.Fatal(err)
	}
	copyInToken(t, second, second.Label) // which of them is it?
	for range 2 {
		if err := n.advance(t.Context()); err == nil || !strings.Contains(err.Error(), "2 keys have this label and ID") {
			t.Errorf("the end of an epoch with a KEK that cannot be destroyed: %v", err)
		}
	}
	got := s.recorded(audit.KEKGone, last)
	if epochOf(t, k, last).State != store.EpochDraining || len(got) != len(e.KEKs)-1 || strings.Contains(strings.Join(got, " "), "not in the token any more") {
		t.Errorf("recorded as destroyed: %q, want each but the second, and that it was there", got)
	}
}
