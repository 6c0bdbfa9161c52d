package admin_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/pki"
)

// stage is the door over TLS with a CA of its own, and a Backend that says what it
// is told to say.
type stage struct {
	t      *testing.T
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	server *httptest.Server
	*script
}

// script is the Backend.
type script struct {
	node   admin.Node
	links  []admin.Link
	alarms []admin.Alarm
	err    error // of every call
	epochs admin.Epochs
	saes   []admin.SAE

	certificates []admin.Certificate
	waiting      []admin.Waiting
	given        []approval.Approval // to the last EnableSAE

	acts []string
	past map[string][]admin.Span

	findings []admin.Finding
	queries  []admin.Query
	many     int // events found beside
	linksErr error
	stopping chan struct{}
	healthy  error
	ready    error

	mu       sync.Mutex
	callers  []string // who reached the Backend
	refusals []string // who did not, and where
}

func (s *script) saw(c identity.Caller, rid string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.callers = append(s.callers, c.ID())
	if rid == "" || c.Route() == "" {
		return errors.New("no request ID, or no route")
	}
	return s.err
}

func (s *script) Node(_ context.Context, c identity.Caller, rid string) (admin.Node, error) {
	return s.node, s.saw(c, rid)
}

func (s *script) Links(_ context.Context, c identity.Caller, rid string) ([]admin.Link, error) {
	return s.links, errors.Join(s.linksErr, s.saw(c, rid))
}

func (s *script) TrustLink(_ context.Context, c identity.Caller, rid, _ string) error {
	return s.saw(c, rid)
}

func (s *script) Cleanup(_ context.Context, c identity.Caller, rid string, _ []approval.Approval) (int, error) {
	return 7, s.saw(c, rid)
}

func (s *script) Alarms(_ context.Context, c identity.Caller, rid string) ([]admin.Alarm, error) {
	err := s.saw(c, rid)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alarms, err
}

func (s *script) History(_ context.Context, _ identity.Caller, _, link string, from time.Time, each time.Duration) ([]admin.Span, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []admin.Span
	for _, p := range s.past[link] {
		if !p.At.Before(from.Truncate(each)) {
			list = append(list, p)
		}
	}
	return list, s.err
}

func (s *script) KeyStory(_ context.Context, c identity.Caller, rid string, id key.ID) (admin.KeyStory, error) {
	return admin.KeyStory{ID: id.String(), State: "SERVED", Events: []admin.Event{{Node: "a", Seq: 7, Action: "enc_keys"}}}, s.saw(c, rid)
}

func (s *script) Compromise(_ context.Context, c identity.Caller, rid string, given []approval.Approval, what admin.Suspicion) (admin.Compromised, error) {
	return admin.Compromised{From: what.Since, To: what.Until, Burned: 7, Voided: len(given), Untold: []string{what.Link}}, s.saw(c, rid)
}

func (s *script) Epochs(_ context.Context, c identity.Caller, rid string) (admin.Epochs, error) {
	return s.epochs, s.saw(c, rid)
}

func (s *script) Doctor(_ context.Context, c identity.Caller, rid string) ([]admin.Finding, error) {
	return s.findings, s.saw(c, rid)
}

func (s *script) SAEs(_ context.Context, c identity.Caller, rid string) ([]admin.SAE, error) {
	return s.saes, s.saw(c, rid)
}

func (s *script) DisableSAE(_ context.Context, c identity.Caller, rid string, sae identity.SAE, reason string) error {
	s.acts = append(s.acts, "disable "+sae.String()+" "+reason)
	return s.saw(c, rid)
}

func (s *script) LeaveApproval(_ context.Context, c identity.Caller, rid string, a approval.Approval) error {
	s.waiting = append(s.waiting, admin.Waiting{Officer: c.ID(), Approval: a})
	return s.saw(c, rid)
}

func (s *script) Waiting(_ context.Context, c identity.Caller, rid string) ([]admin.Waiting, error) {
	return s.waiting, s.saw(c, rid)
}

func (s *script) EnableSAE(_ context.Context, c identity.Caller, rid string, given []approval.Approval, sae identity.SAE) error {
	s.acts, s.given = append(s.acts, "enable "+sae.String()), given
	return s.saw(c, rid)
}

func (s *script) PolicyFiles(_ context.Context, c identity.Caller, rid string) (admin.Policies, error) {
	return admin.Policies{Digest: "0ddba11"}, s.saw(c, rid)
}

func (s *script) ReloadPolicies(_ context.Context, c identity.Caller, rid string, given []approval.Approval, looked admin.Policies) (admin.Policies, error) {
	s.acts, s.given = append(s.acts, strings.TrimSpace("reload "+looked.Digest)), given
	return admin.Policies{Digest: "abc"}, s.saw(c, rid)
}

