package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/policies"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kmectl": main})
}

// TestScripts runs the CLI as a process against real doors, with real certificates
// and the shipped policies, in front of a KME that is only a table.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata", Setup: setUp,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"waitfor": waitFor},
	})
}

// waitFor waits until a file has a match: waitfor FILE PATTERN.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: waitfor FILE PATTERN")
	}
	pattern, err := regexp.Compile(args[1])
	ts.Check(err)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		select {
		case <-tick.C:
		case <-late:
			ts.Fatalf("%s never had %s", args[0], args[1])
		}
		if text, err := os.ReadFile(ts.MkAbs(args[0])); err == nil && pattern.Match(text) {
			return
		}
	}
}

// setUp fills a script's folder with profiles as a lab does. Scripts find the SAE
// door in $SAE and the operator door in $OPERATOR.
func setUp(env *testscript.Env) error {
	s := &stage{dir: filepath.Join(env.WorkDir, ".lab"), table: &table{keys: make(map[key.ID]shared)}}
	if err := s.open(); err != nil {
		return err
	}
	env.Defer(func() {
		for _, d := range s.doors {
			_ = d.Close()
		}
	})
	env.Setenv("SAE", s.doors[0].Addr)
	env.Setenv("OPERATOR", s.doors[1].Addr)
	if err := os.CopyFS(filepath.Join(env.WorkDir, "policies"), policies.Shipped); err != nil {
		return err
	}
	return s.people()
}

// stage is two doors and the CAs behind them.
type stage struct {
	dir   string
	root  issuer
	roles map[string]issuer
	doors []*http.Server // of SAEs, of operators; Addr is the URL
	*table
}

// issuer is a CA.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (s *stage) open() error {
	var err error
	authority := x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if s.root, err = issue(issuer{}, authority); err != nil {
		return err
	}
	s.roles = make(map[string]issuer)
	for _, role := range []string{"sae", "operator"} {
		if s.roles[role], err = issue(s.root, authority); err != nil {
			return err
		}
	}
	if err := store(s.dir, "root.pem", 0o644, certPEM(s.root.cert)); err != nil {
		return err
	}
	credential, err := s.server("km1", time.Hour)
	if err != nil {
		return err
	}
	set, err := policies.Load("../../policies")
	if err != nil {
		return err
	}
	s.set, s.live = set, policies.NewCurrent(set)
	log, kme := slog.New(slog.DiscardHandler), set.Links[0].Alice
	identify := func(pool string) func(*http.Request) (identity.Caller, error) {
		return pki.Identify(pool, func() *identity.Map { return s.live.Set().Principals }, time.Now)
	}
	door014, err := etsi014.New(etsi014.Config{KME: kme, Backend: s.table, Identify: identify("sae"), Log: log})
	if err != nil {
		return err
	}
	operators, err := admin.Handler(admin.Config{
		KME: kme, Backend: operatorTable{s.table}, Trail: &troubledTrail{}, Identify: identify("operator"), Metrics: http.NotFoundHandler(), Log: log,
	})
	if err != nil {
		return err
	}
	for _, d := range []struct {
		role    string
		handler http.Handler
	}{{"sae", door014.Handler()}, {"operator", operators}} {
		pool := x509.NewCertPool()
		pool.AddCert(s.roles[d.role].cert)
		if err := s.serve(d.handler, pki.ServerTLS(credential, pool, tls.VersionTLS12)); err != nil {
			return err
		}
	}
	return nil
}

// server makes the certificate of a node, which ends after some time.
func (s *stage) server(folder string, life time.Duration) (*pki.Credential, error) {
	if err := s.write(folder, s.root, x509.Certificate{
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, NotAfter: time.Now().Add(life),
	}); err != nil {
		return nil, err
	}
	return pki.LoadCredential(filepath.Join(s.dir, folder))
}

// serve opens a door.
func (s *stage) serve(h http.Handler, config *tls.Config) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	d := &http.Server{
		Addr: "https://" + l.Addr().String(), Handler: h, TLSConfig: config, ReadHeaderTimeout: 10 * time.Second,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
	s.doors = append(s.doors, d)
	go func() { _ = d.ServeTLS(l, "", "") }() // ends with Close
	return nil
}

// people makes the profiles of the lab's people.
func (s *stage) people() error {
	for _, p := range []struct{ folder, role, id, kme string }{
		{"saes/alice", "sae", "alice", s.doors[0].Addr},
		{"saes/bob", "sae", "bob", s.doors[0].Addr},
		{"saes/carol", "sae", "carol", s.doors[0].Addr},
		{"saes/mallory", "sae", "mallory", s.doors[0].Addr}, // whom the policies do not know
		{"operators/root", "operator", "root", s.doors[1].Addr},
	} {
		if err := s.person(p.folder, p.role, p.id, p.kme, time.Hour); err != nil {
			return err
		}
	}
	return nil
}

