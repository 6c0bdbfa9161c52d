package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/kme"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/pki"
)

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
func (n *node) examine(now time.Time) []admin.Finding {
	found := []admin.Finding{kme.JudgeCertificate("certificate", n.credential.Leaf().NotAfter, now)}
	for _, role := range roles {
		found = append(found, kme.JudgeCRL(string(role), n.revoked[string(role)].Trouble(now)))
	}
	return found
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
	keys    bool                                      // are in its answers
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
	gateAssign, gateClassical := n.gate("assign", "kme", tls.VersionTLS13), n.gate("classical", "kme", tls.VersionTLS13, peer.ClassicalProtocol)
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
		Metrics:      promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}),
		Certificates: func() []admin.Certificate { return certificatesOf(gateSAE.Seen()) },
	}
	if n.reader != nil {
		operatorDoor.Trail = core.TrailDoor(n.reader)
	}
	operator, err := admin.Handler(operatorDoor)
	if err != nil {
		return nil, err
	}

	return []door{
		{name: "sae", address: n.env.address(e.SAE), gate: gateSAE, handler: n.sweeper.watch(door014.Handler(doorOld.Mount)), state: n.sweeper.connection, keys: true, log: n.log},
		{name: "assign", address: e.Assign, gate: gateAssign, handler: peer.Handler(core.PeerDoor(), gateAssign.Identify, n.log), log: n.log},
		{name: "operator", address: e.Operator, gate: gateOperator, handler: operator, log: n.log},
		{name: "classical", address: e.Classical, log: n.log, raw: func(ctx context.Context, ln net.Listener) error {
			return peer.ServeClassical(ctx, ln, peer.ClassicalConfig{
				Shake: gateClassical.Listen, Changed: n.revoked["kme"].Changed,
				Identify: func(s tls.ConnectionState) (identity.Caller, error) {
					return gateClassical.Identify(&http.Request{TLS: &s})
				},
				Handle: core.Classical, Refused: core.PeerDoor().Refused, Log: n.log,
			})
		}},
	}, nil
}

// certificatesOf is what operators are shown of certificates.
func certificatesOf(seen []pki.Seen) []admin.Certificate {
	list := make([]admin.Certificate, len(seen))
	for i, s := range seen {
		list[i] = admin.Certificate{SAE: s.Caller, Serial: s.Certificate.Serial, Ends: s.Certificate.NotAfter, Last: s.Last, Open: s.Open}
	}
	return list
}

// gate is the way into a door for the callers of a role.
func (n *node) gate(door, role string, minTLS uint16, protocols ...string) *pki.Gate {
	l := n.cfg.Limits
	return pki.NewGate(pki.GateConfig{
		Door: door, Credential: n.credential, Issuers: n.issuers[role], Revocations: n.revoked[role], MinVersion: minTLS, Protocols: protocols,
		Judge: func(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
			return n.live.Set().Principals.Judge(role, leaf, now)
		},
		Changed:  n.live.Changed,
		Refusals: n.refusals, Now: failpoint.Now, Log: n.log,
		Limits: pki.Limits{
			Handshakes: l.Handshakes, HandshakesPerNetwork: l.HandshakesPerNetwork, HandshakesAtWork: l.HandshakesAtWork,
			Failures: l.FailedHandshakesPerSecond, FailureBurst: l.FailedHandshakesBurst, Connections: l.Connections,
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

// What one connection of HTTP/2 may have at a time. Whoever has more requests than these
// has them wait, or opens another connection, as Go's clients do. What has arrived of SAEs'
// requests and was not read yet is bounded by the window, in bytes; a peer's are megabytes.
const (
	maxStreams = 64
	saeWindow  = 256 << 10
)

// server is the door's, for connections that have shaken hands by cfg, of which tell tells.
func (d door) server(cfg *tls.Config, tell func(context.Context, net.Conn) context.Context) *http.Server {
	s := &http.Server{
		Handler: pki.Retire(d.handler, failpoint.Now), TLSConfig: cfg, ConnContext: tell, ConnState: d.state, ErrorLog: slog.NewLogLogger(d.log.With("door", d.name).Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 15 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
	}
	if !d.keys {
		return s
	}
	s.HTTP2.MaxReceiveBufferPerConnection, s.HTTP2.MaxReceiveBufferPerStream = saeWindow, saeWindow/4
	behindTLS(s)
	return s
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
	ln = d.gate.Listen(ln)
	if d.keys {
		ln = wiping{ln}
	}
	s := d.server(d.gate.TLS(), d.gate.ConnContext)
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		stopped <- s.Shutdown(grace)
	}()
	if err := s.Serve(ln); err != http.ErrServerClosed {
		return fmt.Errorf("serving the %s door: %w", d.name, err)
	}
	return <-stopped
}