func (s *script) Healthy(context.Context) error { return s.healthy }
func (s *script) Ready(context.Context) error   { return s.ready }

func (s *script) Refused(_ context.Context, c identity.Caller, _, route string, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusals = append(s.refusals, route+" "+c.Certificate().Serial+" "+c.ID())
	return err
}

func newStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{t: t, script: &script{stopping: make(chan struct{})}}
	s.key = newKey(t)
	s.ca = s.issue(&x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, s.key)
	m, err := identity.NewMap(
		[]identity.Rule{
			{ID: "operator", Pool: "operator", Role: identity.RoleOperator, URI: "qkd://operator.lab.test/{id}", Principal: "{id}"},
			{ID: "sae", Pool: "sae", Role: identity.RoleSAE, URI: "qkd://operator.lab.test/{id}", Principal: "{id}"},
		},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 2 * time.Hour},
		map[string]identity.Principal{
			"operator/root": {Enabled: true, Duties: []identity.Duty{identity.Operating, identity.SecurityOfficer, identity.Auditor}}, "operator/vera": {Enabled: true}, "sae/alice": {Enabled: true},
		})
	if err != nil {
		t.Fatal(err)
	}
	operators := pki.Identify("operator", func() *identity.Map { return m }, time.Now)
	saes := pki.Identify("sae", func() *identity.Map { return m }, time.Now)
	kme, err := identity.ParseKME("km1")
	if err != nil {
		t.Fatal(err)
	}
	door, err := admin.Handler(admin.Config{
		KME: kme, Trail: trail{s.script}, Node: "km1-a", Stopping: s.stopping, Backend: s.script, Log: slog.New(slog.DiscardHandler),
		Identify: func(r *http.Request) (identity.Caller, error) {
			if c, err := saes(r); err == nil { // a mix-up of pools, which the door must notice
				return c, nil
			}
			return operators(r)
		},
		Certificates: func() []admin.Certificate { return s.certificates },
		Metrics:      http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("kme_up 1\n")) }),
	})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(s.ca)
	s.server = httptest.NewUnstartedServer(door)
	s.server.TLS = &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	s.server.StartTLS()
	t.Cleanup(s.server.Close)
	return s
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (s *stage) issue(c *x509.Certificate, of *ecdsa.PrivateKey) *x509.Certificate {
	s.t.Helper()
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent := s.ca
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, of.Public(), s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	return leaf
}

// http is an HTTP client with a certificate for id.
func (s *stage) http(id string) *http.Client {
	s.t.Helper()
	k := newKey(s.t)
	leaf := s.issue(&x509.Certificate{
		SerialNumber: big.NewInt(47), Subject: pkix.Name{CommonName: id}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "qkd", Host: "operator.lab.test", Path: "/" + id}},
	}, k)
	hc := s.server.Client()
	transport := hc.Transport.(*http.Transport).Clone()
	transport.TLSClientConfig.Certificates = []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: k}}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func (s *stage) client(id string) *admin.Client { return admin.NewClient(s.server.URL, s.http(id)) }

// trail is the audit log: one event, which is in the tree as leaf 7, and one that is not yet.
type trail struct{ *script }

func (s trail) Trail(_ context.Context, c identity.Caller, rid string) (admin.Trail, error) {
	return admin.Trail{Logs: []admin.TrailLog{{Origin: 1, Name: "km1/1", Size: 8, Begun: when}}, Waiting: 1}, s.saw(c, rid)
}

func (s trail) Search(_ context.Context, c identity.Caller, rid string, q admin.Query) (admin.Findings, error) {
	err := s.saw(c, rid)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queries = append(s.queries, q)
	const text = `{"at":"2026-11-23T12:00:00Z","action":"enc_keys","outcome":"refused","reason":"<b>because</b>","actor":{"role":"sae","id":"alice","gateway":"qutemail"},"peer":"bob"}`
	list := []admin.Found{{Leaf: 7, Text: text}, {Leaf: -1, Text: "not an event"}}
	for range s.many {
		list = append(list, admin.Found{Leaf: int64(7 + len(list)), Text: text})
	}
	return admin.Findings{Events: list[:min(len(list), q.Limit)], More: len(list) >= q.Limit}, err
}

func (s trail) Proof(_ context.Context, c identity.Caller, rid string, _, leaf int64) (audit.Proof, error) {
	return audit.Proof{Leaf: leaf, Text: "{}"}, s.saw(c, rid)
}

func (s trail) Bundle(_ context.Context, c identity.Caller, rid string, _, _, _ int64, _ func() io.Writer) error {
	return s.saw(c, rid)
}
