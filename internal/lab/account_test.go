package lab

import (
	"context"
	"iter"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// close stops the clients, has the slaves take what they have not, and holds the
// clients' account against itself and against the audit of both sites.
func (f *traffic) close(t testing.TB) {
	t.Helper()
	f.end()
	waiting := func(a *account) bool { return !a.taken && !a.gone }
	left := 0
	for id, a := range f.ofState(waiting) {
		left++
		c := newClient(a.route.slaves)
		for range 3 { // a 503 is lawful, now and then
			if f.takeOnce(a.route, c, []key.ID{id}) {
				break
			}
		}
	}
	for id, a := range f.ofState(waiting) {
		t.Errorf("%v: key %s, which its master has, can still not be taken", a.route, id)
	}
	lost := 0
	for range f.ofState(func(a *account) bool { return a.gone }) {
		lost++
	}
	for _, r := range f.routes {
		t.Logf("%v: %d requests served, %d not; %d taken, %d not %v", r, r.served.Load(), r.unserved.Load(), r.taken.Load(), r.untaken.Load(), r.why)
	}
	t.Logf("%d keys at their masters; %d of them taken at the end, %d taken by requests without an answer", len(f.keys), left, lost)
	settled(t, f.lab)
	f.compareAudit(t)
	comparePools(t, f.lab, f.recovered, f.tooOld)
	for _, w := range f.wrong {
		t.Error(w)
	}
	f.compareAnswers(t)
}

// ofState lists the accounts of a kind.
func (f *traffic) ofState(is func(*account) bool) iter.Seq2[key.ID, *account] {
	type entry struct {
		id key.ID
		a  *account
	}
	var found []entry
	f.mu.Lock()
	for id, a := range f.keys {
		for _, a := range append(slices.Clone(a.copies), a) {
			if is(a) {
				found = append(found, entry{id, a})
			}
		}
	}
	f.mu.Unlock()
	return func(yield func(key.ID, *account) bool) {
		for _, e := range found {
			if !yield(e.id, e.a) {
				return
			}
		}
	}
}

// compareAudit says what the audit of the two sites and the clients do not agree on:
// that each key at a client was handed out once, to this client, and that a key
// whose answer was lost was one.
func (f *traffic) compareAudit(t testing.TB) {
	t.Helper()
	type act struct {
		site, action, sae string
		id                key.ID
	}
	done := make(map[act]int)
	var served, taken int
	for _, s := range []*Site{f.lab.KM1, f.lab.KM2} {
		e, err := s.gather(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range e.events {
			if ev.Outcome != "done" || ev.Reread || !slices.Contains([]string{encKeys, decKeys, assign}, ev.Action) {
				continue
			}
			who := []string{ev.Actor.ID}
			if ev.Action == assign {
				who = ev.Slaves
			}
			for _, id := range ev.Keys {
				for _, w := range who {
					done[act{s.Name, ev.Action, w, id}]++
				}
			}
			if ev.Action == encKeys {
				served += len(ev.Keys)
			}
			if ev.Action == decKeys {
				taken += len(ev.Keys)
			}
		}
	}
	atSlaves := 0
	for id, a := range f.ofState(func(*account) bool { return true }) {
		r := a.route
		if n := done[act{r.at.Name, encKeys, r.master.ID.String(), id}]; n != 1 && !f.since[r.at][id] {
			t.Errorf("%v: key %s, which the master has, was handed to it by %d events", r, id, n)
		}
		if f.since[r.from][id] {
			atSlaves += done[act{r.from.Name, decKeys, r.slave.ID.String(), id}]
			continue
		}
		if n := done[act{r.from.Name, assign, r.slave.ID.String(), id}]; n != 1 {
			t.Errorf("%v: key %s, which the master has, was assigned to the slave by %d events", r, id, n)
		}
		want := 0
		if a.taken || a.gone {
			want = 1
			atSlaves++
		}
		if n := done[act{r.from.Name, decKeys, r.slave.ID.String(), id}]; n != want {
			t.Errorf("%v: key %s was handed to the slave by %d events, want %d", r, id, n, want)
		}
	}
	if taken != atSlaves {
		t.Errorf("the audit knows of %d keys at slaves, the slaves of %d", taken, atSlaves)
	}
	if served < len(f.keys) && len(f.since) == 0 {
		t.Errorf("the audit knows of %d keys at masters, the masters of %d", served, len(f.keys))
	}
	t.Logf("%d keys served by the audit, %d of them never arrived", served, served-len(f.keys))
}

// comparePools says where the pools of the two sites differ, which they may not do
// at rest: an atom that has left one pool has left both. Nor may a site ever have
// been asked for an atom that it did not have.
//
// The other end of a site that was restored asks it for atoms that it has forgotten,
// until it has burned them: what was refused before recovered is not looked at. Nor are, with
// tooOld, refusals of atoms that have become too old on their way.
func comparePools(t testing.TB, l *Lab, recovered time.Time, tooOld bool) {
	t.Helper()
	type blocks map[handover.BlockRef]map[int]bool // the atoms in the pool of each READY block
	var pools [2]blocks
	for i, s := range []*Site{l.KM1, l.KM2} {
		conn, done, err := s.super(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		rows, _ := conn.Query(t.Context(), `SELECT b.link, b.session, b.id, coalesce(k.index, -1) FROM kme.block b
			JOIN kme.chunk c ON b.link = c.link AND b.session = c.session AND b.id = c.block
			JOIN kme.epoch e ON e.epoch = c.epoch LEFT JOIN kme.key k ON c.id = k.chunk
			WHERE b.state = 'ready' AND e.state = 'open'`) // each site ends its pools in its own time
		pools[i] = make(blocks)
		var ref handover.BlockRef
		var index int
		if _, err := pgx.ForEachRow(rows, []any{&ref.Link, &ref.Session, &ref.Block, &index}, func() error {
			if pools[i][ref] == nil {
				pools[i][ref] = make(map[int]bool)
			}
			pools[i][ref][index] = true
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		rows, _ = conn.Query(t.Context(), `SELECT body FROM kme.audit WHERE body::jsonb @> '{"action": "assign", "outcome": "refused"}'
			AND at > $1 AND NOT ($2 AND body::jsonb->>'reason' = 'atoms that are too old')`, recovered, tooOld)
		refused, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		for _, body := range refused {
			t.Errorf("%s refused an announce: %s", s.Name, body)
		}
	}
	for ref, one := range pools[0] {
		if two := pools[1][ref]; two != nil && !maps.Equal(one, two) { // nil: not READY there yet
			t.Errorf("of block %s %s has %d atoms in its pool and %s %d, or others", ref, l.KM1.Name, len(one), l.KM2.Name, len(two))
		}
	}
}