// person makes the profile of one, whose certificate ends after some time.
func (s *stage) person(folder, role, id, kme string, life time.Duration) error {
	if err := s.write(folder, s.roles[role], x509.Certificate{
		Subject: pkix.Name{CommonName: id}, URIs: []*url.URL{{Scheme: "qkd", Host: role + ".lab.test", Path: "/" + id}},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		ExtraExtensions: []pkix.Extension{identity.RoleExtension(identity.Role(role))}, NotAfter: time.Now().Add(life),
	}); err != nil {
		return err
	}
	return store(filepath.Join(s.dir, folder), "profile.yaml", 0o644, []byte("kme: "+kme+"\n"))
}

// write issues a certificate into a folder.
func (s *stage) write(folder string, by issuer, c x509.Certificate) error {
	leaf, err := issue(by, c)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(leaf.key)
	if err != nil {
		return err
	}
	dir := filepath.Join(s.dir, folder)
	if err := store(dir, "key.pem", 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return err
	}
	return store(dir, "cert.pem", 0o644, certPEM(leaf.cert, by.cert))
}

func issue(by issuer, c x509.Certificate) (issuer, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return issuer{}, err
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore = time.Now().Add(-time.Minute)
	if c.NotAfter.IsZero() {
		c.NotAfter = time.Now().Add(48 * time.Hour)
	}
	if c.Subject.CommonName == "" {
		c.Subject.CommonName = fmt.Sprint("issued ", c.SerialNumber)
	}
	if by.cert == nil {
		by = issuer{&c, private}
	}
	der, err := x509.CreateCertificate(rand.Reader, &c, by.cert, private.Public(), by.key)
	if err != nil {
		return issuer{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return issuer{cert, private}, err
}

func certPEM(certs ...*x509.Certificate) []byte {
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

func store(dir, name string, mode os.FileMode, text []byte) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), text, mode)
}

// table is all that these tests need of a KME: it makes keys of its own and hands
// each out twice.
type table struct {
	set  *policies.Set
	live *policies.Current

	mu   sync.Mutex
	keys map[key.ID]shared
	asks int // of links
}

type shared struct {
	master, slave identity.SAE
	bits          []byte
}

func (b *table) allowed(c identity.Caller, action string, other identity.SAE) error {
	sae, _ := c.SAE()
	if d := b.set.Decide(policies.Question{Action: action, Caller: sae, Other: other}); !d.Allow {
		return problem.New(problem.Unauthorized, "%s", d.Reason)
	}
	return nil
}

func (b *table) Limits() etsi014.Limits {
	return etsi014.Limits{KeySize: 256, MinSize: 256, MaxSize: 512, MaxPerRequest: 4}
}

func (b *table) Admit(identity.Caller) error { return nil }

func (b *table) Status(_ context.Context, c identity.Caller, _ string, slave identity.SAE) (etsi014.Status, error) {
	l := b.Limits()
	return etsi014.Status{
		SourceKME: "km1", TargetKME: "km2", Master: c.ID(), Slave: slave.String(), KeySize: l.KeySize, Stored: 7, Max: 100,
		MaxPerRequest: l.MaxPerRequest, MaxSize: l.MaxSize, MinSize: l.MinSize,
	}, b.allowed(c, policies.Status, slave)
}

