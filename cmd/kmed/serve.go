package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/kme"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/policies"
)

// node is a daemon being put together: what the configuration names, opened.
type node struct {
	path       string // of the configuration
	cfg        Config
	env        Environment
	log        *slog.Logger
	self       identity.KME
	set        *policies.Set // that the node began with: what is in force may have changed, but not its links and addresses
	live       *policies.Current
	entry      policies.NodeEntry
	credential *pki.Credential
	issuers    map[string]*pki.Issuers
	revoked    map[string]*pki.Revocations
	refusals   *pki.Refusals
	renewal    *pki.Renewal
	roots      *x509.CertPool
	token      *hsm.Token
	sweeper    sweeper
	witness    *store.Witness
	auditKey   *audit.NodeKey
	reader     *auditlog.Reader // nil: the audit log is not read here
	db         *store.DB
	lock       *os.File // of the data folder; the kernel lets it go when the process ends
}

// serve opens everything, runs the node and closes everything again.
func serve(ctx context.Context, path string, log *slog.Logger) error {
	n, core, err := load(ctx, path, log)
	if err != nil {
		return err
	}
	defer n.close()
	doors, err := n.doors(ctx, core)
	if err != nil {
		return err
	}
	return n.run(ctx, core, doors)
}

// recoverSite brings the site back whose database was restored to the past.
func recoverSite(ctx context.Context, c recoverCommand, stdout io.Writer, log *slog.Logger) error {
	n, core, err := load(ctx, c.Config, log)
	if err != nil {
		return err
	}
	defer n.close()
	return core.Recover(ctx, c.Burn, stdout)
}

// zeroize destroys every key of the token. It touches nothing else that may be away.
func zeroize(ctx context.Context, c zeroizeCommand, stdout io.Writer, log *slog.Logger) error {
	cfg, err := LoadConfig(c.Config, Environment{})
	if err != nil {
		return err
	}
	if !c.Destroy {
		return fmt.Errorf("nothing was done: it destroys every key of token %s, and all that is stored at %s is lost: --destroy-every-key says so", cfg.HSM.Token, cfg.KME)
	}
	token, err := hsm.Open(ctx, cfg.token(log))
	if err != nil {
		return fmt.Errorf("opening the HSM: %w", err)
	}
	err = kme.Zeroize(ctx, token, cfg.Data, failpoint.Now(), stdout)
	return errors.Join(err, token.Close())
}

// load opens what the configuration at path names and makes the core of it.
func load(ctx context.Context, path string, log *slog.Logger) (*node, *kme.KME, error) {
	env, err := ReadEnvironment(os.Getenv)
	if err != nil {
		return nil, nil, err
	}
	env.log(log)
	cfg, err := LoadConfig(path, env)
	if err != nil {
		return nil, nil, err
	}
	n := &node{path: path, cfg: cfg, env: env, refusals: new(pki.Refusals), log: log.With("kme", cfg.KME, "node", cfg.Node)}
	if err := n.open(ctx); err != nil {
		return nil, nil, err
	}
	core, err := n.core()
	if err != nil {
		n.close()
		return nil, nil, err
	}
	return n, core, nil
}

func (n *node) close() {
	if n.reader != nil {
		n.reader.Close()
	}
	n.db.Close()
	_ = n.witness.Close() // what it holds is in the file
	_ = n.token.Close()
	_ = n.lock.Close()
}

// run serves until ctx ends or a part fails. The doors are closed first, so that
// requests under way are finished by a core that still runs.
func (n *node) run(ctx context.Context, core *kme.KME, doors []door) error {
	coreCtx, stopCore := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCore()
	open, ctx := errgroup.WithContext(ctx)
	coreDone := make(chan error, 1)
	began := make(chan struct{})
	go func() {
		coreDone <- core.Run(coreCtx, func() { close(began) })
	}()
	select {
	case err := <-coreDone:
		return err
	case <-ctx.Done():
		stopCore()
		return <-coreDone
	case <-began:
	}
	var listening []net.Listener
	for _, d := range doors {
		ln, err := d.listen(ctx)
		if err != nil {
			for _, ln := range listening {
				_ = ln.Close()
			}
			stopCore()
			return errors.Join(err, <-coreDone)
		}
		listening = append(listening, ln)
	}
	for i, d := range doors {
		open.Go(func() error { return d.serve(ctx, listening[i]) })
	}
	open.Go(func() error { return n.sweeper.run(ctx) })
	open.Go(func() error { return n.tellSystemd(ctx, core.Alive) })
	for _, r := range n.revoked {
		open.Go(func() error { return r.Run(ctx) })
	}
	n.refusals.Record = core.RecordRefusals
	open.Go(func() error { return n.refusals.Run(ctx) })
	n.renewal.Record = core.RecordRenewal
	open.Go(func() error { return n.renewal.Run(ctx) })
	open.Go(func() error { return n.reloadAtHUP(ctx, core) })
	open.Go(func() error {
		select {
		case err := <-coreDone:
			coreDone <- err
			return cmp.Or(err, errors.New("the core has ended"))
		case <-ctx.Done():
			return nil
		}
	})
	n.log.Info("serving", "sae", n.entry.SAE, "operator", n.entry.Operator)
	err := open.Wait()
	stopCore()
	return cmp.Or(err, <-coreDone)
}

