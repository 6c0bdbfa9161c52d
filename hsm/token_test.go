//go:build cgo

package hsm

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
)

func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, b *bench)
		want  string
	}{
		"PIN file that group may read":   {func(t *testing.T, b *bench) { b.writePIN(t, testPIN, 0o640) }, "only its owner"},
		"PIN file that others may write": {func(t *testing.T, b *bench) { b.writePIN(t, testPIN, 0o602) }, "only its owner"},
		"PIN file that is a directory": {func(t *testing.T, b *bench) {
			b.cfg.PINFile = filepath.Join(b.dir, "tokens") // of mode 0700
		}, "only its owner"},
		"no PIN file":               {func(_ *testing.T, b *bench) { b.cfg.PINFile += "x" }, "no such file"},
		"empty PIN file":            {func(t *testing.T, b *bench) { b.writePIN(t, "\n", 0o400) }, "must hold one line"},
		"two lines in the PIN file": {func(t *testing.T, b *bench) { b.writePIN(t, "a\nb\n", 0o400) }, "must hold one line"},
		"endless PIN file":          {func(t *testing.T, b *bench) { b.writePIN(t, strings.Repeat("1", 300), 0o400) }, "has more than 256 bytes"},
		"wrong PIN":                 {func(t *testing.T, b *bench) { b.writePIN(t, "9999", 0o400) }, "C_Login: pkcs11: 0xA0: CKR_PIN_INCORRECT"},
		"no token of that label":    {func(_ *testing.T, b *bench) { b.cfg.TokenLabel = "other" }, `0 tokens have the label "other"`},
		"no label":                  {func(_ *testing.T, b *bench) { b.cfg.TokenLabel = "" }, "not a configuration"},
		"module by bare name":       {func(_ *testing.T, b *bench) { b.cfg.Module = "libsofthsm2.so" }, "not an absolute path"},
		"no such module":            {func(_ *testing.T, b *bench) { b.cfg.Module = filepath.Join(b.dir, "no.so") }, "cannot be loaded"},
		"not a module":              {func(_ *testing.T, b *bench) { b.cfg.Module = b.cfg.PINFile }, "cannot be loaded"},
		"no token directory": {func(t *testing.T, b *bench) {
			if err := os.RemoveAll(filepath.Join(b.dir, "tokens")); err != nil {
				t.Fatal(err)
			}
		}, "SOFTHSM2_CONF"},
		"two tokens of that label": {func(t *testing.T, b *bench) {
			if err := InitToken(b.cfg.Module, "twin", testSOPIN, testPIN); err != nil {
				t.Fatal(err)
			}
			relabel(t, b, "twin", testLabel)
		}, `2 tokens have the label`},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			c.spoil(t, b)
			token, err := Open(t.Context(), b.cfg)
			if err == nil {
				token.Close()
				t.Fatal("Open succeeded")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
}

// relabel initialises a token anew under another label, as InitToken never would.
func relabel(t *testing.T, b *bench, from, to string) {
	t.Helper()
	m, err := load(b.cfg.Module, "")
	if err != nil {
		t.Fatal(err)
	}
	defer m.unload()
	if err := m.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer m.Finalize()
	slots, err := m.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		if ti, err := m.GetTokenInfo(slot); err == nil && strings.TrimSpace(ti.Label) == from {
			if err := m.Ctx.InitToken(slot, testSOPIN, to); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestOneOwner(t *testing.T) {
	b, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	if _, err := Open(t.Context(), b.cfg); err == nil || !strings.Contains(err.Error(), "another owner in this process") {
		t.Errorf("second Open: got %v, want it to name the other owner", err)
	}
	if err := InitToken(b.cfg.Module, "another", testSOPIN, testPIN); err == nil {
		t.Error("InitToken succeeded beside an open Token")
	}
	wrap(t, k).opens(t, k)
}

func TestInitTokenRefusesLabels(t *testing.T) {
	b := newBench(t)
	for _, label := range []string{testLabel, "", " blank", strings.Repeat("x", 33)} {
		if err := InitToken(b.cfg.Module, label, testSOPIN, testPIN); err == nil {
			t.Errorf("InitToken(%q) succeeded", label)
		}
	}
}

func TestWriteSoftHSMConfigRefusesItsGrammar(t *testing.T) {
	for _, name := range []string{"site#1", "site=1"} {
		if conf, err := WriteSoftHSMConfig(filepath.Join(t.TempDir(), name)); err == nil {
			t.Errorf("got %s: SoftHSM would use another directory", conf)
		}
	}
}

func TestInfo(t *testing.T) {
	_, token := newToken(t)
	if i := token.Info(); !i.Software || i.Serial == "" || i.Manufacturer != "SoftHSM project" {
		t.Errorf("Info: got %+v, want SoftHSM known as software", i)
	}
}

func TestRandom(t *testing.T) {
	_, token := newToken(t)
	a, b := make([]byte, 33), make([]byte, 33)
	for _, buf := range [][]byte{a, b} {
		if err := token.Random(t.Context(), buf); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(a, b) || bytes.Equal(a, make([]byte, 33)) {
		t.Errorf("Random: got %x then %x", a, b)
	}
}

func TestClosedTokenIsUnavailable(t *testing.T) {
	_, token := newToken(t)
	k := newKEK(t, token, "epoch-1")
	s := wrap(t, k)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := k.Unwrap(t.Context(), s.iv, s.ct, s.aad)
	wantErr(t, "Unwrap", err, ErrUnavailable)
	wantErr(t, "Heartbeat", token.Heartbeat(t.Context()), ErrUnavailable)
	if err := k.Close(); err != nil {
		t.Errorf("KEK.Close after Token.Close: %v", err)
	}
}

func TestCounter(t *testing.T) {
	b := newBench(t)
	token := b.open(t)
	want := func(name string, v int64) {
		t.Helper()
		if got, err := token.Counter(t.Context(), name); err != nil || got != v {
			t.Errorf("Counter(%s): got %d, %v, want %d", name, got, err, v)
		}
	}
	set := func(name string, v int64) {
		t.Helper()
		if err := token.SetCounter(t.Context(), name, v); err != nil {
			t.Error(err)
		}
	}
	want("run km1-a", 0)
	set("run km1-a", 7)
	set("run km1-b", 1<<40)
	set("run km1-a", 8)
	set("run km1-a", 8)
	want("run km1-a", 8)
	for _, v := range []int64{7, -1} {
		if err := token.SetCounter(t.Context(), "run km1-a", v); err == nil {
			t.Errorf("the counter went back to %d", v)
		}
	}
	// A crash between writing the new value and destroying the old one.
	rw(t, token, func(s pkcs11.SessionHandle) error {
		_, err := token.m.CreateObject(s, append(counter("run km1-a"), pkcs11.NewAttribute(pkcs11.CKA_VALUE, []byte{0, 0, 0, 0, 0, 0, 0, 3})))
		return err
	})
	want("run km1-a", 8)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = b.open(t)
	want("run km1-a", 8)
	want("run km1-b", 1<<40)
	set("run km1-a", 9)
	want("run km1-a", 9)
	rw(t, token, func(s pkcs11.SessionHandle) error {
		counts, err := token.m.counts(s, "run km1-a")
		if len(counts) != 1 {
			t.Errorf("%d objects remain for the counter, want 1", len(counts))
		}
		return err
	})
}
