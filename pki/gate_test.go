package pki_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

// door is an SAE door behind a Gate, with the CRL of its CA.
type door struct {
	t        testing.TB
	ca       string
	url      string
	sae      signer
	crl      *publisher
	revoked  *pki.Revocations
	gate     *pki.Gate
	refusals pki.Refusals
	later    atomic.Int64 // how far the door's clock is ahead
	stopped  atomic.Int64 // when it was stopped, in ns since 1970; 0: it runs
	people   atomic.Pointer[identity.Map]
	issuers  *pki.Issuers
	issuing  string // the file of issuers

	credential    *pki.Credential
	credentialDir string
	changed       atomic.Pointer[chan struct{}]
	caller        atomic.Pointer[identity.Caller] // of the last request

	log      said
	mu       sync.Mutex
	recorded []pki.Refusal
	denied   []string // what Identify said of requests
	failing  bool     // nothing can be recorded
}

// said is a log.
type said struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

func newDoor(t testing.TB, limits pki.Limits) *door {
	t.Helper()
	d := &door{t: t, ca: newCAs(t), crl: newPublisher(t)}
	d.sae = signerOf(t, d.ca, "sae")
	d.issuing = filepath.Join(t.TempDir(), "sae.pem")
	d.credentialDir = mint(t, d.ca, "kme", "km1", nil)
	d.credential = load(t, d.credentialDir)
	d.crl.publish(d.sae.crl(t, 1, nil))
	d.trust(d.ca)
	var err error
	if d.revoked, err = pki.OpenRevocations(t.Context(), pki.RevocationsConfig{
		Role: "sae", Issuers: d.issuers, URLs: []string{d.crl.url}, Dir: t.TempDir(), Log: quiet,
	}); err != nil {
		t.Fatal(err)
	}
	d.people.Store(saeMap(t, true))
	changed := make(chan struct{})
	d.changed.Store(&changed)
	d.refusals.Record = func(_ context.Context, rs []pki.Refusal) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.failing {
			return io.ErrClosedPipe
		}
		d.recorded = append(d.recorded, rs...)
		return nil
	}
	d.gate = pki.NewGate(pki.GateConfig{
		Door: "sae", Credential: d.credential, Issuers: d.issuers, Revocations: d.revoked,
		MinVersion: tls.VersionTLS13, Refusals: &d.refusals, Limits: limits, Now: d.now, Log: slog.New(slog.NewTextHandler(&d.log, nil)),
		Judge: func(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
			return d.people.Load().Judge("sae", leaf, now)
		},
		Changed: func() <-chan struct{} { return *d.changed.Load() },
	})
	d.serve()
	return d
}

// trust has the door take the SAEs of these CAs, and of no others.
func (d *door) trust(cas ...string) {
	var all string
	for _, ca := range cas {
		all += pemText(d.t, filepath.Join(ca, "sae/intermediate.pem"))
	}
	if err := os.WriteFile(d.issuing, []byte(all), 0o600); err != nil {
		d.t.Fatal(err)
	}
	if d.issuers == nil {
		d.issuers = issuers(d.t, d.issuing)
		return
	}
	if err := d.issuers.Reload(); err != nil {
		d.t.Fatal(err)
	}
	d.revoked.Reissued()
	d.revoked.Fetch(d.t.Context())
}

func (d *door) now() time.Time {
	now := time.Now()
	if at := d.stopped.Load(); at != 0 {
		now = time.Unix(0, at)
	}
	return now.Add(time.Duration(d.later.Load()))
}

// stop has the door's clock move by later alone.
func (d *door) stop() { d.stopped.Store(time.Now().UnixNano()) }

func (d *door) address() string { return strings.TrimPrefix(d.url, "https://") }

func (d *door) serve() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		d.t.Fatal(err)
	}
	d.url = strings.Replace("https://"+ln.Addr().String(), "127.0.0.1", "localhost", 1)
	s := &http.Server{TLSConfig: d.gate.TLS(), ConnContext: d.gate.ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := d.gate.Identify(r)
		d.caller.Store(&caller)
		if err != nil {
			d.mu.Lock()
			d.denied = append(d.denied, reasonOf(err))
			d.mu.Unlock()
			w.WriteHeader(http.StatusUnauthorized)
		}
	})}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = s.Serve(d.gate.Listen(ln)) })
	running.Go(func() { _ = d.gate.Run(ctx) })
	d.t.Cleanup(func() {
		cancel()
		_ = s.Close()
		running.Wait()
	})
}

