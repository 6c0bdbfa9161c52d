package vector

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Stranger is the caller whose certificate no rule names.
const Stranger = "stranger"

// Gateway is the caller who acts for the SAEs that are mail addresses.
const Gateway = "qutemail"

// Stage is where a door can be tested without a KME behind it: TLS servers on the
// loopback interface, a certificate authority that lives as long as the Stage, and
// the certificates of some SAEs.
type Stage struct {
	HTTP2 bool // whether clients offer it; set before the first Client

	ca      *x509.Certificate
	caKey   *ecdsa.PrivateKey
	rules   *identity.Map
	servers map[string]*http.Server
	bases   map[string]string
	clients map[string]*http.Client
}

// NewStage returns a Stage for the SAEs named.
func NewStage(saes ...string) (*Stage, error) {
	principals := make(map[string]identity.Principal)
	var users []identity.SAE
	for _, sae := range saes {
		principals[identity.PrincipalKey(identity.RoleSAE, sae)] = identity.Principal{Enabled: true}
		if strings.Contains(sae, "@") {
			id, err := identity.ParseSAE(sae)
			if err != nil {
				return nil, err
			}
			users = append(users, id)
		}
	}
	if len(users) > 0 {
		principals[identity.PrincipalKey(identity.RoleSAE, Gateway)] = identity.Principal{Enabled: true, GatewayFor: users}
	}
	rules, err := identity.NewMap(
		[]identity.Rule{{ID: "sae", Pool: "sae", Role: identity.RoleSAE, URI: "qkd://sae.lab.test/{id}", Principal: "{id}"}},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 2 * time.Hour}, principals)
	if err != nil {
		return nil, err
	}
	s := &Stage{rules: rules, servers: make(map[string]*http.Server), bases: make(map[string]string), clients: make(map[string]*http.Client)}
	if s.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	s.ca, err = s.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "stage CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, &s.caKey.PublicKey)
	return s, err
}

// issue completes and signs a certificate, by itself if there is no parent.
func (s *Stage) issue(c, parent *x509.Certificate, public *ecdsa.PublicKey) (*x509.Certificate, error) {
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, s.caKey)
	if err != nil {
		return nil, fmt.Errorf("issuing a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

func (s *Stage) credential(c *x509.Certificate) (tls.Certificate, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	c.KeyUsage = x509.KeyUsageDigitalSignature
	leaf, err := s.issue(c, s.ca, &private.PublicKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: private, Leaf: leaf}, nil
}

// Identify judges the certificate of a request as a KME's door for SAEs does.
func (s *Stage) Identify(r *http.Request) (identity.Caller, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return identity.Stranger(nil), errors.New("no certificate")
	}
	c, err := s.rules.Judge("sae", r.TLS.PeerCertificates[0], time.Now())
	return c.WithRemote(r.RemoteAddr), err
}

// Serve opens the door of a KME.
func (s *Stage) Serve(kme string, h http.Handler) error {
	cert, err := s.credential(&x509.Certificate{
		Subject: pkix.Name{CommonName: kme}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, TLSConfig: &tls.Config{
		Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: s.pool(), MinVersion: tls.VersionTLS12,
	}}
	s.servers[kme], s.bases[kme] = server, "https://"+l.Addr().String()
	go func() { _ = server.ServeTLS(l, "", "") }() // ends with Close
	return nil
}

func (s *Stage) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(s.ca)
	return pool
}

// Client is the Client of a Place.
func (s *Stage) Client(kme, sae string) (base string, hc *http.Client, err error) {
	base, ok := s.bases[kme]
	if !ok {
		return "", nil, fmt.Errorf("there is no %s", kme)
	}
	if hc = s.clients[sae]; hc != nil {
		return base, hc, nil
	}
	cert, err := s.credential(&x509.Certificate{
		Subject: pkix.Name{CommonName: sae}, URIs: []*url.URL{{Scheme: "qkd", Host: "sae.lab.test", Path: "/" + sae}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return "", nil, err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(s.HTTP2)
	protocols.SetHTTP1(!s.HTTP2)
	hc = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		Protocols: protocols, TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: s.pool(), MinVersion: tls.VersionTLS13},
	}}
	s.clients[sae] = hc
	return base, hc, nil
}

// Close ends all servers and connections.
func (s *Stage) Close() {
	for _, hc := range s.clients {
		hc.CloseIdleConnections()
	}
	for _, server := range s.servers {
		_ = server.Close()
	}
}
