//go:build cgo

package hsm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// KEK is an open key-encryption key. It works on a session copy of the token
// object (C_CopyObject), because a module may go to its store for every use of a
// token object: 2.8 times slower on SoftHSM. It stays good across an outage of the token.
type KEK struct {
	t     *Token
	info  KEKInfo
	wraps atomic.Int64

	// Only the holder of all turns changes these.
	object pkcs11.ObjectHandle // in the token; used to see that the token is still there
	copy   pkcs11.ObjectHandle // lives as long as the anchor session
	gone   error               // why it cannot be used; nil while it can
	canary canary
}

// NewKEK makes a KEK in the token and reads its attributes back. A label that is
// in use is refused. The KEK is in the token when NewKEK returns, and must be
// recorded by the caller: ListKEKs finds one whose record was lost.
func (t *Token) NewKEK(ctx context.Context, label string) (KEKInfo, error) {
	if label == "" {
		return KEKInfo{}, errors.New("making a KEK: no label")
	}
	info := KEKInfo{Label: label, ID: make([]byte, 16)}
	_, _ = rand.Read(info.ID) // never fails: it ends the process instead
	sameLabel := append(tokenKeys(), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label))
	err := t.alone(ctx, fmt.Sprintf("making KEK %q", label), func(s pkcs11.SessionHandle) error {
		others, err := t.m.find(s, sameLabel)
		if err != nil {
			return err
		}
		if len(others) != 0 {
			return errors.New("a key with this label exists")
		}
		o, err := t.m.generateKEK(s, true, label, info.ID)
		if err != nil {
			return err
		}
		info.CheckValue, err = t.m.inspect(s, o, true)
		if err == nil {
			// Another process may have made one since we looked.
			if others, err = t.m.find(s, sameLabel); err == nil && len(others) != 1 {
				err = fmt.Errorf("%d keys have this label now", len(others))
			}
		}
		if err != nil {
			return errors.Join(err, fault("C_DestroyObject", t.m.DestroyObject(s, o)))
		}
		return nil
	})
	if err != nil {
		return KEKInfo{}, err
	}
	t.log.Info("KEK made", "kek", info.String())
	return info, nil
}

