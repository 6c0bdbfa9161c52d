// Package lab is a whole two-site QKD network on one machine, of real processes:
// the three CAs, a SoftHSM token and a private Postgres per site, the quantum
// channel, KM1 and KM2, and SAEs with certificates. It is what `make run` starts
// and what the end-to-end tests use; Check holds the invariants of the product
// against what lies in the databases and tokens.
//
// It is a lab: both sites' secrets lie in one folder. It promises to stop every
// process that it started, by its pid, also when it is killed itself; and that a
// second start in the same folder finds the keys and certificates of the first.
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Config says where a lab lies and what is peculiar about it. Dir, Bin and Log
// must be set.
type Config struct {
	Dir string // everything of the lab; made if missing
	Bin string // folder of kmed, kme-ca and qlink
	Log *slog.Logger

	Nodes     int           // of each site; default 1
	Links     int           // between the sites, each with a quantum channel of its own; default 1
	Ports     Ports         // of a new lab; the zero Ports are those of the README. A lab keeps the ports that it began with
	Epoch     time.Duration // length of one, for ever that of a new lab; default 1h
	Interval  time.Duration // between blocks of a link; default 1s
	KeyBits   int           // sifted bits of a block; default 2^19
	InFlight  int           // blocks of a link under way at a time; default 1
	PoolLimit int           // keys stored per link; default 20000
	Eve       float64       // fraction of photons intercepted at the start
	Filler    int           // if not 0: no light, but blocks of so many paired random atoms (provenance simulated), for load tests

	// Upstream, by site, is what its configuration says of the device that hands out the
	// keys of the link, instead of light.
	Upstream map[string]string

	// Limits are those of each SAE. The zero Limits are the daemon's defaults, or, with
	// Filler, so high that a load test does not meet them.
	Limits Limits

	// Database, by site, is how a role reaches a database that somebody else runs and
	// that deploy/patroni/post_init.sh has prepared. The lab migrates it as its owner.
	Database map[string]func(role string) string

	// Template, if set, is the folder of a Postgres, of package pgdev, that has been
	// stopped and has the database with its schema: those of a new lab begin as copies.
	Template string

	// Settings, by site, are lines added to the configuration of its nodes.
	Settings map[string]string

	// Proxy puts one in front of each node's peer doors, to make trouble with.
	Proxy bool

	// Module, by site, is the PKCS#11 library instead of SoftHSM's: one that passes on to
	// it and misbehaves when a test says so.
	Module map[string]string

	// Env, by site or node, is added to the environment of a kmed: how tests arm failpoints.
	Env map[string][]string

	// Watch, if not nil, comes between the lab's people and their connections: how tests
	// note what they are answered.
	Watch func(http.RoundTripper) http.RoundTripper

	// Step, if not nil, is told what the lab is doing.
	Step func(what string)
}

const defaultEpoch = time.Hour

// Limits bound what one SAE may have: limits in the daemon's configuration.
type Limits struct{ AtomsPerSecond, Burst, Untaken int }

// Lab is a running lab.
type Lab struct {
	Config
	KM1, KM2 *Site
	pin      string // SHA-256 of the root certificate, as kme-ca prints it
	cas      []*process
	Fibres   []*Fibre // of each link
	nursery  *nursery
}

// trustDomain is that of every lab.
const trustDomain = "lab.test"

// Up makes what is missing in cfg.Dir and starts everything. On an error nothing
// is left running.
func Up(ctx context.Context, cfg Config) (*Lab, error) {
	l := &Lab{Config: cfg, nursery: newNursery()}
	if err := l.up(ctx); err != nil {
		return nil, errors.Join(err, l.Down())
	}
	return l, nil
}

