package kme

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// change runs SQL as somebody who has the database, and says how many rows it changed.
func (s *site) change(sql string, args ...any) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.cluster.DSN(pgdev.Superuser, s.name)+" search_path=kme")
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	tag, err := conn.Exec(s.t.Context(), sql, args...)
	if err != nil || tag.RowsAffected() == 0 {
		s.t.Fatalf("%s: %s, %v", sql, tag, err)
	}
}

// TestTamperedDue: whatever somebody with the whole database makes of the row of a key
// that waits, the key does not leave, the row is not used up, and the audit tells of it.
func TestTamperedDue(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	run(t, k)
	const swap = `WITH a AS (SELECT * FROM due WHERE key_id = $1), b AS (SELECT * FROM due WHERE key_id = $2)
		UPDATE due SET iv = CASE due.key_id WHEN $1 THEN b.iv ELSE a.iv END, ct = CASE due.key_id WHEN $1 THEN b.ct ELSE a.ct END
		FROM a, b WHERE due.key_id IN ($1, $2)`
	first := func(sql string) func(a, b key.ID) (string, []any) {
		return func(a, _ key.ID) (string, []any) {
			return "UPDATE due SET " + sql + " WHERE key_id = $1", []any{[16]byte(a)}
		}
	}
	for name, tamper := range map[string]func(a, b key.ID) (string, []any){
		"two blobs swapped":      func(a, b key.ID) (string, []any) { return swap, []any{[16]byte(a), [16]byte(b)} },
		"a bit of the blob":      first("ct = set_bit(ct, 77, 1 - get_bit(ct, 77))"),
		"a bit of the tag":       first("ct = set_bit(ct, 8 * length(ct) - 1, 1 - get_bit(ct, 8 * length(ct) - 1))"),
		"a bit of the IV":        first("iv = set_bit(iv, 5, 1 - get_bit(iv, 5))"),
		"a shorter blob":         first("ct = substr(ct, 1, 20)"),
		"another master":         first("master = 'both'"),
		"another lifetime":       first("expires_at = expires_at + interval '1 minute'"),
		"may be read again":      first("reread = true"),
		"another provenance":     first("provenance = 'qkd'"),
		"another size":           first("bits = 128"),
		"under another KEK":      first("kek = (SELECT min(id) FROM kek WHERE id <> due.kek AND state = 'open')"),
		"moved to another taker": first("sae = 'both'"),
		"moved to a link":        first("link = 'fibre'"),
		"of an earlier version":  first("version = 1"),
		"of no version":          first("version = 7, link = 'fibre'"),
		"the blob of another row": func(a, b key.ID) (string, []any) {
			return "UPDATE due SET ct = o.ct, iv = o.iv FROM due o WHERE due.key_id = $1 AND o.key_id = $2", []any{[16]byte(a), [16]byte(b)}
		},
		"replayed under a new key": func(a, b key.ID) (string, []any) {
			return "UPDATE due SET key_id = $3 WHERE key_id = $1 AND $2::uuid IS NOT NULL", []any{[16]byte(a), [16]byte(b), [16]byte(later(a))}
		},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := get(t, k, 2, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			sql, args := tamper(keys[0].ID, keys[1].ID)
			s.change(sql, args...)
			id, taker, master := keys[0].ID, "anna", "alice"
			switch name {
			case "replayed under a new key":
				id = later(id)
			case "moved to another taker":
				taker = "both"
			case "another master":
				master = "both"
			}
			c := k.callOf(t, taker, audit.DecKeys)
			c.ev.Keys = []key.ID{id}
			got, err := k.take(t.Context(), c, saeID(t, master), c.ev.Keys, false)
			if len(got) != 0 || !errors.Is(err, hsm.ErrTampered) {
				t.Fatalf("%d keys, %v, want none: it was tampered with", len(got), err)
			}
			if err := c.refuse(t.Context(), err); problem.KindOf(err) != problem.Unavailable {
				t.Errorf("the caller is told %v", err)
			}
			if n := s.ask(fmt.Sprintf("SELECT count(*) FROM kme.due WHERE key_id = '%s' AND ct IS NOT NULL", id)); n != 1 {
				t.Errorf("%d rows wait, want it left as evidence", n)
			}
			var last told // of what was asked for
			for _, ev := range s.audit() {
				if ev.Action == string(audit.DecKeys) {
					last = ev
				}
			}
			if last.Outcome != string(audit.Failed) || !strings.Contains(last.Reason, "was changed") {
				t.Errorf("recorded: %+v", last)
			}
		})
	}
	for _, a := range k.Alarms() {
		if a.Name == "tampered-due" {
			return
		}
	}
	t.Errorf("alarms: %v, want one of tampering", k.Alarms())
}

// later is another key of the same epoch.
func later(id key.ID) key.ID {
	id[15]++
	return id
}

