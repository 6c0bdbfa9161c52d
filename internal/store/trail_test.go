package store

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// Old checkpoints go, but for the last of each hour and the last of each hour that each
// witness has signed; those of the log's last day stay, and what stays is never less
// than that, however often it is done.
func TestOldCheckpointsEnd(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n0")
	random := rand.New(rand.NewPCG(1, 2))
	type name struct{ Origin, Size int64 }
	kept := make(map[name]bool)
	total := 0
	s.super(func(conn *pgx.Conn) error {
		for origin := int64(1); origin <= 2; origin++ {
			at, size := start0.AddDate(0, 0, -int(origin)), int64(0)
			last := make(map[string]name) // by hour, and by hour and witness
			var batch pgx.Batch
			batch.Queue("INSERT INTO audit_log (origin, name, vkey, size, begun_at) VALUES ($1, $2, '', 0, $3)", origin, fmt.Sprint("log/", origin), at)
			for end := at.Add(50 * time.Hour); at.Before(end); at = at.Add(time.Duration(1+random.IntN(900)) * time.Second) {
				size += 1 + random.Int64N(9)
				n := name{origin, size}
				batch.Queue("INSERT INTO audit_checkpoint (origin, size, note, at) VALUES ($1, $2, '', $3)", origin, size, at)
				total++
				h := at.Truncate(time.Hour).String()
				last[h] = n
				for _, witness := range []string{"km2", "other", "gone"} {
					if random.IntN(3) > 0 && (witness != "gone" || size < 200) {
						batch.Queue("INSERT INTO audit_cosignature (origin, size, witness, line) VALUES ($1, $2, $3, '')", origin, size, witness)
						last[h+witness] = n
					}
				}
				batch.Queue("UPDATE audit_log SET size = $2 WHERE origin = $1", origin, size)
			}
			if err := conn.SendBatch(t.Context(), &batch).Close(); err != nil {
				return err
			}
			rows, _ := conn.Query(t.Context(), `SELECT c.origin, c.size FROM audit_checkpoint c
				WHERE origin = $1 AND at >= (SELECT max(at) - interval '24 hours' FROM audit_checkpoint WHERE origin = $1)`, origin)
			young, err := pgx.CollectRows(rows, pgx.RowToStructByPos[name])
			if err != nil {
				return err
			}
			for _, n := range young {
				kept[n] = true
			}
			for _, n := range last {
				kept[n] = true
			}
		}
		return nil
	})
	var n int
	if err := db.pool.QueryRow(t.Context(), "SELECT end_audit_checkpoints(7)").Scan(&n); err != nil || n != 7 {
		t.Fatalf("%d of 7 ended: %v", n, err)
	}
	ended, err := db.EndCheckpoints(t.Context())
	if err != nil || ended != total-7-len(kept) {
		t.Errorf("%d ended of %d, and %d should stay: %v", ended+7, total, len(kept), err)
	}
	if ended, err := db.EndCheckpoints(t.Context()); err != nil || ended != 0 {
		t.Errorf("%d more ended: %v", ended, err)
	}
	rows, _ := db.pool.Query(t.Context(), "SELECT origin, size FROM audit_checkpoint")
	left, err := pgx.CollectRows(rows, pgx.RowToStructByPos[name])
	if err != nil {
		t.Fatal(err)
	}
	is := make(map[name]bool)
	for _, n := range left {
		is[n] = true
	}
	if diff := cmp.Diff(kept, is); diff != "" {
		t.Errorf("what is left (-want +got):\n%s", diff)
	}
	if len(left) >= total || len(left) < 100 {
		t.Errorf("%d of %d are left: this test shows little", len(left), total)
	}
	if _, err := db.pool.Exec(t.Context(), "DELETE FROM audit_checkpoint"); err == nil {
		t.Error("the daemon may delete checkpoints as it likes")
	}
}

// The schema's migrations are told of once, whoever has applied them and whichever node
// is first to start after that.
func TestSchemaIsToldOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n0")
	var told []SchemaChange
	tell := func(want ...SchemaChange) {
		t.Helper()
		told = nil
		for range 2 {
			err := db.TellSchema(t.Context(), func(c SchemaChange) audit.Event {
				told = append(told, c)
				return audit.Event{Action: audit.Migrated, Outcome: audit.Done}
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		for i := range told {
			if since := time.Since(told[i].Last); since < -time.Minute || since > time.Hour {
				t.Errorf("the last migration was %v ago", since)
			}
			told[i].Last = time.Time{}
		}
		if diff := cmp.Diff(want, told); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
	}
	tell(SchemaChange{To: schemaVersion})
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), "INSERT INTO kme.goose_db_version (version_id, is_applied) VALUES (998, true), (999, true), (1000, false)")
		return err
	})
	tell(SchemaChange{From: schemaVersion, To: 999})
	var events int
	s.super(func(conn *pgx.Conn) error {
		return conn.QueryRow(t.Context(), "SELECT count(*) FROM kme.audit WHERE body::json->>'action' = $1", string(audit.Migrated)).Scan(&events)
	})
	if events != 2 {
		t.Errorf("%d events are recorded", events)
	}
}