// open reads the policies, gets a certificate if there is none, and opens the
// HSM and the database, in the order in which an operator would want to hear of
// what is wrong.
func (n *node) open(ctx context.Context) (err error) {
	if err := n.openPolicies(); err != nil {
		return err
	}
	if err := os.MkdirAll(n.cfg.Data, 0o700); err != nil {
		return fmt.Errorf("making the data folder: %w", err)
	}
	if n.lock, err = lockData(n.cfg.Data); err != nil {
		return err
	}
	if err := n.openCertificates(ctx); err != nil {
		return fmt.Errorf("opening the certificates: %w", err)
	}
	token := n.cfg.token(n.log)
	token.StartPatience = startPatience
	n.token, err = hsm.Open(ctx, token)
	if err != nil {
		return fmt.Errorf("opening the HSM: %w", err)
	}
	info := n.token.Info()
	n.log.Info("hsm open", "token", n.cfg.HSM.Token, "manufacturer", info.Manufacturer, "model", info.Model, "serial", info.Serial)
	if info.Software {
		n.log.Warn(softHSMWarning)
	}
	if err := lockMemory(); err != nil {
		n.log.Warn("memory is not locked: keys can get into the swap (LimitMEMLOCK=infinity)", "err", err)
	}
	if !n.cfg.Production {
		n.log.Warn("production is not set: keys of the simulated link are handed out")
	}
	if n.witness, err = store.OpenWitness(filepath.Join(n.cfg.Data, "witness"), n.cfg.Node); err != nil {
		return errors.Join(err, n.token.Close())
	}
	if n.auditKey, err = audit.OpenNodeKey(filepath.Join(n.cfg.Data, "audit.key")); err != nil {
		return errors.Join(err, n.witness.Close(), n.token.Close())
	}
	n.db, err = store.Open(ctx, store.Config{
		DSN: n.cfg.Database, Site: n.self, Node: n.cfg.Node, EpochLength: n.cfg.Epoch, Now: failpoint.Now, Witness: n.witness, Key: n.auditKey, Log: n.log,
	})
	if err != nil {
		_, _ = n.token.Close(), n.witness.Close()
		if errors.Is(err, store.ErrOldSchema) {
			err = fmt.Errorf("%w: kmed migrate does it, as the schema's owner", err)
		}
		return fmt.Errorf("opening the database: %w", err)
	}
	if n.cfg.Audit.Reader != "" {
		if n.reader, err = auditlog.NewReader(ctx, n.cfg.Audit.Reader); err != nil {
			n.close()
			return err
		}
	}
	return nil
}

// openPolicies reads them, and finds this node in them.
func (n *node) openPolicies() (err error) {
	if n.self, err = identity.ParseKME(n.cfg.KME); err != nil {
		return err
	}
	if _, err := os.Stat(n.cfg.Policies); err != nil {
		return fmt.Errorf("looking for the folder of policies: %w", err)
	}
	if n.set, err = policies.Load(n.cfg.Policies); err != nil {
		return err
	}
	n.live = policies.NewCurrent(n.set)
	site, ok := n.set.KMEs[n.self]
	if !ok {
		return fmt.Errorf("KME %s is not among the kmes of %s", n.self, n.network())
	}
	if n.entry, ok = site.Node(n.cfg.Node); !ok {
		return fmt.Errorf("node %s is not among the nodes of KME %s in %s", n.cfg.Node, n.self, n.network())
	}
	return nil
}

// startPatience is how long a starting node waits for an HSM that fails, as one does
// that is not on the network yet. Beyond that it is the service manager's turn.
const startPatience = 15 * time.Second

