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
// recorded by the caller: ListKEKs finds one whose record was lost. One that the module
// has made when nobody waited for it any more is destroyed at once, if the process is
// still there: the caller was told that there is none.
func (t *Token) NewKEK(ctx context.Context, label string) (KEKInfo, error) {
	if label == "" {
		return KEKInfo{}, errors.New("making a KEK: no label")
	}
	info := KEKInfo{Label: label, ID: make([]byte, 16)}
	_, _ = rand.Read(info.ID) // never fails: it ends the process instead
	sameLabel := append(tokenKeys(), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label))
	var made pkcs11.ObjectHandle // 0 while there is none that is good
	generate := func(s pkcs11.SessionHandle) error {
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
		made = o
		return nil
	}
	err := t.call(ctx, alone, fmt.Sprintf("making KEK %q", label), func() error { return t.onOwnSession(generate) }, func() {
		if made == 0 {
			return
		}
		err := t.onOwnSession(func(s pkcs11.SessionHandle) error { return fault("C_DestroyObject", t.m.DestroyObject(s, made)) })
		t.log.Warn("a KEK was made when nobody waited for it any more: it is destroyed", "kek", info.String(), "err", err)
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
		_ = k.dropCopy() // if it lives on, CloseKEK finds it
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

// load finds the token object of k, copies it unless there is a copy that works,
// and sees by the canary that the copy is the key it was. The caller holds all turns.
func (k *KEK) load(s pkcs11.SessionHandle) error {
	o, err := k.t.findKEK(s, k.info)
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
	if err := k.dropCopy(); err != nil { // it may have failed for a moment only
		return err
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

// findKEK finds the token object of a KEK. ErrNoKEK is said only of a token that sees us as
// its user.
func (t *Token) findKEK(s pkcs11.SessionHandle, info KEKInfo) (o pkcs11.ObjectHandle, err error) {
	err = sure(t.loggedIn, func() (err error) {
		o, err = t.m.findKEK(s, info)
		return err
	})
	return o, err
}

// dropCopy destroys the session copy, and forgets it only if it is gone.
func (k *KEK) dropCopy() error {
	if k.copy == 0 {
		return nil
	}
	err := fault("C_DestroyObject of the session copy", k.t.m.DestroyObject(k.t.anchor, k.copy))
	if err == nil || isRV(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) || anchorLost(err) {
		k.copy = 0
		return nil
	}
	return err
}

// anchorLost says whether err, of a call on the anchor session, means that the session is
// gone, and with it every copy that was made on it (PKCS#11 v2.40 base, 2.4).
func anchorLost(err error) bool {
	return isRV(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
}

// Info names the KEK.
func (k *KEK) Info() KEKInfo { return k.info }

// Wraps is how many blobs were sealed with this *KEK, failed attempts and one
// canary for each opening included. With random IVs a KEK must stop well before
// 2^32 (NIST SP 800-38D, 8.3).
func (k *KEK) Wraps() int64 { return k.wraps.Load() }

// Close is CloseKEK, for at most 10 s.
func (k *KEK) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	return k.t.CloseKEK(ctx, k.info)
}

// CloseKEK gives the KEK up in this process, once the calls that use it are through: it is
// unusable to whoever has opened it, and every session copy of it is destroyed, also one
// that is left of an opening that failed or that nobody waited for. It returns nil only if
// the token, asked for such copies, has none. If it fails, they may live on: it can be
// called again. Closing what is not open is harmless, as is closing while the token is down.
func (t *Token) CloseKEK(ctx context.Context, info KEKInfo) error {
	is := func(k *KEK) bool { return bytes.Equal(k.info.ID, info.ID) }
	return t.closeKEKs(ctx, "closing KEK "+info.String(), is, append(sessionKeys(), named(info.Label, info.ID)...))
}

// CloseKEKs is CloseKEK of all that there are in this process.
func (t *Token) CloseKEKs(ctx context.Context) error {
	return t.closeKEKs(ctx, "closing all KEKs", func(*KEK) bool { return true }, sessionKeys())
}

func (t *Token) closeKEKs(ctx context.Context, what string, is func(*KEK) bool, copies []*pkcs11.Attribute) error {
	if err := t.admitAlone(ctx, what, t.waitForTurn); err != nil {
		return err
	}
	return judged(what, t.do(ctx, alone, func() error {
		for k := range t.keks {
			if is(k) {
				k.gone = fmt.Errorf("%w: closed", ErrNoKEK)
				delete(t.keks, k)
			}
		}
		if t.closed {
			return nil
		}
		return t.destroyCopies(copies)
	}, nil))
}

// destroyCopies destroys all session objects that match, and sees that they are gone. The
// caller is alone with the token.
func (t *Token) destroyCopies(match []*pkcs11.Attribute) error {
	copies, err := t.m.find(t.anchor, match)
	for _, c := range copies {
		if e := t.m.DestroyObject(t.anchor, c); !isRV(e, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			err = errors.Join(err, fault("C_DestroyObject of a session copy", e))
		}
	}
	switch {
	case anchorLost(err):
		return nil
	case err != nil:
		return err
	}
	return sure(t.loggedIn, func() error {
		if copies, err = t.m.find(t.anchor, match); err == nil && len(copies) > 0 {
			err = fmt.Errorf("%w: %d session copies live on", ErrUnavailable, len(copies))
		}
		return err
	})
}

// DestroyKEK destroys the KEK in the token and sees that it is gone. Whatever was
// sealed under it is lost. It refuses while the KEK is open here: destroying a
// token object does nothing to session copies, so every process must have closed
// its own first. ErrNoKEK if there is none, which is said only of a token that is well
// and sees us as its user.
func (t *Token) DestroyKEK(ctx context.Context, info KEKInfo) error {
	err := t.alone(ctx, "destroying KEK "+info.String(), func(s pkcs11.SessionHandle) error {
		for k := range t.keks {
			if bytes.Equal(k.info.ID, info.ID) {
				return errors.New("it is open: close it first")
			}
		}
		return sure(t.inSight, func() error { return t.m.destroyKEK(s, info) })
	})
	if err == nil {
		t.log.Info("KEK destroyed", "kek", info.String())
	}
	return err
}

func (m *module) destroyKEK(s pkcs11.SessionHandle, info KEKInfo) error {
	o, err := m.findKEK(s, info)
	if err != nil {
		return err
	}
	is, err := m.identify(s, o)
	if err != nil {
		return err
	}
	if is.CheckValue != info.CheckValue {
		return fmt.Errorf("check value of the key is %x: it is another key", is.CheckValue)
	}
	if err := m.DestroyObject(s, o); err != nil {
		return fault("C_DestroyObject", err)
	}
	if _, err := m.findKEK(s, info); !errors.Is(err, ErrNoKEK) {
		return errors.Join(errors.New("the key is still there"), err)
	}
	return nil
}

// DestroyAll destroys every secret key and every authentication secret in the token, ours
// or not, whatever its label, and names those that it did. It is for emergencies, and asks
// nobody: session copies, also those of this process, live on until a heartbeat finds that
// theirs is gone. One that cannot be destroyed keeps none of the others; the error names
// it. If there is neither, the token is one that sees us as its user. Of a module that does
// not return it names none: some may be gone, and more may go yet.
func (t *Token) DestroyAll(ctx context.Context) (destroyed []string, err error) {
	gone := make(chan []string, 1) // if the module does not return, what it does belongs to nobody
	err = t.alone(ctx, "destroying all keys", func(s pkcs11.SessionHandle) error {
		var names []string
		defer func() { gone <- names }()
		return sure(t.loggedIn, func() error {
			var left []error
			for _, match := range [][]*pkcs11.Attribute{tokenKeys(), authSecrets()} {
				objects, err := t.m.find(s, match)
				if err != nil {
					left = append(left, err)
				}
				for _, o := range objects {
					name := t.m.describe(s, o)
					if err := t.m.DestroyObject(s, o); err != nil {
						left = append(left, fmt.Errorf("%s: %w", name, fault("C_DestroyObject", err)))
						continue
					}
					names = append(names, name)
				}
			}
			return errors.Join(left...)
		})
	})
	select {
	case destroyed = <-gone:
	default:
	}
	return destroyed, err
}

// ListKEKs returns every secret key in the token, ours or not, ordered by label
// and ID, so that they can be compared with the register. Err of one says what could not
// be read of it. The token is one that is well and sees us as its user: what is not
// listed is not there.
func (t *Token) ListKEKs(ctx context.Context) ([]KeyStatus, error) {
	return t.list(ctx, "listing KEKs", func(pkcs11.SessionHandle, pkcs11.ObjectHandle) error { return nil })
}

// list identifies every secret key in the token, and adds what look says of it.
func (t *Token) list(ctx context.Context, what string, look func(pkcs11.SessionHandle, pkcs11.ObjectHandle) error) ([]KeyStatus, error) {
	var all []KeyStatus
	each := func(s pkcs11.SessionHandle) error {
		objects, err := t.m.find(s, tokenKeys())
		for _, o := range objects {
			info, err := t.m.identify(s, o)
			if err == nil {
				err = look(s, o)
			}
			if !isRV(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) { // destroyed since
				all = append(all, KeyStatus{info, err})
			}
		}
		return err
	}
	// On a session of its own: what cannot be read of a key may leave that in any state.
	err := t.call(ctx, urgent, what, func() error {
		return t.onOwnSession(func(s pkcs11.SessionHandle) error {
			return sure(t.inSight, func() error { return each(s) })
		})
	}, nil)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b KeyStatus) int {
		return cmp.Or(cmp.Compare(a.Label, b.Label), bytes.Compare(a.ID, b.ID))
	})
	return all, nil
}
