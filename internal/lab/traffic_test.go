package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
)

// traffic is SAEs that ask for keys and take them, without end and whatever
// happens, and what they got by their own account: a key is counted by nobody else.
type traffic struct {
	mix
	lab    *Lab
	notes  *notes
	routes []*route
	stop   chan struct{}
	ended  sync.WaitGroup
	rest   sync.RWMutex // held for reading during a request: whoever locks it has the clients rest

	mu    sync.Mutex
	since map[*Site]map[key.ID]bool // keys from before a recovery of the site, of which it may have forgotten what it did
	keys  map[key.ID]*account

	recovered time.Time                    // when the last recovery of a site was over
	tooOld    bool                         // atoms may be too old when they are announced: a second is a minute
	ids       map[[sha256.Size]byte]key.ID // by the key's bytes
	wrong     []string                     // what no client may ever see
}

// route is a master at its KME and a slave at the other one, or at the same.
type route struct {
	also              []*route // to further slaves that are named in each request
	legacy            bool     // keys are asked for, and read again and again, by QuteMail's routes
	master, slave     *Person
	masters, slaves   []*Person // the same at each node of their sites
	strangers         []*Person // who may share keys with neither, at each node of the slave's site
	at, from          *Site     // of the master, of the slave
	asked             chan []key.ID
	served, taken     atomic.Int64   // requests answered with keys
	unserved, untaken atomic.Int64   // requests that ended otherwise
	why               map[string]int // of them, by what the KME said; guarded by the traffic's mu
}

// client is one of a person's programs: it stays with a node as long as that serves it.
type client struct {
	nodes []*Person
	at    int
	wait  time.Duration // before its next request, beside the pace of the traffic
}

func newClient(nodes []*Person) *client {
	return &client{nodes: nodes, at: rand.IntN(len(nodes))}
}

func (c *client) person() *Person { return c.nodes[c.at] }

// afterRefusal is how long a client waits after it was refused: a daemon that starts again
// needs the machine more than twenty clients that ask whether it has.
const afterRefusal = 50 * time.Millisecond

// answered has the client turn to the next node after no answer, or a 503, and now
// and then for no reason.
func (c *client) answered(err error) {
	if c.wait = 0; err != nil {
		c.wait = afterRefusal
	}
	if err == nil && rand.IntN(50) == 0 {
		c.at = (c.at + 1) % len(c.nodes)
	}
	if answer := (*etsi014.APIError)(nil); err != nil && (!errors.As(err, &answer) || answer.Status == http.StatusServiceUnavailable) {
		c.at = (c.at + 1) % len(c.nodes)
	}
}

// all is the route and those to further slaves.
func (r *route) all() []*route { return append(slices.Clone(r.also), r) }

func (r *route) String() string { return fmt.Sprintf("%s -> %s", r.master.ID, r.slave.ID) }

// because counts why a request had no keys for an answer. The caller holds the traffic's mu.
func (r *route) because(err error) {
	said := "no answer"
	if answer := (*etsi014.APIError)(nil); errors.As(err, &answer) {
		said = answer.Message
	}
	r.why[said]++
}

// account is what the clients know of one key for one slave.
type account struct {
	route  *route
	copies []*account        // for further slaves
	master [sha256.Size]byte // of the bytes that the master got
	tries  int               // takes whose outcome the slave was not told
	taken  bool              // by the slave, once
	gone   bool              // the KME says so: one of those tries took it
	burned bool              // by a recovery of the slave's KME: it may never be taken
}

// mix is what traffic is made of.
type mix struct {
	clients int           // of each route ask, and as many take
	number  int           // of keys that a request may name
	bits    []int         // of a key: one of these
	pace    time.Duration // the rest of a client between two requests
	patient bool          // nobody asks for more than is taken
	aside   int           // every so many of a master's requests is one of asides; 0: none is
}

