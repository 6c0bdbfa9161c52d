package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/bits"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/pki"
)

// BenchmarkEncKeys has clients with a connection each ask KM1 for keys as fast as
// it answers. Everything is real: mutual TLS, two kmed, two Postgres with fsync on,
// SoftHSM; the link's blocks are random bits, and it rests while requests are
// measured. The clients share the machine.
//
// of-null is the share of the rate at which the same clients are answered a key, over
// the same TLS, by a process that does nothing for it; cpu-of-null the same of the
// work of processors, which holds also while the machine has other things to do.
func BenchmarkEncKeys(b *testing.B) { benchmarkEncKeys(b, 0, loads) }

// BenchmarkEncKeysFar is BenchmarkEncKeys with a peer that is farLatency away, there
// and back.
func BenchmarkEncKeysFar(b *testing.B) {
	benchmarkEncKeys(b, farLatency, []benchLoad{{64, 1}, {64, 64}})
}

const farLatency = 10 * time.Millisecond

func benchmarkEncKeys(b *testing.B, latency time.Duration, loads []benchLoad) {
	r := newRig(b, latency)
	for _, load := range loads {
		b.Run(load.String(), func(b *testing.B) {
			r.rests(b, b.N*load.number)
			r.measure(b, "alice", "bob", r.KM1, load, func(c *etsi014.Client, _ int) error {
				return discard(c.EncKeys(context.Background(), SAEID("bob"), load.request()))
			})
		})
	}
}

// BenchmarkAuditCost is what the audit costs those who ask for keys: they ask as in
// BenchmarkEncKeys, in turns with the audit and without it, which only a kmed that was
// built for tests can do (package failpoint).
//
// of-unaudited is the rate with the audit against that without it; cpu-of-unaudited the
// same of the work of processors, which holds also while the machine has other things to
// do. The work of a turn ends when the log's tree has all of its events.
func BenchmarkAuditCost(b *testing.B) {
	r := &rig{block: 1 << 15}
	r.Lab = startUnchecked(b, func(c *Config) { // whose keys leave without a trace
		c.Bin = binaries(b, true)
		r.fill(c)
	})
	r.rests(b, 0)
	for _, turn := range []struct {
		load     benchLoad
		requests int
	}{{benchLoad{64, 1}, 8192}, {benchLoad{64, 64}, 256}} {
		b.Run(turn.load.String(), func(b *testing.B) { benchmarkAuditCost(b, r, turn.load, turn.requests) })
	}
}

func benchmarkAuditCost(b *testing.B, r *rig, load benchLoad, requests int) {
	clients := r.connect(b, "alice", r.KM1.URL(), load.clients)
	ask := func(c *etsi014.Client, _ int) error {
		return discard(c.EncKeys(context.Background(), SAEID("bob"), load.request()))
	}
	drive(b, requests/2, clients, ask) // the first ones find nothing in any cache
	var took [2]time.Duration          // without the audit, with it
	var worked [2]spent
	turns := 0
	turn := func(audited int) {
		r.rests(b, requests*load.number)
		r.audits(b, audited == 1)
		events, before, began := r.events(b), r.cpu(b), time.Now()
		drive(b, requests, clients, ask)
		took[audited] += time.Since(began)
		if b.Failed() {
			b.FailNow()
		}
		r.folded(b)
		worked[audited] = worked[audited].plus(r.cpu(b).less(before))
		for i, n := range r.events(b) {
			if n -= events[i]; audited == 0 && n > 0 || audited == 1 && n < requests {
				b.Fatalf("%d events of %d requests, in a turn in which %d is audited", n, requests, audited)
			}
		}
	}
	for b.Loop() {
		for _, audited := range []int{0, 1, 1, 0} {
			turn(audited)
		}
		turns += 2
	}
	all := float64(turns * requests)
	b.ReportMetric(took[0].Seconds()/took[1].Seconds(), "of-unaudited")
	b.ReportMetric(float64(worked[0].all())/float64(worked[1].all()), "cpu-of-unaudited")
	b.ReportMetric(all/took[1].Seconds(), "req/s")
	more := worked[1].less(worked[0])
	for i, site := range []string{"km1", "km2"} {
		b.ReportMetric(float64(more.kmed[i].Microseconds())/all, site+"-audit-us")
		b.ReportMetric(float64(more.postgres[i].Microseconds())/all, site+"-postgres-audit-us")
	}
}

// events is how many each site has recorded.
func (r *rig) events(b *testing.B) (n [2]int) {
	for i, s := range []*Site{r.KM1, r.KM2} {
		n[i] = s.count(b, "SELECT sum(seq)::bigint FROM kme.node_run")
	}
	return n
}

