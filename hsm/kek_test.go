//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/pkcs11"
	"pgregory.net/rapid"
)

func wantErr(t *testing.T, call string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", call, err, want)
	}
	for _, other := range []error{ErrTampered, ErrUnavailable, ErrNoKEK} {
		if other != want && errors.Is(err, other) {
			t.Errorf("%s: %v is also %v", call, err, other)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	other := newKEK(t, token, "epoch-2")
	bytesOf := func(rt *rapid.T, name string, least, most int) []byte {
		return rapid.SliceOfN(rapid.Byte(), least, most).Draw(rt, name)
	}
	rapid.Check(t, func(rt *rapid.T) {
		plain, aad := bytesOf(rt, "plain", 1, 600), bytesOf(rt, "aad", 0, 300)
		iv, ct, err := k.Wrap(t.Context(), plain, aad)
		if err != nil || len(ct) != len(plain)+TagBytes {
			rt.Fatalf("Wrap: got %d bytes, %v", len(ct), err)
		}
		got, err := k.Unwrap(t.Context(), iv, ct, aad)
		if err != nil || !bytes.Equal(got, plain) {
			rt.Fatalf("Unwrap: got %x, %v, want %x", got, err, plain)
		}

		// Whatever is changed, the blob is refused as tampered with.
		iv2, ct2, aad2, under := iv, bytes.Clone(ct), bytes.Clone(aad), k
		bit := byte(1) << rapid.IntRange(0, 7).Draw(rt, "bit")
		switch rapid.SampledFrom([]string{"iv", "ct", "aad", "cut", "grown", "key"}).Draw(rt, "change") {
		case "iv":
			iv2[rapid.IntRange(0, IVBytes-1).Draw(rt, "at")] ^= bit
		case "ct":
			ct2[rapid.IntRange(0, len(ct)-1).Draw(rt, "at")] ^= bit
		case "aad":
			aad2 = append(aad2, bit)
			aad2[rapid.IntRange(0, len(aad2)-1).Draw(rt, "at")] ^= bit << 1
		case "cut":
			ct2 = ct2[:rapid.IntRange(0, len(ct)-1).Draw(rt, "at")]
		case "grown":
			ct2 = append(ct2, bytesOf(rt, "tail", 1, 40)...)
		case "key":
			under = other
		}
		if got, err := under.Unwrap(t.Context(), iv2, ct2, aad2); !errors.Is(err, ErrTampered) || errors.Is(err, ErrUnavailable) || got != nil {
			rt.Fatalf("Unwrap of a changed blob: got %x, %v, want ErrTampered", got, err)
		}
	})
	if err := token.Heartbeat(t.Context()); err != nil {
		t.Errorf("Heartbeat after refusals: %v", err)
	}
}

// TestAllOrNone: several at once are opened as one by one, and none if one was changed.
func TestAllOrNone(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	rapid.Check(t, func(rt *rapid.T) {
		plains := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 1, 64), 0, 2*turnItems+3).Draw(rt, "plains")
		aads := make([][]byte, len(plains))
		for i := range aads {
			aads[i] = []byte{byte(i)}
		}
		before, counted := k.Wraps(), token.count.wraps.done.Load()
		sealed, err := k.WrapAll(t.Context(), plains, aads)
		if err != nil || len(sealed) != len(plains) {
			rt.Fatalf("WrapAll: %d of %d, %v", len(sealed), len(plains), err)
		}
		if n := k.Wraps() - before; n != int64(len(plains)) || token.count.wraps.done.Load()-counted != n {
			rt.Errorf("%d wraps are counted of %d", n, len(plains))
		}
		got, err := k.UnwrapAll(t.Context(), sealed)
		if err != nil || !slices.EqualFunc(got, plains, bytes.Equal) {
			rt.Fatalf("UnwrapAll: %x, %v, want %x", got, err, plains)
		}
		if len(sealed) == 0 {
			return
		}
		at := rapid.IntRange(0, len(sealed)-1).Draw(rt, "changed")
		sealed[at].CT[0] ^= 1
		if got, err := k.UnwrapAll(t.Context(), sealed); !errors.Is(err, ErrTampered) || got != nil {
			rt.Fatalf("UnwrapAll of a changed blob among others: %x, %v, want ErrTampered", got, err)
		}
	})
}

