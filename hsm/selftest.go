//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// selfTest shows on a key that lives only for the test that the module seals and
// opens, refuses what was changed, uses the IV it is given, and keeps odd lengths;
// and that we refuse, before they reach the module, the IV and tag lengths that
// SoftHSM would take. The caller is alone with the token.
func (t *Token) selfTest() (err error) {
	s := t.anchor
	key, err := t.m.generateKEK(s, false, "self-test", []byte("self-test"))
	if err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	defer func() {
		if e := t.m.DestroyObject(s, key); e != nil && err == nil {
			err = fmt.Errorf("self-test: %w", fault("C_DestroyObject", e))
		}
	}()
	if _, err := t.m.inspect(s, key, false); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	for _, size := range []int{32, len(canaryPayload)} {
		if err := t.m.trySize(s, key, size); err != nil {
			return fmt.Errorf("self-test with %d bytes: %w", size, err)
		}
	}
	return nil
}

func (m *module) trySize(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, size int) error {
	var iv, otherIV [IVBytes]byte
	plain, aad := make([]byte, size), []byte("self-test aad")
	for _, b := range [][]byte{iv[:], otherIV[:], plain} {
		_, _ = rand.Read(b)
	}
	blob, otherBlob, out := make([]byte, size+TagBytes), make([]byte, size+TagBytes), make([]byte, size+TagBytes)
	if err := m.seal(s, key, iv[:], aad, plain, blob); err != nil {
		return err
	}
	if err := m.seal(s, key, otherIV[:], aad, plain, otherBlob); err != nil {
		return err
	}
	if bytes.Contains(blob, plain) || bytes.Equal(blob[:size], otherBlob[:size]) {
		return errors.New("the module does not use the IV it is given")
	}
	n, err := m.unseal(s, key, iv[:], aad, blob, out)
	if err != nil {
		return err
	}
	if !bytes.Equal(out[:n], plain) {
		return errors.New("what was sealed opens to something else")
	}

	changed := bytes.Clone(blob)
	changed[len(changed)-1] ^= 1
	for name, err := range map[string]error{
		"wrong AAD": second(m.unseal(s, key, iv[:], []byte("self-test AAD"), blob, out)),
		"wrong tag": second(m.unseal(s, key, iv[:], aad, changed, out)),
		"wrong IV":  second(m.unseal(s, key, otherIV[:], aad, blob, out)),
	} {
		if err == nil {
			return fmt.Errorf("the module opened a blob with a %s", name)
		}
		if !errors.Is(err, errRefused) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for name, err := range map[string]error{
		"sealing with an empty IV":  m.seal(s, key, nil, aad, plain, blob),
		"sealing without a tag":     m.seal(s, key, iv[:], aad, plain, blob[:size]),
		"sealing with a short tag":  m.seal(s, key, iv[:], aad, plain, blob[:size+12]),
		"opening with an empty IV":  second(m.unseal(s, key, nil, aad, blob, out)),
		"opening without a payload": second(m.unseal(s, key, iv[:], aad, blob[:TagBytes], out[:TagBytes])),
	} {
		if err == nil || isFault(err) {
			return fmt.Errorf("%s reached the module", name)
		}
	}
	return nil
}

func second(_ int, err error) error { return err }