// OpenKEK readies a KEK for use. Exactly one key of the token must have its label
// and ID, and it must have the check value and every attribute that NewKEK gave
// it. ErrNoKEK if there is none.
func (t *Token) OpenKEK(ctx context.Context, info KEKInfo) (*KEK, error) {
	info.ID = bytes.Clone(info.ID)
	k := &KEK{t: t, info: info}
	err := t.call(ctx, alone, "opening KEK "+info.String(), func() error {
		return t.onOwnSession(func(s pkcs11.SessionHandle) error {
			if err := k.load(s); err != nil {
				return err
			}
			t.keks[k] = struct{}{}
			return nil
		})
	}, func() {
		k.gone = fmt.Errorf("%w: nobody waited for it", ErrNoKEK)
		delete(t.keks, k)
		_ = k.dropCopy() // it goes with the next login
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

// load finds the token object of k, copies it unless there is a copy that works,
// and sees by the canary that the copy is the key it was. The caller holds all turns.
func (k *KEK) load(s pkcs11.SessionHandle) error {
	o, err := k.t.m.findKEK(s, k.info)
	if err != nil {
		return err
	}
	kcv, err := k.t.m.inspect(s, o, true)
	if err != nil {
		return err
	}
	if kcv != k.info.CheckValue {
		return fmt.Errorf("check value of the key is %x: it is another key", kcv)
	}
	k.object = o
	if k.copy != 0 && k.canary.check(k.t.m, s, k.copy) == nil {
		return nil
	}
	if k.copy, err = k.t.m.copyToSession(k.t.anchor, o); err != nil {
		k.copy = 0
		return err
	}
	if kcv, err = k.t.m.inspect(s, k.copy, false); err == nil && kcv != k.info.CheckValue {
		err = fmt.Errorf("check value of the session copy is %x: it is another key", kcv)
	}
	switch {
	case err != nil:
	case k.canary.blob == nil:
		k.wraps.Add(1)
		k.canary, err = newCanary(k.t.m, s, k.copy)
	default:
		err = k.canary.check(k.t.m, s, k.copy)
	}
	if err != nil {
		return errors.Join(err, k.dropCopy())
	}
	return nil
}

// dropCopy destroys the session copy. One that is gone already is fine: it goes with
// the session it was made on (PKCS#11 v2.40 base, 2.4), and that with the module.
func (k *KEK) dropCopy() error {
	if k.copy == 0 {
		return nil
	}
	err := k.t.m.DestroyObject(k.t.anchor, k.copy)
	k.copy = 0
	if isRV(err, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) {
		return nil
	}
	return fault("C_DestroyObject of the session copy", err)
}

// Info names the KEK.
func (k *KEK) Info() KEKInfo { return k.info }

// Wraps is how many blobs were sealed with this *KEK, failed attempts and one
// canary for each opening included. With random IVs a KEK must stop well before
// 2^32 (NIST SP 800-38D, 8.3).
func (k *KEK) Wraps() int64 { return k.wraps.Load() }

// Close gives up the session copy, once the calls that use it are through. If it
// fails, the copy may live on until the token is closed; the KEK is unusable in
// either case. Closing twice is harmless.
func (k *KEK) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	if err := k.t.gate.enter(ctx, alone); err != nil {
		return fmt.Errorf("closing KEK %s: a call is stuck in the module: %w", k.info, err)
	}
	defer k.t.gate.leave(alone)
	k.gone = fmt.Errorf("%w: closed", ErrNoKEK)
	delete(k.t.keks, k)
	if k.t.closed {
		return nil
	}
	if err := k.dropCopy(); err != nil {
		return fmt.Errorf("closing KEK %s: %w", k.info, err)
	}
	return nil
}

// DestroyKEK destroys the KEK in the token and sees that it is gone. Whatever was
// sealed under it is lost. It refuses while the KEK is open here: destroying a
// token object does nothing to session copies, so every process must have closed
// its own first. ErrNoKEK if there is none.
func (t *Token) DestroyKEK(ctx context.Context, info KEKInfo) error {
	err := t.alone(ctx, "destroying KEK "+info.String(), func(s pkcs11.SessionHandle) error {
		for k := range t.keks {
			if bytes.Equal(k.info.ID, info.ID) {
				return errors.New("it is open: close it first")
			}
		}
		o, err := t.m.findKEK(s, info)
		if err != nil {
			return err
		}
		is, err := t.m.identify(s, o)
		if err != nil {
			return err
		}
		if is.CheckValue != info.CheckValue {
			return fmt.Errorf("check value of the key is %x: it is another key", is.CheckValue)
		}
		if err := t.m.DestroyObject(s, o); err != nil {
			return fault("C_DestroyObject", err)
		}
		if _, err := t.m.findKEK(s, info); !errors.Is(err, ErrNoKEK) {
			return errors.Join(errors.New("the key is still there"), err)
		}
		return nil
	})
	if err == nil {
		t.log.Info("KEK destroyed", "kek", info.String())
	}
	return err
}

// DestroyAll destroys every secret key in the token, ours or not, whatever its label,
// and returns those that it did. It is for emergencies, and asks nobody: session copies,
// also those of this process, live on until a heartbeat finds that theirs is gone. A key
// that cannot be destroyed keeps none of the others; the error names it.
func (t *Token) DestroyAll(ctx context.Context) (destroyed []KEKInfo, err error) {
	err = t.alone(ctx, "destroying all keys", func(s pkcs11.SessionHandle) error {
		objects, err := t.m.find(s, tokenKeys())
		if err != nil {
			return err
		}
		var left []error
		for _, o := range objects {
			info, err := t.m.identify(s, o)
			if err == nil {
				err = fault("C_DestroyObject", t.m.DestroyObject(s, o))
			}
			if err != nil {
				left = append(left, fmt.Errorf("key %s: %w", info, err))
				continue
			}
			destroyed = append(destroyed, info)
		}
		return errors.Join(left...)
	})
	return destroyed, err
}

// ListKEKs returns every secret key in the token, ours or not, ordered by label
// and ID, so that they can be compared with the register.
func (t *Token) ListKEKs(ctx context.Context) ([]KEKInfo, error) {
	var list []KEKInfo
	err := t.with(ctx, "listing KEKs", func(s pkcs11.SessionHandle) error {
		objects, err := t.m.find(s, tokenKeys())
		for _, o := range objects {
			info, err := t.m.identify(s, o)
			if err != nil {
				return err
			}
			list = append(list, info)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b KEKInfo) int {
		return cmp.Or(cmp.Compare(a.Label, b.Label), bytes.Compare(a.ID, b.ID))
	})
	return list, nil
}
