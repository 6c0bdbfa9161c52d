package pki

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Limits bound what callers may have of a door. What is beyond is closed at once, but
// for handshakes at work: those wait.
type Limits struct {
	Handshakes           int // under way, from all networks together
	HandshakesPerNetwork int // under way, from one /24 (IPv4) or /48 (IPv6)
	HandshakesAtWork     int // computing, of those; 0: half as many as there are processors
	Failures             int // handshakes a second that fail, in the long run, from one address (IPv4) or /64 (IPv6); 0: no bound
	FailureBurst         int // the same, after a pause; at least 1 if Failures is
	Connections          int // open, of one caller
}

// DefaultLimits are those of a Gate that was given none.
var DefaultLimits = Limits{Handshakes: 1024, HandshakesPerNetwork: 256, Failures: 10, FailureBurst: 200, Connections: 1024}

// handshakeTime is how long a client may take for its handshake.
const handshakeTime = 5 * time.Second

// GateConfig is what a Gate needs. Everything must be set unless said otherwise.
type GateConfig struct {
	Door        string // for logs, metrics and the record
	Credential  *Credential
	Issuers     *Issuers
	Revocations *Revocations
	MinVersion  uint16   // of TLS, at least 1.2 whatever is given
	Protocols   []string // of ALPN; default HTTP/2 and HTTP/1.1
	// Judge says whom a certificate names, or why it names nobody.
	Judge func(leaf *x509.Certificate, now time.Time) (identity.Caller, error)
	// Changed, if set, is closed when Judge may say otherwise. It is asked again then.
	Changed  func() <-chan struct{}
	Refusals *Refusals
	Limits   Limits           // default DefaultLimits
	Now      func() time.Time // default time.Now
	Log      *slog.Logger     // default slog.Default()
}

// Gate is the way into a door: it makes the TLS handshakes, ends those of nobody
// that a CA of the door has certified or that it has revoked, and knows the
// connections that are open. One whose certificate named a caller and does so no
// longer (revoked, disabled, ended) is closed; one that never did stays, so that its
// requests are refused and recorded.
type Gate struct {
	cfg      GateConfig
	tls      *tls.Config
	turns    chan struct{} // those of the handshakes at work
	failures *failures

	mu        sync.Mutex
	shaking   int
	networks  map[netip.Prefix]int // handshakes under way
	open      map[*gateConn]struct{}
	perCaller map[string]int   // connections
	seen      map[string]*Seen // by fingerprint
	accepted  atomic.Int64
}

// NewGate returns the Gate of a door. Its Run closes connections, its Listen makes
// them.
func NewGate(c GateConfig) *Gate {
	c.Limits = cmp.Or(c.Limits, DefaultLimits)
	c.Log = cmp.Or(c.Log, slog.Default()).With("door", c.Door)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Protocols == nil {
		c.Protocols = []string{"h2", "http/1.1"}
	}
	g := &Gate{
		cfg:      c,
		turns:    make(chan struct{}, cmp.Or(c.Limits.HandshakesAtWork, max(1, runtime.GOMAXPROCS(0)/2))),
		failures: newFailures(c.Limits.Failures, c.Limits.FailureBurst),
		networks: make(map[netip.Prefix]int), open: make(map[*gateConn]struct{}), perCaller: make(map[string]int), seen: make(map[string]*Seen),
	}
	g.tls = g.config()
	return g
}

// TLS is the configuration with which the Gate shakes hands. A server that is given
// its listener needs it to know that HTTP/2 is spoken there.
func (g *Gate) TLS() *tls.Config { return g.tls.Clone() }

// config is that of ServerTLS, with the CAs of the moment and their CRLs.
func (g *Gate) config() *tls.Config {
	base := ServerTLS(g.cfg.Credential, g.cfg.Issuers.Pool(), g.cfg.MinVersion)
	base.NextProtos = g.cfg.Protocols
	base.Time = g.cfg.Now
	base.VerifyConnection = func(state tls.ConnectionState) error {
		err := g.cfg.Revocations.Check(state.VerifiedChains[0][0], g.cfg.Now())
		if err != nil { // with the certificate, for the record
			err = &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
		}
		return err
	}
	outer := base.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := base.Clone()
		c.ClientCAs = g.cfg.Issuers.Pool()
		return c, nil
	}
	return outer
}

// Listen returns a listener whose connections have shaken hands: each is a *tls.Conn.
// Its Close waits for the handshakes under way, which it ends.
func (g *Gate) Listen(ln net.Listener) net.Listener {
	ctx, cancel := context.WithCancel(context.Background())
	l := &gateListener{Listener: ln, g: g, ready: make(chan net.Conn), failed: make(chan struct{}), cancel: cancel}
	l.work.Go(func() { l.accept(ctx) })
	return l
}

type gateListener struct {
	net.Listener
	g      *Gate
	ready  chan net.Conn
	failed chan struct{} // closed when err is set
	err    error
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// Accept returns the next connection that has shaken hands.
func (l *gateListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.failed:
		return nil, l.err
	}
}

