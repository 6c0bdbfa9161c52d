package store

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// otherLink leads to the same KME as linkName.
const otherLink = "other"

func (s *site) openOther(db *DB) {
	s.t.Helper()
	if err := db.EnsureLink(context.Background(), otherLink, kme("KM2"), handover.Bob); err != nil {
		s.t.Fatal(err)
	}
}

// links of assigned keys, and "?" for what is gone.
func (s *site) links(db *DB, keys ...key.ID) (links []string) {
	s.t.Helper()
	rows, _, err := db.FindDue(context.Background(), sae("bob"), keys)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, id := range keys {
		if rows[id].Gone != "" {
			links = append(links, "?")
		} else {
			links = append(links, rows[id].Link)
		}
	}
	return links
}

// TestTwoLinks: one batch assigns keys of two links to the peer, each of which is known by
// its link from then on, also in a repeat and when they are compromised: then those of the
// other link stay.
func TestTwoLinks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.openOther(db)
	ctx := t.Context()
	a, b := s.fill(db, 64, theirs), s.fillLink(db, otherLink, 64, theirs)
	hear(t, db, 1)
	strayed := request("strayed", a.BlockRef, b.Atoms[3]) // of the other link, it says
	requests := []handover.Request{request("r1", a.BlockRef, a.Atoms[0]), request("r2", b.BlockRef, b.Atoms[0], b.Atoms[1]), strayed, request("r3", b.BlockRef, b.Atoms[2])}
	whys := []string{"", "", "atoms that lie elsewhere", ""}
	mustAssign(t, db, s.assignJob(1, 1, requests...), handover.Fresh, whys...)
	for i, r := range mustRepeat(t, db, s.assignJob(1, 1, requests...)).Results {
		if r.Accepted != (whys[i] == "") {
			t.Errorf("repeated, request %s is %+v", r.ID, r)
		}
	}
	// Two keys that were made here: in part for an SAE here, of a link; and for a pair here.
	mineToo := s.fillLink(db, otherLink, 64, func(int) handover.End { return handover.Alice })
	multicast, local := s.due(mineToo.Atoms[0].ID, "bob", "alice"), s.due(key.NewLocalID(s.now()), "bob", "alice")
	multicast.Link, local.Provenance = otherLink, key.LocalRNG
	err := db.Serve(ctx, ServeJob{Atoms: ids(mineToo.Atoms[:1]), Due: []Due{multicast, local}, Events: []audit.Event{served("m", mineToo.BlockRef, mineToo.Atoms[0])}})
	if err != nil {
		t.Fatal(err)
	}
	keys := []key.ID{a.Atoms[0].ID, b.Atoms[0].ID, b.Atoms[2].ID, multicast.Key, local.Key}
	if diff := cmp.Diff([]string{linkName, otherLink, otherLink, otherLink, ""}, s.links(db, keys...)); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
	// One of a time when that was not known is meant by a compromise of any link.
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "UPDATE due SET link = '' WHERE key_id = $1", [16]byte(b.Atoms[2].ID))
		return err
	})
	c, err := db.BeginCompromise(ctx, Compromise{Link: linkName, First: s.epoch(), Last: s.epoch(), Why: "a test"}, nil, audit.Event{Action: audit.Compromise, Outcome: audit.Done})
	if err != nil {
		t.Fatal(err)
	}
	n, err := db.VoidCompromised(ctx, c, 100, func(rows []DueRef) audit.Event {
		return audit.Event{Action: audit.VoidKeys, Outcome: audit.Done, Count: len(rows)}
	})
	if err != nil || n != 2 {
		t.Errorf("%d keys are voided, %v; want 2", n, err)
	}
	if diff := cmp.Diff([]string{"?", otherLink, "?", otherLink, ""}, s.links(db, keys...)); diff != "" {
		t.Errorf("links of what is left (-want +got):\n%s", diff)
	}
	s.check()
}

func mustRepeat(t *testing.T, db *DB, j AssignJob) handover.AnnounceAnswer {
	t.Helper()
	answer, err := db.Assign(t.Context(), j)
	if err != nil || answer.Standing != handover.Repeat {
		t.Fatalf("a repeat is %s, %v", answer.Standing, err)
	}
	return answer
}

