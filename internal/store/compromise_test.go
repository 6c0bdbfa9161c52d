package store

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// burnHeard hears of a compromise and burns what it means, unless it is done already.
func (s *site) burnHeard(db *DB, m handover.Compromise) (burned, voided int) {
	s.t.Helper()
	ctx := context.Background()
	c, err := db.HearCompromise(ctx, kme("KM2"), m, audit.Event{Action: audit.Compromise, Outcome: audit.Done, Link: m.Link})
	if err != nil {
		s.t.Fatal(err)
	}
	if c.Done {
		return 0, 0
	}
	for {
		n, chunks, err := db.BurnCompromised(ctx, c, func(link string, atoms []audit.Atoms) audit.Event {
			return audit.Event{Action: audit.Burn, Outcome: audit.Done, Link: link, Atoms: atoms}
		})
		if err != nil {
			s.t.Fatal(err)
		}
		if burned += n; chunks == 0 {
			break
		}
	}
	voided, err = db.VoidCompromised(ctx, c, 100, voidedRows)
	if err == nil {
		err = db.EndCompromise(ctx, c.ID)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return burned, voided
}

func voidedRows(rows []DueRef) audit.Event {
	return audit.Event{Action: audit.VoidKeys, Outcome: audit.Done, Count: len(rows)}
}

// TestCompromiseOfTwoLinks: officers at a peer that two links lead to mean both by one act,
// and each is burned here. After the peer's database was set back its acts have the numbers
// of earlier ones, and mean other keys. The same, heard again, is done.
func TestCompromiseOfTwoLinks(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	s.openOther(db)
	hear(t, db, 1)
	batch := int64(0)
	fill := func(link string) { // 63 keys in the pool, and one that waits
		b := s.fillLink(db, link, key.ChunkAtoms, theirs)
		batch++
		mustAssign(t, db, s.assignJob(1, batch, request(link, b.BlockRef, b.Atoms[0])), handover.Fresh, "")
	}
	meant := func(link string, session, block int64) handover.Compromise { // which is above all that there are
		e := int64(s.epoch())
		return handover.Compromise{Act: 7, Link: link, First: e, Last: e, Session: session, Block: block}
	}
	wider := func(m handover.Compromise) handover.Compromise { m.Last++; return m }
	fill(linkName)
	fill(otherLink)
	for _, step := range []struct {
		name   string
		m      handover.Compromise
		burned int
	}{
		{"the second link", meant(otherLink, 1, 100), 63},
		{"the second link, again", meant(otherLink, 1, 100), 0},
		{"the first link", meant(linkName, 1, 100), 63},
		{"the first link, again", meant(linkName, 1, 100), 0},
	} {
		if burned, voided := s.burnHeard(db, step.m); burned != step.burned || voided != step.burned/63 {
			t.Errorf("%s: %d keys burned and %d voided, want %d and %d", step.name, burned, voided, step.burned, step.burned/63)
		}
	}
	for name, m := range map[string]handover.Compromise{
		"another block": meant(linkName, 1, 101), "another session": meant(linkName, 2, 100), "other epochs": wider(meant(linkName, 1, 100)),
	} {
		fill(linkName)
		if burned, voided := s.burnHeard(db, m); burned != 63 || voided != 1 {
			t.Errorf("an act of that number and %s: %d keys burned and %d voided, want 63 and 1", name, burned, voided)
		}
	}
	fill(linkName)
	if burned, voided := s.burnHeard(db, meant(linkName, 1, 1)); burned != 0 || voided != 1 {
		t.Errorf("an act of that number and earlier blocks: %d keys burned and %d voided, want those that wait, 1", burned, voided)
	}
	if left, err := db.UnfinishedCompromises(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("unfinished: %v, %v", left, err)
	}
	all, err := db.Compromises(t.Context(), 0)
	if err != nil || len(all) != 6 {
		t.Errorf("%d compromises are known, want 6: %v", len(all), err)
	}

	// A peer that makes up acts is heard no more that day.
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), `INSERT INTO compromise (peer, act, link, first_epoch, last_epoch, session, block, chunks, why, done_at)
			SELECT 'KM2', n, 'fibre', 0, 0, 1, 1, 0, '', $2 FROM generate_series(100, 99 + $1::int) n`, maxHeard-len(all), s.now())
		return err
	})
	one := handover.Compromise{Act: 8, Link: linkName, First: 1, Last: 1, Session: 1, Block: 1}
	if _, err := db.HearCompromise(t.Context(), kme("KM2"), one, audit.Event{}); !errors.Is(err, ErrTooManyCompromises) {
		t.Errorf("one more than is heard in a day: %v", err)
	}
	if burned, voided := s.burnHeard(db, meant(otherLink, 1, 100)); burned != 0 || voided != 0 {
		t.Errorf("one that is done, again: %d keys burned and %d voided", burned, voided)
	}
	s.step(25 * hour)
	s.burnHeard(db, one)
	s.check()
}

// TestCompromiseIsProven: what waits is looked for in a read that an old primary, which may
// not know of all that waits, cannot end: otherwise the compromise would be done without it.
func TestCompromiseIsProven(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	hear(t, db, 1)
	b := s.fill(db, 64, theirs)
	mustAssign(t, db, s.assignJob(1, 1, request("r", b.BlockRef, b.Atoms[0])), handover.Fresh, "")
	c := Compromise{Link: linkName, First: s.epoch(), Last: s.epoch(), Why: "a test"}
	s.provable(false)
	if n, err := db.VoidCompromised(t.Context(), c, 100, voidedRows); err == nil {
		t.Errorf("%d keys were voided, and nothing is known for sure", n)
	}
	s.provable(true)
	if n, err := db.VoidCompromised(t.Context(), c, 100, voidedRows); n != 1 || err != nil {
		t.Errorf("%d keys were voided, %v; want 1", n, err)
	}
	if diff := cmp.Diff([]string{"?"}, s.links(db, b.Atoms[0].ID)); diff != "" {
		t.Errorf("what waits (-want +got):\n%s", diff)
	}
}

// provable says whether reads can end for which proven is used. As at an old primary, one
// that cannot fails at its end.
func (s *site) provable(may bool) {
	s.t.Helper()
	verb, who := "REVOKE", "FROM PUBLIC"
	if may {
		verb, who = "GRANT", "TO PUBLIC"
	}
	s.super(func(conn *pgx.Conn) error {
		var functions string
		err := conn.QueryRow(context.Background(), "SELECT string_agg(oid::regprocedure::text, ', ') FROM pg_proc WHERE proname = 'pg_logical_emit_message'").Scan(&functions)
		if err == nil {
			_, err = conn.Exec(context.Background(), verb+" EXECUTE ON FUNCTION "+functions+" "+who)
		}
		return err
	})
}
