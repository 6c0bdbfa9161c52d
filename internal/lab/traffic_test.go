package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// traffic is SAEs that ask for keys and take them, without end and whatever
// happens, and what they got by their own account: a key is counted by nobody else.
type traffic struct {
	lab    *Lab
	routes []*route
	stop   chan struct{}
	ended  sync.WaitGroup
	rest   sync.RWMutex // held for reading during a request: whoever locks it has the clients rest

	mu    sync.Mutex
	keys  map[key.ID]*account
	ids   map[[sha256.Size]byte]key.ID // by the key's bytes
	wrong []string                     // what no client may ever see
}

// route is a master at its KME and a slave at the other one.
type route struct {
	master, slave     *Person
	masters, slaves   []*Person // the same at each node of their sites
	at, from          *Site     // of the master, of the slave
	asked             chan []key.ID
	served, taken     atomic.Int64 // requests answered with keys
	unserved, untaken atomic.Int64 // requests that ended otherwise
}

// client is one of a person's programs: it stays with a node as long as that serves it.
type client struct {
	nodes []*Person
	at    int
}

func newClient(nodes []*Person) *client { return &client{nodes, rand.IntN(len(nodes))} }

func (c *client) person() *Person { return c.nodes[c.at] }

// answered has the client turn to the next node after no answer, or a 503, and now
// and then for no reason.
func (c *client) answered(err error) {
	if err == nil && rand.IntN(50) == 0 {
		c.at = (c.at + 1) % len(c.nodes)
	}
	if answer := (*etsi014.APIError)(nil); err != nil && (!errors.As(err, &answer) || answer.Status == http.StatusServiceUnavailable) {
		c.at = (c.at + 1) % len(c.nodes)
	}
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
		for i, n := range r.at.Nodes {
			r.masters = append(r.masters, saeAt(t, l, names[0], n.Name))
			r.slaves = append(r.slaves, saeAt(t, l, names[1], r.from.Nodes[i].Name))
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
	c := newClient(r.masters)
	for !f.stopped() {
		if ids := f.askOnce(r, c); ids != nil {
			select {
			case r.asked <- ids:
			default: // they wait until the end
			}
		}
	}
}

// askOnce has the master ask for a few keys. nil: it got none.
func (f *traffic) askOnce(r *route, c *client) []key.ID {
	f.rest.RLock()
	defer f.rest.RUnlock()
	got, err := c.person().Client.EncKeys(context.Background(), r.slave.ID, etsi014.KeyRequest{Number: 1 + rand.IntN(3)})
	c.answered(err)
	if err != nil {
		r.unserved.Add(1)
		if answer := (*etsi014.APIError)(nil); errors.As(err, &answer) && answer.Status != http.StatusServiceUnavailable {
			f.violation("%v: a request for keys was answered: %v", r, err)
		}
		return nil
	}
	r.served.Add(1)
	return f.give(r, got)
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
	c := newClient(r.slaves)
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
		if f.takeOnce(r, c, waiting[0]) {
			waiting = waiting[1:]
		} else {
			waiting = append(waiting[1:], waiting[0])
		}
	}
}

// takeOnce has the slave take keys, and says whether it need not try again.
func (f *traffic) takeOnce(r *route, c *client, ids []key.ID) (done bool) {
	f.rest.RLock()
	defer f.rest.RUnlock()
	got, err := c.person().Client.DecKeys(context.Background(), r.master.ID, ids)
	c.answered(err)
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
