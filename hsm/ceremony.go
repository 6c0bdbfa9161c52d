//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/internal/secretfile"
)

// InitToken makes a token called label, with both PINs set, in the first slot whose
// token is not initialised. It refuses a label that is in use. It is for labs, tests
// and the key ceremony (README), and owns the module of this process meanwhile.
func InitToken(modulePath, label, soPIN, pin string) error {
	m, err := load(modulePath, "")
	if err != nil {
		return fmt.Errorf("making token %q: %w", label, err)
	}
	defer m.unload()
	if err := m.initialise(); err != nil {
		return fmt.Errorf("making token %q: %w", label, err)
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

// Keys lists every secret key in the token, ordered by label and ID, and looks at each.
func (t *Token) Keys(ctx context.Context) ([]KeyStatus, error) {
	all, err := t.list(ctx, "looking at the token's keys", func(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
		_, err := t.m.inspect(s, o, true)
		return err
	})
	if err != nil {
		return nil, err
	}
	labels := make(map[string]int)
	for _, k := range all {
		labels[k.Label]++
	}
	for i, k := range all {
		if n := labels[k.Label]; n > 1 {
			all[i].Err = errors.Join(k.Err, fmt.Errorf("%d keys have this label", n))
		}
	}
	return all, nil
}

// Verify is nil if each of keks is in the token, once, with its check value and every
// attribute that NewKEK gave it, and no key of the token shares a label with another.
// The error names every key that is missing or wrong.
func (t *Token) Verify(ctx context.Context, keks []KEKInfo) error {
	all, err := t.Keys(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, want := range keks {
		i := slices.IndexFunc(all, func(k KeyStatus) bool { return k.Label == want.Label && bytes.Equal(k.ID, want.ID) })
		switch {
		case i < 0:
			errs = append(errs, fmt.Errorf("KEK %s: %w", want, ErrNoKEK))
		case all[i].CheckValue != want.CheckValue:
			errs = append(errs, fmt.Errorf("KEK %s: the check value of the key is %x: it is another key", want, all[i].CheckValue))
		case all[i].Err != nil:
			errs = append(errs, fmt.Errorf("KEK %s: %w", want, all[i].Err))
		}
	}
	for i := 1; i < len(all); i++ {
		if all[i].Label == all[i-1].Label {
			errs = append(errs, fmt.Errorf("two keys have the label %q: ids %x and %x", all[i].Label, all[i-1].ID, all[i].ID))
		}
	}
	return errors.Join(errs...)
}

// NewPIN returns the PIN in the file at path, which only its owner may read. If there
// is no such file it makes a random PIN, of 128 bits in hex, and the file.
func NewPIN(path string) (string, error) {
	if pin, err := readPIN(secretfile.Source{File: path}); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return string(pin), err
	}
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails: it ends the process instead
	pin := hex.EncodeToString(random[:])
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(pin + "\n")
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		return "", fmt.Errorf("making a PIN: %w", err)
	}
	return pin, nil
}
