package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	smallstep "github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"go.step.sm/crypto/kms"
	"go.step.sm/crypto/kms/apiv1"
	_ "go.step.sm/crypto/kms/pkcs11" // for kms.New

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki/templates"
)

// Lifetimes of what a CA issues. A certificate begins backdate before the moment it
// is made, for clocks that disagree, and so lasts that much longer.
const (
	minLifetime     = time.Minute
	defaultLifetime = 24 * time.Hour
	maxLifetime     = 7 * 24 * time.Hour
	backdate        = 30 * time.Second
	crlLifetime     = 24 * time.Hour
	crlRenewal      = 10 * time.Minute // and at each revocation
)

// open starts the smallstep authority of one role. key is its issuing key if that is in
// a token.
func (s settings) open() (a *smallstep.Authority, key crypto.Signer, err error) {
	cfg, err := s.smallstepConfig()
	if err != nil {
		return nil, nil, err
	}
	options := []smallstep.Option{smallstep.WithQuietInit(), smallstep.WithX509Enforcers(profile{s})}
	if cfg.KMS != nil {
		manager, err := kms.New(context.Background(), *cfg.KMS)
		if err != nil {
			return nil, nil, fmt.Errorf("opening token %q: %w", s.HSM.Label, err)
		}
		if key, err = manager.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: cfg.IntermediateKey}); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("finding the issuing key in token %q: %w", s.HSM.Label, err), manager.Close())
		}
		options = append(options, smallstep.WithKeyManager(manager)) // which closes it
	}
	if a, err = smallstep.New(cfg, options...); err != nil {
		return nil, nil, fmt.Errorf("starting the authority: %w", err)
	}
	return a, key, nil
}

// Render is the configuration with which the stock step-ca runs the CA of role: for
// operators who prefer that to Serve. What step-ca does not know is left out: it takes
// client certificates of every CA under the root, and there is no last look at a
// certificate before it is signed but the template and the CA's name constraints.
func Render(dir string, role identity.Role) ([]byte, error) {
	text, err := render(dir, role)
	if err != nil {
		return nil, fmt.Errorf("rendering the configuration of the %s CA: %w", role, err)
	}
	return text, nil
}

func render(dir string, role identity.Role) ([]byte, error) {
	s, err := settingsOf(dir, role)
	if err != nil {
		return nil, err
	}
	cfg, err := s.smallstepConfig()
	if err != nil {
		return nil, err
	}
	cfg.InsecureAddress = s.CRLAddress
	text, err := json.MarshalIndent(cfg, "", "  ")
	return append(text, '\n'), err
}

func (s settings) smallstepConfig() (*config.Config, error) {
	host, _, err := net.SplitHostPort(s.Address)
	if err != nil {
		return nil, fmt.Errorf("address of the CA: %w", err)
	}
	names := []string{"localhost", "127.0.0.1"}
	if !slices.Contains(names, host) {
		names = append(names, host)
	}
	jwk, err := s.jwkProvisioner()
	if err != nil {
		return nil, err
	}
	cfg := &config.Config{
		Root:             []string{s.rootPath()},
		IntermediateCert: s.path(intermediateFile),
		IntermediateKey:  s.path(issuingKeyFile),
		Address:          s.Address,
		DNSNames:         names,
		CommonName:       s.uriHost() + " CA server",
		DB:               &db.Config{Type: "bbolt", DataSource: s.path(databaseFile)},
		TLS:              &config.TLSOptions{MinVersion: 1.3, MaxVersion: 1.3},
		CRL: &config.CRLConfig{
			Enabled:          true,
			GenerateOnRevoke: true,
			CacheDuration:    &provisioner.Duration{Duration: crlLifetime},
			RenewPeriod:      &provisioner.Duration{Duration: crlRenewal},
			IDPurl:           s.crlURL(),
		},
		AuthorityConfig: &config.AuthConfig{
			Provisioners: provisioner.List{jwk},
			Backdate:     &provisioner.Duration{Duration: backdate},
			// The database remembers used tokens, so those made before a restart may live.
			DisableIssuedAtCheck: true,
		},
	}
	if s.HSM != (HSMToken{}) {
		if cfg.KMS, err = s.HSM.kms(); err != nil {
			return nil, err
		}
		cfg.IntermediateKey = keyURI
	}
	if s.ACME {
		web, err := s.acmeProvisioner()
		if err != nil {
			return nil, err
		}
		cfg.AuthorityConfig.Provisioners = append(cfg.AuthorityConfig.Provisioners, web)
	}
	cfg.Init()
	return cfg, nil
}

