package kme

import (
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/policies"
)

// What is said of the clock is what the kernel says, and changes seldom.
func TestClockQuality(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		state, status int32
		off           int64 // at most, in microseconds
		want          string
	}{
		{unix.TIME_OK, unix.STA_PLL, 1, "synchronised, within 128ms"},
		{unix.TIME_OK, unix.STA_PLL, 128_000, "synchronised, within 128ms"},
		{unix.TIME_OK, unix.STA_PLL, 128_001, "synchronised, within 256ms"},
		{unix.TIME_INS, unix.STA_PLL | unix.STA_INS, 600_000, "synchronised, within 1.024s"}, // a leap second comes
		{unix.TIME_ERROR, unix.STA_PLL, 1, "not synchronised"},
		{unix.TIME_OK, unix.STA_UNSYNC, 1, "not synchronised"},
	} {
		x := unix.Timex{Status: test.status}
		x.Maxerror = test.off
		if got := qualityOf(int(test.state), x); got != test.want {
			t.Errorf("state %d, status %#x, off by %d us at most: %q, want %q", test.state, test.status, test.off, got, test.want)
		}
	}
}

// How well the clock is kept stands in the event that says what a node's events rest on,
// once, and again when it is another.
func TestClockQualityIsRecorded(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.Policies = func() *policies.Set { return new(policies.Set) }
	said := func() (clocks []string) {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		rows, _ := conn.Query(t.Context(), "SELECT body FROM kme.audit ORDER BY seq")
		bodies, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		for _, body := range bodies {
			e, err := audit.ParseEvent([]byte(body))
			if err != nil || e.Action != audit.FactsChanged {
				t.Fatalf("%s: %v", body, err)
			}
			clocks = append(clocks, e.Facts.Clock)
		}
		return clocks
	}
	before := clockQuality()
	k.watchFacts(t.Context())
	after := clockQuality()
	got := said()
	if len(got) != 1 || got[0] != before && got[0] != after || got[0] == "" {
		t.Fatalf("the events say %q of the clock, which was %q and then %q", got, before, after)
	}
	k.told.Clock = "within a second" // as it was once
	k.watchFacts(t.Context())
	if got := said(); len(got) != 2 || got[1] != k.told.Clock {
		t.Errorf("the events say %q of the clock, the last of it is %q", got, k.told.Clock)
	}
}