// network is the file that says which KMEs and links there are.
func (n *node) network() string { return filepath.Join(n.cfg.Policies, policies.NetworkFile) }

// lockData makes sure that no other process is this node: beginning its next run
// would end the one that serves.
func lockData(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the data folder: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another kmed runs with the data folder %s: stop it first, or give this node its own", dir)
	}
	return f, nil
}

func (n *node) openCertificates(ctx context.Context) (err error) {
	c := n.cfg.Certificates
	enrolment := pki.Enrolment{
		CA: c.CA, RootFingerprint: c.RootFingerprint, TokenFile: c.TokenFile, Dir: c.Dir, ID: n.cfg.KME, Names: c.Names, Log: n.log,
	}
	if err := pki.Enrol(ctx, enrolment); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (certificates.token_file names the file; kme-ca token kme %s prints what belongs into it)", err, n.cfg.KME)
	} else if err != nil {
		return err
	}
	if n.credential, err = pki.LoadCredential(c.Dir); err != nil {
		return err
	}
	n.renewal = &pki.Renewal{Enrolment: enrolment, Credential: n.credential, Now: failpoint.Now}
	if n.roots, err = pki.LoadPool(filepath.Join(c.Dir, "root.pem")); err != nil {
		return err
	}
	n.issuers, n.revoked = make(map[string]*pki.Issuers), make(map[string]*pki.Revocations)
	for _, role := range roles {
		role := string(role)
		if n.issuers[role], err = pki.LoadIssuers(c.Issuers[role]); err != nil {
			return fmt.Errorf("the issuing CA of role %s: %w", role, err)
		}
		if n.revoked[role], err = pki.OpenRevocations(ctx, pki.RevocationsConfig{
			Role: identity.Role(role), Issuers: n.issuers[role], URLs: c.CRLs[role],
			Dir: filepath.Join(n.cfg.Data, "crl"), Now: failpoint.Now, Log: n.log,
		}); err != nil {
			return err
		}
	}
	return nil
}

// reloadAtHUP reads the policies again at each SIGHUP until ctx ends, and the
// certificates: this node's, those of the issuing CAs, and, for half a minute every
// second, the CRLs.
func (n *node) reloadAtHUP(ctx context.Context, core *kme.KME) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
		}
		n.log.Info("SIGHUP: reading the policies, the certificates and the CRLs again")
		_ = core.Reload(ctx) // what is wrong is in the alarm
		if err := n.reloadCertificates(); err != nil {
			n.log.Error("what was not read again stays as it was", "err", err)
		}
	}
}

func (n *node) reloadCertificates() error {
	err := n.credential.Reload()
	cfg, cfgErr := LoadConfig(n.path, n.env)
	for role, revoked := range n.revoked {
		err = errors.Join(err, n.issuers[role].Reload())
		if cfgErr == nil {
			revoked.From(cfg.Certificates.CRLs[role])
		}
		revoked.Reissued()
	}
	return errors.Join(err, cfgErr)
}

// core makes the KME with its peers and links.
func (n *node) core() (*kme.KME, error) {
	trail, err := n.trail()
	if err != nil {
		return nil, err
	}
	cfg := kme.Config{
		Self: n.self, Node: n.cfg.Node, Store: n.db, Token: n.token, Log: n.log, Now: failpoint.Now,
		Live: n.live, LoadPolicies: n.reload, Officer: n.officer,
		Peers:       make(map[identity.KME]*peer.Client),
		DataDir:     n.cfg.Data,
		Examine:     n.examine,
		EpochLength: n.cfg.Epoch, DefaultTTL: n.cfg.TTL, MaxTTL: n.cfg.MaxTTL, PoolTTL: n.cfg.PoolTTL,
		PoolLimit: n.cfg.PoolLimit, Production: n.cfg.Production, Strict: n.cfg.Strict, ReadOnce: n.cfg.Legacy.Reread == once,
		Trail: trail,
		Quota: kme.Quota{Rate: float64(n.cfg.Limits.AtomsPerSecond), Burst: n.cfg.Limits.Burst, Untaken: n.cfg.Limits.Untaken},
	}
	cfg.Watched = append(cfg.Watched, kme.Watched{Alarm: "certificate", Trouble: n.renewal.Trouble})
	for _, role := range roles {
		cfg.Watched = append(cfg.Watched, kme.Watched{Alarm: "crl-" + string(role), Trouble: n.revoked[string(role)].Trouble})
	}
	for _, lc := range n.cfg.Links {
		link, err := n.link(lc)
		if err != nil {
			return nil, err
		}
		cfg.Links = append(cfg.Links, link)
		cfg.Peers[link.Peer], err = peer.NewClient(peer.ClientConfig{Addresses: n.doorsOf(link.Peer, assignDoor), TLS: n.towards(link.Peer), Log: n.log})
		if err != nil {
			return nil, fmt.Errorf("link %s: %w", lc.ID, err)
		}
	}
	return kme.New(cfg)
}