// light leaves room for the daemons to start again beside it.
var light = mix{clients: 3, number: 3, bits: []int{256}, pace: 50 * time.Millisecond}

// begin starts light traffic between alice and bob and between the two mail users, in
// both directions.
func begin(t testing.TB, l *Lab) *traffic {
	t.Helper()
	n := newNotes()
	l.Watch = n.over
	f := newTraffic(l, light, n)
	for _, names := range [][2]string{
		{"alice", "bob"},
		{"bob", "alice"},
		{"alice@qutemail.example", "bob@qutemail.example"},
		{"bob@qutemail.example", "alice@qutemail.example"},
	} {
		f.add(newRoute(t, l, names[0], names[1]))
	}
	f.begin(t)
	return f
}

func newTraffic(l *Lab, m mix, n *notes) *traffic {
	return &traffic{lab: l, mix: m, notes: n, stop: make(chan struct{}), keys: make(map[key.ID]*account), ids: make(map[[sha256.Size]byte]key.ID)}
}

// newRoute leads from a master to a slave, each at all nodes of its home.
func newRoute(t testing.TB, l *Lab, master, slave string) *route {
	t.Helper()
	site := map[string]*Site{"km1": l.KM1, "km2": l.KM2}
	r := &route{master: sae(t, l, master), slave: sae(t, l, slave), at: site[people[master]], from: site[people[slave]], asked: make(chan []key.ID, 64), why: make(map[string]int)}
	for _, n := range r.at.Nodes {
		r.masters = append(r.masters, saeAt(t, l, master, n.Name))
	}
	for _, n := range r.from.Nodes {
		r.slaves = append(r.slaves, saeAt(t, l, slave, n.Name))
		r.strangers = append(r.strangers, saeAt(t, l, "carol", n.Name))
	}
	return r
}

func (f *traffic) add(r *route) { f.routes = append(f.routes, r) }

