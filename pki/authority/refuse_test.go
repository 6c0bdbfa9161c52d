package authority_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/jose"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/pki/authority"
)

// tokenKey is the key that verifies the tokens of a role.
func (s *site) tokenKey(t *testing.T, role identity.Role) (key jose.JSONWebKey) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, string(role), "token.pub"))
	if err == nil {
		err = json.Unmarshal(text, &key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign asks for a certificate with a request and a token of the test's own making.
func (s *site) sign(t *testing.T, role identity.Role, csr *x509.CertificateRequest, key any, token, notAfter string) (int, string, *x509.Certificate) {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, csr, key)
	if err != nil {
		t.Fatal(err)
	}
	status, body, err := s.call(t, s.client(t, ""), "POST", role, "/1.0/sign", map[string]string{
		"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})),
		"ott": token, "notAfter": notAfter,
	})
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		Certificate string `json:"crt"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	block, _ := pem.Decode([]byte(answer.Certificate))
	if block == nil {
		return status, string(body), nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return status, string(body), cert
}

func newKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestAskedForNamesAreDropped(t *testing.T) {
	s := newSite(t)
	asked := []string{"qkd://operator.lab.test/root", "evil.test", "192.0.2.1", "a@evil.test"}
	csr := &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "alice", OrganizationalUnit: []string{"OPERATOR"}},
		URIs:           []*url.URL{{Scheme: "qkd", Host: "operator.lab.test", Path: "/root"}},
		DNSNames:       []string{"evil.test"},
		IPAddresses:    []net.IP{net.IPv4(192, 0, 2, 1)},
		EmailAddresses: []string{"a@evil.test"},
	}
	for _, role := range []identity.Role{identity.RoleSAE, identity.RoleOperator} {
		s.serve(t, role)
		status, body, cert := s.sign(t, role, csr, newKey(t, elliptic.P256()), s.forge(t, role, map[string]any{"sans": asked}), "")
		if status != http.StatusCreated {
			t.Fatalf("%s: %d %s", role, status, body)
		}
		want := fmt.Sprintf("CN=alice,OU=%s [qkd://%s.lab.test/alice] [] [] []", strings.ToUpper(string(role)), role)
		if got := fmt.Sprint(cert.Subject, cert.URIs, cert.DNSNames, cert.IPAddresses, cert.EmailAddresses); got != want {
			t.Errorf("%s: got %s, want %s", role, got, want)
		}
	}
}

func TestBadIDs(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleSAE)
	for _, id := range []string{
		"", ".", "..", "Alice", "alice bob", "alice/../bob", "аlice", "alice\x00", "%61lice", "alice?", "alice#x",
		`a"}, "isCA": true`, "alice\n", strings.Repeat("a", 65),
	} {
		if _, err := authority.Token(s.dir, identity.RoleSAE, id, time.Now()); err == nil {
			t.Errorf("Token(%q): no error", id)
		}
		token := s.forge(t, identity.RoleSAE, map[string]any{"sub": id})
		status, body, _ := s.sign(t, identity.RoleSAE, &x509.CertificateRequest{}, newKey(t, elliptic.P256()), token, "")
		if status/100 != 4 {
			t.Errorf("ID %q: %d %s, want a refusal", id, status, body)
		}
	}
}

func TestLifetimesAndKeys(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleSAE)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		key      any
		notAfter string
		want     int
	}{
		{"ten minutes", newKey(t, elliptic.P256()), "10m", http.StatusCreated},
		{"seven days", newKey(t, elliptic.P384()), "168h", http.StatusCreated},
		{"more than seven days", newKey(t, elliptic.P256()), "168h1m", http.StatusForbidden},
		{"ten seconds", newKey(t, elliptic.P256()), "10s", http.StatusForbidden},
		{"P-521", newKey(t, elliptic.P521()), "", http.StatusForbidden},
		{"RSA", rsaKey, "", http.StatusForbidden},
	} {
		status, body, cert := s.sign(t, identity.RoleSAE, &x509.CertificateRequest{}, tt.key, s.token(t, identity.RoleSAE, "alice"), tt.notAfter)
		if status != tt.want {
			t.Errorf("%s: %d %s, want %d", tt.name, status, body, tt.want)
		}
		if cert != nil && cert.NotAfter.Sub(cert.NotBefore) > 7*24*time.Hour+30*time.Second {
			t.Errorf("%s: the certificate lasts %v", tt.name, cert.NotAfter.Sub(cert.NotBefore))
		}
	}
}

