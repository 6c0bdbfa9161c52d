//go:build cgo

package hsm

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm/hsmtest"
)

// copies is how many session copies of KEKs live in this process.
func copies(t *testing.T, token *Token) int {
	t.Helper()
	found, err := token.m.find(token.anchor, sessionKeys())
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}

// TestCopiesGone: a KEK counts as given up when no session copy of it lives, and not
// before, whatever has left the copy.
func TestCopiesGone(t *testing.T) {
	_, f, token := newFaulty(t)
	for name, leave := range map[string]func(t *testing.T, info KEKInfo) (failed error){
		"it cannot be destroyed at first": func(t *testing.T, info KEKInfo) error {
			k := openKEK(t, token, info)
			f.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
			return errors.Join(k.Close(), k.Close())
		},
		"its canary failed for a moment": func(t *testing.T, info KEKInfo) error {
			openKEK(t, token, info)
			f.Fail(hsmtest.Decrypt, pkcs11.CKR_DEVICE_ERROR, 2) // in the token, then the copy
			err := token.Heartbeat(t.Context())
			if n := copies(t, token); n != 1 {
				t.Errorf("%d copies after the heartbeat, want 1", n)
			}
			return errors.Join(err, errors.New("not given up yet"))
		},
		"its canary failed, and it could not be destroyed": func(t *testing.T, info KEKInfo) error {
			k := openKEK(t, token, info)
			f.Fail(hsmtest.Decrypt, pkcs11.CKR_DEVICE_ERROR, 2)
			f.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, 1)
			if err := token.Heartbeat(t.Context()); err != nil {
				t.Error(err)
			}
			wrap(t, k).opens(t, k)
			return errors.New("not given up yet")
		},
		"the opening failed": func(t *testing.T, info KEKInfo) error {
			f.Fail(hsmtest.EncryptInit, pkcs11.CKR_DEVICE_ERROR, 1) // of the canary
			f.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
			_, err := token.OpenKEK(t.Context(), info)
			return err
		},
		"it was made by a call that failed": func(t *testing.T, info KEKInfo) error {
			f.FailLate(hsmtest.CopyObject, pkcs11.CKR_DEVICE_ERROR, 1)
			_, err := token.OpenKEK(t.Context(), info)
			return err
		},
		"the KEK was destroyed, and the copy could not be": func(t *testing.T, info KEKInfo) error {
			k := openKEK(t, token, info)
			rw(t, token, func(s pkcs11.SessionHandle) error { return token.m.DestroyObject(s, k.object) })
			f.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, 1)
			if err := token.Heartbeat(t.Context()); err != nil {
				t.Error(err)
			}
			return errors.New("not given up yet")
		},
	} {
		t.Run(name, func(t *testing.T) {
			info, err := token.NewKEK(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			if err := leave(t, info); err == nil {
				t.Error("it counts as given up")
			}
			if copies(t, token) == 0 && !strings.Contains(name, "canary") {
				t.Error("no copy was left: nothing is tested")
			}
			f.Heal()
			if err := token.CloseKEK(t.Context(), info); err != nil {
				t.Error(err)
			}
			if n := copies(t, token); n != 0 {
				t.Errorf("%d copies live on", n)
			}
		})
	}
}

// TestAllCopiesGone: so it is with all KEKs at once.
func TestAllCopiesGone(t *testing.T) {
	_, f, token := newFaulty(t)
	k, other := newKEK(t, token, "epoch-1"), newKEK(t, token, "epoch-2")
	s := wrap(t, k)
	f.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, 1)
	wantErr(t, "CloseKEKs", token.CloseKEKs(t.Context()), ErrUnavailable)
	if n := copies(t, token); n != 1 {
		t.Errorf("%d copies, want the one that could not be destroyed", n)
	}
	if err := token.CloseKEKs(t.Context()); err != nil || copies(t, token) != 0 {
		t.Errorf("CloseKEKs: %v, and %d copies", err, copies(t, token))
	}
	for _, k := range []*KEK{k, other} {
		_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
		wantErr(t, "Unwrap under a closed KEK", err, ErrNoKEK)
	}
}

