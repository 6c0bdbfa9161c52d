package store

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// TestPlaces: whatever is said of where atoms lie, those that were named go, and no
// others.
func TestPlaces(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.fill(db, 64, mine)
	leases, err := db.Lease(t.Context(), linkName, 1)
	if err != nil {
		t.Fatal(err)
	}
	a := leases[0].Atoms
	pooled := func() int { return ask[int](s, "SELECT count(*) FROM key") }
	serve := func(atoms []Atom, at []Place) error {
		return db.Serve(t.Context(), ServeJob{Atoms: ids(atoms), Places: at, Events: []audit.Event{served("r", leases[0].BlockRef, atoms...)}})
	}
	must := func(err error, left int) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
		if n := pooled(); n != left {
			t.Errorf("%d atoms are in the pool, want %d", n, left)
		}
	}
	short := func(err error, left int) {
		t.Helper()
		if !errors.Is(err, ErrShort) {
			t.Errorf("an atom that is gone is answered %v", err)
		}
		must(nil, left)
	}

	must(serve(a[:2], places(a[:2])), 62)
	short(serve(a[1:3], places(a[1:3])), 62)
	must(serve(a[2:4], []Place{a[4].Place, a[5].Place}), 60) // others' places
	must(serve(a[4:6], []Place{a[4].Place, {}}), 58)
	short(serve(a[:1], places(a[6:7])), 58)
	s.super(func(conn *pgx.Conn) error { // moves every row
		_, err := conn.Exec(t.Context(), "VACUUM FULL "+keyTable(s.epoch()))
		return err
	})
	must(serve(a[6:10], places(a[6:10])), 54)
	must(serve(a[60:], places(a[60:])), 50)
	s.check()
}

func places(atoms []Atom) []Place {
	var at []Place
	for _, a := range atoms {
		at = append(at, a.Place)
	}
	return at
}
