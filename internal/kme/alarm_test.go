package kme

import (
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/handover"
)

// TestAlarmStands from the first time that it is raised until it is cleared, and
// each of the two is recorded once.
func TestAlarmStands(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	ctx := t.Context()
	began := s.now()
	k.raise(ctx, "hsm", "no answer")
	s.step(time.Minute)
	k.raise(ctx, "database", "away")
	k.raise(ctx, "hsm", "still no answer")
	want := []Alarm{{"hsm", "still no answer", began}, {"database", "away", s.now()}}
	if diff := cmp.Diff(want, k.Alarms()); diff != "" {
		t.Errorf("alarms, oldest first (-want +got):\n%s", diff)
	}
	k.clear(ctx, "hsm")
	k.clear(ctx, "hsm")
	k.clear(ctx, "never raised")
	if diff := cmp.Diff(want[1:], k.Alarms()); diff != "" {
		t.Errorf("alarms after one was cleared (-want +got):\n%s", diff)
	}
	s.step(time.Hour)
	k.raise(ctx, "hsm", "again")
	if got := k.Alarms(); len(got) != 2 || !got[1].Since.Equal(s.now()) {
		t.Errorf("an alarm that comes again stands from now: %v", got)
	}
	wantAudit := []told{
		{"alarm", "failed", "hsm: no answer", 0},
		{"alarm", "failed", "database: away", 0},
		{"alarm", "done", "hsm is over", 0},
		{"alarm", "failed", "hsm: again", 0},
	}
	if diff := cmp.Diff(wantAudit, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}

// TestIncident: an alarm of something that has happened ends when it has not happened
// again for long, by itself.
func TestIncident(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	ctx := t.Context()
	k.raise(ctx, "hsm", "no answer")
	k.incident(ctx, "refused-km2", "two requests")
	s.step(incidentTime - time.Second)
	k.incident(ctx, "refused-km2", "three requests")
	s.step(incidentTime - time.Second)
	k.endIncidents(ctx)
	if got := k.Alarms(); len(got) != 2 {
		t.Errorf("alarms %v, want both", got)
	}
	s.step(time.Second)
	k.endIncidents(ctx)
	if got := k.Alarms(); len(got) != 1 || got[0].Name != "hsm" {
		t.Errorf("alarms %v, want the one whose cause is not gone", got)
	}
}

// TestAlarmsAtOnce: many who see one cause make one alarm and one event of it.
func TestAlarmsAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			k.raise(t.Context(), "peer-km2", "no answer")
			k.suspect(t.Context(), "link-fibre", "down")
			k.Alarms()
		})
	}
	g.Wait()
	if got := k.Alarms(); len(got) != 1 || len(s.audit()) != 1 {
		t.Errorf("alarms %v, audit %v", got, s.audit())
	}
}

// TestSuspicion becomes an alarm when its cause has stood for longer than patience,
// counted anew after each time that all was well.
func TestSuspicion(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	ctx := t.Context()
	standing := func(when string, want int) {
		t.Helper()
		if got := k.Alarms(); len(got) != want {
			t.Errorf("%s: alarms %v, want %d", when, got, want)
		}
	}
	k.suspect(ctx, "peer-km2", "refused")
	standing("at once", 0)
	s.step(patience - time.Millisecond)
	k.suspect(ctx, "peer-km2", "refused")
	standing("just before patience ends", 0)
	k.clear(ctx, "peer-km2")
	s.step(time.Hour)
	k.suspect(ctx, "peer-km2", "refused")
	standing("after it was well", 0)
	s.step(patience)
	k.suspect(ctx, "peer-km2", "timeout")
	standing("when patience has ended", 1)
	s.step(patience)
	k.suspect(ctx, "peer-km2", "no route")
	standing("later", 1)
	if got := k.Alarms()[0]; got.Text != "no route" || !got.Since.Equal(s.now().Add(-patience)) {
		t.Errorf("alarm %+v", got)
	}
	k.clear(ctx, "peer-km2")
	standing("at the end", 0)
	want := []told{{"alarm", "failed", "peer-km2: timeout", 0}, {"alarm", "done", "peer-km2 is over", 0}}
	if diff := cmp.Diff(want, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}

// TestAlarmWithoutDatabase stands all the same.
func TestAlarmWithoutDatabase(t *testing.T) {
	t.Parallel()
	k := newSite(t).node()
	k.Store.Close()
	k.raise(t.Context(), "database", "away")
	if got := k.Alarms(); len(got) != 1 {
		t.Errorf("alarms %v", got)
	}
	k.clear(t.Context(), "database")
	if got := k.Alarms(); len(got) != 0 {
		t.Errorf("alarms %v", got)
	}
}

// TestAlarmIsToldLate: one that could not be recorded is when it is raised again, once.
func TestAlarmIsToldLate(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.Store.Close()
	k.raise(t.Context(), "database", "away")
	k.raise(t.Context(), "database", "still away")
	k.Store = s.open() // it is back
	for range 3 {
		k.raise(t.Context(), "database", "away until now")
	}
	if diff := cmp.Diff([]told{{"alarm", "failed", "database: away until now", 0}}, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}

// TestClocks: an offset of the peer's clock beyond 1 s is an alarm, and beyond 30 s
// no blocks are made, whichever of the two is ahead.
func TestClocks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	km2, km3 := kmeID(t, "km2"), kmeID(t, "km3")
	l := &link{LinkConfig: LinkConfig{ID: "fibre", Peer: km2}, k: k}
	other := &link{LinkConfig: LinkConfig{ID: "other", Peer: km3}, k: k}
	k.links = map[string]*link{"fibre": l, "other": other}
	for _, tt := range []struct {
		ahead       time.Duration
		alarm, rest bool
	}{
		{0, false, false},
		{time.Second, false, false},
		{-1001 * time.Millisecond, true, false},
		{30 * time.Second, true, false},
		{-30001 * time.Millisecond, true, true},
		{time.Hour, true, true},
		{-time.Second, false, false},
	} {
		before := s.now()
		s.step(400 * time.Millisecond) // the exchange takes so long: the peer looked at its clock in the middle
		k.judgeClock(t.Context(), km2, handover.Hello{Clock: before.Add(200*time.Millisecond + tt.ahead).UnixMilli()}, before)
		alarm := len(k.Alarms()) == 1 && k.Alarms()[0].Name == "clock-km2"
		if alarm != tt.alarm || l.skewed.Load() != tt.rest || other.skewed.Load() {
			t.Errorf("%v ahead: alarm %t, link rests %t, want %t and %t", tt.ahead, alarm, l.skewed.Load(), tt.alarm, tt.rest)
		}
		if got, _ := k.offsets.Load(km2); got != tt.ahead {
			t.Errorf("offset %v, want %v", got, tt.ahead)
		}
	}
	if _, ok := k.offsets.Load(km3); ok {
		t.Error("an offset of a KME that said nothing")
	}
}