// TestTamperedPool: likewise of atoms in the pool, which are opened from the lease.
func TestTamperedPool(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	run(t, k)
	km2 := kmeID(t, "km2")
	for _, id := range []string{"fibre", "other"} {
		if err := k.Store.EnsureLink(t.Context(), id, km2, handover.Alice); err != nil {
			t.Fatal(err)
		}
		if err := k.Store.OpenSession(t.Context(), id, 1, k.own(audit.LinkOpen)); err != nil {
			t.Fatal(err)
		}
	}
	l := &link{LinkConfig: LinkConfig{ID: "fibre", Peer: km2, End: handover.Alice, Provenance: key.Simulated}, k: k}
	const atoms = 3
	block := int64(0)
	secret := make([]byte, atoms*key.AtomBytes)
	for i := range secret {
		secret[i] = byte(i)
	}
	hold := func(t *testing.T) {
		block++
		terms := distill.Terms{Epoch: int64(key.EpochAt(s.now(), time.Hour)), Owners: "a"}
		b := qlink.Block{Outcome: distill.Outcome{Session: 1, Block: block, Terms: terms, Bits: bytes.Clone(secret), Length: atoms * key.AtomBits}, Provenance: key.Simulated}
		if err := l.intake(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		s.change("UPDATE block SET state = 'ready' WHERE id = $1", block)
	}
	hold(t)
	for name, sql := range map[string]string{
		"":                     "", // positive control: it opens
		"two blobs swapped":    "UPDATE key SET iv = o.iv, ct = o.ct FROM key o WHERE key.chunk = o.chunk AND o.index = 1 - key.index AND key.index < 2",
		"a bit of the blob":    "UPDATE key SET ct = set_bit(ct, 9, 1 - get_bit(ct, 9)) WHERE index = 0",
		"a bit of the IV":      "UPDATE key SET iv = set_bit(iv, 9, 1 - get_bit(iv, 9)) WHERE index = 0",
		"another place":        "UPDATE key SET index = 7 WHERE index = 0",
		"of another block":     "UPDATE chunk SET block = (SELECT min(id) FROM block WHERE link = 'fibre'), first = 64 * (1 + id) WHERE block = (SELECT max(id) FROM block WHERE link = 'fibre')",
		"another provenance":   "UPDATE block SET provenance = 'qkd' WHERE id = (SELECT max(id) FROM block)",
		"under another KEK":    "UPDATE key SET kek = (SELECT max(id) FROM kek WHERE state = 'open')",
		"replayed under an ID": "UPDATE key SET id = (substr(id::text, 1, 35) || CASE right(id::text, 1) WHEN '0' THEN '1' ELSE '0' END)::uuid WHERE index = 0",
	} {
		t.Run(name, func(t *testing.T) {
			s.change("DELETE FROM key")
			s.change("UPDATE chunk SET remaining = 0 WHERE remaining >= 0")
			hold(t)
			if sql != "" {
				s.change(sql)
			}
			leases, err := k.Store.Lease(t.Context(), "fibre", 8)
			if err != nil || len(leases) != 1 {
				t.Fatalf("%d leases, %v", len(leases), err)
			}
			failed := 0
			for _, a := range leases[0].Atoms {
				if (a.Index == 1 || a.Index == 2) && sql != "" && !strings.Contains(name, "another KEK") {
					continue
				}
				got, bad, err := l.open(t.Context(), []lent{{a, &leases[0]}}, order{number: 1, bits: 256, ttl: time.Hour})
				switch {
				case sql == "" && (err != nil || !bytes.Equal(got.keys[0].Material.Reveal(), secret[a.Index*32:][:32])):
					t.Errorf("an honest row: %v", err)
				case sql != "" && (!errors.Is(err, hsm.ErrTampered) || len(got.keys) != 0 || bad.ID != a.ID):
					t.Errorf("%d keys, %v, want none: it was tampered with", len(got.keys), err)
				}
				failed++
			}
			if failed == 0 {
				t.Error("nothing was tried")
			}
			if sql == "" {
				return
			}
			var all []lent
			for _, a := range leases[0].Atoms {
				all = append(all, lent{a, &leases[0]})
			}
			got, bad, err := l.open(t.Context(), all, order{number: len(all), bits: 256, ttl: time.Hour})
			if !errors.Is(err, hsm.ErrTampered) || len(got.keys) != 0 {
				t.Errorf("%d keys of %d atoms at once, %v, want none: one was tampered with", len(got.keys), len(all), err)
			}
			if _, _, err := l.open(t.Context(), []lent{bad}, order{number: 1, bits: 256, ttl: time.Hour}); !errors.Is(err, hsm.ErrTampered) {
				t.Errorf("atom %d is blamed, and alone: %v", bad.Index, err)
			}
		})
	}

	t.Run("one of a batch", func(t *testing.T) { // of the peer's: the others of it are well
		s.change("DELETE FROM key")
		s.change("UPDATE chunk SET remaining = 0 WHERE remaining >= 0")
		hold(t)
		s.change("UPDATE key SET ct = set_bit(ct, 9, 1 - get_bit(ct, 9)) WHERE index = 1")
		leases, err := k.Store.Lease(t.Context(), "fibre", 8)
		if err != nil || len(leases) != 1 || len(leases[0].Atoms) != atoms {
			t.Fatalf("%d leases, %v", len(leases), err)
		}
		lease, batch, pooled := leases[0], handover.Announce{}, make(map[key.ID]store.PooledAtom)
		for _, a := range lease.Atoms {
			pooled[a.ID] = store.PooledAtom{Atom: a, Chunk: lease.Chunk, BlockRef: lease.BlockRef, Owner: handover.Alice, BlockState: handover.Ready, Epoch: lease.Epoch, Provenance: lease.Provenance}
			want := handover.Key{Session: lease.Session, Block: lease.Block, First: a.Index, Atoms: []key.ID{a.ID}}
			batch.Requests = append(batch.Requests, handover.Request{
				ID: fmt.Sprint(a.Index), Link: l.ID, Master: saeID(t, "bob"), Slaves: []identity.SAE{saeID(t, "alice"), saeID(t, "anna")}, Bits: 200, TTL: time.Hour.Milliseconds(), Keys: []handover.Key{want},
			})
		}
		there := &link{LinkConfig: LinkConfig{ID: "fibre", Peer: km2, End: handover.Bob, Provenance: key.Simulated}, k: k}
		p := &prepared{due: make(map[string][]store.Due), refused: make(map[string]string), unusable: make(map[string][]key.ID)}
		if err := there.seal(t.Context(), batch, batch.Requests, pooled, p); err != nil {
			t.Fatal(err)
		}
		for _, r := range batch.Requests {
			id := r.Keys[0].ID()
			if r.ID == "1" {
				if p.refused[r.ID] == "" || len(p.due[r.ID]) != 0 || !slices.Equal(p.unusable[r.ID], []key.ID{id}) {
					t.Errorf("of the spoilt atom: refused %q, %d rows, unusable %v", p.refused[r.ID], len(p.due[r.ID]), p.unusable[r.ID])
				}
				continue
			}
			if p.refused[r.ID] != "" || len(p.due[r.ID]) != 2 {
				t.Fatalf("atom %s beside it: refused %q, %d rows", r.ID, p.refused[r.ID], len(p.due[r.ID]))
			}
			for i, d := range p.due[r.ID] {
				plains, _, err := k.unseal(t.Context(), k.wrappedDue(d))
				if err != nil || !bytes.Equal(plains[0], secret[r.Keys[0].First*32:][:25]) || d.Key != id || d.SAE != r.Slaves[i] {
					t.Errorf("atom %s for %s: %v; the row is of %s for %s", r.ID, r.Slaves[i], err, d.Key, d.SAE)
				}
			}
		}
	})
}

// TestDueOfEarlierRelease: a key that was assigned before its row said to what its blob is
// bound is taken, and a later one is not taken for such.
func TestDueOfEarlierRelease(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	d := store.Due{
		Key: key.NewLocalID(s.now()), SAE: saeID(t, "anna"), Master: saeID(t, "alice"), Bits: 256, Provenance: key.Simulated,
		ExpiresAt: k.expiry(time.Hour), Link: "fibre", Version: 1,
	}
	o, err := k.keks.forExpiry(t.Context(), &d)
	if err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte{7}, 32)
	sealed, err := o.kek.WrapAll(t.Context(), [][]byte{secret}, [][]byte{k.dueAAD(d)})
	if err != nil {
		t.Fatal(err)
	}
	s.change(`INSERT INTO due (key_id, sae, expiry_epoch, master, bits, provenance, kek, iv, ct, link, peer, node, run, batch, expires_at, reread)
		VALUES ($1, 'anna', $2, 'alice', 256, 'simulated', $3, $4, $5, 'fibre', '', 'a', 1, 0, $6, false)`,
		[16]byte(d.Key), int64(d.ExpiryEpoch), d.KEK, sealed[0].IV[:], sealed[0].CT, d.ExpiresAt)
	got, err := takes(t, k, d.Key)
	if err != nil || len(got) != 1 || !bytes.Equal(got[0].material.Reveal(), secret) || got[0].row.Version != 1 || got[0].row.Link != "fibre" {
		t.Errorf("%d keys, %v", len(got), err)
	}
	keys, err := get(t, k, 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.ask(fmt.Sprintf("SELECT version FROM kme.due WHERE key_id = '%s'", keys[0].ID)); n != dueVersion {
		t.Errorf("a key that is assigned now is of version %d", n)
	}
	if got, err := takes(t, k, keys[0].ID); err != nil || !bytes.Equal(got[0].material.Reveal(), keys[0].Material.Reveal()) {
		t.Errorf("of version %d: %v", dueVersion, err)
	}
}
