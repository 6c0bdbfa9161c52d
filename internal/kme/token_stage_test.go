package kme

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/hsm/hsmtest"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

const (
	softHSM    = "/usr/lib/softhsm/libsofthsm2.so"
	tokenLabel = "km1"
)

// module is SoftHSM, which belongs to one test at a time: it is one for the process,
// and finds its folder by the process's environment.
var module sync.Mutex

// tokenDir makes a SoftHSM folder with a token, and has the module to itself until the
// test ends: whatever takes time and needs no token comes before.
func tokenDir(t *testing.T) string {
	t.Helper()
	module.Lock()
	t.Cleanup(module.Unlock)
	dir := t.TempDir()
	useTokens(t, dir)
	err := errors.Join(hsm.InitToken(softHSM, tokenLabel, "so-pin-774410", "pin-483920"),
		os.WriteFile(filepath.Join(dir, "pin"), []byte("pin-483920\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// useTokens points the module, which nobody has open, at a folder.
func useTokens(t *testing.T, dir string) {
	t.Helper()
	conf, err := hsm.WriteSoftHSMConfig(dir)
	if err == nil {
		err = os.Setenv("SOFTHSM2_CONF", conf)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func openToken(t testing.TB, dir string) *hsm.Token {
	t.Helper()
	return openTokenBy(t, softHSM, dir)
}

func openTokenBy(t testing.TB, module, dir string) *hsm.Token {
	t.Helper()
	token, err := hsm.Open(t.Context(), hsm.Config{Module: module, TokenLabel: tokenLabel, PINFile: filepath.Join(dir, "pin")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	return token
}

// faultyToken opens the token in a folder by a module that misbehaves when told. The test
// has the module to itself: see tokenDir.
func faultyToken(t *testing.T, dir string) (*hsm.Token, *hsmtest.Module) {
	t.Helper()
	m, err := hsmtest.New(t.TempDir(), softHSM)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, env := range m.Env {
		name, value, _ := strings.Cut(env, "=")
		if err := os.Setenv(name, value); err != nil { // it is read when the module is loaded
			t.Fatal(err)
		}
	}
	return openTokenBy(t, m.Path, dir), m
}

// withToken is a whole node of km1, without peers, on the site's database and the token
// in a folder. It does not run yet.
func (s *site) withToken(dir string, change ...func(*Config)) *KME {
	s.t.Helper()
	rules, _ := core(s.t)
	c := Config{
		Self: kmeID(s.t, "km1"), Node: "a", Store: s.connect(), Policies: rules.Policies,
		Live: policies.NewCurrent(rules.Policies()), LoadPolicies: func() (*policies.Set, error) { return rules.Policies(), nil },
		Officer: func(*x509.Certificate, time.Time) (identity.Caller, error) {
			return identity.Caller{}, errors.New("there are no officers")
		},
		Log: slog.New(slog.DiscardHandler), Now: s.now, DataDir: s.data,
		EpochLength: time.Hour, DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour, PoolTTL: time.Hour, PoolLimit: 1000,
		Quota: Quota{Rate: 1e6, Burst: 1e6, Untaken: 1e6}, Trail: Trail{TrustDomain: "lab.test"},
	}
	for _, f := range change {
		f(&c)
	}
	if c.Token == nil {
		c.Token = openToken(s.t, dir)
	}
	k, err := New(c)
	if err != nil {
		s.t.Fatal(err)
	}
	return k
}

// beside is another node of the site, on the same token. It does not run yet.
func (s *site) beside(k *KME, node string) *KME {
	s.t.Helper()
	c := k.Config
	c.Node, c.DataDir = node, s.t.TempDir()
	c.Store = s.connectAs(c.Node, c.DataDir)
	other, err := New(c)
	if err != nil {
		s.t.Fatal(err)
	}
	return other
}

// run runs the node until the returned function is called, which waits for its end.
func run(t *testing.T, k *KME) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	started, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- k.Run(ctx, func() { close(started) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the node ended: %v", err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-started:
	case err := <-ended:
		ended <- nil
		t.Fatalf("the node did not start: %v", err)
	}
	return stop
}

// get has alice get keys for anna, who is served here too.
func get(t *testing.T, k *KME, number int, ttl time.Duration) ([]etsi014.Key, error) {
	t.Helper()
	o := order{slaves: names2(t, "anna"), number: number, bits: 256, ttl: ttl}
	got, err := k.initiate(t.Context(), k.callOf(t, "alice", audit.EncKeys), o)
	return got.keys, err
}

// takes has anna take keys of alice.
func takes(t *testing.T, k *KME, ids ...key.ID) ([]taken, error) {
	t.Helper()
	c := k.callOf(t, "anna", audit.DecKeys)
	c.ev.Keys = ids
	keys, err := k.take(t.Context(), c, saeID(t, "alice"), ids, false)
	if err != nil {
		err = c.refuse(t.Context(), err)
	}
	return keys, err
}

// copyInToken copies a KEK to another object of the token, as whoever has the PIN can,
// and returns that one's CKA_ID. It borrows the module that the test's token has loaded.
func copyInToken(t *testing.T, kek hsm.KEKInfo, label string) []byte {
	t.Helper()
	p, s := borrow(t)
	err := p.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, kek.Label), pkcs11.NewAttribute(pkcs11.CKA_ID, kek.ID), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)})
	if err != nil {
		t.Fatal(err)
	}
	found, _, err := p.FindObjects(s, 2)
	if err = errors.Join(err, p.FindObjectsFinal(s)); err != nil || len(found) != 1 {
		t.Fatalf("%d objects of %s: %v", len(found), kek, err)
	}
	id := kek.ID
	if label != kek.Label {
		id = []byte("another id")
	}
	_, err = p.CopyObject(s, found[0], []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// borrow opens a session of the module that the test's token has loaded, which is logged in.
func borrow(t *testing.T) (*pkcs11.Ctx, pkcs11.SessionHandle) {
	t.Helper()
	p := pkcs11.New(softHSM)
	t.Cleanup(p.Destroy)
	slots, err := p.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	return p, s
}

// openAll is what somebody does who has the token in a folder, its PIN and blobs: every
// object of the token is tried on every blob. It returns what could be opened, and how
// many objects there are. Nobody has the module open.
func openAll(t *testing.T, dir string, blobs []blob) (opened [][]byte, objects int) {
	t.Helper()
	useTokens(t, dir)
	pin, err := os.ReadFile(filepath.Join(dir, "pin"))
	if err != nil {
		t.Fatal(err)
	}
	p := pkcs11.New(softHSM)
	defer p.Destroy()
	if err := p.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Finalize(); err != nil {
			t.Error(err)
		}
	}()
	slots, err := p.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err == nil {
		err = p.Login(s, pkcs11.CKU_USER, strings.TrimSpace(string(pin)))
	}
	if err == nil {
		err = p.FindObjectsInit(s, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	found, _, err := p.FindObjects(s, 1000)
	if err = errors.Join(err, p.FindObjectsFinal(s)); err != nil {
		t.Fatal(err)
	}
	for _, o := range found {
		for _, b := range blobs {
			params := pkcs11.NewGCMParams(b.iv, b.aad(t), 128)
			err := p.DecryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, o)
			if err == nil {
				var plain []byte
				if plain, err = p.Decrypt(s, b.ct); err == nil {
					opened = append(opened, plain)
				}
			}
			params.Free()
		}
	}
	return opened, len(found)
}

// eventually waits for what must come.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !is() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

// states are those of the epochs that are not dropped.
func states(t *testing.T, k *KME) map[key.Epoch]store.EpochState {
	t.Helper()
	epochs, err := k.Store.Epochs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[key.Epoch]store.EpochState)
	for _, e := range epochs {
		all[e.Epoch] = e.State
	}
	return all
}
