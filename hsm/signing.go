//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// ErrNoSigningKey: the token works but holds no signing key of that label.
var ErrNoSigningKey = errors.New("no such signing key")

// edwards25519 names the curve as PKCS#11 v3.0 (6.3.3) does: a DER PrintableString.
var edwards25519 = append([]byte{0x13, 12}, "edwards25519"...)

// pointPrefix is the DER of an OCTET STRING of 32 bytes, in which CKA_EC_POINT wraps
// the public key.
var pointPrefix = []byte{0x04, ed25519.PublicKeySize}

// Mechanisms of PKCS#11 v3.0 (6.3.15, 6.3.19) that miekg/pkcs11 has no names for.
const (
	edwardsPairGen = 0x1055 // CKM_EC_EDWARDS_KEY_PAIR_GEN
	eddsa          = 0x1057 // CKM_EDDSA
)

// SigningKey is an Ed25519 key that was generated in the token and cannot leave it.
type SigningKey struct {
	t      *Token
	label  string
	id     []byte
	public ed25519.PublicKey
}

// OpenSigningKey finds the signing key with the label; ErrNoSigningKey says that there
// is none.
func (t *Token) OpenSigningKey(ctx context.Context, label string) (*SigningKey, error) {
	k := &SigningKey{t: t, label: label}
	err := t.with(ctx, fmt.Sprintf("opening signing key %q", label), func(s pkcs11.SessionHandle) error { return k.read(s) })
	if err != nil {
		return nil, err
	}
	return k, nil
}

// NewSigningKey generates a key under the label, which nobody else may be doing at
// the same time, and proves that the token signs with it.
func (t *Token) NewSigningKey(ctx context.Context, label string) (*SigningKey, error) {
	k := &SigningKey{t: t, label: label}
	err := t.alone(ctx, fmt.Sprintf("making signing key %q", label), func(s pkcs11.SessionHandle) error {
		switch err := k.read(s); {
		case err == nil:
			return errors.New("there is one already")
		case !errors.Is(err, ErrNoSigningKey):
			return err
		}
		id := make([]byte, 16)
		_, _ = rand.Read(id) // never fails
		public := append(named(label, id),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, edwards25519))
		private := append(named(label, id),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false),
			pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false), pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false))
		pair := []*pkcs11.Mechanism{pkcs11.NewMechanism(edwardsPairGen, nil)}
		if _, _, err := t.m.GenerateKeyPair(s, pair, public, private); err != nil {
			return fault("C_GenerateKeyPair", err)
		}
		return k.read(s)
	})
	if err != nil {
		return nil, err
	}
	probe := []byte("is this key what it says it is?")
	sig, err := k.Sign(ctx, probe)
	if err == nil && !ed25519.Verify(k.public, probe, sig) {
		err = fmt.Errorf("signing key %q: its signature does not verify", label)
	}
	if err != nil {
		return nil, err
	}
	return k, nil
}

// Public is the key's public half.
func (k *SigningKey) Public() ed25519.PublicKey { return bytes.Clone(k.public) }

// Sign signs a message (Ed25519, RFC 8032).
func (k *SigningKey) Sign(ctx context.Context, message []byte) (sig []byte, err error) {
	err = k.t.with(ctx, fmt.Sprintf("signing with %q", k.label), func(s pkcs11.SessionHandle) error {
		found, err := k.t.m.find(s, signers(k.label, k.id))
		switch {
		case err != nil:
			return err
		case len(found) != 1:
			return fmt.Errorf("%w: %d keys have its label and ID", ErrNoSigningKey, len(found))
		}
		if err := k.t.m.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(eddsa, nil)}, found[0]); err != nil {
			return fault("C_SignInit", err)
		}
		sig, err = k.t.m.Ctx.Sign(s, message)
		return fault("C_Sign", err)
	})
	if err == nil && len(sig) != ed25519.SignatureSize {
		err = fmt.Errorf("signing with %q: a signature of %d bytes", k.label, len(sig))
	}
	return sig, err
}

// signers matches the private halves under a label, and an ID if it is not nil.
func signers(label string, id []byte) []*pkcs11.Attribute {
	match := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	}
	if id != nil {
		match = append(match, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	return match
}

// read finds the key by its label and reads what it is. Both halves must be there.
func (k *SigningKey) read(s pkcs11.SessionHandle) error {
	m := k.t.m
	found, err := m.find(s, signers(k.label, nil))
	switch {
	case err != nil:
		return err
	case len(found) == 0:
		return ErrNoSigningKey
	case len(found) > 1:
		return fmt.Errorf("%d signing keys have this label", len(found))
	}
	want := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_LOCAL, true), pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, true),
	}
	got, err := m.get(s, found[0], append(want, pkcs11.NewAttribute(pkcs11.CKA_ID, nil))...)
	if err != nil {
		return err
	}
	for i, w := range want {
		if !bytes.Equal(got[i].Value, w.Value) {
			return fmt.Errorf("attribute %#x of the signing key is %x, must be %x", w.Type, got[i].Value, w.Value)
		}
	}
	k.id = got[len(want)].Value
	halves, err := m.find(s, append(named(k.label, k.id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY)))
	if err != nil {
		return err
	}
	if len(halves) != 1 {
		return fmt.Errorf("%d public keys go with the signing key", len(halves))
	}
	point, err := m.get(s, halves[0], pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil))
	if err != nil {
		return err
	}
	raw, ok := bytes.CutPrefix(point[0].Value, pointPrefix)
	if !ok || len(raw) != ed25519.PublicKeySize {
		return fmt.Errorf("the public key is %x, which is no Ed25519 point", point[0].Value)
	}
	k.public = raw
	return nil
}