// begin starts the clients.
func (f *traffic) begin(t testing.TB) {
	t.Helper()
	for _, r := range f.routes {
		for range f.clients {
			f.ended.Go(func() { f.ask(r) })
			for _, to := range r.all() {
				f.ended.Go(func() { f.take(to) })
			}
		}
	}
	t.Cleanup(f.end)
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

// stopped says whether the traffic is over, after the client's rest.
func (f *traffic) stopped(c *client) bool {
	select {
	case <-f.stop:
		return true
	case <-time.After(f.pace + c.wait):
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
	var last key.ID
	for !f.stopped(c) {
		if f.aside > 0 && rand.IntN(f.aside) == 0 && last != (key.ID{}) {
			f.askAside(r, c.person(), last)
			continue
		}
		ids := f.askOnce(r, c)
		if ids == nil {
			continue
		}
		last = ids[0]
		for _, to := range r.all() {
			f.hand(to, ids)
		}
	}
}

// hand leaves keys to the slave's clients. Those that have no room wait until the
// end, unless the mix is patient.
func (f *traffic) hand(to *route, ids []key.ID) {
	if f.patient {
		select {
		case to.asked <- ids:
		case <-f.stop:
		}
		return
	}
	select {
	case to.asked <- ids:
	default:
	}
}

// askOnce has the master ask for a few keys. nil: it got none.
func (f *traffic) askOnce(r *route, c *client) []key.ID {
	f.rest.RLock()
	defer f.rest.RUnlock()
	got, err := f.request(r, c.person())
	c.answered(err)
	if err != nil {
		r.unserved.Add(1)
		f.mu.Lock()
		r.because(err)
		f.mu.Unlock()
		if answer := (*etsi014.APIError)(nil); errors.As(err, &answer) && answer.Status != http.StatusServiceUnavailable {
			f.violation("%v: a request for keys was answered: %v", r, err)
		}
		return nil
	}
	r.served.Add(1)
	return f.give(r, got)
}

// request asks for keys as the route does it.
func (f *traffic) request(r *route, master *Person) (etsi014.Container, error) {
	if r.legacy {
		k, err := master.Legacy.RequestKey(context.Background(), master.ID, r.slave.ID, 0, 0)
		if err != nil {
			return etsi014.Container{}, legacyError(err)
		}
		return etsi014.Container{Keys: []etsi014.Key{{ID: k.ID, Material: k.Material}}}, nil
	}
	q := etsi014.KeyRequest{Number: 1 + rand.IntN(f.number), Bits: f.bits[rand.IntN(len(f.bits))]}
	for _, to := range r.also {
		q.AdditionalSlaves = append(q.AdditionalSlaves, to.slave.ID)
	}
	return master.Client.EncKeys(context.Background(), r.slave.ID, q)
}

// legacyError is an answer of QuteMail's routes as 014 would have given it.
func legacyError(err error) error {
	if answer := (*legacy.APIError)(nil); errors.As(err, &answer) {
		return &etsi014.APIError{Status: answer.Status, Message: answer.Message}
	}
	return err
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
		a := &account{route: r, master: sum}
		for _, to := range r.also {
			a.copies = append(a.copies, &account{route: to, master: sum})
		}
		f.keys[k.ID], f.ids[sum], ids[i] = a, k.ID, k.ID
	}
	return ids
}

// take is a client of the slave.
func (f *traffic) take(r *route) {
	c := newClient(r.slaves)
	var waiting [][]key.ID
	for !f.stopped(c) {
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

// of is the account of a key for the slave of a route. The caller holds mu.
func (f *traffic) of(r *route, id key.ID) *account {
	a := f.keys[id]
	for _, c := range a.copies {
		if c.route == r {
			return c
		}
	}
	return a
}

// read has the slave read a key that it may read again.
func (f *traffic) read(r *route, c *client, id key.ID) {
	k, err := c.person().Legacy.RetrieveKey(context.Background(), r.slave.ID, id)
	if c.answered(err); err != nil {
		return // what is wrong with it shows when it is taken
	}
	defer k.Material.Wipe()
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.of(r, id); sha256.Sum256(k.Material.Reveal()) != a.master {
		f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s has other bytes for its reader", r, id))
	} else if a.taken {
		f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s was read after it was taken", r, id))
	}
}

// takeOnce has the slave take keys, and says whether it need not try again.
func (f *traffic) takeOnce(r *route, c *client, ids []key.ID) (done bool) {
	f.rest.RLock()
	defer f.rest.RUnlock()
	if r.legacy {
		for range rand.IntN(3) {
			f.read(r, c, ids[0])
		}
	}
	got, err := c.person().Client.DecKeys(context.Background(), r.master.ID, ids)
	c.answered(err)
	defer got.Wipe()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		f.took(r, got)
		return true
	}
	r.untaken.Add(1)
	r.because(err)
	answer := (*etsi014.APIError)(nil)
	if !errors.As(err, &answer) || answer.Status == http.StatusServiceUnavailable {
		for _, id := range ids {
			f.of(r, id).tries++
		}
		return false
	}
	for _, id := range ids {
		a := f.of(r, id)
		if answer.Status != http.StatusBadRequest || a.tries == 0 && !a.burned {
			f.wrong = append(f.wrong, fmt.Sprintf("%v: the slave cannot take key %s, which its master has: %v", r, id, err))
		}
		a.gone = true
	}
	return true
}

// took enters keys that a slave got. The caller holds mu.
func (f *traffic) took(r *route, got etsi014.Container) {
	r.taken.Add(1)
	for _, k := range got.Keys {
		a := f.of(r, k.ID)
		if a.taken || a.gone || a.burned {
			f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s was handed to its slave twice", r, k.ID))
		}
		if sha256.Sum256(k.Material.Reveal()) != a.master {
			f.wrong = append(f.wrong, fmt.Sprintf("%v: key %s has other bytes for its slave", r, k.ID))
		}
		a.taken = true
	}
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