func (b *table) EncKeys(_ context.Context, c identity.Caller, _ string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	if err := b.allowed(c, policies.EncKeys, slave); err != nil {
		return etsi014.Container{}, err
	}
	if r.Number == 4 {
		return etsi014.Container{}, &problem.Error{Kind: problem.Unavailable, Detail: "3 keys are stored", RetryAfter: 7 * time.Second}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var out etsi014.Container
	master, _ := c.SAE()
	for range r.Number {
		bits := make([]byte, r.Bits/8)
		_, _ = rand.Read(bits)
		k := etsi014.Key{ID: key.NewLocalID(time.Now()), Material: key.NewMaterial(slices.Clone(bits)), Provenance: key.Simulated}
		b.keys[k.ID] = shared{master, slave, bits}
		out.Keys = append(out.Keys, k)
	}
	return out, nil
}

func (b *table) DecKeys(_ context.Context, c identity.Caller, _ string, master identity.SAE, ids []key.ID) (etsi014.Container, error) {
	if err := b.allowed(c, policies.DecKeys, master); err != nil {
		return etsi014.Container{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var out etsi014.Container
	for _, id := range ids {
		k, ok := b.keys[id]
		if !ok || k.master != master || k.slave.String() != c.ID() {
			return etsi014.Container{}, problem.New(problem.NotFound, "")
		}
		out.Keys = append(out.Keys, etsi014.Key{ID: id, Material: key.NewMaterial(k.bits)})
	}
	for _, id := range ids {
		delete(b.keys, id)
	}
	return out, nil
}

func (b *table) Refused(_ context.Context, _ identity.Caller, _, _ string, err error) error {
	return err
}

func (b *table) AnswerLost(context.Context, identity.Caller, string, error) {}

// operatorTable is the same KME to its operators. Its link makes a block whenever
// somebody looks.
type operatorTable struct{ *table }

var since = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func (b operatorTable) Node(context.Context, identity.Caller, string) (admin.Node, error) {
	return admin.Node{
		KME: "km1", Node: "a", Version: "v1", Run: 3, Started: since, Uptime: 61.5, HSM: admin.Health{OK: true, Detail: "SoftHSM"},
		Database: admin.Health{OK: true}, Peers: []admin.Peer{{KME: "km2", Health: admin.Health{Detail: "connection\nrefused"}, ClockOffset: 0.25}},
	}, nil
}

func (b operatorTable) Links(context.Context, identity.Caller, string) ([]admin.Link, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asks++
	return []admin.Link{exampleLink(int64(b.asks))}, nil
}

func exampleLink(block int64) admin.Link {
	return admin.Link{
		ID: "km1-km2", Peer: "km2", End: "alice", Provenance: "simulated", State: admin.LinkOpen, Session: 7, Blocks: int(block), Aborts: 1,
		Stored: 100, StoredPeer: 90, Current: &admin.Progress{Stage: "reconcile", Step: 3, Steps: 5, Done: 0.5},
		Last: &admin.Block{
			Session: 7, Block: block, At: since, Took: 1.5, QBER: 0.0102, Efficiency: 1.043, Length: 147_200, Gates: 5_200_000,
			Detected: 650_000, Gains: []float64{.07, .02, 3e-4}, SiftedKey: 300_000, SiftedTest: 70_000, KeyQBER: .0101, Leak: 30_000, LeakLimit: 36_000, Rounds: 200,
		},
		Pads: 12, EpsSecrecy: 2e-12, EpsLimit: 1e-6,
	}
}

func (b operatorTable) Alarms(context.Context, identity.Caller, string) ([]admin.Alarm, error) {
	return []admin.Alarm{{Name: "peer-km2", Text: "connection refused", Since: since}}, nil
}

func (b operatorTable) TrustLink(context.Context, identity.Caller, string, string) error { return nil }

func (b operatorTable) Cleanup(_ context.Context, _ identity.Caller, _ string, given []approval.Approval) (int, error) {
	return 3 + len(given), nil
}

func (b operatorTable) KeyStory(_ context.Context, _ identity.Caller, _ string, id key.ID) (admin.KeyStory, error) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return admin.KeyStory{
		ID: id.String(), Epoch: 492204, Made: at, State: "CONSUMED",
		Due: []admin.KeyDue{{SAE: "bob", Master: "alice", Bits: 256, Provenance: "simulated", KEK: 3, Expires: at, Gone: "taken"}},
		Events: []admin.Event{
			{At: at, Node: "km1-a", Seq: 9, Action: "enc_keys", Outcome: "done", Actor: "sae alice", Master: "alice", Slaves: []string{"bob"}},
			{At: at, Node: "km1-a", Seq: 12, Action: "dec_keys", Outcome: "refused", Actor: "sae carol", Reason: "not named"},
		},
	}, nil
}

func (b operatorTable) Compromise(_ context.Context, _ identity.Caller, _ string, given []approval.Approval, s admin.Suspicion) (admin.Compromised, error) {
	if len(given) != 2 {
		return admin.Compromised{}, problem.New(problem.Forbidden, "this takes two officers")
	}
	return admin.Compromised{From: s.Since, To: s.Since.Add(time.Hour), Burned: 640, Voided: 5, Untold: []string{"km2"}}, nil
}

func (b operatorTable) Epochs(context.Context, identity.Caller, string) (admin.Epochs, error) {
	starts := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return admin.Epochs{Length: 3600, WorstCase: 90095, Epochs: []admin.Epoch{
		{Epoch: 492204, Starts: starts, Ends: starts.Add(time.Hour), State: "draining", KEKs: []admin.KEK{
			{ID: 3, Label: "kek-a", State: "sealed", Wraps: 1 << 30}, {ID: 4, Label: "kek-b", State: "sealed", Wraps: 12, Copies: []string{"km1-a", "km1-b"}},
		}},
		{Epoch: 492205, Starts: starts.Add(time.Hour), Ends: starts.Add(2 * time.Hour), State: "open", Stored: 640, Waiting: 5, KEKs: []admin.KEK{{ID: 5, State: "open", Wraps: 645}}},
	}}, nil
}

func (b operatorTable) History(context.Context, identity.Caller, string, string, time.Time, time.Duration) ([]admin.Span, error) {
	return nil, nil
}

func (b operatorTable) Doctor(context.Context, identity.Caller, string) ([]admin.Finding, error) {
	return []admin.Finding{admin.Good("hsm", "the token answered in 2ms"), admin.Bad("peer km2", "call its operators", "it does not answer: refused")}, nil
}

func (b operatorTable) SAEs(context.Context, identity.Caller, string) ([]admin.SAE, error) {
	var list []admin.SAE
	set := b.live.Set()
	for sae, entry := range set.SAEs {
		why, off := set.Disabled(sae)
		s := admin.SAE{ID: sae.String(), Homes: []string{entry.Homes[0].String()}, Enabled: !off, Reason: why}
		if off {
			s.By, s.Since = "root", since
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(x, y admin.SAE) int { return strings.Compare(x.ID, y.ID) })
	return list, nil
}

func (b operatorTable) DisableSAE(_ context.Context, _ identity.Caller, _ string, sae identity.SAE, reason string) error {
	b.live.SwitchOff(map[string]string{identity.PrincipalKey(identity.RoleSAE, sae.String()): reason})
	return nil
}

func (b operatorTable) LeaveApproval(_ context.Context, _ identity.Caller, _ string, a approval.Approval) error {
	if a.Act != "enable-sae alice" {
		return problem.New(problem.Forbidden, "left: %s", a.Act)
	}
	return nil
}

func (b operatorTable) Waiting(context.Context, identity.Caller, string) ([]admin.Waiting, error) {
	return nil, nil
}

func (b operatorTable) EnableSAE(context.Context, identity.Caller, string, []approval.Approval, identity.SAE) error {
	b.live.SwitchOff(nil)
	return nil
}

func (b operatorTable) PolicyFiles(context.Context, identity.Caller, string) (admin.Policies, error) {
	return admin.Policies{}, nil
}

func (b operatorTable) ReloadPolicies(_ context.Context, _ identity.Caller, _ string, given []approval.Approval, looked admin.Policies) (admin.Policies, error) {
	if looked.Digest != "" {
		return admin.Policies{Digest: fmt.Sprintf("%s, approved by %d,", looked.Digest, len(given))}, nil
	}
	return admin.Policies{}, problem.New(problem.Invalid, "the policies stay what they were: default.cedar:7:9: no")
}

func (b operatorTable) Healthy(context.Context) error { return nil }
func (b operatorTable) Ready(context.Context) error   { return nil }

// troubledTrail is the audit log of a site that somebody watches: it is away for a while,
// a connection breaks, and a recovery begins another log.
type troubledTrail struct {
	admin.TrailBackend // of which nothing is asked

	mu    sync.Mutex
	looks int
}

func (t *troubledTrail) Trail(context.Context, identity.Caller, string) (admin.Trail, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	logs := []admin.TrailLog{{Origin: 1, Name: "km1/audit/1", Size: 7}}
	if t.looks > 0 {
		logs = append(logs, admin.TrailLog{Origin: 2, Name: "km1/audit/2", Size: 2})
	}
	return admin.Trail{Logs: logs}, nil
}

func (t *troubledTrail) Search(_ context.Context, _ identity.Caller, _ string, q admin.Query) (found admin.Findings, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.looks++
	size := map[int64]int64{1: 8, 2: 2}[q.Origin]
	switch {
	case t.looks == 2 || t.looks == 3:
		return found, problem.Because(problem.Unavailable, errors.New("the database is away"))
	case t.looks == 4:
		panic(http.ErrAbortHandler)
	case t.looks > 4 && q.Origin == 1:
		size = 10
	}
	for leaf := q.First; leaf < size; leaf++ {
		if len(found.Events) == 1 { // a page is short, and says that it is
			found.More = true
			break
		}
		found.Events = append(found.Events, admin.Found{Leaf: leaf, Text: fmt.Sprintf(`{"at":"2026-03-01T12:00:00.000Z","node":"a","action":"alarm","outcome":"done","reason":"log %d"}`, q.Origin)})
	}
	if len(found.Events) == 0 && q.Origin == 1 {
		return found, problem.New(problem.Gone, "the log has ended")
	}
	return found, nil
}