// count asks the site's database for a number.
func (s *Site) count(b *testing.B, sql string) (n int) {
	b.Helper()
	conn, done, err := s.super(b.Context())
	if err == nil {
		err = conn.QueryRow(b.Context(), sql).Scan(&n)
		done()
	}
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// audits has both sites record events from now on, or none, and returns when they do so.
func (r *rig) audits(b *testing.B, on bool) {
	b.Helper()
	for _, s := range []*Site{r.KM1, r.KM2} {
		var lines []string
		if !on {
			lines = []string{"audit off"}
		}
		if err := s.Faults(lines...); err != nil {
			b.Fatal(err)
		}
	}
	eventually(b, "the sites to heed it", func(context.Context) error {
		before := r.events(b)
		r.waiting(b, 1, 1)
		for i, n := range r.events(b) {
			if (n > before[i]) != on {
				return fmt.Errorf("KM%d has recorded %d events of a request", i+1, n-before[i])
			}
		}
		return nil
	})
	r.folded(b)
}

// folded returns when the trees of both sites' logs have all events.
func (r *rig) folded(b *testing.B) {
	b.Helper()
	for _, s := range []*Site{r.KM1, r.KM2} {
		eventually(b, "the tree of "+s.Name, func(context.Context) error {
			if n := s.count(b, "SELECT ((SELECT sum(seq) FROM kme.node_run) - (SELECT sum(seq) FROM kme.audit_node))::bigint"); n > 0 {
				return fmt.Errorf("%d events wait", n)
			}
			return nil
		})
	}
}

// BenchmarkDecKeys has clients take at KM2 the keys that alice got at KM1 before.
func BenchmarkDecKeys(b *testing.B) {
	r := newRig(b, 0)
	for _, load := range loads {
		b.Run(load.String(), func(b *testing.B) {
			r.rests(b, b.N*load.number)
			asked := r.waiting(b, b.N, load.number)
			r.measure(b, "bob", "alice", r.KM2, load, func(c *etsi014.Client, i int) error {
				return discard(c.DecKeys(context.Background(), SAEID("alice"), asked[i]))
			})
		})
	}
}

// BenchmarkLink has the lab's link make blocks as fast as it can, in its own processes:
// qlink, and two kmed that distil over mutual TLS, wrap every key and pad with SoftHSM and
// store them in two Postgres with fsync on, until both ends have said that they hold them.
//
// secret-Mbit/s is a throughput of the processing, not a rate of a link: gates are
// simulated as fast as they can be, and sim/wall says how much faster than the link's clock
// that was. Mbit/cpu-s is what a second of one processor makes, all processes counted.
// Blocks are the lab's, one at a time, then four and eight times as long, three at a time.
func BenchmarkLink(b *testing.B) {
	for _, c := range []struct{ inFlight, keyBits int }{{1, 1 << 19}, {3, 1 << 21}, {3, 1 << 22}} {
		plan := qlink.StandardPlan()
		plan.KeyBits = c.keyBits
		name := fmt.Sprintf("in-flight=%d,key=2^%d", c.inFlight, bits.Len(uint(c.keyBits))-1)
		b.Run(name, func(b *testing.B) { benchmarkLink(b, plan, c.inFlight) })
	}
}

func benchmarkLink(b *testing.B, plan qlink.Plan, inFlight int) {
	params := bb84.Standard()
	profile, err := plan.Profile(params)
	if err != nil {
		b.Fatal(err)
	}
	r := &rig{Lab: start(b, func(c *Config) {
		c.Interval, c.PoolLimit, c.KeyBits, c.InFlight = time.Millisecond, 1<<30, plan.KeyBits, inFlight
	})}
	op := operator(b, r.KM1)
	b.Run(fmt.Sprintf("km=%v/clock=%vGHz", params.Km, params.ClockHz/1e9), func(b *testing.B) {
		tick := time.NewTicker(250 * time.Millisecond) // looking costs both kmed and Postgres something
		defer tick.Stop()
		blocks := func(n int) int {
			for {
				now, err := link(b.Context(), op)
				if err != nil || now.Aborts > 0 {
					b.Fatalf("%d blocks, %d given up: the link is %s (%s), %v", now.Blocks, now.Aborts, now.State, now.Why, err)
				}
				if now.Blocks >= n {
					return now.Blocks
				}
				<-tick.C
			}
		}
		keysStored(b, r.Lab, 1)
		first := blocks(1)
		before, began := r.cpu(b), time.Now()
		b.ResetTimer()
		made := blocks(first+b.N) - first
		took, worked := time.Since(began), r.cpu(b).less(before)
		b.StopTimer()
		all := worked.all() + worked.fibre - worked.clients
		secret := float64(made*profile.KeyedBits()) / 1e6
		b.ReportMetric(secret/took.Seconds(), "secret-Mbit/s")
		b.ReportMetric(secret/all.Seconds(), "secret-Mbit/cpu-s")
		b.ReportMetric(float64(made)*params.Seconds(profile.Gates)/took.Seconds(), "sim/wall")
		b.ReportMetric(float64(made)*params.Seconds(profile.Gates)/all.Seconds(), "sim/cpu")
		for name, used := range map[string]time.Duration{
			"qlink": worked.fibre, "km1": worked.kmed[0], "km2": worked.kmed[1], "postgres": worked.postgres[0] + worked.postgres[1],
		} {
			b.ReportMetric(used.Seconds()*1e3/float64(made), name+"-cpu-ms/block")
		}
	})
}

// benchLoad is how many clients ask at once, each for how many keys.
type benchLoad struct{ clients, number int }

var loads = []benchLoad{{1, 1}, {8, 1}, {64, 1}, {8, 64}, {64, 64}}

func (l benchLoad) String() string { return fmt.Sprintf("clients=%d/number=%d", l.clients, l.number) }

func (l benchLoad) request() etsi014.KeyRequest { return etsi014.KeyRequest{Number: l.number} }

func discard(got etsi014.Container, err error) error {
	got.Wipe()
	return err
}

// rig is a lab whose pool is full, and beside it a process that does nothing for its
// clients.
type rig struct {
	*Lab
	block   int    // atoms of a block of its link
	null    string // its URL
	nullPID int
}

func newRig(b *testing.B, latency time.Duration) *rig {
	b.Helper()
	r := &rig{block: benchBlock}
	r.Lab = start(b, func(c *Config) {
		r.fill(c)
		c.Proxy = latency > 0
	})
	r.rests(b, 0)
	if latency > 0 {
		r.KM2.Node.Proxy.Set(Trouble{Delay: latency / 2})
	}
	r.startNull(b)
	return r
}

// waiting has alice get keys for bob to take, in requests of so many.
func (r *rig) waiting(b *testing.B, requests, number int) [][]key.ID {
	b.Helper()
	asked := make([][]key.ID, requests)
	alice := r.connect(b, "alice", r.KM1.URL(), 8)
	var next atomic.Int64
	var all sync.WaitGroup
	for _, c := range alice {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < requests; i = int(next.Add(1)) - 1 {
				got, err := c.EncKeys(context.Background(), SAEID("bob"), etsi014.KeyRequest{Number: number})
				if err != nil {
					b.Error(err)
					return
				}
				for _, k := range got.Keys {
					asked[i] = append(asked[i], k.ID)
				}
				got.Wipe()
			}
		})
	}
	all.Wait()
	if b.Failed() {
		b.FailNow()
	}
	return asked
}