func (l *Lab) up(ctx context.Context) error {
	var err error
	if l.Dir, err = filepath.Abs(l.Dir); err != nil {
		return err
	}
	if l.Bin, err = filepath.Abs(l.Bin); err != nil {
		return err
	}
	if l.Nodes == 0 {
		l.Nodes = 1
	}
	for i := range max(1, l.Links) {
		l.Fibres = append(l.Fibres, l.fibre(i))
	}
	if err := l.choosePorts(); err != nil {
		return err
	}
	if l.Epoch == 0 {
		l.Epoch = defaultEpoch
	}
	if l.Interval == 0 {
		l.Interval = time.Second
	}
	if l.PoolLimit == 0 {
		l.PoolLimit = 20_000
	}
	if l.Limits == (Limits{}) && l.Filler != 0 {
		l.Limits = Limits{AtomsPerSecond: 10_000_000, Burst: 10_000_000, Untaken: 100_000_000}
	}
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return fmt.Errorf("making the lab's folder: %w", err)
	}
	if err := l.writePolicies(); err != nil {
		return err
	}
	l.KM1, l.KM2 = l.site("km1", "alice"), l.site("km2", "bob")
	for _, s := range []*Site{l.KM1, l.KM2} {
		// Postgres, as a user of its own, must get through to its folder.
		if err := os.MkdirAll(s.path(), 0o755); err != nil {
			return err
		}
	}
	if err := l.saveState(); err != nil {
		return err
	}
	for _, f := range l.Fibres {
		if err := f.prepareSecret(); err != nil {
			return err
		}
	}
	if l.Proxy {
		if err := l.startProxies(); err != nil {
			return err
		}
	}

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { l.step("certificate authorities"); return l.startCAs(gctx) })
	g.Go(func() error { l.step("databases"); return l.KM1.prepareDatabase(gctx) })
	g.Go(func() error { return l.KM2.prepareDatabase(gctx) })
	g.Go(func() error { // one after the other: the PKCS#11 module has one owner in a process
		l.step("HSM tokens")
		return errors.Join(l.KM1.prepareToken(), l.KM2.prepareToken())
	})
	l.step("fibre")
	for _, f := range l.Fibres {
		g.Go(func() error { return f.Start(gctx) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	l.step("KM1 and KM2")
	g, gctx = errgroup.WithContext(ctx)
	for _, n := range l.nodes() {
		g.Go(func() error { return n.Start(gctx) })
	}
	g.Go(func() error { return l.enrolPeople(gctx) })
	if err := g.Wait(); err != nil {
		return err
	}
	g, gctx = errgroup.WithContext(ctx)
	for _, n := range l.nodes() {
		g.Go(func() error { return n.Await(gctx) })
	}
	return g.Wait()
}

// nodes are those of both sites.
func (l *Lab) nodes() []*Node {
	if l.KM1 == nil {
		return nil
	}
	return slices.Concat(l.KM1.Nodes, l.KM2.Nodes)
}

// node is the one of that name, or the first of the site of that name.
func (l *Lab) node(name string) (*Node, error) {
	for _, n := range l.nodes() {
		if n.Name == name || n.site.Name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("the lab has no site or node %q", name)
}

func (l *Lab) step(what string) {
	if l.Step != nil {
		l.Step(what)
	}
}

// Down stops everything that this lab started: the daemons first, the databases last.
func (l *Lab) Down() error {
	var errs []error
	var mu sync.Mutex
	together := func(stops ...func() error) {
		var wg sync.WaitGroup
		for _, stop := range stops {
			wg.Go(func() {
				if err := stop(); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	}
	var last []func() error
	if l.KM1 != nil {
		together(l.KM1.Stop, l.KM2.Stop)
		last = append(last, l.KM1.stopDatabase, l.KM2.stopDatabase)
	}
	for _, n := range l.nodes() {
		n.Proxy.close()
	}
	for _, f := range l.Fibres {
		last = append(last, f.Stop)
	}
	for _, ca := range l.cas {
		last = append(last, ca.stop)
	}
	together(last...)
	l.nursery.close()
	return errors.Join(errs...)
}

func (l *Lab) path(parts ...string) string {
	return filepath.Join(append([]string{l.Dir}, parts...)...)
}

// state is what other commands find in lab.json about a lab that is up.
type state struct {
	Ports Ports  `json:"ports"`
	Bin   string `json:"bin"`
}

func (l *Lab) saveState() error {
	text, err := json.MarshalIndent(state{Ports: l.Ports, Bin: l.Bin}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(l.path("lab.json"), append(text, '\n'), 0o644)
}

// loadState reads lab.json. The error wraps fs.ErrNotExist if there is no lab.
func (l *Lab) loadState() (state, error) {
	var s state
	text, err := os.ReadFile(l.path("lab.json"))
	if err != nil {
		return s, fmt.Errorf("reading lab.json: %w", err)
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("reading lab.json: %w (a lab of an older version? remove %s and begin anew)", err, l.Dir)
	}
	return s, nil
}

// choosePorts settles the ports: the CAs, the policies and the profiles of a lab
// that was up before name those that it had. Nodes that are new get new ones.
func (l *Lab) choosePorts() error {
	if l.Ports.KM1 == nil {
		l.Ports = ReadmePorts(l.Nodes)
	}
	before, err := l.loadState()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if had := len(before.Ports.KM1); err == nil && had < l.Nodes {
		before.Ports.KM1 = append(before.Ports.KM1, l.Ports.KM1[had:]...)
		before.Ports.KM2 = append(before.Ports.KM2, l.Ports.KM2[had:]...)
	}
	l.Ports = before.Ports
	return err
}

// replaceAddresses puts this lab's ports where a shipped file has those of the README.
func (l *Lab) replaceAddresses(text string) string {
	var pairs []string
	own := l.Ports.shipped()
	for i, p := range ReadmePorts(1).shipped() {
		pairs = append(pairs, fmt.Sprintf("localhost:%d", p), fmt.Sprintf("localhost:%d", own[i]))
	}
	return strings.NewReplacer(pairs...).Replace(text)
}