// trail is how the audit log is kept. What stands in the configuration was checked.
func (n *node) trail() (kme.Trail, error) {
	c := n.cfg.Audit
	t := kme.Trail{
		Reader: n.reader, Keep: c.Keep, Archive: c.Archive, TrustDomain: n.set.TrustDomain, NodeKey: n.auditKey, Sequencer: c.Sequencer, ForkAlarmOnly: c.Fork == forkAlarm,
		Facts:    audit.Facts{Build: build(), Config: hex.EncodeToString(n.cfg.digest[:])},
		PeerKeys: make(map[identity.KME]string),
	}
	for id, key := range c.PeerKeys {
		if kme, err := identity.ParseKME(id); err == nil {
			t.PeerKeys[kme] = key
		}
	}
	for _, w := range c.Witnesses {
		if key, err := audit.NewWitness(w.Key); err == nil {
			t.Witnesses = append(t.Witnesses, kme.OtherWitness{URL: w.URL, Key: key})
		}
	}
	for _, s := range c.Sinks {
		sink := siem.Config{Name: s.Name, Format: siem.Formats[s.Format], To: s.To, Framed: s.Format == "syslog", Every: time.Second, Log: n.log}
		if s.CA != "" {
			roots, err := pki.LoadPool(s.CA)
			if err != nil {
				return t, fmt.Errorf("audit sink %s: %w", s.Name, err)
			}
			sink.TLS = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
		}
		t.Sinks = append(t.Sinks, sink)
	}
	return t, nil
}

// build names this program: its version, and the source that it was made from.
func build() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	b := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" || s.Key == "vcs.modified" && s.Value == "true" {
			b += " " + s.Value
		}
	}
	return b
}

func assignDoor(n policies.NodeEntry) string    { return n.Assign }
func classicalDoor(n policies.NodeEntry) string { return n.Classical }

// doorsOf are the addresses of a door at the nodes of another KME. Our first node
// turns to their first, our second to their second, and so on, so that the work is
// shared; the others follow in order.
func (n *node) doorsOf(other identity.KME, door func(policies.NodeEntry) string) []string {
	mine := slices.Index(n.set.KMEs[n.self].Nodes, n.entry)
	theirs := n.set.KMEs[other].Nodes
	addresses := make([]string, len(theirs))
	for i := range theirs {
		addresses[i] = door(theirs[(mine+i)%len(theirs)])
	}
	return addresses
}

// towards is the TLS configuration with which this node speaks to another KME,
// and to no other.
func (n *node) towards(other identity.KME) *tls.Config {
	return pki.ClientTLS(n.credential, n.roots, pki.PeerURI(fmt.Sprintf("qkd://kme.%s/%s", n.set.TrustDomain, other)))
}

// link joins what network.yaml says of a link with what lies at this end of it.
func (n *node) link(lc LinkConfig) (kme.LinkConfig, error) {
	for _, l := range n.set.Links {
		if l.ID != lc.ID {
			continue
		}
		_, profile := qlink.Standard()
		c := kme.LinkConfig{
			ID: lc.ID, TTL: l.TTL, PoolTTL: l.PoolTTL, Profile: profile, Provenance: key.Simulated, Interval: lc.Interval, Random: mixed{n.token}, Filler: lc.Filler, AuthFile: lc.AuthFile,
		}
		switch n.self {
		case l.Alice:
			c.End, c.Peer = handover.Alice, l.Bob
			c.Dial = func(ctx context.Context) (*peer.Stream, error) {
				return peer.DialClassical(ctx, n.doorsOf(l.Bob, classicalDoor), n.towards(l.Bob))
			}
		case l.Bob:
			c.End, c.Peer = handover.Bob, l.Alice
		default:
			return c, fmt.Errorf("link %s of %s joins %s and %s, not %s", lc.ID, n.network(), l.Alice, l.Bob, n.self)
		}
		c.Box = func(ctx context.Context) (*qlink.Box, error) {
			return qlink.OpenBox(ctx, lc.Socket, lc.SecretFile, c.End)
		}
		return c, nil
	}
	return kme.LinkConfig{}, fmt.Errorf("link %s is not among the links of %s", lc.ID, n.network())
}