// benchBlock is how many atoms a block of the benchmarks' link has. The pool's limit
// lies just above a multiple of it: once it rests, almost a block's keys can be asked
// for before it makes another.
const benchBlock = 1 << 17

func (r *rig) limit() int { return 3*r.block + 1 }

func (r *rig) fill(c *Config) {
	c.Filler, c.PoolLimit = r.block, r.limit()
}

// rests returns when the pool is full and, if a block has as many, so many keys can be
// asked for before the link makes another one, which would cost both ends more than they do.
func (r *rig) rests(b *testing.B, keys int) {
	b.Helper()
	op := operator(b, r.KM1)
	for {
		var spare int
		eventually(b, "a full pool", func(ctx context.Context) error {
			now, err := link(ctx, op)
			spare = now.Stored + now.StoredPeer - r.limit()
			if err == nil && (now.State != "full" || spare < 0) { // it looks once in an interval
				err = fmt.Errorf("%d keys; the link is %s (%s)", now.Stored, now.State, now.Why)
			}
			return err
		})
		const request = 128
		if spare >= min(keys, r.block-request) {
			return
		}
		r.waiting(b, spare/request+1, request) // so that it makes one now
	}
}

// spent is the time that processors have worked for the parts of a lab: a sturdier
// figure than a rate, on a machine that has other things to do.
type spent struct {
	kmed, postgres       [2]time.Duration // of KM1 and KM2
	clients, null, fibre time.Duration
}

// all is what it took to serve the clients, and them.
func (s spent) all() time.Duration {
	return s.kmed[0] + s.kmed[1] + s.postgres[0] + s.postgres[1] + s.clients
}

func (s spent) plus(t spent) spent { return s.less(spent{}.less(t)) }