// client is one of id, or of whom the credential in dir is, with connections of its own.
func (d *door) client(dir string, protocols ...string) *http.Client {
	return d.clientOf(load(d.t, dir), pool(d.t, filepath.Join(d.ca, "root.pem")), protocols...)
}

func (d *door) clientOf(c *pki.Credential, roots *x509.CertPool, protocols ...string) *http.Client {
	cfg := pki.ClientTLS(c, roots, nil)
	tr := &http.Transport{TLSClientConfig: cfg, Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!slices.Contains(protocols, "h2"))
	tr.Protocols.SetHTTP2(slices.Contains(protocols, "h2"))
	d.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func (d *door) alice() string { return mint(d.t, d.ca, "sae", "alice", nil) }

// ask makes a request and returns its status, or 0.
func (d *door) ask(c *http.Client) (int, error) {
	res, err := c.Get(d.url)
	if err != nil {
		return 0, err
	}
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode, res.Body.Close()
}

// reasons are those that were recorded or denied since the last call, and how often.
func (d *door) reasons() string {
	d.refusals.Flush(context.Background())
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []string
	for _, r := range d.recorded {
		all = append(all, fmt.Sprintf("handshake %s %d", r.Reason, r.Count))
		if r.Certificate.Serial == "" && slices.Contains([]string{identity.Revoked, identity.Expired, pki.TooMany}, r.Reason) {
			d.t.Errorf("%s: nobody knows which certificate", r.Reason)
		}
	}
	for _, reason := range d.denied {
		all = append(all, "request "+reason)
	}
	d.recorded, d.denied = nil, nil
	return strings.Join(all, ", ")
}

// record fails the test unless this, and nothing else, comes on record. A client may
// know of its refusal before it is on record.
func (d *door) record(name, want string) {
	d.t.Helper()
	var got string
	d.until(fmt.Sprintf("%s: %q on record", name, want), func() bool {
		if more := d.reasons(); more != "" {
			got = strings.TrimPrefix(got+", "+more, ", ")
		}
		return len(got) >= len(want)
	})
	if got != want {
		d.t.Errorf("%s: on record: %q, want %q", name, got, want)
	}
}

// TestCertificateTraps: each is refused for its own reason, and on record with it.
func TestCertificateTraps(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	other := newCAs(t)
	uri := func(s string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs = nil; c.ExtraExtensions = append(c.ExtraExtensions, sanOf(t, s)) }
	}
	subject := func(cns ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.RawSubject = subjectOf(t, cns...) }
	}
	revoked := mint(t, d.ca, "sae", "alice", nil)
	d.crl.publish(d.sae.crl(t, 2, nil, load(t, revoked).Leaf()))
	d.revoked.Fetch(t.Context())
	for name, tt := range map[string]struct {
		dir  string
		want string
	}{
		"a good one":               {d.alice(), ""},
		"no EKU":                   {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.ExtKeyUsage = nil }), "request eku"},
		"any EKU":                  {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), "request eku"},
		"EKU of servers":           {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "handshake eku 1"},
		"a CA as leaf":             {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), "request not-leaf"},
		"no digitalSignature":      {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), "request key-usage"},
		"two CNs":                  {mint(t, d.ca, "sae", "alice", subject("bob", "alice")), "request cn-mismatch"},
		"NUL in the CN":            {mint(t, d.ca, "sae", "alice", subject("alice\x00")), "request cn-mismatch"},
		"Cyrillic in the CN":       {mint(t, d.ca, "sae", "alice", subject("\u0430lice")), "request cn-mismatch"},
		"two URI SANs":             {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), "request ambiguous"},
		"an escape":                {mint(t, d.ca, "sae", "alice", uri("qkd://sae.lab.test/%61lice")), "request bad-id"},
		"userinfo":                 {mint(t, d.ca, "sae", "alice", uri("qkd://u@sae.lab.test/alice")), "request no-rule"},
		"a port":                   {mint(t, d.ca, "sae", "alice", uri("qkd://sae.lab.test:99/alice")), "request no-rule"},
		"dots":                     {mint(t, d.ca, "sae", "alice", uri("qkd://sae.lab.test/x/../alice")), "request bad-id"},
		"another trust domain":     {mint(t, d.ca, "sae", "alice", uri("qkd://sae.evil.test/alice")), "handshake names 1"},
		"another role's host":      {mint(t, d.ca, "sae", "alice", uri("qkd://operator.lab.test/alice")), "handshake names 1"},
		"a KME's":                  {mint(t, d.ca, "kme", "km1", nil), "handshake unknown-ca 1"},
		"an operator's":            {mint(t, d.ca, "operator", "root", nil), "handshake unknown-ca 1"},
		"a CA of the same name":    {mint(t, other, "sae", "alice", nil), "handshake unknown-ca 1"},
		"not begun":                {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "handshake not-yet-valid 1"},
		"of a year":                {mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(1, 0, 0) }), "request lifetime"},
		"revoked":                  {revoked, "handshake revoked 1"},
		"of somebody nobody knows": {mint(t, d.ca, "sae", "mallory", nil), "request unknown-principal"},
	} {
		status, err := d.ask(d.client(tt.dir))
		if (status == http.StatusOK) != (tt.want == "") {
			t.Errorf("%s: got %d, %v", name, status, err)
		}
		d.record(name, tt.want)
	}

	t.Run("nothing", func(t *testing.T) {
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: pki.AnonymousTLS(pool(t, filepath.Join(d.ca, "root.pem")))}}
		if status, err := d.ask(c); err == nil {
			t.Errorf("got %d", status)
		}
		d.record("", "handshake no-certificate 1")
	})
	t.Run("the other way round", func(t *testing.T) { // an SAE's at the door of KMEs
		kmes, crl := issuers(t, filepath.Join(d.ca, "kme/intermediate.pem")), newPublisher(t)
		crl.publish(signerOf(t, d.ca, "kme").crl(t, 1, nil))
		revoked, err := pki.OpenRevocations(t.Context(), pki.RevocationsConfig{
			Role: "kme", Issuers: kmes, URLs: []string{crl.url}, Dir: t.TempDir(), Log: quiet,
		})
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		gate := pki.NewGate(pki.GateConfig{
			Door: "assign", Credential: d.credential, Issuers: kmes, Revocations: revoked, Refusals: &d.refusals, Log: quiet,
			Judge: func(leaf *x509.Certificate, _ time.Time) (identity.Caller, error) {
				return identity.Stranger(leaf), nil
			},
		})
		way := gate.Listen(ln)
		defer way.Close()
		let := make(chan net.Conn, 1)
		go func() {
			for {
				conn, err := way.Accept()
				if err != nil {
					return
				}
				let <- conn
			}
		}()
		conn, err := tls.Dial("tcp", ln.Addr().String(), clientTLS(t, d.ca, d.alice()))
		if err == nil {
			_, err = conn.Read(make([]byte, 1)) // it learns of it after its handshake
			_ = conn.Close()
		}
		if err == nil {
			t.Error("it was let in")
		}
		d.record("", "handshake unknown-ca 1")
		conn, err = tls.Dial("tcp", ln.Addr().String(), clientTLS(t, d.ca, mint(t, d.ca, "kme", "km2", nil)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		defer (<-let).Close() // a KME's is
	})
	t.Run("ended", func(t *testing.T) {
		dir := d.alice()
		d.later.Store(int64(2 * time.Hour))
		defer d.later.Store(0)
		if status, _ := d.ask(d.client(dir)); status != 0 {
			t.Errorf("got %d", status)
		}
		d.record("", "handshake expired 1")
	})
	t.Run("a session to resume", func(t *testing.T) {
		dir := d.alice()
		c := d.client(dir)
		c.Transport.(*http.Transport).TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		if status, err := d.ask(c); status != http.StatusOK {
			t.Fatal(status, err)
		}
		d.crl.publish(d.sae.crl(t, 3, nil, load(t, dir).Leaf()))
		d.revoked.Fetch(t.Context())
		c.CloseIdleConnections()
		if status, _ := d.ask(c); status != 0 {
			t.Errorf("got %d", status)
		}
		d.record("", "handshake revoked 1")
	})
}

// clientTLS is that of whom the credential in dir is.
func clientTLS(t testing.TB, ca, dir string) *tls.Config {
	t.Helper()
	cfg := pki.ClientTLS(load(t, dir), pool(t, filepath.Join(ca, "root.pem")), nil)
	cfg.ServerName = "localhost"
	return cfg
}

var oidSubjectAltName, oidCommonName = asn1.ObjectIdentifier{2, 5, 29, 17}, asn1.ObjectIdentifier{2, 5, 4, 3}

// sanOf is a SAN with one URI in exactly this spelling.
func sanOf(t testing.TB, uri string) pkix.Extension {
	t.Helper()
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Value: value}
}

