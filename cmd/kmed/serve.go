package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/kme"
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
	devices    []*pki.Credential // with which this KME is an SAE of others
	token      *hsm.Token
	sweeper    sweeper
	witness    *store.Witness
	reader     *auditlog.Reader // nil: the audit log is not read here
	db         *store.DB
	lock       *os.File // of the data folder; the kernel lets it go when the process ends
}

// Run opens everything, runs the node and closes everything again.
func (c serveCommand) Run(ctx context.Context, log *slog.Logger) error {
	n, core, err := load(ctx, c.Config, log)
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

// Run brings the site back whose database was restored to the past.
func (c recoverCommand) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	n, core, err := load(ctx, c.Config, log)
	if err != nil {
		return err
	}
	defer n.close()
	return core.Recover(ctx, c.Burn, stdout)
}

// Run destroys every key of the token. It touches nothing else that may be away.
func (c zeroizeCommand) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
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
	n.log.Info("serving", "sae", n.env.address(n.entry.SAE), "operator", n.entry.Operator)
	err := open.Wait()
	stopCore()
	return cmp.Or(err, <-coreDone)
}

// longestTTL is how long keys live that were asked for without a lifetime.
func (n *node) longestTTL() time.Duration {
	longest := n.cfg.TTL
	for _, l := range n.set.Links {
		longest = max(longest, l.TTL)
	}
	return longest
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
	auditKey, err := audit.OpenNodeKey(filepath.Join(n.cfg.Data, "audit.key"))
	if err != nil {
		return errors.Join(err, n.witness.Close(), n.token.Close())
	}
	n.db, err = store.Open(ctx, store.Config{
		DSN: n.cfg.Database, Site: n.self, Node: n.cfg.Node, EpochLength: n.cfg.Epoch, TTL: n.longestTTL(), Now: failpoint.Now, Witness: n.witness, Key: auditKey, Log: n.log,
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
