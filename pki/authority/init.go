package authority

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"go.step.sm/crypto/jose"

	"github.com/qutemail/kme/internal/identity"
)

// InitConfig says what Init makes.
type InitConfig struct {
	Dir         string // must not exist, or be empty
	TrustDomain string // lower-case DNS name, e.g. "lab.test"

	// Addresses are where the CA of each role will listen; all of Roles are needed.
	Addresses map[identity.Role]Address

	// KMENames are the DNS domains and IP addresses (or prefixes, 192.0.2.0/24) that
	// certificates of KMEs may carry beside localhost and 127.0.0.1. A token says
	// which of them one KME gets.
	KMENames []string

	// Token makes or names the token for the signing key of owner ("root" or a role),
	// whose directory is dir. Without it the keys are files of mode 0600: for tests.
	Token func(owner, dir string) (HSMToken, error)
}

// Address is where the CA of one role listens.
type Address struct {
	HTTPS string // host:port that clients use; the CA listens on it too
	CRL   string // host:port of the CRL over plain HTTP; "" is HTTPS with the port 10 higher
}

// Lifetimes of the authorities. Renewing them is a ceremony with the root's key.
const (
	rootLifetime    = 20 * 365 * 24 * time.Hour
	issuingLifetime = 5 * 365 * 24 * time.Hour
)

// crlPortAbove is how far above the HTTPS port that of the CRL is by default.
const crlPortAbove = 10

// Init makes the root and the issuing CAs. It makes all or nothing: a directory
// that is there is whole. It is an error if there is something in Dir.
func Init(c InitConfig) error {
	all, err := c.settings()
	if err != nil {
		return fmt.Errorf("making the authorities: %w", err)
	}
	if err := c.create(all); err != nil {
		return fmt.Errorf("making the authorities: %w", err)
	}
	return nil
}

// create works in a directory beside Dir that takes its name in the end.
func (c InitConfig) create(all []settings) error {
	if entries, err := os.ReadDir(c.Dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("%s is not empty: it may hold authorities already", c.Dir)
	}
	parent := filepath.Dir(filepath.Clean(c.Dir))
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return err
	}
	stage, err := os.MkdirTemp(parent, ".kme-ca-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(stage)

	if err := c.sign(stage, all); err != nil {
		return err
	}
	if err := os.Chmod(stage, 0o755); err != nil {
		return err
	}
	if err := os.Remove(c.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) { // os.Rename takes no folder's place, be it empty
		return err
	}
	return os.Rename(stage, c.Dir)
}

// sign makes the keys and the certificates. Tokens are opened one after the other: where
// each is a folder of SoftHSM of its own, a process sees one at a time.
func (c InitConfig) sign(stage string, all []settings) error {
	keys := make(map[identity.Role]crypto.PublicKey)
	for i, s := range all {
		key, token, done, err := c.newSigner(filepath.Join(stage, string(s.Role)), string(s.Role), issuingKeyFile)
		if err != nil {
			return err
		}
		keys[s.Role], all[i].HSM = key.Public(), token
		if err := done(); err != nil {
			return fmt.Errorf("closing the token of the %s CA: %w", s.Role, err)
		}
	}
	key, _, done, err := c.newSigner(filepath.Join(stage, RootOwner), RootOwner, filepath.Base(rootKeyFile))
	if err != nil {
		return err
	}
	root, err := newRoot(stage, c.TrustDomain, key)
	for _, s := range all {
		if err == nil {
			err = c.newIssuer(filepath.Join(stage, string(s.Role)), s, keys[s.Role], root)
		}
	}
	return errors.Join(err, done())
}

var dnsPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,200}[a-z0-9])?$`)

// settings checks c and spreads it over the roles.
func (c InitConfig) settings() ([]settings, error) {
	if c.Dir == "" {
		return nil, errors.New("no directory given")
	}
	if !dnsPattern.MatchString(c.TrustDomain) {
		return nil, fmt.Errorf("trust domain %q is not a lower-case DNS name", c.TrustDomain)
	}
	for _, name := range c.KMENames {
		if parsePrefix(name) == nil && !dnsPattern.MatchString(name) {
			return nil, fmt.Errorf("KME name %q is no lower-case DNS name, IP address or prefix", name)
		}
	}
	var all []settings
	for _, role := range Roles {
		address, err := c.Addresses[role].complete()
		if err != nil {
			return nil, fmt.Errorf("address of the %s CA: %w", role, err)
		}
		all = append(all, settings{Role: role, TrustDomain: c.TrustDomain, Address: address.HTTPS, CRLAddress: address.CRL})
	}
	return all, nil
}

// complete checks a and fills in the CRL's address.
func (a Address) complete() (Address, error) {
	host, port, err := net.SplitHostPort(a.HTTPS)
	if err != nil {
		return a, err
	}
	number, err := strconv.Atoi(port)
	if err != nil || number < 1 || number > 65535-crlPortAbove {
		return a, fmt.Errorf("port %q is not between 1 and %d", port, 65535-crlPortAbove)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return a, fmt.Errorf("%q names no host: clients have to find it", a.HTTPS)
	}
	a.CRL = cmp.Or(a.CRL, net.JoinHostPort(host, strconv.Itoa(number+crlPortAbove)))
	if _, _, err := net.SplitHostPort(a.CRL); err != nil {
		return a, err
	}
	return a, nil
}

// issuer is a CA that can sign: the root, here.
type issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newRoot(dir, trustDomain string, key crypto.Signer) (issuer, error) {
	template := caTemplate(pkix.Name{Organization: []string{trustDomain}, CommonName: trustDomain + " root"}, rootLifetime)
	template.MaxPathLen = 1
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return issuer{}, fmt.Errorf("signing the root: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return issuer{}, fmt.Errorf("signing the root: %w", err)
	}
	return issuer{cert, key}, writePEM(filepath.Join(dir, rootFile), "CERTIFICATE", der, 0o644)
}

// newIssuer makes the CA of one role in dir.
func (c InitConfig) newIssuer(dir string, s settings, key crypto.PublicKey, root issuer) error {
	template := caTemplate(pkix.Name{
		Organization: []string{s.TrustDomain}, OrganizationalUnit: []string{string(s.Role)}, CommonName: s.uriHost() + " CA",
	}, issuingLifetime)
	template.MaxPathLenZero = true
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if err := c.constrain(template, s); err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root.cert, key, root.key)
	if err != nil {
		return fmt.Errorf("signing the %s CA: %w", s.Role, err)
	}
	if err := writePEM(filepath.Join(dir, intermediateFile), "CERTIFICATE", der, 0o644); err != nil {
		return err
	}
	if err := newTokenKey(dir); err != nil {
		return err
	}
	return s.write(filepath.Join(dir, settingsFile))
}

// constrain fences the CA in: URIs on the host of its role, and host names on this
// machine, at the CA's own address and, for the CA of KMEs, in KMENames. Each CA
// needs host names because it signs the certificate of its own HTTPS listener.
func (c InitConfig) constrain(template *x509.Certificate, s settings) error {
	host, _, err := net.SplitHostPort(s.Address)
	if err != nil {
		return err
	}
	names := []string{"localhost", "127.0.0.0/8"}
	if host != "localhost" {
		names = append(names, host)
	}
	if s.Role == identity.RoleKME {
		names = append(names, c.KMENames...)
	}
	template.PermittedDNSDomainsCritical = true // the whole extension, in spite of the name
	template.PermittedURIDomains = []string{s.uriHost()}
	for _, name := range names {
		if prefix := parsePrefix(name); prefix != nil {
			template.PermittedIPRanges = append(template.PermittedIPRanges, prefix)
		} else {
			template.PermittedDNSDomains = append(template.PermittedDNSDomains, name)
		}
	}
	return nil
}

// parsePrefix reads an IP prefix or, as a prefix of one, an address; nil for anything else.
func parsePrefix(s string) *net.IPNet {
	if _, prefix, err := net.ParseCIDR(s); err == nil {
		return prefix
	}
	ip := net.ParseIP(s)
	if ip4 := ip.To4(); ip4 != nil {
		ip = ip4
	}
	if ip == nil {
		return nil
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))}
}

func caTemplate(subject pkix.Name, lifetime time.Duration) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:               subject,
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

// newKey makes a P-256 key and keeps it in file, readable by its owner only.
func newKey(file string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	return key, writePEM(file, "PRIVATE KEY", der, 0o600)
}

// newTokenKey makes the key of the role's tokens, and keeps it and its public half in dir.
func newTokenKey(dir string) error {
	key, err := jose.GenerateJWK("EC", "P-256", jose.ES256, "sig", "", 0)
	if err != nil {
		return fmt.Errorf("making the token key: %w", err)
	}
	if key.KeyID, err = jose.Thumbprint(key); err != nil {
		return fmt.Errorf("making the token key: %w", err)
	}
	return errors.Join(writeJSON(filepath.Join(dir, tokenKeyFile), key, 0o600), writeJSON(filepath.Join(dir, tokenPublicFile), key.Public(), 0o644))
}

func writePEM(file, kind string, der []byte, mode os.FileMode) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

func writeJSON(file string, v any, mode os.FileMode) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(file), err)
	}
	return os.WriteFile(file, append(text, '\n'), mode)
}
