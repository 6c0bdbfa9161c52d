package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

// traffic is SAEs that ask for keys and take them, without end and whatever
// happens, and what they got by their own account: a key is counted by nobody else.
type traffic struct {
	lab    *Lab
	routes []*route
	stop   chan struct{}
	ended  sync.WaitGroup

	mu    sync.Mutex
	keys  map[key.ID]*account
	ids   map[[sha256.Size]byte]key.ID // by the key's bytes
	wrong []string                     // what no client may ever see
}

// route is a master at its KME and a slave at the other one.
type route struct {
	master, slave     *Person
	at, from          *Site // of the master, of the slave
	asked             chan []key.ID
	served, taken     atomic.Int64 // requests answered with keys
	unserved, untaken atomic.Int64 // requests that ended otherwise
}

func (r *route) String() string { return fmt.Sprintf("%s -> %s", r.master.ID, r.slave.ID) }

// account is what the clients know of one key.
type account struct {
	route  *route
	master [sha256.Size]byte // of the bytes that the master got
	tries  int               // takes whose outcome the slave was not told
	taken  bool              // by the slave, once
	gone   bool              // the KME says so: one of those tries took it
}

// clientsPerRoute ask, and as many take.
const clientsPerRoute = 3

// pace is the rest of a client between two requests: there is to be load, and room
// for the daemons to start again beside it.
const pace = 4 * time.Millisecond

// begin starts traffic between alice and bob and between the two mail users, in both directions.
func begin(t testing.TB, l *Lab) *traffic {
	t.Helper()
	f := &traffic{lab: l, stop: make(chan struct{}), keys: make(map[key.ID]*account), ids: make(map[[sha256.Size]byte]key.ID)}
	for _, names := range [][2]string{
		{"alice", "bob"},
		{"bob", "alice"},
		{"alice@qutemail.example", "bob@qutemail.example"},
		{"bob@qutemail.example", "alice@qutemail.example"},
	} {
		master, slave := sae(t, l, names[0]), sae(t, l, names[1])
		r := &route{master: master, slave: slave, at: l.KM1, from: l.KM2, asked: make(chan []key.ID, 64)}
		if people[names[0]] == l.KM2.Name {
			r.at, r.from = l.KM2, l.KM1
		}
		f.routes = append(f.routes, r)
		for range clientsPerRoute {
			f.ended.Go(func() { f.ask(r) })
			f.ended.Go(func() { f.take(r) })
		}
	}
	t.Cleanup(f.end)
	return f
}

// end stops the clients, each after the request it is at.
func (f *traffic) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
	}
	f.ended.Wait()
}

func (f *traffic) stopped() bool {
	select {
	case <-f.stop:
		return true
	case <-time.After(pace):
		return false
	}
}

func (f *traffic) violation(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wrong = append(f.wrong, fmt.Sprintf(format, args...))
}

// ask is a client of the master.
func (f *traffic) ask(r *route) {
	for !f.stopped() {
		got, err := r.master.Client.EncKeys(context.Background(), r.slave.ID, etsi014.KeyRequest{Number: 1 + rand.IntN(3)})
		if err != nil {
			r.unserved.Add(1)
			if answer := (*etsi014.APIError)(nil); errors.As(err, &answer) && answer.Status != http.StatusServiceUnavailable {
				f.violation("%v: a request for keys was answered: %v", r, err)
			}
			continue
		}
		r.served.Add(1)
		ids := f.give(r, got)
		select {
		case r.asked <- ids:
		default: // they wait until the end
		}
	}
}

// give enters keys that a master got.
func (f *traffic) give(r *route, got etsi014.Container) []key.ID {
	defer got.Wipe()
	f.mu.Lock()
	defer f.mu.Unlock()
	ids := make([]key.ID, len(got.Keys))
	for i, k := range got.Keys {
		sum := sha256.Sum256(k.Material.Reveal())
		if f.keys[k.ID] != nil {
			f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s was handed to a master before", r, k.ID))
		}
		if other, ok := f.ids[sum]; ok {
			f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s has the bytes of %s", r, k.ID, other))
		}
		f.keys[k.ID], f.ids[sum], ids[i] = &account{route: r, master: sum}, k.ID, k.ID
	}
	return ids
}

// take is a client of the slave.
func (f *traffic) take(r *route) {
	var waiting [][]key.ID
	for !f.stopped() {
		if len(waiting) == 0 {
			select {
			case ids := <-r.asked:
				waiting = append(waiting, ids)
			default:
				continue
			}
		}
		if f.takeOnce(r, waiting[0]) {
			waiting = waiting[1:]
		} else {
			waiting = append(waiting[1:], waiting[0])
		}
	}
}