// reload reads the policies anew. What a node builds on when it starts can only be
// changed by a restart.
func (n *node) reload() (*policies.Set, error) {
	set, err := policies.Load(n.cfg.Policies)
	if err != nil {
		return nil, err
	}
	entry, ok := set.KMEs[n.self].Node(n.cfg.Node)
	switch {
	case !ok || entry != n.entry:
		return nil, fmt.Errorf("%s: node %s of KME %s is not what it was: that takes a restart", n.network(), n.cfg.Node, n.self)
	case set.TrustDomain != n.set.TrustDomain:
		return nil, fmt.Errorf("%s: another trust_domain takes a restart", n.network())
	}
	for _, l := range n.set.Links {
		if (l.Alice == n.self || l.Bob == n.self) && !slices.Contains(set.Links, l) {
			return nil, fmt.Errorf("%s: link %s is not what it was: that takes a restart", n.network(), l.ID)
		}
	}
	for _, lc := range n.cfg.Links {
		for _, l := range n.set.Links {
			peer := l.Alice
			if peer == n.self {
				peer = l.Bob
			}
			if l.ID == lc.ID && !slices.Equal(set.KMEs[peer].Nodes, n.set.KMEs[peer].Nodes) {
				return nil, fmt.Errorf("%s: other nodes of KME %s take a restart", n.network(), peer)
			}
		}
	}
	return set, nil
}

// officer says whose certificate it is: one that could call at the operator door now.
func (n *node) officer(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots: n.issuers["operator"].Pool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return identity.Caller{}, err
	}
	if err := n.revoked["operator"].Check(leaf, now); err != nil {
		return identity.Caller{}, err
	}
	return n.live.Set().Principals.Judge("operator", leaf, now)
}

// mixed is the source of seeds and public choices: the machine's generator XOR the
// HSM's, so that neither alone decides. It fails when the HSM does.
type mixed struct{ token *hsm.Token }

func (m mixed) Read(b []byte) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := m.token.Random(ctx, b); err != nil {
		return 0, err
	}
	own := make([]byte, len(b))
	_, _ = rand.Read(own) // never fails: it ends the process instead
	for i := range b {
		b[i] ^= own[i]
	}
	clear(own)
	return len(b), nil
}

// identify says who makes a request.
type identify = func(*http.Request) (identity.Caller, error)

// timed is who, with the time observed that it takes.
func timed(seconds prometheus.Observer, who identify) identify {
	return func(r *http.Request) (identity.Caller, error) {
		began := time.Now()
		defer func() { seconds.Observe(time.Since(began).Seconds()) }()
		return who(r)
	}
}

// examine looks at what the core does not see.
func (n *node) examine() []admin.Finding {
	return []admin.Finding{kme.JudgeCertificate("certificate", n.credential.Leaf().NotAfter, failpoint.Now())}
}

// collectors are the metrics of the node: each package that has some exports them,
// and here they are gathered.
func (n *node) collectors(core *kme.KME, sae *etsi014.Door) []prometheus.Collector {
	return []prometheus.Collector{
		core, sae, n.token,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "kme_certificate_end_timestamp_seconds", Help: "When this node's own certificate ends.",
		}, func() float64 { return float64(n.credential.Leaf().NotAfter.Unix()) }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	}
}

// door is one listener with its handler.
type door struct {
	name    string
	address string
	gate    *pki.Gate
	handler http.Handler
	log     *slog.Logger
	raw     func(context.Context, net.Listener) error // instead of gate and handler
	state   func(net.Conn, http.ConnState)            // told of each connection; may be nil
}