// subjectOf is a subject of these CNs, in order.
func subjectOf(t testing.TB, cns ...string) []byte {
	t.Helper()
	var seq pkix.RDNSequence
	for _, cn := range cns {
		seq = append(seq, pkix.RelativeDistinguishedNameSET{{Type: oidCommonName, Value: cn}})
	}
	raw, err := asn1.Marshal(seq)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// watcher keeps asking on one connection until it ends.
func (d *door) watch(c *http.Client, asked *atomic.Int64) (ended <-chan error) {
	done := make(chan error, 1)
	go func() {
		for {
			status, err := d.ask(c)
			if err == nil && status != http.StatusOK {
				err = fmt.Errorf("status %d", status)
			}
			if err != nil {
				done <- err
				return
			}
			asked.Add(1)
		}
	}()
	return done
}

// TestBlockAlice: her open connections end when her certificate is revoked, or her
// switch is turned; those of others go on.
func TestBlockAlice(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"CRL", "switch"} {
		for _, protocol := range []string{"http/1.1", "h2"} {
			t.Run(how+" "+protocol, func(t *testing.T) {
				t.Parallel()
				d := newDoor(t, pki.Limits{})
				d.people.Store(peopleMap(t, true))
				alice, bob := mint(t, d.ca, "sae", "alice", nil), mint(t, d.ca, "sae", "bob", nil)
				var hers, his atomic.Int64
				aliceDone, bobDone := d.watch(d.client(alice, protocol), &hers), d.watch(d.client(bob, protocol), &his)
				idle := d.client(alice, protocol)
				if status, err := d.ask(idle); err != nil || status != http.StatusOK {
					t.Fatal(status, err)
				}
				d.until("both are served", func() bool { return hers.Load() > 10 && his.Load() > 10 })
				if n := d.gate.Open(); n != 3 {
					t.Errorf("%d connections are open, want 3", n)
				}
				switch how {
				case "CRL":
					d.crl.publish(d.sae.crl(t, 2, nil, load(t, alice).Leaf()))
					d.revoked.Fetch(t.Context())
				case "switch":
					d.people.Store(peopleMap(t, false))
					next := make(chan struct{})
					close(*d.changed.Swap(&next))
				}
				if err := <-aliceDone; err == nil {
					t.Error("alice is served on")
				}
				d.until("her other connection, which asks nothing, is closed", func() bool { return d.gate.Good() == 1 })
				served := his.Load()
				d.until("bob is served on", func() bool { return his.Load() > served+10 })
				select {
				case err := <-bobDone:
					t.Errorf("bob was disturbed: %v", err)
				default:
				}
				// A client does not say when it had to begin another connection.
				if log := d.log.String(); strings.Count(log, "caller=sae/alice ") != 2 || strings.Contains(log, "caller=sae/bob ") {
					t.Errorf("the gate has not closed two connections of alice, and no other:\n%s", log)
				}
			})
		}
	}
}

