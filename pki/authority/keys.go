package authority

import (
	"cmp"
	"crypto"
	"crypto/elliptic"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/ThalesIgnite/crypto11"
	"go.step.sm/crypto/kms/apiv1"
)

// RootOwner is the owner of the root's token, as a role is of its CA's.
const RootOwner = "root"

// HSMToken is a PKCS#11 token that holds the signing key of one authority and nothing
// else.
type HSMToken struct {
	Module  string `json:"module"`   // path of the PKCS#11 library
	Label   string `json:"label"`    // exactly one token must have it
	PINFile string `json:"pin_file"` // readable by its owner only; relative to the authority's directory
}

// keyLabel is the label of the signing key in its token. Its CKA_ID is keyID.
const (
	keyLabel = "kme-ca"
	keyID    = "\x01"
	keyURI   = "pkcs11:id=01;object=kme-ca"
)

// newSigner makes the signing key of owner ("root" or a role) in dir, or in a token if
// c says so. done gives the token back: a process has one at a time.
func (c InitConfig) newSigner(dir, owner, keyFile string) (key crypto.Signer, token *HSMToken, done func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, nil, nil, err
	}
	if c.Token == nil {
		key, err := newKey(filepath.Join(dir, keyFile))
		return key, nil, func() error { return nil }, err
	}
	t, err := c.Token(owner, dir)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("token of %s: %w", owner, err)
	}
	session, err := t.open(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	key, err = generate(session)
	if err != nil {
		_ = session.Close() // the key is what failed
		return nil, nil, nil, fmt.Errorf("making the key of %s in token %q: %w", owner, t.Label, err)
	}
	return key, &t, session.Close, nil
}

// generate makes the key: for signing only, and never to leave the token.
func generate(session *crypto11.Context) (crypto.Signer, error) {
	if there, err := session.FindKeyPair([]byte(keyID), []byte(keyLabel)); err != nil || there != nil {
		return nil, cmp.Or(err, fmt.Errorf("there is a key %q already", keyLabel))
	}
	public, err := crypto11.NewAttributeSetWithIDAndLabel([]byte(keyID), []byte(keyLabel))
	if err != nil {
		return nil, err
	}
	private := public.Copy()
	for attribute, value := range map[crypto11.AttributeType]bool{
		crypto11.CkaSign: true, crypto11.CkaSensitive: true, crypto11.CkaExtractable: false,
		crypto11.CkaDecrypt: false, crypto11.CkaUnwrap: false, crypto11.CkaDerive: false, crypto11.CkaModifiable: false,
	} {
		if err := private.Set(attribute, value); err != nil {
			return nil, err
		}
	}
	return session.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P256())
}

// open logs in to the token. dir is the authority's.
func (t HSMToken) open(dir string) (*crypto11.Context, error) {
	pin, err := t.pin(dir)
	if err != nil {
		return nil, err
	}
	session, err := crypto11.Configure(&crypto11.Config{Path: t.Module, TokenLabel: t.Label, Pin: pin})
	if err != nil {
		return nil, fmt.Errorf("opening token %q: %w", t.Label, err)
	}
	return session, nil
}

func (t HSMToken) pinFile(dir string) string {
	if filepath.IsAbs(t.PINFile) {
		return t.PINFile
	}
	return filepath.Join(dir, t.PINFile)
}

func (t HSMToken) pin(dir string) (string, error) {
	file := t.pinFile(dir)
	info, err := os.Stat(file)
	if err != nil {
		return "", fmt.Errorf("reading the PIN of token %q: %w", t.Label, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("others can read %s (mode %o)", file, info.Mode().Perm())
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading the PIN of token %q: %w", t.Label, err)
	}
	return strings.TrimSpace(string(text)), nil
}

// kms is the token as smallstep wants it. dir is the authority's. Whoever opens it has
// made sure of the PIN file with pin.
func (t HSMToken) kms(dir string) *apiv1.Options {
	return &apiv1.Options{
		Type: apiv1.PKCS11,
		URI:  fmt.Sprintf("pkcs11:module-path=%s;token=%s;max-sessions=16?pin-source=%s", t.Module, t.Label, t.pinFile(dir)),
	}
}
