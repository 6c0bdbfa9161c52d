package authority

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"go.step.sm/crypto/jose"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/secretfile"
)

// tokenLifetime is short: a token is a bearer secret until it has been used.
const tokenLifetime = 5 * time.Minute

// tokenClaims are the claims of a one-time token, as step has them.
type tokenClaims struct {
	jose.Claims
	SANs            []string `json:"sans"`
	RootFingerprint string   `json:"sha"` // lets step find and pin the CA with the token alone
}

// Token returns a one-time token, good for five minutes from now, with which its
// holder fetches one certificate of role for id. names are the DNS names and IP
// addresses that the certificate of a KME gets beside localhost and 127.0.0.1; the
// CA was told at Init which of them it may sign.
func Token(dir string, role identity.Role, id string, now time.Time, names ...string) (string, error) {
	token, err := newToken(dir, role, id, now, names)
	if err != nil {
		return "", fmt.Errorf("making a token: %w", err)
	}
	return token, nil
}

func newToken(dir string, role identity.Role, id string, now time.Time, names []string) (string, error) {
	if err := checkID(id); err != nil {
		return "", err
	}
	if len(names) > 0 && role != identity.RoleKME {
		return "", fmt.Errorf("a certificate of role %s carries no host names", role)
	}
	s, err := settingsOf(dir, role)
	if err != nil {
		return "", err
	}
	fingerprint, err := Fingerprint(dir)
	if err != nil {
		return "", err
	}
	signer, err := tokenSigner(s.path(tokenKeyFile))
	if err != nil {
		return "", err
	}
	sans := []string{id}
	if role == identity.RoleKME {
		sans = append([]string{"localhost", "127.0.0.1"}, names...)
	}
	var nonce [32]byte
	rand.Read(nonce[:]) // never fails
	claims := tokenClaims{
		Claims: jose.Claims{
			Issuer:    s.provisioner(),
			Subject:   id,
			Audience:  jose.Audience{"https://" + s.Address + "/1.0/sign"},
			IssuedAt:  jose.NewNumericDate(now),
			NotBefore: jose.NewNumericDate(now),
			Expiry:    jose.NewNumericDate(now.Add(tokenLifetime)),
			ID:        hex.EncodeToString(nonce[:]),
		},
		SANs:            sans,
		RootFingerprint: fingerprint,
	}
	return jose.Signed(signer).Claims(claims).CompactSerialize()
}

// tokenSigner reads the token key, which nobody but its owner may read.
func tokenSigner(file string) (jose.Signer, error) {
	if err := secretfile.Check(file); err != nil {
		return nil, fmt.Errorf("reading the token key: %w", err)
	}
	key, err := jose.ReadKey(file)
	if err != nil {
		return nil, fmt.Errorf("reading the token key: %w", err)
	}
	if key.IsPublic() {
		return nil, errors.New("reading the token key: it is a public key")
	}
	options := new(jose.SignerOptions).WithType("JWT").WithHeader("kid", key.KeyID)
	return jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key.Key}, options)
}
