package authority

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"go.step.sm/crypto/jose"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/yamlfile"
)

// settings are the configuration of the CA of one role: ca.yaml in its folder, which Init
// writes. deploy/kme-ca.yaml says what each member means. Unknown and repeated members are
// refused. Relative paths are relative to the folder.
type settings struct {
	Role         identity.Role `yaml:"role"`
	TrustDomain  string        `yaml:"trust_domain"`
	Address      string        `yaml:"address"`        // host:port of the HTTPS listener; the host is a name in its certificate
	CRLAddress   string        `yaml:"crl_address"`    // host:port of the plain HTTP listener, which serves the CRL and nothing else
	HSM          HSMToken      `yaml:"hsm"`            // of the issuing key; the zero token: it is in intermediate.key
	ACME         bool          `yaml:"acme"`           // issues certificates of plain servers, at the CA of KMEs
	ACMEHTTPPort int           `yaml:"acme_http_port"` // where the challenge is answered

	dir string // the folder, an absolute path
}

// SettingsFile is the configuration of the CA of a role, in the directory that Init made.
func SettingsFile(dir string, role identity.Role) string {
	return filepath.Join(dir, string(role), settingsFile)
}

// written is what Init writes.
const written = `# The CA of role %[1]s. Written by kme-ca init; kme-ca config print-default has every member
# there is, and what each means.
role: %[1]s
trust_domain: %[2]q
address: %[3]q
crl_address: %[4]q
`

const writtenHSM = `hsm:
  module: %q
  token: %q
  pin_file: %q
`

// write makes the file.
func (s settings) write(file string) error {
	text := fmt.Sprintf(written, s.Role, s.TrustDomain, s.Address, s.CRLAddress)
	if s.HSM != (HSMToken{}) {
		text += fmt.Sprintf(writtenHSM, s.HSM.Module, s.HSM.Label, s.HSM.PINFile)
	}
	return os.WriteFile(file, []byte(text), 0o644)
}

// loadSettings reads and checks a file. Its error has a line for each thing that is wrong,
// and says where it stands.
func loadSettings(file string) (settings, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return settings{}, fmt.Errorf("reading the configuration: %w (kme-ca init writes one for each role)", err)
	}
	return parseSettings(file, text)
}

// settingsOf are those of the CA of a role, in the directory that Init made.
func settingsOf(dir string, role identity.Role) (settings, error) {
	if !slices.Contains(Roles[:], role) {
		return settings{}, fmt.Errorf("there is no authority for role %q: those are %v", role, Roles)
	}
	s, err := loadSettings(SettingsFile(dir, role))
	if err == nil && s.Role != role {
		err = fmt.Errorf("the configuration of the %s CA says role %s", role, s.Role)
	}
	return s, err
}

// parseSettings is loadSettings of a file with that text.
func parseSettings(file string, text []byte) (settings, error) {
	s := settings{ACMEHTTPPort: 80}
	f, err := yamlfile.Decode(file, text, &s)
	if err != nil {
		return s, err
	}
	if s.dir, err = filepath.Abs(filepath.Dir(file)); err != nil {
		return s, err
	}
	if err := f.Resolve(&s.HSM.Module, &s.HSM.PINFile); err != nil {
		return s, err
	}
	return s, s.check(f)
}