// TestCAAwayForADay: while no CRL comes the door serves on, on old connections and new ones,
// and an alarm stands; when the last one has ended it lets nobody in, and closes what is
// open; with the next one it serves again.
func TestCAAwayForADay(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	d.stop()
	ends := time.Now().Add(72 * time.Hour)
	alice := mint(t, d.ca, "sae", "alice", func(c *x509.Certificate) { c.NotAfter = ends })
	open := d.client(alice)
	d.want(open, http.StatusOK)
	d.crl.body.Store(nil)
	for _, away := range []time.Duration{time.Minute, 12 * time.Hour, 23 * time.Hour} {
		d.later.Store(int64(away))
		d.revoked.Fetch(t.Context())
		d.want(open, http.StatusOK)
		d.want(d.client(alice), http.StatusOK)
		if trouble := d.revoked.Trouble(d.now()); strings.Contains(trouble, "nobody whom it certified is let in") != (away > pki.DefaultCRLAlarm) {
			t.Errorf("the CA is away for %v, trouble: %q", away, trouble)
		}
	}
	if log := d.log.String(); strings.Contains(log, "closing a connection") {
		t.Errorf("a connection was closed meanwhile:\n%s", log)
	}
	d.record("meanwhile", "")

	d.later.Store(int64(24*time.Hour + time.Minute))
	d.until("what is open is closed", func() bool { return d.gate.Open() == 0 })
	if status, err := d.ask(d.client(alice)); err == nil {
		t.Errorf("without a CRL that holds: let in, %d", status)
	}
	d.record("without a CRL that holds", "handshake no-crl 1")
	if trouble := d.revoked.Trouble(d.now()); !strings.Contains(trouble, "has ended: nobody") {
		t.Errorf("without a CRL that holds, trouble: %q", trouble)
	}

	d.crl.publish(d.sae.crl(t, 2, func(l *x509.RevocationList) { l.NextUpdate = ends }))
	d.revoked.Fetch(t.Context())
	d.want(d.client(alice), http.StatusOK)
}

