package policies

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"
)

// certificate is one such as our CAs issue.
func certificate(t *testing.T, role, ou, id string, eku ...x509.ExtKeyUsage) *x509.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(168 * time.Hour),
		Subject:  pkix.Name{CommonName: id, OrganizationalUnit: []string{ou}},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: eku,
		URIs: []*url.URL{{Scheme: "qkd", Host: role + ".lab.test", Path: "/" + id}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func TestShippedPrincipals(t *testing.T) {
	s, err := Load(".")
	if err != nil {
		t.Fatal(err)
	}
	client, server := x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	for _, tt := range []struct {
		pool, id string
		leaf     *x509.Certificate
		ok       bool
	}{
		{"sae", "alice", certificate(t, "sae", "SAE", "alice", client), true},
		{"sae", "alice@qutemail.example", certificate(t, "sae", "SAE", "alice@qutemail.example", client), true},
		{"sae", "", certificate(t, "sae", "SAE", "mallory", client), false},
		{"sae", "", certificate(t, "kme", "KME", "km1", server, client), false},
		{"kme", "km1", certificate(t, "kme", "KME", "km1", server, client), true},
		{"operator", "root", certificate(t, "operator", "OPERATOR", "root", client), true},
		{"operator", "", certificate(t, "sae", "SAE", "alice", client), false},
	} {
		c, err := s.Principals.Judge(tt.pool, tt.leaf, time.Now())
		if (err == nil) != tt.ok || c.ID() != tt.id {
			t.Errorf("Judge(%s, %s): got %q, %v, want %q", tt.pool, tt.leaf.URIs[0], c.ID(), err, tt.id)
		}
	}
}
