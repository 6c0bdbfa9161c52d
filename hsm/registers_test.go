//go:build cgo && (amd64 || arm64)

package hsm

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm/hsmtest"
	"github.com/qutemail/kme/internal/registers"
)

// TestRegistersAreCleared: whatever a module leaves in the vector registers, nothing of it is
// there when one of our calls that a key, a secret or the PIN goes through has returned. What
// goes through other calls stays: that is how the test sees that it looks where it lies.
func TestRegistersAreCleared(t *testing.T) {
	_, f, token := newFaulty(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	pattern := [8]byte{0xc3, 0x5a, 0x96, 0x0f, 0x77, 0xe1, 0x18, 0xb4}
	var all registers.File
	seen := func(call func() error) (n int) {
		for range 20 { // this goroutine may go on in another thread, now and then
			err := call()
			all.Peek()
			if err != nil {
				t.Fatal(err)
			}
			n += bytes.Count(all[:], pattern[:])
		}
		return n
	}
	rw(t, token, func(h pkcs11.SessionHandle) error {
		blob := make([]byte, len(s.ct))
		if err := token.m.keep(h, "app", "label", s.plain); err != nil {
			t.Fatal(err)
		}
		kept, err := token.m.find(h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "label")})
		if err != nil || len(kept) != 1 {
			t.Fatal(kept, err)
		}
		for _, c := range []struct {
			name string
			at   hsmtest.Function
			call func() error
		}{
			{"seal", hsmtest.Encrypt, func() error { return token.m.sealOne(h, k.copy, s.iv[:], s.aad, s.plain, blob) }},
			{"unseal", hsmtest.Decrypt, func() error {
				_, err := token.m.unsealOne(h, k.copy, s.iv[:], s.aad, s.ct)
				return err
			}},
			{"random", hsmtest.GenerateRandom, func() error { return token.m.random(h, blob) }},
			{"keep", hsmtest.CreateObject, func() error { return token.m.keep(h, "app", "another", s.plain) }},
			{"value", hsmtest.GetAttributeValue, func() error {
				_, err := token.m.value(h, kept[0], blob)
				return err
			}},
			{"login", hsmtest.Login, func() error {
				err := token.m.login(h, pkcs11.CKU_USER, []byte(testPIN))
				if isRV(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
					err = nil
				}
				return err
			}},
		} {
			f.Mark(c.at, pattern)
			if n := seen(c.call); n > 0 {
				t.Errorf("%s: what the module left is in %d registers", c.name, n)
			}
			f.Heal()
		}
		f.Mark(hsmtest.GetSessionInfo, pattern)
		if seen(func() error { _, err := token.m.GetSessionInfo(h); return err }) == 0 {
			t.Error("the test does not see what a module leaves in the registers")
		}
		f.Heal()
		return nil
	})
}
