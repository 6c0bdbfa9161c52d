package policies

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
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
		URIs:            []*url.URL{{Scheme: "qkd", Host: role + ".lab.test", Path: "/" + id}},
		ExtraExtensions: []pkix.Extension{identity.RoleExtension(identity.Role(role))},
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

// TestCases runs the cases that an operator has: kmectl principal test.
func TestCases(t *testing.T) {
	s, err := Load(".")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("principals_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	cases, err := ParseCases("principals_test.yaml", text)
	if err != nil || len(cases) < 40 {
		t.Fatalf("%d cases, %v", len(cases), err)
	}
	now := time.Now()
	for _, c := range cases {
		if err := c.Check(s, now); err != nil {
			t.Error(err)
		}
	}
	wrong := cases[0]
	wrong.Principal = "bob"
	if err := wrong.Check(s, now); err == nil || !strings.Contains(err.Error(), "principals_test.yaml:6:") {
		t.Errorf("a case that is not so: got %v", err)
	}
	for _, bad := range []string{"version: 1\n", "version: 1\ncases:\n  - {name: x, pool: sae}\n", "version: 1\ncases:\n  - {name: x, pool: sae, principal: a, refused: b}\n"} {
		if _, err := ParseCases("x.yaml", []byte(bad)); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
	if _, _, err := s.Verdict(Recipe{Pool: "sae", EKU: []string{"codeSigning"}}, now); err == nil {
		t.Error("an unknown EKU was taken")
	}
}
