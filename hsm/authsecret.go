//go:build cgo

package hsm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// NewAuthSecret makes a secret for the two ends of a link to authenticate each other
// with until they have key of their own: from the token's generator and the machine's,
// so that neither alone decides. The caller wipes it.
func (t *Token) NewAuthSecret(ctx context.Context) ([]byte, error) {
	secret, own := make([]byte, AuthSecretBytes), make([]byte, AuthSecretBytes)
	defer clear(own)
	if err := t.Random(ctx, secret); err != nil {
		return nil, err
	}
	_, _ = rand.Read(own) // never fails: it ends the process instead
	for i := range secret {
		secret[i] ^= own[i]
	}
	return secret, nil
}

// SetAuthSecret keeps the secret of a link in the token, as a private object. It
// refuses a link that has one: DestroyAuthSecret comes first.
func (t *Token) SetAuthSecret(ctx context.Context, link string, secret []byte) error {
	return t.alone(ctx, fmt.Sprintf("keeping the authentication secret of link %q", link), func(s pkcs11.SessionHandle) error {
		if link == "" || len(secret) != AuthSecretBytes {
			return fmt.Errorf("%d bytes for link %q: want %d, and a link", len(secret), link, AuthSecretBytes)
		}
		found, err := t.m.find(s, authSecret(link))
		if err != nil {
			return err
		}
		if len(found) != 0 {
			return errors.New("the token has one for this link")
		}
		return t.m.keep(s, authSecretApplication, link, secret)
	})
}

// AuthSecret returns the secret of a link, which the caller wipes. ErrNoAuthSecret if
// the token has none.
func (t *Token) AuthSecret(ctx context.Context, link string) ([]byte, error) {
	secret := make([]byte, AuthSecretBytes)
	err := t.call(ctx, urgent, fmt.Sprintf("reading the authentication secret of link %q", link), func() error {
		return t.onSession(func(s pkcs11.SessionHandle) error {
			found, err := t.m.find(s, authSecret(link))
			switch {
			case err != nil:
				return err
			case len(found) == 0:
				return ErrNoAuthSecret
			case len(found) > 1:
				return fmt.Errorf("the token has %d for this link", len(found))
			}
			n, err := t.m.value(s, found[0], secret)
			if err == nil && n != len(secret) {
				err = fmt.Errorf("the secret has %d bytes, want %d", n, len(secret))
			}
			return err
		})
	}, func() { clear(secret) })
	if err != nil {
		return nil, err
	}
	return secret, nil
}

// DestroyAuthSecret destroys the secret of a link, as is done when the link has key of
// its own. ErrNoAuthSecret if the token has none.
func (t *Token) DestroyAuthSecret(ctx context.Context, link string) error {
	return t.alone(ctx, fmt.Sprintf("destroying the authentication secret of link %q", link), func(s pkcs11.SessionHandle) error {
		found, err := t.m.find(s, authSecret(link))
		if err == nil && len(found) == 0 {
			err = ErrNoAuthSecret
		}
		for _, o := range found {
			err = errors.Join(err, fault("C_DestroyObject", t.m.DestroyObject(s, o)))
		}
		return err
	})
}

// AuthSecretCheck is what the people at both ends read to each other to see that they
// have the same secret. It gives 32 bits of the secret's 65,536 away.
func AuthSecretCheck(secret []byte) string {
	sum := sha256.Sum256(secret)
	defer clear(sum[:])
	return hex.EncodeToString(sum[:4])
}

// authSecretApplication is what the objects that hold secrets of links are for.
const authSecretApplication = "qkd kme authentication secret"

// authSecrets matches the secrets of all links.
func authSecrets() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, authSecretApplication),
	}
}

// authSecret matches the secret of a link.
func authSecret(link string) []*pkcs11.Attribute {
	return append(authSecrets(), pkcs11.NewAttribute(pkcs11.CKA_LABEL, link))
}