// doors makes the four doors. A certificate of one role cannot reach a route of
// another: each has its own CA, its own pool of rules and its own mux. ctx ends when
// the node is to stop.
func (n *node) doors(ctx context.Context, core *kme.KME) ([]door, error) {
	now := failpoint.Now
	saeTLS := uint16(tls.VersionTLS13)
	if n.cfg.TLS12 {
		saeTLS = tls.VersionTLS12
	}
	gateSAE, gateOperator := n.gate("sae", "sae", saeTLS), n.gate("operator", "operator", tls.VersionTLS13)
	gateAssign, gateClassical := n.gate("assign", "kme", tls.VersionTLS13), n.gate("classical", "kme", tls.VersionTLS13)
	saes := timed(core.Identity(), gateSAE.Identify)

	door014, err := etsi014.New(etsi014.Config{KME: n.self, Backend: core, Identify: saes, Log: n.log})
	if err != nil {
		return nil, err
	}
	doorOld, err := legacy.New(legacy.Config{KME: n.self, Backend: core, Identify: saes, Limits: n.env.limits(core.LegacyLimits()), Now: now, Log: n.log})
	if err != nil {
		return nil, err
	}

	e := n.entry
	metrics := prometheus.NewRegistry()
	certificates := pki.Metrics{
		Gates: []*pki.Gate{gateSAE, gateAssign, gateOperator, gateClassical}, Refusals: n.refusals, Renewal: n.renewal,
		Revocations: slices.Collect(maps.Values(n.revoked)),
	}
	for _, c := range append(n.collectors(core, door014), certificates) {
		if err := metrics.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	operatorDoor := admin.Config{
		KME: n.self, Node: n.cfg.Node, Backend: core.OperatorDoor(), Identify: gateOperator.Identify, Log: n.log, Stopping: ctx.Done(),
		Metrics: promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}),
	}
	if n.reader != nil {
		operatorDoor.Trail = core.TrailDoor(n.reader)
	}
	operator, err := admin.Handler(operatorDoor)
	if err != nil {
		return nil, err
	}

	return []door{
		{name: "sae", address: n.env.address(e.SAE), gate: gateSAE, handler: n.sweeper.watch(door014.Handler(doorOld.Mount)), state: n.sweeper.connection, log: n.log},
		{name: "assign", address: e.Assign, gate: gateAssign, handler: peer.Handler(core.PeerDoor(), gateAssign.Identify, n.log), log: n.log},
		{name: "operator", address: e.Operator, gate: gateOperator, handler: operator, log: n.log},
		{name: "classical", address: e.Classical, log: n.log, raw: func(ctx context.Context, ln net.Listener) error {
			return peer.ServeClassical(ctx, ln, peer.ClassicalConfig{
				TLS: gateClassical.TLS(), Failed: gateClassical.Failed, Changed: n.revoked["kme"].Changed,
				Identify: func(s tls.ConnectionState) (identity.Caller, error) {
					return gateClassical.Identify(&http.Request{TLS: &s})
				},
				Handle: core.Classical, Refused: core.PeerDoor().Refused, Log: n.log,
			})
		}},
	}, nil
}

// gate is the way into a door for the callers of a role.
func (n *node) gate(door, role string, minTLS uint16) *pki.Gate {
	return pki.NewGate(pki.GateConfig{
		Door: door, Credential: n.credential, Issuers: n.issuers[role], Revocations: n.revoked[role], MinVersion: minTLS,
		Judge: func(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
			return n.live.Set().Principals.Judge(role, leaf, now)
		},
		Changed:  n.live.Changed,
		Refusals: n.refusals, Now: failpoint.Now, Log: n.log,
		Limits: pki.Limits{
			Handshakes: n.cfg.Limits.Handshakes, HandshakesPerNetwork: n.cfg.Limits.HandshakesPerNetwork, Connections: n.cfg.Limits.Connections,
		},
	})
}

func (d door) listen(ctx context.Context) (net.Listener, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", d.address)
	if err != nil {
		return nil, fmt.Errorf("opening the %s door: %w", d.name, err)
	}
	return ln, nil
}

// serve runs a door until ctx ends, then lets what is under way finish.
func (d door) serve(ctx context.Context, ln net.Listener) error {
	if d.raw != nil {
		return d.raw(ctx, ln)
	}
	var watch errgroup.Group
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	watch.Go(func() error { return d.gate.Run(watching) })
	defer func() {
		stopWatching()
		_ = watch.Wait() // it has no errors
	}()
	s := &http.Server{
		Handler: pki.Retire(d.handler, failpoint.Now), TLSConfig: d.gate.TLS(), ConnContext: d.gate.ConnContext, ConnState: d.state, ErrorLog: slog.NewLogLogger(d.log.With("door", d.name).Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 15 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10,
	}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		stopped <- s.Shutdown(grace)
	}()
	if err := s.Serve(d.gate.Listen(ln)); err != http.ErrServerClosed {
		return fmt.Errorf("serving the %s door: %w", d.name, err)
	}
	return <-stopped
}
