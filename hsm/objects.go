//go:build cgo

package hsm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"

	"github.com/miekg/pkcs11"
)

const kekBytes = 32 // AES-256

// pinned is what a KEK must be, in the token or as a session copy: it seals and
// opens with AES-GCM and does nothing else, and it never leaves.
func (m *module) pinned(inToken bool) []*pkcs11.Attribute {
	all := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, kekBytes),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, inToken),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, false),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
	}
	if !m.weak {
		all = append(all, pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, ulong(pkcs11.CKM_AES_GCM)))
	}
	return all
}

// born is what the token itself says of a key that was generated inside it and
// was never anything but secret. No template can claim these.
func born() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LOCAL, true),
		pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, true),
	}
}

func named(label string, id []byte) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
}

// tokenKeys matches every secret key that is a token object.
func tokenKeys() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
	}
}

// sessionKeys matches every secret key that is a session object.
func sessionKeys() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
	}
}

// ulong is v as an array of one CK_ULONG, which miekg/pkcs11 takes to be as long
// as uint.
func ulong(v uint) []byte {
	if strconv.IntSize == 32 {
		return binary.NativeEndian.AppendUint32(nil, uint32(v))
	}
	return binary.NativeEndian.AppendUint64(nil, uint64(v))
}

// find returns every object that matches.
func (m *module) find(s pkcs11.SessionHandle, match []*pkcs11.Attribute) (all []pkcs11.ObjectHandle, err error) {
	if err := m.FindObjectsInit(s, match); err != nil {
		return nil, fault("C_FindObjectsInit", err)
	}
	for {
		some, _, err := m.FindObjects(s, 64)
		if err != nil {
			_ = m.FindObjectsFinal(s)
			return nil, fault("C_FindObjects", err)
		}
		if len(some) == 0 {
			return all, fault("C_FindObjectsFinal", m.FindObjectsFinal(s))
		}
		all = append(all, some...)
	}
}

// get reads attributes, in the order of want, whose values are not looked at.
func (m *module) get(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, want ...*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	got, err := m.GetAttributeValue(s, o, want)
	return got, fault("C_GetAttributeValue", err)
}

// generateKEK makes an AES-256 key with the pinned attributes.
func (m *module) generateKEK(s pkcs11.SessionHandle, inToken bool, label string, id []byte) (pkcs11.ObjectHandle, error) {
	aes := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}
	o, err := m.GenerateKey(s, aes, append(m.pinned(inToken), named(label, id)...))
	return o, fault("C_GenerateKey", err)
}

// copyToSession makes a copy of a key that lives as long as the session.
func (m *module) copyToSession(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) (pkcs11.ObjectHandle, error) {
	c, err := m.CopyObject(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)})
	return c, fault("C_CopyObject", err)
}

// inspect reads the key back and fails unless it is just what a KEK must be. It
// returns the key's check value.
func (m *module) inspect(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, inToken bool) (kcv [3]byte, err error) {
	want := m.pinned(inToken)
	if !m.weak {
		want = append(want, born()...)
	}
	got, err := m.get(s, o, want...)
	if err != nil {
		return kcv, err
	}
	for i, w := range want {
		if !bytes.Equal(got[i].Value, w.Value) {
			return kcv, fmt.Errorf("attribute %#x of the key is %x, must be %x", w.Type, got[i].Value, w.Value)
		}
	}
	return m.checkValue(s, o)
}

// checkValue reads CKA_CHECK_VALUE. Where the module does not know it, it does not know
// that the key is for GCM only either, and what the value would be can be asked for.
func (m *module) checkValue(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) (kcv [3]byte, err error) {
	var v []byte
	if m.weak {
		if err := m.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil)}, o); err != nil {
			return kcv, fault("C_EncryptInit for the check value", err)
		}
		if v, err = m.Encrypt(s, make([]byte, 16)); err != nil {
			return kcv, fault("C_Encrypt for the check value", err)
		}
		v = v[:min(len(v), len(kcv))]
	} else {
		got, err := m.get(s, o, pkcs11.NewAttribute(pkcs11.CKA_CHECK_VALUE, nil))
		if err != nil {
			return kcv, err
		}
		v = got[0].Value
	}
	if len(v) != len(kcv) {
		return kcv, fmt.Errorf("check value %x of the key is not 3 bytes", v)
	}
	return [3]byte(v), nil
}

// findKEK finds the one token object with the label and ID of info.
func (m *module) findKEK(s pkcs11.SessionHandle, info KEKInfo) (pkcs11.ObjectHandle, error) {
	found, err := m.find(s, append(tokenKeys(), named(info.Label, info.ID)...))
	switch {
	case err != nil:
		return 0, err
	case len(found) == 0:
		return 0, ErrNoKEK
	case len(found) > 1:
		return 0, fmt.Errorf("%d keys have this label and ID", len(found))
	}
	return found[0], nil
}

// identify reads the label, ID and check value of any secret key; a key without a
// check value has zeros there. With an error it has read what it could.
func (m *module) identify(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) (info KEKInfo, err error) {
	got, err := m.get(s, o, named("", nil)...)
	if err != nil {
		return info, err
	}
	info = KEKInfo{Label: string(got[0].Value), ID: got[1].Value}
	info.CheckValue, err = m.checkValue(s, o)
	if isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
		return info, nil
	}
	return info, err
}

// describe names any object, by what can be read of it.
func (m *module) describe(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) string {
	got, err := m.get(s, o, authSecret("")...)
	if err == nil && bytes.Equal(got[0].Value, authSecret("")[0].Value) {
		return fmt.Sprintf("authentication secret of link %q", got[len(got)-1].Value)
	}
	info, err := m.identify(s, o)
	if err != nil {
		return fmt.Sprintf("key %s, of which not all can be read (%v)", info, err)
	}
	return "key " + info.String()
}
