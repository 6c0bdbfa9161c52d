//go:build cgo

package hsm

import (
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"
)

// InitToken makes a token called label, with both PINs set, in the first slot whose
// token is not initialised. It refuses a label that is in use. It is for labs, tests
// and the key ceremony (README), and owns the module of this process meanwhile.
func InitToken(modulePath, label, soPIN, pin string) error {
	m, err := load(modulePath)
	if err != nil {
		return fmt.Errorf("making token %q: %w", label, err)
	}
	defer m.unload()
	if err := m.Initialize(); err != nil {
		return fmt.Errorf("making token %q: %w", label, fault("C_Initialize", err))
	}
	err = m.initToken(label, soPIN, pin)
	if ferr := fault("C_Finalize", m.Finalize()); err == nil {
		err = ferr
	}
	if err != nil {
		return fmt.Errorf("making token %q: %w", label, err)
	}
	return nil
}

func (m *module) initToken(label, soPIN, pin string) error {
	if label == "" || len(label) > 32 || strings.TrimSpace(label) != label { // CK_TOKEN_INFO has room for 32 bytes, padded with blanks
		return errors.New("a label has 1 to 32 bytes and no blanks around it")
	}
	slot, err := m.freeSlot(label)
	if err != nil {
		return err
	}
	if err := m.Ctx.InitToken(slot, soPIN, label); err != nil {
		return fault("C_InitToken", err)
	}
	s, err := m.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fault("C_OpenSession", err)
	}
	defer m.CloseSession(s)
	if err := m.Login(s, pkcs11.CKU_SO, soPIN); err != nil {
		return fault("C_Login as security officer", err)
	}
	if err := m.InitPIN(s, pin); err != nil {
		return fault("C_InitPIN", err)
	}
	return fault("C_Logout", m.Logout(s))
}

// freeSlot is the first slot whose token is not initialised. No token may be called
// label already.
func (m *module) freeSlot(label string) (uint, error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return 0, fault("C_GetSlotList", err)
	}
	free, found := uint(0), false
	for _, slot := range slots {
		ti, err := m.GetTokenInfo(slot)
		if err != nil {
			return 0, fault("C_GetTokenInfo", err)
		}
		switch initialised := ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0; {
		case initialised && strings.TrimSpace(ti.Label) == label:
			return 0, errors.New("a token with this label exists")
		case !initialised && !found:
			free, found = slot, true
		}
	}
	if !found {
		return 0, fmt.Errorf("all %d slots have initialised tokens", len(slots))
	}
	return free, nil
}
