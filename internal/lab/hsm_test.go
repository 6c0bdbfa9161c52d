package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm/hsmtest"
)

// What a KME under load does about an HSM whose library misbehaves: who asks is told
// 503 and nothing else, operators are told what it is, nothing is handed out twice or
// lost, and service is back without a restart. A library between kmed and SoftHSM makes
// the trouble; kmed knows nothing of it. Package hsm has a test for each row of this and
// more; here one lab goes through those that callers notice.
func TestHSMMisbehaves(t *testing.T) {
	t.Parallel()
	module, err := hsmtest.New(t.TempDir(), softHSM)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := module.Close(); err != nil {
			t.Error(err)
		}
	})
	l := start(t, func(c *Config) {
		c.Filler, c.Interval, c.PoolLimit = 512, 200*time.Millisecond, 8192
		c.Module = map[string]string{"km1": module.Path}
		c.Settings = map[string]string{"km1": "max_wraps: 300\n"} // so that a KEK has to be made now and then
		c.Env = map[string][]string{"km1": module.Env}
	})
	keysStored(t, l, 1000)
	f := begin(t, l)
	f.flows(t)
	run := node(t, l.KM1).Run
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")

	for _, c := range []struct {
		name  string
		begin func()
		alarm string // at KM1; "" if the trouble is too small for one
		ends  bool   // by itself
	}{
		{"token full", func() { module.Fail(hsmtest.GenerateKey, pkcs11.CKR_FUNCTION_FAILED, hsmtest.Always) }, "keks", false},
		{"slow", func() { module.Slow(hsmtest.Decrypt, 60*time.Millisecond) }, "hsm-slow", false},
		{"device error", func() {
			for _, at := range []hsmtest.Function{hsmtest.EncryptInit, hsmtest.DecryptInit, hsmtest.GetTokenInfo, hsmtest.OpenSession, hsmtest.Initialize} {
				module.Fail(at, pkcs11.CKR_DEVICE_ERROR, hsmtest.Always)
			}
		}, "hsm", false},
		{"good blobs refused", func() { module.Fail(hsmtest.Decrypt, pkcs11.CKR_GENERAL_ERROR, hsmtest.Always) }, "hsm", false},
		{"library that does not return", func() { module.Hold(hsmtest.Decrypt, true) }, "hsm", false},
		{"sessions lost, and few to be had", func() {
			module.Fail(hsmtest.EncryptInit, pkcs11.CKR_SESSION_HANDLE_INVALID, 5)
			module.Fail(hsmtest.DecryptInit, pkcs11.CKR_SESSION_HANDLE_INVALID, 5)
			module.MaxSessions(3)
		}, "", true},
	} {
		c.begin()
		if c.alarm != "" {
			untilAlarm(t, l.KM1, c.alarm, true)
		}
		if c.alarm == "keks" {
			f.flows(t) // under the KEKs that there are
		}
		if c.alarm == "hsm" {
			f.pause(t, func() {
				before := stored(t, alice, bob)
				for range 3 {
					began := time.Now()
					wantAway(t, c.name, enc(t.Context(), alice, bob))
					if took := time.Since(began); took > noticed {
						t.Errorf("%s: a refusal took %v, want at most %v", c.name, took, noticed)
					}
				}
				if n := stored(t, alice, bob); n < before {
					t.Errorf("%s: %d keys are stored, and %d were: the refusals have consumed some", c.name, n, before)
				}
			})
		}
		if !c.ends {
			module.Heal()
		}
		f.flows(t)
		if c.alarm != "" {
			untilAlarm(t, l.KM1, c.alarm, false)
		}
		module.Heal()
	}
	if now := node(t, l.KM1).Run; now != run {
		t.Errorf("KM1 is in run %d and was in run %d: somebody has restarted it", now, run)
	}

	// A refused PIN ends the node, and is not tried again, though it be the right one,
	// before somebody says so.
	module.Fail(hsmtest.GetSessionInfo, pkcs11.CKR_SESSION_HANDLE_INVALID, 3) // what a restarted HSM says: log in
	module.Fail(hsmtest.Login, pkcs11.CKR_PIN_INCORRECT, hsmtest.Always)
	<-l.KM1.Exited()
	wantExit(t, l.KM1, 78)
	logins := module.Calls(hsmtest.Login)
	if err := l.KM1.Restart(t.Context(), module.Env...); err == nil {
		t.Error("KM1 started with a PIN that was refused")
	}
	wantExit(t, l.KM1, 78)
	module.Heal()
	if err := l.KM1.Restart(t.Context(), module.Env...); err == nil {
		t.Error("KM1 tried a PIN that was refused before")
	}
	if n := module.Calls(hsmtest.Login); n != logins {
		t.Errorf("%d more logins with a PIN that was refused", n-logins)
	}
	cmd := exec.Command(l.Bin+"/kmed", "hsm", "selftest", "--retry-pin", "--config", l.KM1.Node.path("kmed.yaml"))
	cmd.Env = append(append(os.Environ(), "SOFTHSM2_CONF="+l.KM1.site.path("hsm", "softhsm2.conf")), module.Env...)
	if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "FAILED") {
		t.Fatalf("kmed hsm selftest --retry-pin: %v\n%s", err, out)
	}
	if err := l.KM1.Restart(t.Context(), module.Env...); err != nil {
		t.Fatal(err)
	}
	f.flows(t)

	// The file of a key is cut, which SoftHSM does not see while it is in use: the next start
	// does, and there is none before the key is what it was.
	if err := l.KM1.Stop(); err != nil {
		t.Fatal(err)
	}
	whole := t.TempDir()
	if err := os.CopyFS(whole, os.DirFS(l.KM1.TokenDir())); err != nil {
		t.Fatal(err)
	}
	objects, err := filepath.Glob(filepath.Join(l.KM1.TokenDir(), "*", "*.object"))
	if err != nil || len(objects) < 2 {
		t.Fatalf("objects of the token: %v, %v", objects, err)
	}
	for _, object := range objects {
		if st, err := os.Stat(object); err != nil {
			t.Fatal(err)
		} else if filepath.Base(object) == "token.object" {
			continue
		} else if err := os.Truncate(object, st.Size()/2); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.KM1.Restart(t.Context(), module.Env...); err == nil {
		t.Error("KM1 started with keys that were cut")
	}
	if err := errors.Join(os.RemoveAll(l.KM1.TokenDir()), os.CopyFS(l.KM1.TokenDir(), os.DirFS(whole))); err != nil {
		t.Fatal(err)
	}
	if err := l.KM1.Restart(t.Context(), module.Env...); err != nil {
		t.Fatal(err)
	}
	f.flows(t)
	f.close(t)
}

// wantExit fails the test unless the site's node has ended with that status.
func wantExit(t *testing.T, s *Site, status int) {
	t.Helper()
	<-s.Exited()
	exit, ok := errors.AsType[*exec.ExitError](s.kmed.err)
	if !ok || exit.ExitCode() != status {
		t.Errorf("%s ended with %v, want exit status %d:\n%s", s.Name, s.kmed.err, status, fmt.Sprint(s.kmed.lastWords()))
	}
}
