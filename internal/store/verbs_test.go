package store

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// TestLifeOfKeys goes through the verbs of one site in the order of a key's life.
func TestLifeOfKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()

	b := s.fill(db, 130, mine) // chunks of 64, 64 and 2
	leases, err := db.Lease(ctx, linkName, 2)
	if err != nil {
		t.Fatal(err)
	}
	if len(leases) != 2 || len(leases[0].Atoms) != 64 || leases[1].First != 64 || leases[0].BlockRef != b.BlockRef {
		t.Fatalf("leased %+v", leases)
	}
	if diff := cmp.Diff(b.Atoms[:64], leases[0].Atoms, cmpopts.IgnoreFields(Atom{}, "Place")); diff != "" {
		t.Errorf("the lease's atoms (-stored +leased):\n%s", diff)
	}
	if n, err := db.Stored(ctx, linkName); n != 130 || err != nil {
		t.Errorf("Stored: %d, %v; want 130", n, err)
	}
	if n, err := db.Free(ctx, linkName, 10); n != 1 || err != nil {
		t.Errorf("Free: %d, %v; want 1", n, err)
	}

	atoms := leases[0].Atoms
	due := s.due(atoms[0].ID, "bob", "alice")
	err = db.Serve(ctx, ServeJob{Atoms: ids(atoms[:2]), Due: []Due{due}, Events: []audit.Event{served("r1", b.BlockRef, atoms[:2]...)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Serve(ctx, ServeJob{Atoms: ids(atoms[1:3]), Events: []audit.Event{served("r2", b.BlockRef, atoms[1:3]...)}}); !errors.Is(err, ErrShort) {
		t.Errorf("serving a served atom: %v, want ErrShort", err)
	}
	if n, _ := db.Stored(ctx, linkName); n != 128 {
		t.Errorf("Stored after Serve: %d, want 128: the refused request took something", n)
	}

	rows, named, err := db.FindDue(ctx, sae("bob"), []key.ID{due.Key, atoms[5].ID})
	if err != nil || !named[due.Key] || named[atoms[5].ID] {
		t.Fatalf("FindDue: %v, %v", named, err)
	}
	want := due
	want.Node, want.Run = "n1", 1
	if diff := cmp.Diff(Taken{Due: want}, rows[due.Key], cmpOpts); diff != "" {
		t.Errorf("the due row (-written +read):\n%s", diff)
	}
	rows, named, err = db.FindDue(ctx, sae("carol"), []key.ID{due.Key})
	if err != nil || len(rows) != 0 || !named[due.Key] {
		t.Errorf("FindDue of an outsider: %v, %v, %v", rows, named, err)
	}

	take := TakeJob{
		SAE: sae("bob"), Rows: []DueRef{due.ref()}, How: GoneTaken,
		Events: []audit.Event{{Action: audit.DecKeys, Outcome: audit.Done, Keys: []key.ID{due.Key}}},
	}
	if err := db.Take(ctx, TakeJob{SAE: sae("carol"), Rows: take.Rows, How: GoneTaken}); !errors.Is(err, ErrShort) {
		t.Errorf("taking another's key: %v, want ErrShort", err)
	}
	if err := db.Take(ctx, take); err != nil {
		t.Fatal(err)
	}
	if err := db.Take(ctx, take); !errors.Is(err, ErrShort) {
		t.Errorf("a second take: %v, want ErrShort", err)
	}
	rows, _, err = db.FindDue(ctx, sae("bob"), []key.ID{due.Key})
	if r := rows[due.Key]; err != nil || r.Gone != GoneTaken || r.CT != nil {
		t.Errorf("after the take: %+v, %v", r, err)
	}

	events := s.check()
	if n := countOf(events, audit.EncKeys); n != 1 {
		t.Errorf("%d enc_keys events, want 1", n)
	}
	if n := countOf(events, audit.DecKeys); n != 1 {
		t.Errorf("%d dec_keys events, want 1", n)
	}
}

func countOf(events []recorded, a audit.Action) (n int) {
	for _, e := range events {
		if e.Action == a {
			n++
		}
	}
	return n
}