func TestWrapsAreCountedAndDiffer(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	before := k.Wraps()
	a, b := wrap(t, k), wrap(t, k)
	if a.iv == b.iv || bytes.Equal(a.ct, b.ct) {
		t.Error("two wraps of one key are alike")
	}
	if got := k.Wraps() - before; got != 2 {
		t.Errorf("Wraps: got %d more, want 2", got)
	}
	if _, _, err := k.Wrap(t.Context(), nil, []byte("aad")); err == nil {
		t.Error("Wrap of nothing succeeded")
	}
}

func TestKEKLife(t *testing.T) {
	b := newBench(t)
	token := b.open(t)
	info, err := token.NewKEK(t.Context(), "epoch-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := token.NewKEK(t.Context(), "epoch-1"); err == nil || !strings.Contains(err.Error(), "label exists") {
		t.Errorf("NewKEK of a label in use: got %v", err)
	}
	info2, err := token.NewKEK(t.Context(), "epoch-2")
	if err != nil {
		t.Fatal(err)
	}
	list, err := token.ListKEKs(t.Context())
	if diff := cmp.Diff([]KeyStatus{{KEKInfo: info}, {KEKInfo: info2}}, list); diff != "" || err != nil {
		t.Errorf("ListKEKs: %v\n%s", err, diff)
	}
	s := wrap(t, openKEK(t, token, info))
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}

	token = b.open(t)
	k := openKEK(t, token, info)
	s.opens(t, k)
	if err := token.DestroyKEK(t.Context(), info); err == nil || !strings.Contains(err.Error(), "it is open") {
		t.Errorf("DestroyKEK of an open KEK: got %v", err)
	}
	wrong := info
	wrong.CheckValue[0] ^= 1
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap under a closed KEK", err, ErrNoKEK)
	if err := token.DestroyKEK(t.Context(), wrong); err == nil {
		t.Error("DestroyKEK took a KEK of another check value")
	}
	if err := token.DestroyKEK(t.Context(), info); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "second DestroyKEK", token.DestroyKEK(t.Context(), info), ErrNoKEK)
	_, err = token.OpenKEK(t.Context(), info)
	wantErr(t, "OpenKEK of a destroyed KEK", err, ErrNoKEK)
	list, err = token.ListKEKs(t.Context())
	if diff := cmp.Diff([]KeyStatus{{KEKInfo: info2}}, list); diff != "" || err != nil {
		t.Errorf("ListKEKs afterwards: %v\n%s", err, diff)
	}
	rw(t, token, func(s pkcs11.SessionHandle) error {
		copies, err := token.m.find(s, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, info.Label),
		})
		if len(copies) != 0 {
			t.Errorf("%d copies of the destroyed KEK are left", len(copies))
		}
		return err
	})
}

