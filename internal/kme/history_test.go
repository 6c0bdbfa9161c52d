package kme

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// TestForecast: how long a pool lasts, from how it shrank.
func TestForecast(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := func(s, here, there int) look { return look{start.Add(time.Duration(s) * time.Second), here, there} }
	for _, tt := range []struct {
		name        string
		looks       []look
		now         int // seconds after start
		here, there time.Duration
	}{
		{"nothing is known", nil, 0, -1, -1},
		{"one look says nothing", []look{at(0, 100, 100)}, 0, -1, -1},
		{"it grows, it stays", []look{at(0, 100, 100), at(10, 101, 100)}, 10, -1, -1},
		{"one end shrinks", []look{at(0, 1000, 100), at(100, 900, 100)}, 100, 900 * time.Second, -1},
		{"with time gone since", []look{at(0, 1000, 100), at(100, 900, 100)}, 200, 800 * time.Second, -1},
		{"later than forecast", []look{at(0, 1000, 100), at(100, 900, 100)}, 2000, 0, -1},
		{"empty now", []look{at(0, 10, 20), at(10, 0, 10)}, 10, 0, 10 * time.Second},
		{"a clock that was set back", []look{at(10, 10, 20), at(0, 0, 10)}, 0, -1, -1},
	} {
		var h history
		for _, l := range tt.looks {
			h.saw(l)
		}
		for here, want := range map[bool]time.Duration{true: tt.here, false: tt.there} {
			got, ok := h.empty(start.Add(time.Duration(tt.now)*time.Second), here)
			if !ok {
				got = -1
			}
			if got != want {
				t.Errorf("%s, here %v: %v, want %v", tt.name, here, got, want)
			}
		}
	}
}

// TestForecastForgets: what was long ago is not what a forecast is made from.
func TestForecastForgets(t *testing.T) {
	t.Parallel()
	var h history
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for i := range 10 * historyLooks {
		h.saw(look{start.Add(time.Duration(i) * historyEvery), 1_000_000 - 100*i, 5})
	}
	if len(h.looks) != historyLooks {
		t.Errorf("%d looks are kept", len(h.looks))
	}
}

// TestChronicle: what the links did is in the database once, also when it could not be
// added for a while, and what is too old goes.
func TestChronicle(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	l := newLink(k, LinkConfig{ID: "km1-km2", Peer: kmeID(t, "km2"), End: handover.Alice})
	k.links = map[string]*link{l.ID: l}
	if err := k.Store.EnsureLink(t.Context(), l.ID, l.Peer, l.End); err != nil {
		t.Fatal(err)
	}
	first := s.now()
	l.history.block(0.02, true, 1000)
	l.history.block(0.12, true, 0)
	l.history.block(0, false, 0) // its error rate was not found
	k.chronicle(t.Context())
	l.history.block(0.04, true, 500)
	k.chronicle(t.Context())
	s.step(2 * time.Minute)
	k.chronicle(t.Context())
	got, err := k.Store.History(t.Context(), l.ID, first.Add(-time.Hour), time.Hour)
	if err != nil || len(got) != 1 {
		t.Fatalf("history: %v, %v", got, err)
	}
	if m := got[0]; m.Blocks != 2 || m.Aborts != 2 || m.Unrated != 1 || m.Bits != 1500 || m.QBER < 0.179 || m.QBER > 0.181 {
		t.Errorf("the hour: %+v", m)
	}
	if spans, err := k.OperatorDoor().History(t.Context(), identity.Caller{}, "", l.ID, first.Add(-time.Hour), time.Hour); err != nil || len(spans) != 1 || spans[0].QBER < .0599 || spans[0].QBER > .0601 {
		t.Errorf("as operators see it: %+v, %v", spans, err)
	}
	if got, _ = k.Store.History(t.Context(), l.ID, first.Add(-time.Hour), 0); len(got) != 2 {
		t.Errorf("by the minute: %v", got)
	}
	s.step(store.HistoryKept)
	k.endHistory(t.Context())
	if got, _ = k.Store.History(t.Context(), l.ID, first.Add(-time.Hour), time.Minute); len(got) != 1 {
		t.Errorf("the minute that is not too old yet: %v", got)
	}
}

// TestAlive: a node that does not look after itself any more says so.
func TestAlive(t *testing.T) {
	t.Parallel()
	k := new(KME)
	if err := k.Alive(); err != nil {
		t.Errorf("before it has begun: %v", err)
	}
	k.beaten.Store(int64(time.Since(processStart)))
	if err := k.Alive(); err != nil {
		t.Errorf("after a beat: %v", err)
	}
	k.beaten.Store(int64(time.Since(processStart) - stuckAfter - time.Second))
	if k.Alive() == nil {
		t.Error("long after the last one: alive")
	}
}

// TestUnratedBlock: of a block whose error rate was not found none is kept.
func TestUnratedBlock(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	l := newLink(k, LinkConfig{ID: "km1-km2", Peer: kmeID(t, "km2"), End: handover.Alice})
	if err := k.Store.EnsureLink(t.Context(), l.ID, l.Peer, l.End); err != nil {
		t.Fatal(err)
	}
	block := func(n int64) qlink.Block { return qlink.Block{Outcome: distill.Outcome{Session: 1, Block: n}} }
	l.aborted(t.Context(), block(1), &distill.Abort{Reason: distill.ReasonCounts})
	l.aborted(t.Context(), block(2), &distill.Abort{Reason: distill.ReasonQBER, QBER: .12})
	b := block(3)
	b.QBER = .01
	l.distilled(t.Context(), b)
	l.Filler = 1 // from here on there is no light
	l.distilled(t.Context(), block(4))
	list, err := k.Store.LastDistilled(t.Context(), l.ID, 10)
	var got []string
	for _, d := range list {
		got = append(got, fmt.Sprint(d.Block, d.Rated, d.TestQBER))
	}
	slices.Sort(got)
	if want := []string{"1 false 0", "2 true 0.12", "3 true 0.01", "4 false 0"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("kept: %q, %v; want %q", got, err, want)
	}
	if n := s.ask("SELECT count(*) FROM kme.distilled WHERE qber_test IS NULL"); n != 2 {
		t.Errorf("%d blocks have no error rate, want 2", n)
	}
}