// until waits for what must become true.
func (d *door) until(what string, is func() bool) {
	d.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 60_000 {
		if is() {
			return
		}
		<-tick.C
	}
	d.t.Fatalf("never: %s", what)
}

// peopleMap knows alice and bob.
func peopleMap(t testing.TB, alice bool) *identity.Map {
	t.Helper()
	m, err := identity.NewMap(
		[]identity.Rule{{ID: "sae-uri", Pool: "sae", Role: identity.RoleSAE, URI: "qkd://sae.lab.test/{id}", Principal: "{id}"}},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 169 * time.Hour},
		map[string]identity.Principal{
			identity.PrincipalKey(identity.RoleSAE, "alice"): {Enabled: alice}, identity.PrincipalKey(identity.RoleSAE, "bob"): {Enabled: true},
		},
	)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestLimits: who does not come to the end of his handshakes keeps others out of his
// network only, and one caller has only so many connections.
func TestLimits(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{Handshakes: 3, HandshakesPerNetwork: 2, Connections: 2})
	address := d.address()
	dial := func(from string) net.Conn {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp4", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	mute := []net.Conn{dial("127.0.0.1"), dial("127.0.0.9")}
	d.until("two handshakes are under way", func() bool { return d.gate.Shaking() == 2 })
	if d.hears("127.0.0.1") {
		t.Error("a third of the same network was heard")
	}
	d.record("", "handshake busy 1")
	third := dial("127.0.1.1") // of another network
	d.until("three handshakes are under way", func() bool { return d.gate.Shaking() == 3 })
	if d.hears("127.0.2.1") {
		t.Error("a fourth of all was heard")
	}
	for _, c := range append(mute, third) {
		c.Close()
	}
	d.until("their places are free", func() bool { return d.gate.Shaking() == 0 })
	d.until("all are counted", func() bool { return d.refusals.Refused() == 5 }) // these three, and the two that were not heard
	d.reasons()

	alice := d.alice()
	first, second := d.client(alice), d.client(alice)
	for _, c := range []*http.Client{first, second} {
		if status, err := d.ask(c); err != nil || status != http.StatusOK {
			t.Fatal(status, err)
		}
	}
	if status, _ := d.ask(d.client(alice)); status != 0 {
		t.Error("alice has a third connection")
	}
	d.record("", "handshake too-many 1")
	first.CloseIdleConnections()
	d.until("her place is free", func() bool { return d.gate.Open() == 1 })
	if status, err := d.ask(d.client(alice)); err != nil || status != http.StatusOK {
		t.Error(status, err)
	}
}

