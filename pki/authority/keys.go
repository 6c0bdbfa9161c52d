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

	"github.com/qutemail/kme/internal/secretfile"
)

// RootOwner is the owner of the root's token, as a role is of its CA's.
const RootOwner = "root"

// HSMToken is a PKCS#11 token that holds the signing key of one authority and nothing
// else.
type HSMToken struct {
	Module  string `yaml:"module"`   // path of the PKCS#11 library
	Label   string `yaml:"token"`    // exactly one token must have it
	PINFile string `yaml:"pin_file"` // readable by its owner only
	// PINCredential is, instead, the name of a credential that systemd passes.
	PINCredential string `yaml:"pin_credential"`
}

// keyLabel is the label of the signing key in its token. Its CKA_ID is keyID.
const (
	keyLabel = "kme-ca"
	keyID    = "\x01"
	keyURI   = "pkcs11:id=01;object=kme-ca"
)

// newSigner makes the signing key of owner ("root" or a role) in dir, or in a token if
// c says so. done gives the token back: a process has one at a time.
func (c InitConfig) newSigner(dir, owner, keyFile string) (key crypto.Signer, token HSMToken, done func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, token, nil, err
	}
	if c.Token == nil {
		key, err := newKey(filepath.Join(dir, keyFile))
		return key, token, func() error { return nil }, err
	}
	if token, err = c.Token(owner, dir); err != nil {
		return nil, token, nil, fmt.Errorf("token of %s: %w", owner, err)
	}
	session, err := token.in(dir).open()
	if err != nil {
		return nil, token, nil, err
	}
	key, err = generate(session)
	if err != nil {
		_ = session.Close() // the key is what failed
		return nil, token, nil, fmt.Errorf("making the key of %s in token %q: %w", owner, token.Label, err)
	}
	return key, token, session.Close, nil
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

// in is the token with a PIN file that is relative to dir.
func (t HSMToken) in(dir string) HSMToken {
	if !filepath.IsAbs(t.PINFile) {
		t.PINFile = filepath.Join(dir, t.PINFile)
	}
	return t
}

// open logs in to the token.
func (t HSMToken) open() (*crypto11.Context, error) {
	pin, err := t.pin().Read(maxPIN)
	if err != nil {
		return nil, fmt.Errorf("reading the PIN of token %q: %w", t.Label, err)
	}
	defer clear(pin)
	session, err := crypto11.Configure(&crypto11.Config{Path: t.Module, TokenLabel: t.Label, Pin: strings.TrimSpace(string(pin))})
	if err != nil {
		return nil, fmt.Errorf("opening token %q: %w", t.Label, err)
	}
	return session, nil
}

// maxPIN is far above what any token takes, in bytes.
const maxPIN = 256

// pin is where the PIN lies.
func (t HSMToken) pin() secretfile.Source {
	return secretfile.Source{File: t.PINFile, Credential: t.PINCredential}
}

// pinPath is the file that holds the PIN, which nobody but its owner may read.
func (t HSMToken) pinPath() (string, error) {
	path, err := t.pin().Path()
	if err != nil {
		return "", fmt.Errorf("reading the PIN of token %q: %w", t.Label, err)
	}
	return path, nil
}

// kms is the token as smallstep wants it.
func (t HSMToken) kms() (*apiv1.Options, error) {
	pin, err := t.pinPath()
	if err != nil {
		return nil, err
	}
	return &apiv1.Options{
		Type: apiv1.PKCS11,
		URI:  fmt.Sprintf("pkcs11:module-path=%s;token=%s;max-sessions=16?pin-source=%s", t.Module, t.Label, pin),
	}, nil
}
