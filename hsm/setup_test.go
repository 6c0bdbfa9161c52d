//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"
)

const (
	testLabel = "kme-test"
	testPIN   = "pin-483920"
	testSOPIN = "so-pin-774410"
)

func TestMain(m *testing.M) {
	refusalRounds = 1000
	if what := os.Getenv(asKeeper); what != "" {
		if err := keeper(what); err != nil {
			log.Fatal(err)
		}
		return
	}
	os.Exit(m.Run())
}

// bench is a SoftHSM directory with one token and what is needed to open it. The
// module belongs to the process, so tests run one after another, each with a
// directory of its own.
type bench struct {
	cfg  Config
	dir  string       // tokens live in dir/tokens
	logs bytes.Buffer // read it only while nothing else uses the token
}

// softHSM is where distributions put the module.
func softHSM(tb testing.TB) string {
	tb.Helper()
	for _, path := range []string{
		"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib64/libsofthsm2.so",
		"/usr/local/lib/softhsm/libsofthsm2.so", "/opt/homebrew/lib/softhsm/libsofthsm2.so",
	} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	tb.Fatal("SoftHSM is not installed: apt-get install softhsm2")
	return ""
}

func newBench(tb testing.TB) *bench {
	tb.Helper()
	dir, err := os.MkdirTemp("", "hsm-test-") // the test's own folder may have a = in its name
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	b := &bench{dir: dir}
	b.use(tb)
	b.cfg = Config{
		Module: softHSM(tb), TokenLabel: testLabel, PINFile: filepath.Join(b.dir, "pin"),
		Log: slog.New(slog.NewTextHandler(&b.logs, nil)),
	}
	if err := InitToken(b.cfg.Module, testLabel, testSOPIN, testPIN); err != nil {
		tb.Fatal(err)
	}
	b.writePIN(tb, testPIN+"\n", 0o600)
	return b
}

// use points SoftHSM at the directory of b.
func (b *bench) use(tb testing.TB) {
	tb.Helper()
	conf, err := WriteSoftHSMConfig(b.dir)
	if err != nil {
		tb.Fatal(err)
	}
	old, was := os.LookupEnv("SOFTHSM2_CONF")
	os.Setenv("SOFTHSM2_CONF", conf)
	tb.Cleanup(func() {
		if was {
			os.Setenv("SOFTHSM2_CONF", old)
		} else {
			os.Unsetenv("SOFTHSM2_CONF")
		}
	})
}

func (b *bench) writePIN(tb testing.TB, pin string, mode os.FileMode) {
	tb.Helper()
	_ = os.Remove(b.cfg.PINFile)
	if err := errors.Join(os.WriteFile(b.cfg.PINFile, []byte(pin), 0o600), os.Chmod(b.cfg.PINFile, mode)); err != nil {
		tb.Fatal(err)
	}
}

func (b *bench) open(tb testing.TB) *Token {
	tb.Helper()
	token, err := Open(tb.Context(), b.cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := token.Close(); err != nil {
			tb.Errorf("Close: %v", err)
		}
		if bytes.Contains(b.logs.Bytes(), []byte(testPIN)) {
			tb.Errorf("the PIN is in the log:\n%s", b.logs.String())
		}
	})
	return token
}

func newToken(tb testing.TB) (*bench, *Token) {
	tb.Helper()
	b := newBench(tb)
	return b, b.open(tb)
}

func newKEK(tb testing.TB, token *Token, label string) *KEK {
	tb.Helper()
	info, err := token.NewKEK(tb.Context(), label)
	if err != nil {
		tb.Fatal(err)
	}
	return openKEK(tb, token, info)
}

func openKEK(tb testing.TB, token *Token, info KEKInfo) *KEK {
	tb.Helper()
	k, err := token.OpenKEK(tb.Context(), info)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// sealed is a blob and all that opens it.
type sealed struct {
	iv             [IVBytes]byte
	ct, aad, plain []byte
}

func wrap(tb testing.TB, k *KEK) sealed {
	tb.Helper()
	s := sealed{plain: []byte("a quantum key of thirty-two byte"), aad: []byte("km1|kek 7|link|session 3|block 9")}
	var err error
	if s.iv, s.ct, err = k.Wrap(tb.Context(), s.plain, s.aad); err != nil {
		tb.Fatal(err)
	}
	return s
}

// opens fails the test unless k opens s.
func (s sealed) opens(tb testing.TB, k *KEK) {
	tb.Helper()
	plain, err := k.Unwrap(tb.Context(), s.iv, s.ct, s.aad)
	if err != nil || !bytes.Equal(plain, s.plain) {
		tb.Fatalf("Unwrap: got %q, %v, want %q", plain, err, s.plain)
	}
}

// rw runs f on a read-write session beside the Token's own, as another process
// with the PIN could.
func rw(tb testing.TB, token *Token, f func(s pkcs11.SessionHandle) error) {
	tb.Helper()
	s, err := token.m.OpenSession(token.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err == nil {
		err = errors.Join(f(s), token.m.CloseSession(s))
	}
	if err != nil {
		tb.Fatal(err)
	}
}