func TestCertificateAtAnotherCA(t *testing.T) {
	s := newSite(t)
	for _, role := range authority.Roles {
		s.serve(t, role)
	}
	alice := s.enrol(t, identity.RoleSAE, "alice")
	serial := leafIn(t, alice).SerialNumber.String()
	revoke := map[string]any{"serial": serial, "passive": true}

	for _, role := range []identity.Role{identity.RoleKME, identity.RoleOperator} {
		for _, path := range []string{"/1.0/renew", "/1.0/rekey", "/1.0/revoke", "/health"} {
			status, body, err := s.call(t, s.client(t, alice), "POST", role, path, revoke)
			if err == nil {
				t.Errorf("alice at the %s CA's %s: %d %s, want no handshake", role, path, status, body)
			}
		}
	}
	if status, body, err := s.call(t, s.client(t, alice), "POST", identity.RoleSAE, "/1.0/renew", nil); status != http.StatusCreated {
		t.Errorf("alice at her own CA: %d %s %v", status, body, err)
	}
}

// TestRenewToken: smallstep renews for a token signed with a certificate's key,
// verified against the root that all roles share. Here it does not.
func TestRenewToken(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleSAE)
	s.serve(t, identity.RoleOperator)
	alice := s.enrol(t, identity.RoleSAE, "alice")
	key, err := jose.ReadKey(filepath.Join(alice, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := os.ReadFile(filepath.Join(alice, "cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	var x5c []string
	for block, rest := pem.Decode(chain); block != nil; block, rest = pem.Decode(rest) {
		x5c = append(x5c, base64.StdEncoding.EncodeToString(block.Bytes))
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key.Key}, new(jose.SignerOptions).WithHeader("x5cInsecure", x5c))
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []identity.Role{identity.RoleSAE, identity.RoleOperator} {
		token, err := jose.Signed(signer).Claims(map[string]any{
			"iss": "step-ca-client/1.0", "sub": "alice", "aud": "https://" + s.addresses[role].HTTPS + "/1.0/renew",
			"iat": time.Now().Unix(), "nbf": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(), "jti": "1",
		}).CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequest("POST", "https://"+s.addresses[role].HTTPS+"/1.0/renew", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := s.client(t, "").Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("renew token at the %s CA: %d, want 400", role, resp.StatusCode)
		}
	}
}

func TestNoSecretIsServed(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleSAE)
	status, body, err := s.call(t, s.client(t, ""), "GET", identity.RoleSAE, "/1.0/provisioners", nil)
	if err != nil || status != http.StatusOK || !strings.Contains(string(body), "enrol-sae") {
		t.Fatalf("provisioners: %d %s %v", status, body, err)
	}
	if text := string(body); strings.Contains(text, "encryptedKey") || strings.Contains(text, `"d"`) {
		t.Errorf("the provisioners show a private key: %s", text)
	}
	kid := s.tokenKey(t, identity.RoleSAE).KeyID
	status, body, err = s.call(t, s.client(t, ""), "GET", identity.RoleSAE, "/1.0/provisioners/"+kid+"/encrypted-key", nil)
	if err != nil || status != http.StatusNotFound {
		t.Errorf("encrypted key: %d %s %v, want 404", status, body, err)
	}
}

// TestServesWithoutTheRootsKey also carries the token key off: tokens can be made elsewhere.
func TestServesWithoutTheRootsKey(t *testing.T) {
	s := newSite(t)
	token := s.token(t, identity.RoleSAE, "alice")
	for _, name := range []string{"root", "sae/token.key", "kme", "operator"} {
		if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	s.serve(t, identity.RoleSAE)
	if err := pki.Enrol(t.Context(), s.enrolment(t, identity.RoleSAE, "alice", token)); err != nil {
		t.Error(err)
	}
}

func TestIssuingCAs(t *testing.T) {
	s := newSite(t)
	roots, err := pki.LoadPool(filepath.Join(s.dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range authority.Roles {
		text, err := os.ReadFile(filepath.Join(s.dir, string(role), "intermediate.pem"))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		ca, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if !ca.IsCA || !ca.MaxPathLenZero || !ca.PermittedDNSDomainsCritical {
			t.Errorf("%s: CA %v, path length zero %v, constraints critical %v", role, ca.IsCA, ca.MaxPathLenZero, ca.PermittedDNSDomainsCritical)
		}
		if want := []string{string(role) + ".lab.test"}; !slices.Equal(ca.PermittedURIDomains, want) {
			t.Errorf("%s: URIs on %v, want %v", role, ca.PermittedURIDomains, want)
		}
		if _, err := ca.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
			t.Errorf("%s: %v", role, err)
		}
		for _, file := range []string{"intermediate.key", "token.key"} {
			info, err := os.Stat(filepath.Join(s.dir, string(role), file))
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s/%s: mode %v (%v), want 0600", role, file, info.Mode(), err)
			}
		}
	}
}

// TestConstraintsHold signs with the SAE CA's key what its API would never sign.
func TestConstraintsHold(t *testing.T) {
	s := newSite(t)
	caCert, caKey := issuing(t, s, identity.RoleSAE)
	anchor := x509.NewCertPool()
	anchor.AddCert(caCert)
	for _, tt := range []struct {
		uri string
		ok  bool
	}{
		{"qkd://sae.lab.test/alice", true},
		{"qkd://operator.lab.test/alice", false},
		{"qkd://kme.lab.test/km1", false},
		{"qkd://lab.test/alice", false},
		{"qkd://evil.test/alice", false},
	} {
		u, err := url.Parse(tt.uri)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			Subject: pkix.Name{CommonName: "alice"}, URIs: []*url.URL{u},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, caCert, newKey(t, elliptic.P256()).Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: anchor, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v, want valid %v", tt.uri, err, tt.ok)
		}
	}
}

func issuing(t *testing.T, s *site, role identity.Role) (*x509.Certificate, any) {
	t.Helper()
	var blocks []*pem.Block
	for _, file := range []string{"intermediate.pem", "intermediate.key"} {
		text, err := os.ReadFile(filepath.Join(s.dir, string(role), file))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		blocks = append(blocks, block)
	}
	cert, err := x509.ParseCertificate(blocks[0].Bytes)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(blocks[1].Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func TestInitRefuses(t *testing.T) {
	good := func(dir string) authority.InitConfig {
		return authority.InitConfig{Dir: dir, TrustDomain: "lab.test", Addresses: map[identity.Role]authority.Address{
			"sae": {HTTPS: "127.0.0.1:1"}, "kme": {HTTPS: "127.0.0.1:2"}, "operator": {HTTPS: "ca.example:3"},
		}}
	}
	for name, spoil := range map[string]func(*authority.InitConfig){
		"no directory":     func(c *authority.InitConfig) { c.Dir = "" },
		"upper-case":       func(c *authority.InitConfig) { c.TrustDomain = "Lab.test" },
		"no trust domain":  func(c *authority.InitConfig) { c.TrustDomain = "" },
		"a role missing":   func(c *authority.InitConfig) { delete(c.Addresses, "kme") },
		"no port":          func(c *authority.InitConfig) { c.Addresses["kme"] = authority.Address{HTTPS: "127.0.0.1"} },
		"nowhere to go to": func(c *authority.InitConfig) { c.Addresses["kme"] = authority.Address{HTTPS: "0.0.0.0:2"} },
		"bad CRL address":  func(c *authority.InitConfig) { c.Addresses["kme"] = authority.Address{HTTPS: "a:2", CRL: "b"} },
		"CRL port too high": func(c *authority.InitConfig) {
			c.Addresses["kme"] = authority.Address{HTTPS: "127.0.0.1:65530"}
		},
		"bad name": func(c *authority.InitConfig) { c.KMENames = []string{"site a"} },
	} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			c := good(filepath.Join(parent, "ca"))
			spoil(&c)
			if err := authority.Init(c); err == nil {
				t.Error("no error")
			}
			if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v %v", left, err)
			}
		})
	}

	dir := t.TempDir() // there, and empty
	if err := authority.Init(good(dir)); err != nil {
		t.Fatal(err)
	}
	before, err := authority.Fingerprint(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := authority.Init(good(dir)); err == nil {
		t.Error("a second Init was no error")
	}
	if after, err := authority.Fingerprint(dir); err != nil || after != before {
		t.Errorf("root: got %s (%v), want %s", after, err, before)
	}
}

func TestServeAndTokenRefuse(t *testing.T) {
	s := newSite(t)
	if err := authority.Serve(t.Context(), authority.ServeConfig{File: authority.SettingsFile(s.dir, "root")}); err == nil {
		t.Error("Serve ran a CA for a role that does not exist")
	}
	if err := authority.Serve(t.Context(), authority.ServeConfig{File: authority.SettingsFile(s.dir, "sae")}); err == nil {
		t.Error("Serve ran on an address that is taken")
	}
	if _, err := authority.Token(s.dir, "../sae", "alice", time.Now()); err == nil {
		t.Error("Token took a path for a role")
	}
	if err := os.Chmod(filepath.Join(s.dir, "sae/token.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := authority.Token(s.dir, "sae", "alice", time.Now()); err == nil {
		t.Error("Token used a key that others can read")
	}
}