// TestGrantsOfTwoLinks: one message may grant chunks of two links; each link's have their
// own event.
func TestGrantsOfTwoLinks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.openOther(db)
	a, b := s.fill(db, 128, theirs), s.fillLink(db, otherLink, 64, theirs)
	all := slices.Concat(grantOf(b, 0, 1).Chunks, grantOf(a, 0, 1).Chunks, grantOf(a, 64, 1).Chunks)
	taken := make(map[string]int)
	_, err := db.TakeGrant(t.Context(), kme("KM2"), handover.Grant{Chunks: all}, func(link string, chunks []audit.Atoms) audit.Event {
		taken[link] = len(chunks)
		for _, c := range chunks {
			if c.Link != link {
				t.Errorf("a chunk of %s among those of %s", c.Link, link)
			}
		}
		return audit.Event{Action: audit.TakeChunks, Outcome: audit.Done, Link: link, Count: len(chunks)}
	})
	if diff := cmp.Diff(map[string]int{linkName: 2, otherLink: 1}, taken); err != nil || diff != "" {
		t.Errorf("chunks taken (-want +got):\n%s%v", diff, err)
	}
	if n := countOf(s.check(), audit.TakeChunks); n != 2 {
		t.Errorf("%d events, want 2", n)
	}
}

// TestMigrationNamesLinks: keys that wait while the database learns of links are those of
// the peer's only link. Where there are two, it is not known which.
func TestMigrationNamesLinks(t *testing.T) {
	t.Parallel()
	up, err := migrationFiles.ReadFile("migrations/00026_due_link.sql")
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	db := s.open("n1")
	a := s.fill(db, 64, theirs)
	hear(t, db, 1)
	mustAssign(t, db, s.assignJob(1, 1, request("r1", a.BlockRef, a.Atoms[0])), handover.Fresh, "")
	local := s.due(key.NewLocalID(s.now()), "bob", "alice")
	if err := db.Serve(t.Context(), ServeJob{Due: []Due{local}, Events: []audit.Event{{Action: audit.EncKeys, Outcome: audit.Done, Keys: []key.ID{local.Key}}}}); err != nil {
		t.Fatal(err)
	}
	migrate := func() []string {
		t.Helper()
		s.super(func(conn *pgx.Conn) error {
			_, err := conn.Exec(t.Context(), "ALTER TABLE due DROP COLUMN link; "+string(up))
			return err
		})
		return s.links(s.open("n2"), a.Atoms[0].ID, local.Key)
	}
	if diff := cmp.Diff([]string{linkName, ""}, migrate()); diff != "" {
		t.Errorf("with one link (-want +got):\n%s", diff)
	}
	s.openOther(db)
	if diff := cmp.Diff([]string{"", ""}, migrate()); diff != "" {
		t.Errorf("with two links (-want +got):\n%s", diff)
	}
}

// TestPadsOfTwoLinks: each link has a reserve of its own, of pads by the same names.
func TestPadsOfTwoLinks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.openOther(db)
	ctx := t.Context()
	held := s.padded(1, 2)
	for _, link := range []string{linkName, otherLink} {
		if err := db.OpenSession(ctx, link, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
			t.Fatal(err)
		}
		b := held
		if b.Link = link; link == otherLink {
			b.Atoms = s.block(1, 1, mine).Atoms
		}
		if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
			t.Fatal(err)
		}
		if err := db.HeardHeldAnswer(ctx, b.BlockRef, handover.Equal, blockEvents(b.BlockRef)); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.SpendPad(ctx, linkName, 1, held.Pads[1].PadName); err != nil {
		t.Fatal(err)
	}
	if p, err := db.NextPad(ctx, linkName, PadName{}); !errors.Is(err, ErrNoPad) {
		t.Errorf("the next pad of a link that has spent both: %v, %v", p.PadName, err)
	}
	for _, want := range held.Pads {
		p, err := db.NextPad(ctx, otherLink, PadName{})
		if err != nil || p.PadName != want.PadName {
			t.Errorf("the next pad of the other link: %v, %v; want %v", p.PadName, err, want.PadName)
		}
		if err := db.SpendPad(ctx, otherLink, 1, want.PadName); err != nil {
			t.Error(err)
		}
	}
}
