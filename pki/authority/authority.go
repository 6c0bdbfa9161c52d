// Package authority is the certificate authority of the three roles: an offline
// root and, for each of sae, kme and operator, an issuing CA that is a smallstep
// authority with a listener, a token key and a database of its own.
//
// Init makes the keys, Serve runs the CA of one role, Token makes the one-time
// token with which its holder fetches one certificate. Clients are pki.Enrol and
// the stock step CLI.
//
// It promises that a certificate of a role carries exactly one URI,
// qkd://ROLE.TRUST-DOMAIN/ID, whose ID is the subject of a token of that role;
// that the CA of one role refuses the certificates and tokens of another; and
// that a token works once. X.509 itself holds the first promise up: each issuing
// CA is constrained to the host of its role.
//
// It must never write a token or a private key to its log, and never needs the
// root's key to serve.
//
// The directory of the authorities:
//
//	root.pem                     the root certificate: public, the anchor of servers
//	root/                        the root's token (or key.pem): made by Init, needed by nothing else; carry it off
//	ROLE/ca.yaml                 its configuration: settings
//	ROLE/intermediate.pem        the issuing CA's certificate: public, the anchor of ROLE's clients
//	ROLE/hsm/                    its token, if that is SoftHSM's, and the PIN; or intermediate.key, its key
//	ROLE/token.key               the key (JWK) that signs one-time tokens; serving does without it
//	ROLE/token.pub               its public half, which verifies them
//	ROLE/ca.db                   certificates issued and revoked, tokens used
package authority

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/qutemail/kme/internal/identity"
)

// Roles are the roles that have an authority.
var Roles = [...]identity.Role{identity.RoleSAE, identity.RoleKME, identity.RoleOperator}

const (
	rootFile         = "root.pem"
	rootKeyFile      = "root/key.pem"
	settingsFile     = "ca.yaml"
	intermediateFile = "intermediate.pem"
	issuingKeyFile   = "intermediate.key"
	tokenKeyFile     = "token.key"
	tokenPublicFile  = "token.pub"
	databaseFile     = "ca.db"
)

// idPattern is what an ID may be; the profiles in pki/templates say the same.
var idPattern = regexp.MustCompile(`^[a-z0-9._@-]{1,64}$`)

// checkID refuses dots alone beside what the pattern does: they would vanish from
// a URL's path.
func checkID(id string) error {
	if !idPattern.MatchString(id) || id == "." || id == ".." {
		return fmt.Errorf("ID %q is not 1 to 64 of a-z, 0-9, ., _, @ and -", id)
	}
	return nil
}

// Fingerprint is the SHA-256 of the root certificate in lower-case hex: the pin
// that a client needs for its first contact.
func Fingerprint(dir string) (string, error) {
	root, err := readCertificate(filepath.Join(dir, rootFile))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(root.Raw)
	return hex.EncodeToString(sum[:]), nil
}

func readCertificate(file string) (*x509.Certificate, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading certificate: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("reading certificate: %s holds no PEM certificate", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading certificate %s: %w", file, err)
	}
	return cert, nil
}