// TestNotSeenIsNotGone: to who is not logged in a token seems to be empty, and one that is
// away may seem so to anybody. Nothing counts as destroyed for that.
func TestNotSeenIsNotGone(t *testing.T) {
	b := newBench(t)
	b.cfg.Grace = time.Hour
	f := newFaults(t, b)
	token := b.open(t)
	k, other := newKEK(t, token, "epoch-1"), newKEK(t, token, "epoch-2")
	info := k.Info()
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	unsure := func(t *testing.T) {
		t.Helper()
		wantErr(t, "DestroyKEK", token.DestroyKEK(t.Context(), info), ErrUnavailable)
		_, err := token.OpenKEK(t.Context(), info)
		wantErr(t, "OpenKEK", err, ErrUnavailable)
		_, err = token.ListKEKs(t.Context())
		wantErr(t, "ListKEKs", err, ErrUnavailable)
		wantErr(t, "Verify", token.Verify(t.Context(), []KEKInfo{info}), ErrUnavailable)
		wantErr(t, "CloseKEK", token.CloseKEK(t.Context(), info), ErrUnavailable)
	}
	heal := func() {
		t.Helper()
		f.Heal()
		if err := token.Heartbeat(t.Context()); err != nil {
			t.Fatal(err)
		}
		if list, err := token.ListKEKs(t.Context()); err != nil || len(list) != 2 {
			t.Errorf("ListKEKs: %v, %v, want two", list, err)
		}
		wrap(t, other).opens(t, other)
	}
	t.Run("logged out", func(t *testing.T) {
		if err := token.m.Logout(token.anchor); err != nil {
			t.Fatal(err)
		}
		unsure(t)
		if _, err := token.DestroyAll(t.Context()); !errors.Is(err, ErrUnavailable) {
			t.Errorf("DestroyAll: %v, want ErrUnavailable", err)
		}
		heal()
	})
	t.Run("away", func(t *testing.T) {
		f.Fail(hsmtest.GetTokenInfo, pkcs11.CKR_TOKEN_NOT_PRESENT, hsmtest.Always)
		if err := token.Heartbeat(t.Context()); err != nil || token.Health().Stage != Grace {
			t.Fatal(err, token.Health())
		}
		unsure(t)
		heal()
	})
	t.Run("back, and not seen to be well yet", func(t *testing.T) {
		f.Fail(hsmtest.GetTokenInfo, pkcs11.CKR_TOKEN_NOT_PRESENT, hsmtest.Always)
		if err := token.Heartbeat(t.Context()); err != nil || token.Health().Stage != Grace {
			t.Fatal(err, token.Health())
		}
		f.Heal()
		wantErr(t, "DestroyKEK", token.DestroyKEK(t.Context(), info), ErrUnavailable)
		heal()
	})
	looks := 0
	away := func() error {
		if looks++; looks == 2 {
			return errors.New("away meanwhile")
		}
		return nil
	}
	wantErr(t, "a look that ends with the token away", sure(away, func() error { return ErrNoKEK }), ErrUnavailable)
	if err := token.DestroyKEK(t.Context(), info); err != nil {
		t.Error(err)
	}
	wantErr(t, "DestroyKEK of one that is gone", token.DestroyKEK(t.Context(), info), ErrNoKEK)
}

// foreign makes a key in the token that is none of ours.
func foreign(t *testing.T, token *Token) {
	t.Helper()
	rw(t, token, func(s pkcs11.SessionHandle) error {
		_, err := token.m.CreateObject(s, append(tokenKeys(), named("somebody else's", nil)[0],
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), pkcs11.NewAttribute(pkcs11.CKA_VALUE, []byte("seven b"))))
		return err
	})
}

// TestForeignKey: a key that cannot be read is listed as such, and keeps nobody from the
// others.
func TestForeignKey(t *testing.T) {
	_, f, token := newFaulty(t)
	foreign(t, token)
	k := newKEK(t, token, "epoch-1")
	for after := range 4 { // two looks at each key
		f.FailAfter(hsmtest.GetAttributeValue, after, pkcs11.CKR_FUNCTION_FAILED, 1)
		list, err := token.ListKEKs(t.Context())
		bad := 0
		for _, one := range list {
			if one.Err != nil {
				bad++
			}
		}
		if err != nil || len(list) != 2 || bad != 1 {
			t.Errorf("ListKEKs: %+v, %v, want two, one of which cannot be read", list, err)
		}
		f.Heal()
	}
	if err := token.Verify(t.Context(), []KEKInfo{k.Info()}); err != nil {
		t.Error(err)
	}
}

// TestDestroyAll: everything that is secret is destroyed, whether or not it can be read.
func TestDestroyAll(t *testing.T) {
	_, f, token := newFaulty(t)
	newKEK(t, token, "epoch-1")
	foreign(t, token)
	if err := token.SetCounter(t.Context(), "run", 7); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{"km1-km2", "km1-km3"} {
		if err := token.SetAuthSecret(t.Context(), link, make([]byte, AuthSecretBytes)); err != nil {
			t.Fatal(err)
		}
	}
	f.Fail(hsmtest.DestroyObject, pkcs11.CKR_DEVICE_ERROR, 1)
	first, err := token.DestroyAll(t.Context())
	if len(first) != 3 || err == nil || !strings.Contains(err.Error(), `"`) {
		t.Errorf("DestroyAll: %q, %v, want three of four, and the name of the other", first, err)
	}
	f.Fail(hsmtest.GetAttributeValue, pkcs11.CKR_FUNCTION_FAILED, hsmtest.Always)
	rest, err := token.DestroyAll(t.Context())
	if len(rest) != 1 || err != nil {
		t.Errorf("DestroyAll of what cannot be read: %q, %v, want one", rest, err)
	}
	f.Heal()
	if !slices.Contains(first, `authentication secret of link "km1-km3"`) {
		t.Errorf("destroyed: %q", first)
	}
	if left, err := token.DestroyAll(t.Context()); len(left) != 0 || err != nil {
		t.Errorf("left: %q, %v", left, err)
	}
	_, err = token.AuthSecret(t.Context(), "km1-km2")
	if !errors.Is(err, ErrNoAuthSecret) {
		t.Errorf("AuthSecret: %v, want ErrNoAuthSecret", err)
	}
	if run, err := token.Counter(t.Context(), "run"); run != 7 || err != nil {
		t.Errorf("counter: %d, %v", run, err)
	}
}
