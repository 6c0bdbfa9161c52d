//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// checker runs checks one after the other. After a failure it goes on, unless nothing
// that follows could succeed.
type checker struct {
	weak bool // Config.WeakAttributes
	done []Check
}

func (c *checker) check(name string, f func() error) (ok bool) {
	err := f()
	c.done = append(c.done, Check{Name: name, Err: err})
	return err == nil
}

// check of something that WeakAttributes lets a module fail.
func (c *checker) attribute(name string, f func() error) {
	if err := f(); err != nil {
		c.done = append(c.done, Check{Name: name, Err: err, Weak: c.weak})
		return
	}
	c.done = append(c.done, Check{Name: name})
}

// failed is the first failure.
func (c *checker) failed() error {
	for _, done := range c.done {
		if done.Err != nil && !done.Weak {
			return fmt.Errorf("self-test: %s: %w", done.Name, done.Err)
		}
	}
	return nil
}

// Examine opens the token like Open, shows everything that kmed needs of it, on keys
// that live only for that, and closes it again. Unlike Open it goes on after a failure,
// and it makes and destroys a key in the token. The error says why the token could not
// be examined at all.
func Examine(ctx context.Context, cfg Config) (Info, []Check, error) {
	t, err := prepare(cfg)
	if err != nil {
		return Info{}, nil, err
	}
	if err := t.start(ctx); err != nil {
		t.m.unload()
		return Info{}, nil, fmt.Errorf("opening hsm token %q: %w", cfg.TokenLabel, err)
	}
	c := checker{weak: t.cfg.WeakAttributes}
	t.checkSessionKey(&c)
	t.checkTokenKey(&c)
	return t.info, c.done, t.Close()
}

// selfTest shows on a key that lives only for the test that the token does what
// Open promises. The caller is alone with the token.
func (t *Token) selfTest() error {
	c := checker{weak: t.cfg.WeakAttributes}
	t.checkSessionKey(&c)
	return c.failed()
}

// checkSessionKey checks what is done with a KEK's session copy: that the module seals
// and opens, refuses what was changed, uses the IV it is given, and keeps odd lengths;
// and that we refuse, before they reach the module, the IV and tag lengths that SoftHSM
// would take.
func (t *Token) checkSessionKey(c *checker) {
	s := t.anchor
	var key pkcs11.ObjectHandle
	made := c.check("an AES-256 key can be generated as a session object", func() (err error) {
		key, err = t.m.generateKEK(s, false, "self-test", []byte("self-test"))
		return err
	})
	if !made {
		return
	}
	c.check("its attributes are as asked for", func() error { return second(t.m.inspect(s, key, false)) })
	c.check("its value cannot be read", func() error {
		_, err := t.m.get(s, key, pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil))
		return wantRefusal(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE)
	})
	c.attribute("it does AES-GCM and nothing else", func() error {
		err := t.m.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil)}, key)
		if err == nil {
			_, _ = t.m.Encrypt(s, make([]byte, 16)) // ends the operation
		}
		return wantRefusal(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	})
	c.attribute("it cannot be wrapped by another key", func() error { return t.m.wrapOut(s, key) })
	for _, size := range []int{32, len(canaryPayload)} {
		t.m.checkSize(c, s, key, size)
	}
	c.check("it can be destroyed", func() error { return fault("C_DestroyObject", t.m.DestroyObject(s, key)) })
}

// wrapOut tries to get key out, wrapped by a key made for that, and fails if it does.
func (m *module) wrapOut(s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
	wrapping, err := m.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, kekBytes),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
	})
	if err != nil {
		return nil // nobody can make such a key
	}
	_, err = m.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}, wrapping, key)
	if e := m.DestroyObject(s, wrapping); e != nil {
		return fault("C_DestroyObject", e)
	}
	return wantRefusal(err, pkcs11.CKR_KEY_UNEXTRACTABLE, pkcs11.CKR_KEY_NOT_WRAPPABLE, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
}

// wantRefusal is nil if err is one of the module's errors rvs.
func wantRefusal(err error, rvs ...pkcs11.Error) error {
	if err == nil {
		return errors.New("the module did it")
	}
	if isRV(err, rvs...) {
		return nil
	}
	return err
}