func TestOpenKEKRefuses(t *testing.T) {
	_, token := newToken(t)
	good, err := token.NewKEK(t.Context(), "epoch-1")
	if err != nil {
		t.Fatal(err)
	}
	// generate makes a key as NewKEK does, but for one attribute.
	generate := func(label string, id []byte, change ...*pkcs11.Attribute) KEKInfo {
		template := slices.Concat(token.m.pinned(true), named(label, id))
		for _, c := range change {
			template = slices.DeleteFunc(template, func(a *pkcs11.Attribute) bool { return a.Type == c.Type })
		}
		var info KEKInfo
		rw(t, token, func(s pkcs11.SessionHandle) error {
			o, err := token.m.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, append(template, change...))
			if err == nil {
				info, err = token.m.identify(s, o)
			}
			return err
		})
		return info
	}
	for name, c := range map[string]struct {
		info KEKInfo
		want string
	}{
		"another check value": {KEKInfo{good.Label, good.ID, [3]byte{1, 2, 3}}, "it is another key"},
		"another ID":          {KEKInfo{good.Label, []byte("0123456789abcdef"), good.CheckValue}, ErrNoKEK.Error()},
		"another label":       {KEKInfo{"epoch-9", good.ID, good.CheckValue}, ErrNoKEK.Error()},
		"extractable":         {generate("out", []byte("1"), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)), "attribute 0x162 of the key is 01"},
		"not sensitive":       {generate("plain", []byte("2"), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false)), "attribute 0x103"},
		"may wrap":            {generate("wraps", []byte("3"), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true)), "attribute 0x106"},
		"of 128 bits":         {generate("short", []byte("4"), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 16)), "attribute 0x161"},
		"any mechanism":       {generate("any", []byte("5"), pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, slices.Concat(ulong(pkcs11.CKM_AES_GCM), ulong(pkcs11.CKM_AES_ECB)))), "attribute 0x40000600"},
		"two of one label and ID": {func() KEKInfo {
			generate("twin", []byte("6"))
			return generate("twin", []byte("6"))
		}(), "2 keys have this label and ID"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := token.OpenKEK(t.Context(), c.info); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
	k := openKEK(t, token, good)
	wrap(t, k).opens(t, k)
}

func TestKEKDoesOnlyGCM(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	rw(t, token, func(s pkcs11.SessionHandle) error {
		for _, o := range []pkcs11.ObjectHandle{k.object, k.copy} {
			ecb := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil)}
			if err := token.m.EncryptInit(s, ecb, o); !isRV(err, pkcs11.CKR_MECHANISM_INVALID) {
				t.Errorf("ECB: got %v, want CKR_MECHANISM_INVALID", err)
			}
			value := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}
			if _, err := token.m.GetAttributeValue(s, o, value); !isRV(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE) {
				t.Errorf("reading the key: got %v, want CKR_ATTRIBUTE_SENSITIVE", err)
			}
		}
		return nil
	})
}

// TestManyAtOnce has more callers than sessions wrap and unwrap under KEKs that are
// made, opened and closed meanwhile, with a heart that beats.
func TestManyAtOnce(t *testing.T) {
	_, token := newToken(t)
	shared := newKEK(t, token, "shared")
	ctx, stop := context.WithCancel(t.Context())
	var heart, callers sync.WaitGroup
	heart.Go(func() {
		for ctx.Err() == nil {
			if err := token.Heartbeat(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for i := range 12 {
		callers.Go(func() {
			k := shared
			if i%4 == 0 {
				info, err := token.NewKEK(t.Context(), string(rune('a'+i)))
				if err != nil {
					t.Error(err)
					return
				}
				if k, err = token.OpenKEK(t.Context(), info); err != nil {
					t.Error(err)
					return
				}
				defer func() {
					if err := errors.Join(k.Close(), token.DestroyKEK(t.Context(), info)); err != nil {
						t.Error(err)
					}
				}()
			}
			plain, aad := bytes.Repeat([]byte{byte(i)}, 32), []byte{byte(i), 1}
			for range 200 {
				iv, ct, err := k.Wrap(t.Context(), plain, aad)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := k.Unwrap(t.Context(), iv, ct, aad); err != nil || !bytes.Equal(got, plain) {
					t.Errorf("Unwrap: got %x, %v", got, err)
					return
				}
			}
		})
	}
	callers.Wait()
	stop()
	heart.Wait()
	if n := len(token.idle); n > defaultConcurrent {
		t.Errorf("%d sessions are kept, want at most %d", n, defaultConcurrent)
	}
	if list, err := token.ListKEKs(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("ListKEKs: got %v, %v, want the shared one", list, err)
	}
}