// jwkProvisioner is the owner of the role's tokens. It has no encryptedKey, which
// smallstep would hand to anyone who asks. Its extension stays in the
// certificates: without it smallstep would let any CA renew them.
func (s settings) jwkProvisioner() (*provisioner.JWK, error) {
	variables, err := json.Marshal(map[string]any{"TrustDomain": s.TrustDomain, "CRL": s.crlURL(), "Role": identity.RoleExtension(s.Role).Value})
	if err != nil {
		return nil, err
	}
	key, err := s.tokenKey()
	if err != nil {
		return nil, err
	}
	profiles := map[identity.Role]string{
		identity.RoleSAE: templates.SAE, identity.RoleKME: templates.KME, identity.RoleOperator: templates.Operator,
	}
	return &provisioner.JWK{
		Type: "JWK",
		Name: s.provisioner(),
		Key:  key,
		Claims: &provisioner.Claims{
			MinTLSDur:     &provisioner.Duration{Duration: minLifetime},
			DefaultTLSDur: &provisioner.Duration{Duration: defaultLifetime},
			MaxTLSDur:     &provisioner.Duration{Duration: maxLifetime},
		},
		Options: &provisioner.Options{X509: &provisioner.X509Options{
			Template: profiles[s.Role], TemplateData: variables,
		}},
	}, nil
}

// acmeProvisioner issues certificates of plain servers to whoever answers for their
// host name. They name nobody: no door, and no KME, takes them for a caller.
func (s settings) acmeProvisioner() (*provisioner.ACME, error) {
	variables, err := json.Marshal(map[string]string{"CRL": s.crlURL()})
	if err != nil {
		return nil, err
	}
	return &provisioner.ACME{
		Type: "ACME", Name: "acme", Challenges: []provisioner.ACMEChallenge{provisioner.HTTP_01},
		Claims: &provisioner.Claims{
			MinTLSDur:     &provisioner.Duration{Duration: minLifetime},
			DefaultTLSDur: &provisioner.Duration{Duration: defaultLifetime},
			MaxTLSDur:     &provisioner.Duration{Duration: maxLifetime},
		},
		Options: &provisioner.Options{X509: &provisioner.X509Options{Template: templates.Server, TemplateData: variables}},
	}, nil
}

// profile is the last look at a certificate before it is signed, whatever the
// template did. Host names are left to the CA's name constraints.
type profile struct{ settings }

// Enforce refuses a certificate that is not what its role's profile says. It
// implements smallstep's provisioner.CertificateEnforcer.
func (p profile) Enforce(c *x509.Certificate) error {
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if p.Role == identity.RoleKME {
		usages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	if p.ACME && len(c.URIs) == 0 && slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) {
		return enforceServer(c)
	}
	id := c.Subject.CommonName
	if err := checkID(id); err != nil {
		return err
	}
	want := "qkd://" + p.uriHost() + "/" + id
	switch {
	case len(c.URIs) != 1 || c.URIs[0].String() != want:
		return fmt.Errorf("URIs %v are not exactly %s", c.URIs, want)
	case len(c.EmailAddresses) > 0:
		return errors.New("it has an e-mail address")
	case p.Role != identity.RoleKME && len(c.DNSNames)+len(c.IPAddresses) > 0:
		return errors.New("it has a host name and is not a KME's")
	case c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature:
		return errors.New("key usage is not exactly digitalSignature")
	case !slices.Equal(c.ExtKeyUsage, usages) || len(c.UnknownExtKeyUsage) > 0:
		return fmt.Errorf("extended key usage is not exactly that of role %s", p.Role)
	case !strongKey(c.PublicKey):
		return errors.New("the key is none of ECDSA P-256, P-384 and Ed25519")
	case !saysRole(c, p.Role):
		return fmt.Errorf("its role extension is not exactly that of role %s", p.Role)
	}
	return nil
}

// saysRole says whether a certificate that is about to be signed has one role extension,
// that of role.
func saysRole(c *x509.Certificate, role identity.Role) bool {
	want, found := identity.RoleExtension(role), 0
	for _, x := range c.ExtraExtensions {
		if x.Id.Equal(want.Id) {
			if found++; !bytes.Equal(x.Value, want.Value) {
				return false
			}
		}
	}
	return found == 1
}

// enforceServer is Enforce for a plain server's certificate.
func enforceServer(c *x509.Certificate) error {
	switch {
	case len(c.DNSNames)+len(c.IPAddresses) == 0 || len(c.EmailAddresses) > 0:
		return errors.New("a plain server's certificate has host names and no others")
	case c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.UnknownExtKeyUsage) > 0:
		return errors.New("key usage is not exactly digitalSignature")
	case !strongKey(c.PublicKey):
		return errors.New("the key is none of ECDSA P-256, P-384 and Ed25519")
	}
	return nil
}

// strongKey says whether the doors accept a key of this kind. RSA is not among
// them: its handshakes cost 2.5 times the CPU.
func strongKey(public any) bool {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		return key.Curve == elliptic.P256() || key.Curve == elliptic.P384()
	case ed25519.PublicKey:
		return true
	}
	return false
}