func (s spent) less(t spent) spent {
	return spent{
		[2]time.Duration{s.kmed[0] - t.kmed[0], s.kmed[1] - t.kmed[1]},
		[2]time.Duration{s.postgres[0] - t.postgres[0], s.postgres[1] - t.postgres[1]},
		s.clients - t.clients, s.null - t.null, s.fibre - t.fibre,
	}
}

// cpu reads what the kernel has counted so far.
func (r *rig) cpu(b *testing.B) spent {
	b.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		b.Fatal(err)
	}
	var s spent
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		name, rest, _ := strings.Cut(string(text), ") ")
		f := strings.Fields(rest) // from the third field of proc(5) on: state, ppid, ...
		pid, _ := strconv.Atoi(name[:strings.Index(name, " ")])
		parent, _ := strconv.Atoi(f[1])
		user, _ := strconv.Atoi(f[11])
		system, _ := strconv.Atoi(f[12])
		ended, _ := strconv.Atoi(f[13]) // children that have been waited for
		endedSystem, _ := strconv.Atoi(f[14])
		const tick = 10 * time.Millisecond // sysconf(_SC_CLK_TCK) is 100 on every Linux
		used := time.Duration(user+system) * tick
		gone := time.Duration(ended+endedSystem) * tick
		switch {
		case pid == os.Getpid():
			s.clients += used
		case pid == r.nullPID:
			s.null += used
		case pid == r.Fibres[0].qlink.cmd.Process.Pid:
			s.fibre += used
		case pid == r.KM1.Nodes[0].kmed.cmd.Process.Pid:
			s.kmed[0] += used
		case pid == r.KM2.Nodes[0].kmed.cmd.Process.Pid:
			s.kmed[1] += used
		case pid == r.KM1.pg.Pid():
			s.postgres[0] += used + gone
		case pid == r.KM2.pg.Pid():
			s.postgres[1] += used + gone
		case parent == r.KM1.pg.Pid():
			s.postgres[0] += used
		case parent == r.KM2.pg.Pid():
			s.postgres[1] += used
		}
	}
	return s
}

// connect returns clients of an SAE at a KME, each with a connection that is open.
func (r *rig) connect(b *testing.B, who, url string, clients int) []*etsi014.Client {
	b.Helper()
	cs := make([]*etsi014.Client, clients)
	for i := range cs {
		p := sae(b, r.Lab, who)
		cs[i] = etsi014.NewClient(url, p.HTTP)
		other := "bob"
		if who == other {
			other = "alice"
		}
		if _, err := cs[i].Status(b.Context(), SAEID(other)); err != nil {
			b.Fatal(err)
		}
	}
	return cs
}

// measured is how requests of some clients went.
type measured struct {
	clients []*etsi014.Client
	request func(*etsi014.Client, int) error
	took    []time.Duration // each request
	wall    time.Duration
	cpu     spent
}

func (m *measured) rate() float64 { return float64(len(m.took)) / m.wall.Seconds() }

// at is a quantile of the time that a request took, in ms. It sorts them.
func (m *measured) at(quantile float64) float64 {
	slices.Sort(m.took)
	return m.took[int(quantile*float64(len(m.took)-1))].Seconds() * 1e3
}

// turnRequests is how many requests a client makes before it is the others' turn: many,
// since a turn ends with ever fewer clients at work.
const turnRequests = 64

// measure makes b.N requests of an SAE to a KME and as many, for a key for other, to the
// null process, in turns, so that both see the same machine, and reports how they went.
func (r *rig) measure(b *testing.B, who, other string, at *Site, load benchLoad, ask func(*etsi014.Client, int) error) {
	b.Helper()
	kme := &measured{clients: r.connect(b, who, at.URL(), load.clients), request: ask}
	null := &measured{clients: r.connect(b, who, r.null, load.clients), request: func(c *etsi014.Client, _ int) error {
		return discard(c.EncKeys(context.Background(), SAEID(other), etsi014.KeyRequest{}))
	}}
	b.ResetTimer()
	b.StopTimer()
	order := []*measured{null, kme}
	for done := 0; done < b.N; done = len(kme.took) {
		n := b.N - done
		if n >= 2*turnRequests*load.clients {
			n = turnRequests * load.clients
		}
		for _, m := range order {
			before, began := r.cpu(b), time.Now()
			if m == kme {
				b.StartTimer()
			}
			took := drive(b, n, m.clients, func(c *etsi014.Client, i int) error { return m.request(c, done+i) })
			b.StopTimer()
			m.wall += time.Since(began)
			if b.Failed() {
				b.FailNow()
			}
			r.folded(b) // what a KME still has to do is its work, and is not done beside the other's
			m.took, m.cpu = append(m.took, took...), m.cpu.plus(r.cpu(b).less(before))
		}
		slices.Reverse(order) // neither always comes after the other
	}
	b.ReportMetric(kme.rate(), "req/s")
	b.ReportMetric(kme.rate()*float64(load.number), "keys/s")
	b.ReportMetric(kme.at(0.5), "p50-ms")
	b.ReportMetric(kme.at(0.99), "p99-ms")
	b.ReportMetric(kme.rate()/null.rate(), "of-null")
	if kme.cpu.all() > 0 {
		b.ReportMetric(float64(null.cpu.null+null.cpu.clients)/float64(kme.cpu.all()), "cpu-of-null")
	}
	each := func(name string, d time.Duration) { b.ReportMetric(float64(d.Microseconds())/float64(b.N), name) }
	for i, site := range []string{"km1", "km2"} {
		each(site+"-us", kme.cpu.kmed[i])
		each(site+"-postgres-us", kme.cpu.postgres[i])
	}
	each("clients-us", kme.cpu.clients)
}