func (m *module) checkSize(c *checker, s pkcs11.SessionHandle, key pkcs11.ObjectHandle, size int) {
	of := func(what string) string { return fmt.Sprintf("%s, %d bytes", what, size) }
	var iv, otherIV [IVBytes]byte
	plain, aad := make([]byte, size), []byte("self-test aad")
	for _, b := range [][]byte{iv[:], otherIV[:], plain} {
		_, _ = rand.Read(b)
	}
	blob, otherBlob := make([]byte, size+TagBytes), make([]byte, size+TagBytes)
	sealed := c.check(of("AES-GCM seals"), func() error {
		return errors.Join(m.sealOne(s, key, iv[:], aad, plain, blob), m.sealOne(s, key, otherIV[:], aad, plain, otherBlob))
	})
	if !sealed {
		return
	}
	c.check(of("with the IV that it is given"), func() error {
		if bytes.Contains(blob, plain) || bytes.Equal(blob[:size], otherBlob[:size]) {
			return errors.New("the module does not use the IV it is given")
		}
		return nil
	})
	c.check(of("it opens"), func() error {
		out, err := m.unsealOne(s, key, iv[:], aad, blob)
		if err == nil && !bytes.Equal(out, plain) {
			err = errors.New("what was sealed opens to something else")
		}
		return err
	})
	changed := bytes.Clone(blob)
	changed[len(changed)-1] ^= 1
	for _, wrong := range []struct {
		what          string
		iv, aad, blob []byte
	}{
		{"AAD", iv[:], []byte("self-test AAD"), blob},
		{"tag", iv[:], aad, changed},
		{"IV", otherIV[:], aad, blob},
	} {
		c.check(of("a wrong "+wrong.what+" is refused"), func() error {
			_, err := m.unsealOne(s, key, wrong.iv, wrong.aad, wrong.blob)
			switch {
			case err == nil:
				return errors.New("the module opened it")
			case !errors.Is(err, errRefused):
				return err
			}
			return nil
		})
	}
	c.check(of("what the module must never see is refused before"), func() error {
		for what, err := range map[string]error{
			"sealing with an empty IV":  m.sealOne(s, key, nil, aad, plain, blob),
			"sealing without a tag":     m.sealOne(s, key, iv[:], aad, plain, blob[:size]),
			"sealing with a short tag":  m.sealOne(s, key, iv[:], aad, plain, blob[:size+12]),
			"opening with an empty IV":  second(m.unsealOne(s, key, nil, aad, blob)),
			"opening without a payload": second(m.unsealOne(s, key, iv[:], aad, blob[:TagBytes])),
		} {
			if err == nil || isFault(err) {
				return fmt.Errorf("%s reached the module", what)
			}
		}
		return nil
	})
}

// checkTokenKey checks the life of a KEK: made in the token, found again, copied to a
// session, at work beside the copy, destroyed.
func (t *Token) checkTokenKey(c *checker) {
	s, err := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if !c.check("a read-write session can be opened", func() error { return fault("C_OpenSession", err) }) {
		return
	}
	defer t.m.CloseSession(s)
	info := KEKInfo{Label: "self-test " + rand.Text(), ID: []byte(rand.Text())}
	var key, copied pkcs11.ObjectHandle
	made := c.check("an AES-256 key can be generated as a token object", func() (err error) {
		key, err = t.m.generateKEK(s, true, info.Label, info.ID)
		return err
	})
	if !made {
		return
	}
	c.check("it is found by its label and ID", func() error {
		o, err := t.m.findKEK(t.anchor, info)
		if err == nil && o != key {
			err = errors.New("another object is found")
		}
		return err
	})
	c.check("its attributes are as asked for", func() error { return second(t.m.inspect(s, key, true)) })
	didCopy := c.check("it can be copied to a session object", func() (err error) {
		copied, err = t.m.copyToSession(t.anchor, key)
		return err
	})
	if didCopy {
		c.check("the copy's attributes are as the key's", func() error { return second(t.m.inspect(s, copied, false)) })
		c.check("what the key seals, the copy opens", func() error {
			sealed, err := newCanary(t.m, s, key)
			if err == nil {
				err = sealed.check(t.m, s, copied)
			}
			return err
		})
		c.check("the copy can be destroyed", func() error { return fault("C_DestroyObject", t.m.DestroyObject(t.anchor, copied)) })
	}
	c.check("the key can be destroyed", func() error { return fault("C_DestroyObject", t.m.DestroyObject(s, key)) })
	c.check("and is not found again", func() error {
		_, err := t.m.findKEK(t.anchor, info)
		switch {
		case err == nil:
			return errors.New("it is still there")
		case !errors.Is(err, ErrNoKEK):
			return err
		}
		return nil
	})
}

func second[T any](_ T, err error) error { return err }