// takeOnce has the slave take keys, and says whether it need not try again.
func (f *traffic) takeOnce(r *route, ids []key.ID) (done bool) {
	got, err := r.slave.Client.DecKeys(context.Background(), r.master.ID, ids)
	defer got.Wipe()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		r.taken.Add(1)
		for _, k := range got.Keys {
			a := f.keys[k.ID]
			if a.taken || a.gone {
				f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s was handed to its slave twice", r, k.ID))
			}
			if sha256.Sum256(k.Material.Reveal()) != a.master {
				f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s has other bytes for its slave", r, k.ID))
			}
			a.taken = true
		}
		return true
	}
	r.untaken.Add(1)
	answer := (*etsi014.APIError)(nil)
	if !errors.As(err, &answer) || answer.Status == http.StatusServiceUnavailable {
		for _, id := range ids {
			f.keys[id].tries++
		}
		return false
	}
	for _, id := range ids {
		a := f.keys[id]
		if answer.Status != http.StatusBadRequest || a.tries == 0 {
			f.wrong = append(f.wrong, fmt.Sprintf("%v: the slave cannot take key %s, which its master has: %v", r, id, err))
		}
		a.gone = true
	}
	return true
}

// flows returns when on every route keys have been asked for and taken since it was called.
func (f *traffic) flows(t testing.TB) {
	t.Helper()
	const enough = 3
	for _, r := range f.routes {
		served, taken := r.served.Load()+enough, r.taken.Load()+enough
		eventually(t, fmt.Sprintf("keys from %v", r), func(context.Context) error {
			if s, k := r.served.Load(), r.taken.Load(); s < served || k < taken {
				return fmt.Errorf("%d more requests served and %d taken, want %d of each (%d were not served, %d not taken)",
					s-served+enough, k-taken+enough, enough, r.unserved.Load(), r.untaken.Load())
			}
			return nil
		})
	}
}

// close stops the clients, has the slaves take what they have not, and holds the
// clients' account against itself and against the audit of both sites.
func (f *traffic) close(t testing.TB) {
	t.Helper()
	f.end()
	left := 0
	for _, id := range f.ofState(func(a *account) bool { return !a.taken && !a.gone }) {
		left++
		for range 3 { // a 503 is lawful, now and then
			if f.takeOnce(f.keys[id].route, []key.ID{id}) {
				break
			}
		}
	}
	for _, id := range f.ofState(func(a *account) bool { return !a.taken && !a.gone }) {
		t.Errorf("%v: key %s, which its master has, can still not be taken", f.keys[id].route, id)
	}
	lost := len(f.ofState(func(a *account) bool { return a.gone }))
	for _, r := range f.routes {
		t.Logf("%v: %d requests served, %d not; %d taken, %d not", r, r.served.Load(), r.unserved.Load(), r.taken.Load(), r.untaken.Load())
	}
	t.Logf("%d keys at their masters; %d of them taken at the end, %d taken by requests without an answer", len(f.keys), left, lost)
	settled(t, f.lab)
	f.compareAudit(t)
	comparePools(t, f.lab)
	for _, w := range f.wrong {
		t.Error(w)
	}
}

// ofState lists the keys with an account of that kind.
func (f *traffic) ofState(is func(*account) bool) (ids []key.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, a := range f.keys {
		if is(a) {
			ids = append(ids, id)
		}
	}
	return ids
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
			if ev.Outcome != "done" || !slices.Contains([]string{encKeys, decKeys, assign}, ev.Action) {
				continue
			}
			who := ev.Actor.ID
			if ev.Action == assign {
				who = ev.Slaves[0]
			}
			for _, id := range ev.Keys {
				done[act{s.Name, ev.Action, who, id}]++
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
	for id, a := range f.keys {
		r := a.route
		if n := done[act{r.at.Name, encKeys, r.master.ID.String(), id}]; n != 1 {
			t.Errorf("%v: key %s, which the master has, was handed to it by %d events", r, id, n)
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
	if served < len(f.keys) {
		t.Errorf("the audit knows of %d keys at masters, the masters of %d", served, len(f.keys))
	}
	t.Logf("%d keys served by the audit, %d of them never arrived", served, served-len(f.keys))
}

// comparePools says where the pools of the two sites differ, which they may not do
// at rest: an atom that has left one pool has left both. Nor may a site ever have
// been asked for an atom that it did not have.
func comparePools(t testing.TB, l *Lab) {
	t.Helper()
	type blocks map[handover.BlockRef]map[int]bool // the atoms in the pool of each READY block
	var pools [2]blocks
	for i, s := range []*Site{l.KM1, l.KM2} {
		conn, err := pgx.Connect(t.Context(), s.DSN(pgdev.Superuser))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		rows, _ := conn.Query(t.Context(), `SELECT b.link, b.session, b.id, coalesce(k.index, -1) FROM kme.block b
			JOIN kme.chunk c ON b.link = c.link AND b.session = c.session AND b.id = c.block LEFT JOIN kme.key k ON c.id = k.chunk
			WHERE b.state = 'ready'`)
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
		rows, _ = conn.Query(t.Context(), `SELECT body FROM kme.audit WHERE body::jsonb @> '{"action": "assign", "outcome": "refused"}'`)
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