// drive makes so many requests, each client one after the other, and times them.
func drive(b *testing.B, requests int, clients []*etsi014.Client, request func(*etsi014.Client, int) error) []time.Duration {
	took := make([]time.Duration, requests)
	var next atomic.Int64
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < requests; i = int(next.Add(1)) - 1 {
				asked := time.Now()
				if err := request(c, i); err != nil {
					b.Error(err)
					return
				}
				took[i] = time.Since(asked)
			}
		})
	}
	all.Wait()
	return took
}

// What a null process is told, in its environment.
const (
	nullTLS    = "KME_NULL_TLS"    // the folder of a KME's certificate
	nullIssuer = "KME_NULL_ISSUER" // the CA of SAEs
	nullBytes  = "KME_NULL_BYTES"  // files with answers to GET and POST
)

// startNull starts the null process, which is this program with TestNull to run.
func (r *rig) startNull(b *testing.B) {
	b.Helper()
	dir := b.TempDir()
	alice := sae(b, r.Lab, "alice")
	for method, route := range map[string]string{http.MethodGet: "status", http.MethodPost: "enc_keys"} {
		req, err := http.NewRequestWithContext(b.Context(), method, r.KM1.URL()+"/api/v1/keys/bob/"+route, nil)
		if err != nil {
			b.Fatal(err)
		}
		res, err := alice.HTTP.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != http.StatusOK {
			b.Fatalf("asking for an answer to repeat: %s: %v", res.Status, err)
		}
		_ = res.Body.Close()
		if err := os.WriteFile(dir+"/"+method, body, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestNull$")
	cmd.Env = append(os.Environ(), nullTLS+"="+r.KM1.Node.path("tls"), nullIssuer+"="+r.path("ca", "sae", "intermediate.pem"), nullBytes+"="+dir)
	cmd.Stderr = os.Stderr
	said, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	stop, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = stop.Close()
		_ = cmd.Wait()
	})
	var url string
	if _, err := fmt.Fscanln(said, &url); err != nil {
		b.Fatalf("the null process does not say where it is: %v", err)
	}
	r.null, r.nullPID = url, cmd.Process.Pid
}

// TestNull is the null process, when startNull asks for it: a KME's TLS and router,
// and an answer that is always the same. It ends when its standard input does.
func TestNull(t *testing.T) {
	if os.Getenv(nullTLS) == "" {
		return
	}
	credential, err := pki.LoadCredential(os.Getenv(nullTLS))
	if err != nil {
		t.Fatal(err)
	}
	issuers, err := pki.LoadPool(os.Getenv(nullIssuer))
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	for method, route := range map[string]string{http.MethodGet: "status", http.MethodPost: "enc_keys"} {
		body, err := os.ReadFile(os.Getenv(nullBytes) + "/" + method)
		if err != nil {
			t.Fatal(err)
		}
		r.MethodFunc(method, "/api/v1/keys/{sae}/"+route, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			w.Header().Set("Cache-Control", "no-store")
			_, _ = io.Copy(w, bytes.NewReader(body))
		})
	}
	ln, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("https://localhost:%d\n", ln.Addr().(*net.TCPAddr).Port)
	s := &http.Server{Handler: r, TLSConfig: pki.ServerTLS(credential, issuers, tls.VersionTLS12), ReadHeaderTimeout: 5 * time.Second}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = s.Close()
	}()
	if err := s.ServeTLS(ln, "", ""); err != http.ErrServerClosed {
		t.Error(err)
	}
}
