package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/pki/authority"
)

// newCAs makes the authorities without serving them and returns their directory.
func newCAs(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	err := authority.Init(authority.InitConfig{
		Dir: dir, TrustDomain: "lab.test", Addresses: map[identity.Role]authority.Address{
			"sae": {HTTPS: "127.0.0.1:9441"}, "kme": {HTTPS: "127.0.0.1:9442"}, "operator": {HTTPS: "127.0.0.1:9443"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// mint signs a certificate for id with the key of the role's CA and returns a
// directory that holds it. edit makes it one that the CA itself would not issue.
func mint(t testing.TB, ca string, role identity.Role, id string, edit func(*x509.Certificate)) string {
	t.Helper()
	issuer, issuerKey := readPEM(t, ca, role, "intermediate.pem"), readPEM(t, ca, role, "intermediate.key")
	parent, err := x509.ParseCertificate(issuer.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	parentKey, err := x509.ParsePKCS8PrivateKey(issuerKey.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	template := leafTemplate(role, id)
	if edit != nil {
		edit(template)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	writeCredential(t, dir, key, der, issuer.Bytes)
	return dir
}

func leafTemplate(role identity.Role, id string) *x509.Certificate {
	c := &x509.Certificate{
		Subject:     pkix.Name{CommonName: id, OrganizationalUnit: []string{strings.ToUpper(string(role))}},
		URIs:        []*url.URL{{Scheme: "qkd", Host: string(role) + ".lab.test", Path: "/" + id}},
		NotBefore:   time.Now().Add(-time.Minute),
		NotAfter:    time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if role == identity.RoleKME {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		c.DNSNames = []string{"localhost"}
	}
	return c
}

func readPEM(t testing.TB, ca string, role identity.Role, file string) *pem.Block {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(ca, string(role), file))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	return block
}

func writeCredential(t testing.TB, dir string, key *ecdsa.PrivateKey, chain ...[]byte) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var certs []byte
	for _, cert := range chain {
		certs = append(certs, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...)
	}
	for file, text := range map[string][]byte{
		"key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), "cert.pem": certs,
	} {
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func load(t testing.TB, dir string) *pki.Credential {
	t.Helper()
	c, err := pki.LoadCredential(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pool(t testing.TB, files ...string) *x509.CertPool {
	t.Helper()
	p, err := pki.LoadPool(files...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLoadCredentialRefuses(t *testing.T) {
	ca := newCAs(t)
	for name, spoil := range map[string]func(dir string) error{
		"no key":        func(dir string) error { return os.Remove(filepath.Join(dir, "key.pem")) },
		"no chain":      func(dir string) error { return os.Remove(filepath.Join(dir, "cert.pem")) },
		"readable key":  func(dir string) error { return os.Chmod(filepath.Join(dir, "key.pem"), 0o640) },
		"another's key": func(dir string) error { return copyFile(mint(t, ca, "sae", "bob", nil), dir, "key.pem") },
		"ended": func(dir string) error {
			old := mint(t, ca, "sae", "alice", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
			return os.Rename(old, dir)
		},
	} {
		dir := mint(t, ca, "sae", "alice", nil)
		if name == "ended" {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.LoadCredential(dir); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
}

func copyFile(from, to, file string) error {
	text, err := os.ReadFile(filepath.Join(from, file))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, file), text, 0o600)
}

func TestReload(t *testing.T) {
	ca := newCAs(t)
	dir := mint(t, ca, "sae", "alice", nil)
	c := load(t, dir)
	first := c.Leaf()

	next := mint(t, ca, "sae", "alice", nil)
	if err := copyFile(next, dir, "key.pem"); err != nil {
		t.Fatal(err)
	}
	if err := c.Reload(); err == nil { // the certificate is not there yet
		t.Error("half a renewal was loaded")
	}
	if !c.Leaf().Equal(first) {
		t.Error("a failed Reload changed the certificate")
	}
	if err := copyFile(next, dir, "cert.pem"); err != nil {
		t.Fatal(err)
	}
	if err := c.Reload(); err != nil {
		t.Fatal(err)
	}
	if c.Leaf().Equal(first) {
		t.Error("Reload kept the old certificate")
	}
}

func TestLoadPoolRefuses(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{empty, empty + ".missing"} {
		if _, err := pki.LoadPool(file); err == nil {
			t.Errorf("LoadPool(%s): no error", filepath.Base(file))
		}
	}
}

// TestLinksNoCA keeps the CA, its databases and its cloud clients out of everything
// that only uses certificates.
func TestLinksNoCA(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		for _, bad := range []string{"smallstep", "step.sm", "badger", "bbolt", "grpc"} {
			if strings.Contains(line, bad) {
				t.Errorf("pki links %s", line)
			}
		}
	}
}
