package kme

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// TestTrustLink: a link whose tags were wrong goes on if, and only if, the log says who
// let it.
func TestTrustLink(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.links = map[string]*link{"fibre": {k: k}}
	if err := k.Store.EnsureLink(t.Context(), "fibre", kmeID(t, "km2"), handover.Alice); err != nil {
		t.Fatal(err)
	}
	if err := k.Store.TagFailed(t.Context(), "fibre"); err != nil {
		t.Fatal(err)
	}
	trust := func() error { return k.OperatorDoor().TrustLink(t.Context(), identity.Caller{}, "r1", "fibre") }
	failures := func(want int64) {
		t.Helper()
		if got := s.ask("SELECT failures FROM kme.link_auth WHERE link = 'fibre'"); got != want {
			t.Errorf("%d wrong tags are remembered, want %d", got, want)
		}
	}
	day := "kme.audit_d" + s.now().UTC().Format("20060102")
	s.exec(s.name, `CREATE FUNCTION kme.no_room() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;
		CREATE TRIGGER no_room BEFORE INSERT ON `+day+` FOR EACH STATEMENT EXECUTE FUNCTION kme.no_room()`)
	if err := trust(); problem.KindOf(err) != problem.Unavailable || k.outage.counted() != 1 {
		t.Errorf("an act that cannot be recorded: %v, and %d are counted", err, k.outage.counted())
	}
	failures(1)
	s.exec(s.name, "DROP TRIGGER no_room ON "+day)
	k.Store.Close()
	k = s.node() // the database is well, to a new process at once
	k.links = map[string]*link{"fibre": {k: k}}
	k.summarise(t.Context())
	if err := trust(); err != nil {
		t.Error(err)
	}
	failures(0)
	want := []told{{"outage-summary", "refused", "refused while the database was away", 1}, {"link-trusted", "done", "", 0}}
	if diff := cmp.Diff(want, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}