// check names everything that is missing or out of bounds.
func (s *settings) check(file yamlfile.File) error {
	k := &yamlfile.Checker{File: file}
	if k.Has("role", string(s.Role)) {
		k.Must(slices.Contains(Roles[:], s.Role), "role", "is %q: there is no authority of it, but of %v", s.Role, Roles)
	}
	if k.Has("trust_domain", s.TrustDomain) {
		k.Must(dnsPattern.MatchString(s.TrustDomain), "trust_domain", "is %q: a lower-case DNS name", s.TrustDomain)
	}
	for _, at := range []struct{ member, address string }{{"address", s.Address}, {"crl_address", s.CRLAddress}} {
		if k.Has(at.member, at.address) {
			host, port, err := net.SplitHostPort(at.address)
			k.Must(err == nil && host != "" && port != "", at.member, "is %q: HOST:PORT", at.address)
		}
	}
	if s.HSM != (HSMToken{}) {
		k.Has("hsm.module", s.HSM.Module)
		k.Has("hsm.token", s.HSM.Label)
		k.Must(s.HSM.PINFile != "" || s.HSM.PINCredential != "", "hsm.pin_file", "is missing")
		k.Must(s.HSM.PINFile == "" || s.HSM.PINCredential == "", "hsm.pin_credential", "is there beside pin_file: one of them")
	}
	k.Must(!s.ACME || s.Role == identity.RoleKME, "acme", "is true, and the %s CA issues no certificates of servers: that of KMEs does", s.Role)
	k.Must(s.ACMEHTTPPort >= 1 && s.ACMEHTTPPort <= 65535, "acme_http_port", "is %d: 1 to 65535", s.ACMEHTTPPort)
	return k.Err()
}

// path is a file of the CA's folder.
func (s settings) path(name string) string { return filepath.Join(s.dir, name) }

// rootPath is the root's certificate, which all CAs have.
func (s settings) rootPath() string { return filepath.Join(filepath.Dir(s.dir), rootFile) }

// provisioner is the name of the provisioner that owns the role's tokens. The
// names differ between the CAs because smallstep looks a certificate's provisioner
// up by name when it renews.
func (s settings) provisioner() string { return "enrol-" + string(s.Role) }

// uriHost is the host of the role's URIs, to which its CA is constrained.
func (s settings) uriHost() string { return string(s.Role) + "." + s.TrustDomain }

func (s settings) crlURL() string { return "http://" + s.CRLAddress + "/crl" }

// tokenKey verifies the role's tokens.
func (s settings) tokenKey() (*jose.JSONWebKey, error) {
	file := s.path(tokenPublicFile)
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the key that verifies tokens: %w", err)
	}
	key := new(jose.JSONWebKey)
	switch err := json.Unmarshal(text, key); {
	case err != nil:
		return nil, fmt.Errorf("reading the key that verifies tokens: %s: %w", file, err)
	case !key.IsPublic(): // it is shown to whoever asks
		return nil, fmt.Errorf("reading the key that verifies tokens: %s is not the public half of one", file)
	}
	return key, nil
}

// intermediate is the CA's certificate, which must be that of this role and trust domain.
func (s settings) intermediate() (*x509.Certificate, error) {
	file := s.path(intermediateFile)
	cert, err := readCertificate(file)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(cert.PermittedURIDomains, []string{s.uriHost()}) {
		return nil, fmt.Errorf("%s is the certificate of the CA of %v, and not of %s: role or trust_domain is wrong", file, cert.PermittedURIDomains, s.uriHost())
	}
	return cert, nil
}

// Check says all that is wrong with the configuration of a CA and the files that belong to
// it, and opens nothing: it may be run beside the CA that serves. If nothing is, it says
// in a line which CA it is.
func Check(file string) (summary string, err error) {
	s, err := loadSettings(file)
	if err != nil {
		return "", err
	}
	root, rootErr := readCertificate(s.rootPath())
	cert, certErr := s.intermediate()
	errs := []error{rootErr, certErr}
	if rootErr == nil && certErr == nil {
		errs = append(errs, cert.CheckSignatureFrom(root))
	}
	_, err = s.tokenKey()
	errs = append(errs, err)
	keyIn := "a file"
	if s.HSM == (HSMToken{}) {
		if _, err := os.Stat(s.path(issuingKeyFile)); err != nil {
			errs = append(errs, fmt.Errorf("hsm is missing, and so is the key as a file: %w", err))
		}
	} else {
		keyIn = fmt.Sprintf("token %q of %s", s.HSM.Label, s.HSM.Module)
		_, moduleErr := os.Stat(s.HSM.Module)
		_, pinErr := s.HSM.pinPath()
		errs = append(errs, moduleErr, pinErr)
	}
	return fmt.Sprintf("the CA of role %s of %s, at %s, CRL at %s, key in %s", s.Role, s.TrustDomain, s.Address, s.crlURL(), keyIn), errors.Join(errs...)
}