// Close ends the listener and the handshakes under way.
func (l *gateListener) Close() error {
	l.cancel()
	err := l.Listener.Close()
	l.work.Wait()
	return err
}

// accept takes connections and has each shake hands by itself: a slow one keeps
// nobody waiting.
func (l *gateListener) accept(ctx context.Context) {
	for pause := time.Duration(0); ; {
		raw, err := l.Listener.Accept()
		switch {
		case err == nil:
			pause = 0
			l.enter(ctx, raw)
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			l.err = err
			close(l.failed)
			return
		default: // too many open files, mostly
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			l.g.cfg.Log.Warn("accepting a connection", "err", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	}
}

func (l *gateListener) enter(ctx context.Context, raw net.Conn) {
	c := &gateConn{Conn: raw, g: l.g, network: networkOf(raw.RemoteAddr(), 24, 48), source: networkOf(raw.RemoteAddr(), 32, 64)}
	if err := l.g.begin(c); err != nil {
		l.g.refuse(nil, raw.RemoteAddr(), err)
		hangUp(raw)
		return
	}
	l.work.Go(func() {
		conn, err := l.g.shake(ctx, c)
		l.g.end(c, err)
		if err != nil {
			if ctx.Err() == nil {
				l.g.refuse(c.leaf, raw.RemoteAddr(), err)
			}
			_ = c.Close()
			return
		}
		select {
		case l.ready <- conn:
		case <-ctx.Done():
			_ = c.Close()
		}
	})
}

// hangUp closes a connection to which nothing was said, and leaves nothing of it in the
// kernel's tables.
func hangUp(raw net.Conn) {
	if t, ok := raw.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = raw.Close()
}

// begin takes a place for a handshake, if there is one and its network may have it.
func (g *Gate) begin(c *gateConn) error {
	if g.failures.tooMany(c.source, g.cfg.Now()) {
		return &floodError{c.source}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shaking >= g.cfg.Limits.Handshakes || g.networks[c.network] >= g.cfg.Limits.HandshakesPerNetwork {
		return errBusy
	}
	g.shaking++
	g.networks[c.network]++
	return nil
}

// end gives the place back, after a failure has been counted: err is how the handshake
// went. One that never got its turn is not the other side's.
func (g *Gate) end(c *gateConn, err error) {
	if err != nil && !errors.Is(err, errBusy) {
		g.failures.add(c.source, g.cfg.Now())
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shaking--
	if g.networks[c.network]--; g.networks[c.network] == 0 {
		delete(g.networks, c.network)
	}
}

// shake makes the handshake and takes the connection up among the open ones.
func (g *Gate) shake(ctx context.Context, c *gateConn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	t := &turn{places: g.turns, over: ctx.Done()}
	c.turn = t
	conn := tls.Server(c, g.tls)
	err := conn.HandshakeContext(ctx)
	c.turn = nil
	t.end()
	if err := cmp.Or(t.err, err); err != nil { // ours says more than that the time was over
		return nil, err
	}
	c.leaf = conn.ConnectionState().VerifiedChains[0][0]
	c.since = g.cfg.Now()
	return conn, g.admit(c)
}

// admit takes c up among the open connections. What changes between its judgement
// and this is found by the next one.
func (g *Gate) admit(c *gateConn) error {
	caller, err := g.cfg.Judge(c.leaf, g.cfg.Now())
	c.caller = string(caller.Role()) + "/" + caller.ID()
	if err != nil { // a stranger is told apart by his certificate
		c.caller = "stranger/" + caller.Certificate().Fingerprint
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.perCaller[c.caller] >= g.cfg.Limits.Connections {
		return errTooMany
	}
	g.perCaller[c.caller]++
	g.open[c] = struct{}{}
	if c.good = err == nil; c.good {
		c.seen = g.see(caller)
	}
	g.accepted.Add(1)
	return nil
}

// leave forgets a connection that is closed.
func (g *Gate) leave(c *gateConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, open := g.open[c]; !open {
		return
	}
	delete(g.open, c)
	if g.perCaller[c.caller]--; g.perCaller[c.caller] == 0 {
		delete(g.perCaller, c.caller)
	}
	if c.seen != nil {
		c.seen.Open--
		c.seen.Last = g.cfg.Now()
	}
}

// Run judges the open connections again whenever something changes, and once a
// second because of what ends by itself, until ctx ends.
func (g *Gate) Run(ctx context.Context) error {
	never := make(chan struct{})
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		changed := (<-chan struct{})(never)
		if g.cfg.Changed != nil {
			changed = g.cfg.Changed()
		}
		revoked := g.cfg.Revocations.Changed()
		g.judge()
		select {
		case <-ctx.Done():
			return nil
		case <-revoked:
		case <-changed:
		case <-tick.C:
		}
	}
}

// judge closes what was good and is so no longer.
func (g *Gate) judge() {
	g.mu.Lock()
	all := make([]*gateConn, 0, len(g.open))
	for c := range g.open {
		all = append(all, c)
	}
	g.mu.Unlock()
	now := g.cfg.Now()
	for _, c := range all {
		err := g.cfg.Revocations.Check(c.leaf, now)
		if err == nil && c.good {
			_, err = g.cfg.Judge(c.leaf, now)
		}
		if err != nil {
			g.cfg.Log.Info("closing a connection", "caller", c.caller, "remote", c.RemoteAddr().String(), "why", err)
			_ = c.Close()
		}
	}
}

// Why a Gate closes a connection without a look at its certificate, or in spite of it.
var (
	errBusy    = errors.New("too many handshakes are under way")
	errTooMany = errors.New("the caller has too many connections")
)

// floodError says that too many handshakes of a network have failed.
type floodError struct{ network netip.Prefix }

func (e *floodError) Error() string {
	return fmt.Sprintf("too many handshakes from %s have failed", e.network)
}

// refuse has the record say that a connection came to nothing. leaf may be nil.
func (g *Gate) refuse(leaf *x509.Certificate, remote net.Addr, err error) {
	r := refusalOf(err, leaf, g.cfg.Now())
	r.Door, r.Remote = g.cfg.Door, remote.String()
	g.cfg.Log.Debug("handshake refused", "remote", r.Remote, "reason", r.Reason, "err", err)
	g.cfg.Refusals.add(r)
}

// gateConn is the raw connection below TLS. All but Close is the Conn's, once it has
// shaken hands.
type gateConn struct {
	net.Conn
	g       *Gate
	network netip.Prefix      // whose places it has one of
	source  netip.Prefix      // whose failures count against it
	turn    *turn             // while it shakes hands
	leaf    *x509.Certificate // when it has shaken hands
	since   time.Time         // likewise
	caller  string            // role/id, for counting
	good    bool              // the certificate named a caller at the handshake
	seen    *Seen             // of the certificate, if it did; guarded by the Gate's mu
}

// Read is the Conn's. A handshake's turn ends with it, and another one begins.
func (c *gateConn) Read(b []byte) (int, error) {
	t := c.turn
	if t == nil {
		return c.Conn.Read(b)
	}
	t.end()
	n, err := c.Conn.Read(b)
	if err == nil {
		err = t.begin(n)
	}
	return n, err
}

// Close closes the connection, whoever asks for it.
func (c *gateConn) Close() error {
	c.g.leave(c)
	return c.Conn.Close()
}

// networkOf is the network of an address, of so many bits: a /24 or /48 is what one customer
// of a provider has at most, a single address or a /64 what one host has at least.
func networkOf(a net.Addr, bits4, bits6 int) netip.Prefix {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip, bits := t.AddrPort().Addr().Unmap(), bits6
	if ip.Is4() {
		bits = bits4
	}
	p, _ := ip.Prefix(bits) // fails for addresses that are none: one network for all of those
	return p
}

// refusalOf says in a word why a handshake failed, and whose it was if that is known.
func refusalOf(err error, leaf *x509.Certificate, now time.Time) Refusal {
	if unverified, ok := errors.AsType[*tls.CertificateVerificationError](err); ok && len(unverified.UnverifiedCertificates) > 0 {
		leaf = unverified.UnverifiedCertificates[0]
	}
	r := Refusal{Reason: "tls", Detail: err.Error()}
	if leaf != nil {
		r.Certificate = identity.Stranger(leaf).Certificate()
	}
	denial, denied := errors.AsType[*identity.Denial](err)
	_, foreign := errors.AsType[x509.UnknownAuthorityError](err)
	invalid, bad := errors.AsType[x509.CertificateInvalidError](err)
	flood, flooded := errors.AsType[*floodError](err)
	var timeout net.Error
	switch {
	case flooded:
		r.Reason, r.Detail, r.Network = Flood, "", flood.network.String()
	case denied:
		r.Reason, r.Detail = denial.Reason, denial.Detail
	case foreign:
		r.Reason = UnknownCA
	case bad && invalid.Reason == x509.Expired && now.Before(leaf.NotBefore):
		r.Reason = identity.NotYetValid
	case bad && invalid.Reason == x509.Expired:
		r.Reason = identity.Expired
	case bad && invalid.Reason == x509.IncompatibleUsage:
		r.Reason = identity.BadEKU
	case bad:
		r.Reason = identity.BadNames
	case err.Error() == noClientCertificate:
		r.Reason = identity.NoCertificate
	case errors.Is(err, errBusy):
		r.Reason = Busy
	case errors.Is(err, errTooMany):
		r.Reason = TooMany
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		r.Reason = Slow
	}
	return r
}

// noClientCertificate is what crypto/tls says when there is none; it has no type for it.
const noClientCertificate = "tls: client didn't provide a certificate"

// Reasons of a Refusal beside those of package identity.
const (
	UnknownCA = "unknown-ca"
	Busy      = "busy"     // too many handshakes were under way
	TooMany   = "too-many" // the caller has too many connections
	Slow      = "slow"     // the handshake took too long
	Flood     = "flood"    // too many handshakes of its network had failed
)
