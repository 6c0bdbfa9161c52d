package store

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

// states are those of keys at this site, as its tables tell them; left is what atoms have
// become that are in none.
func states(t *rapid.T, conn *pgx.Conn, atoms []Atom, left map[key.ID]key.State) map[key.ID]key.State {
	var ids []key.ID
	now := make(map[key.ID]key.State)
	for _, a := range atoms {
		ids = append(ids, a.ID)
		now[a.ID] = left[a.ID]
	}
	rows, _ := conn.Query(context.Background(), `SELECT id, 'pool' FROM key WHERE id = ANY($1::uuid[])
		UNION ALL SELECT key_id, coalesce(gone_how, 'live') FROM due WHERE key_id = ANY($1::uuid[])`, uuids(ids))
	seen := make(map[key.ID]bool)
	var id [16]byte
	var how string
	_, err := pgx.ForEachRow(rows, []any{&id, &how}, func() error {
		if seen[id] {
			return fmt.Errorf("key %s is in the pool and assigned", key.ID(id))
		}
		seen[id] = true
		now[id] = map[string]key.State{
			"pool": key.Stored, "live": key.Cached, GoneTaken: key.Consumed, GoneConsumed: key.Consumed, GoneExpired: key.Expired, GoneVoid: key.Void,
		}[how]
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// TestLawfulMoves: whatever is asked for in whatever order, and however often, a key
// moves by the one table of lawful moves, and not at all from a state that is an end.
func TestLawfulMoves(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	pool := func(link string, atoms []audit.Atoms) audit.Event {
		return audit.Event{Action: audit.Expire, Outcome: audit.Done, Link: link, Atoms: atoms}
	}
	dues := func(rows []DueRef) audit.Event {
		return audit.Event{Action: audit.Expire, Outcome: audit.Done, Count: len(rows)}
	}
	conn, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser)+" search_path=kme")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rapid.Check(t, func(t *rapid.T) {
		b := s.fill(db, 3, mine)
		left := make(map[key.ID]key.State)
		was := map[key.ID]key.State{}
		for _, a := range b.Atoms {
			was[a.ID] = key.Stored
		}
		gone := func(to key.State) { // of those that were in the pool
			for id, state := range was {
				if state == key.Stored {
					left[id] = to
				}
			}
		}
		n := rapid.IntRange(2, 5).Draw(t, "acts")
		for range n {
			atom := rapid.SampledFrom(b.Atoms).Draw(t, "atom")
			due := s.due(atom.ID, "bob", "alice")
			var err error
			act := rapid.SampledFrom([]string{"serve", "assign", "take", "consume", "expire due", "expire pool", "burn", "compromise"}).Draw(t, "act")
			switch act {
			case "serve":
				if err = db.Serve(ctx, ServeJob{Atoms: []key.ID{atom.ID}, Events: []audit.Event{served("r", b.BlockRef, atom)}}); err == nil {
					left[atom.ID] = key.Served
				}
			case "assign":
				err = db.Serve(ctx, ServeJob{Atoms: []key.ID{atom.ID}, Due: []Due{due}, Events: []audit.Event{served("r", b.BlockRef, atom)}})
			case "take":
				err = db.Take(ctx, TakeJob{SAE: due.SAE, Rows: []DueRef{due.ref()}, How: GoneTaken})
			case "consume":
				err = db.Take(ctx, TakeJob{SAE: due.SAE, Rows: []DueRef{due.ref()}, How: GoneConsumed})
			case "expire due":
				_, err = db.ExpireDue(ctx, s.now().Add(90*time.Minute), 100, dues)
			case "expire pool":
				gone(key.Expired)
				_, err = db.ExpirePool(ctx, linkName, s.epoch()+1, pool)
			case "burn":
				if was[atom.ID] == key.Stored {
					left[atom.ID] = key.Void
				}
				err = db.Burn(ctx, BurnJob{Atoms: []key.ID{atom.ID}, Event: func(burned []key.ID) audit.Event {
					return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: rangeOf(b.BlockRef, atom.Index, len(burned))}
				}})
			case "compromise":
				gone(key.Void)
				var c Compromise
				if c, err = db.BeginCompromise(ctx, Compromise{First: s.epoch(), Last: s.epoch(), Why: "a test"}, nil, audit.Event{Action: audit.Compromise, Outcome: audit.Done}); err != nil {
					break
				}
				_, _, errPool := db.BurnCompromised(ctx, c, pool)
				_, errDue := db.VoidCompromised(ctx, c, 100, dues)
				if errPool != nil || errDue != nil {
					t.Fatal(errPool, errDue)
				}
			}
			t.Logf("%s of atom %d: %v", act, atom.Index, err)
			now := states(t, conn, b.Atoms, left)
			for _, a := range b.Atoms {
				if now[a.ID] != was[a.ID] && !key.Lawful(was[a.ID], now[a.ID]) {
					t.Fatalf("%s moved atom %d from %s to %s", act, a.Index, was[a.ID], now[a.ID])
				}
			}
			was = now
		}
	})
	s.check()
}