// TestRefusalsAreSummedUp: a flood is a few events; what cannot be recorded is counted on.
func TestRefusalsAreSummedUp(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	d.failing = true
	km1 := mint(t, d.ca, "kme", "km1", nil)
	for i := range 5 {
		_, _ = d.ask(d.client(km1)) // it may know of its refusal before the gate counts it
		d.until("it is counted", func() bool { return d.refusals.Refused() == int64(i+1) })
		if got := d.reasons(); got != "" {
			t.Errorf("on record: %q, and nothing can be", got)
		}
	}
	d.failing = false
	d.record("", "handshake unknown-ca 5")
	for range 80 { // each a certificate of its own
		leaf := &x509.Certificate{Raw: []byte(rand.Text())}
		d.gate.Failed(&net.TCPAddr{}, &tls.CertificateVerificationError{UnverifiedCertificates: []*x509.Certificate{leaf}, Err: x509.UnknownAuthorityError{}})
	}
	got := strings.Split(d.reasons(), ", ")
	slices.Sort(got)
	if len(got) != 65 || got[64] != "handshake unknown-ca 16" {
		t.Errorf("on record: %d events, the last %q; want 65, and one of 16", len(got), got[len(got)-1])
	}
}

// TestHybrid: the key exchange is one that a quantum computer does not break, unless a
// client knows no better.
func TestHybrid(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	for _, tt := range []struct{ offered, want tls.CurveID }{{0, tls.X25519MLKEM768}, {tls.X25519, tls.X25519}} {
		c := d.client(d.alice(), "h2")
		if cfg := c.Transport.(*http.Transport).TLSClientConfig; tt.offered != 0 {
			cfg.CurvePreferences = []tls.CurveID{tt.offered}
		}
		res, err := c.Get(d.url)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.TLS.CurveID != tt.want || res.TLS.Version != tls.VersionTLS13 || res.ProtoMajor != 2 {
			t.Errorf("got %v, %s, %s; want %v", res.TLS.CurveID, tls.VersionName(res.TLS.Version), res.Proto, tt.want)
		}
	}
}

// BenchmarkHandshake is a connection with one request, at a door and at a bare server
// that does the same mutual TLS and nothing else. The CPU time is that of both ends;
// of-bare is the door's, in terms of the bare server's.
func BenchmarkHandshake(b *testing.B) {
	d := newDoor(b, pki.Limits{})
	config := pki.ServerTLS(d.credential, pool(b, filepath.Join(d.ca, "sae/intermediate.pem")), tls.VersionTLS13)
	bare := httptest.NewUnstartedServer(okay)
	bare.TLS, bare.EnableHTTP2 = config, true
	bare.StartTLS()
	defer bare.Close()
	alice, roots := load(b, d.alice()), pool(b, filepath.Join(d.ca, "root.pem"))
	var spent [2]time.Duration
	urls := [2]string{d.url, strings.Replace(bare.URL, "127.0.0.1", "localhost", 1)}
	for b.Loop() {
		for i, url := range urls {
			before := cpuTime()
			c := d.clientOf(alice, roots)
			res, err := c.Get(url)
			if err != nil || res.StatusCode != http.StatusOK {
				b.Fatal(res, err)
			}
			res.Body.Close()
			c.CloseIdleConnections()
			spent[i] += cpuTime() - before
		}
	}
	perOp := func(t time.Duration) float64 { return float64(t.Microseconds()) / float64(b.N) }
	b.ReportMetric(perOp(spent[0]), "door-cpu-µs/op")
	b.ReportMetric(perOp(spent[1]), "bare-cpu-µs/op")
	b.ReportMetric(float64(spent[0])/float64(spent[1]), "of-bare")
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // has no errors for ourselves
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
