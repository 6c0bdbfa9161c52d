package authority_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"go.step.sm/crypto/keyutil"
	"go.step.sm/crypto/x509util"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/identity"
	ours "github.com/qutemail/kme/pki/authority"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// TestKeysInTokens: every signing key is in a token of its own, can do nothing but sign,
// and cannot leave. What Render writes issues certificates with it, without the root's.
func TestKeysInTokens(t *testing.T) {
	conf, err := hsm.WriteSoftHSMConfig(filepath.Join(t.TempDir(), "hsm"))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	dir := filepath.Join(t.TempDir(), "ca")
	err = ours.Init(ours.InitConfig{
		Dir: dir, TrustDomain: "lab.test", Addresses: map[identity.Role]ours.Address{
			"sae": {HTTPS: "127.0.0.1:9441"}, "kme": {HTTPS: "127.0.0.1:9442"}, "operator": {HTTPS: "127.0.0.1:9443"},
		},
		Token: func(owner, dir string) (ours.HSMToken, error) {
			if err := os.WriteFile(filepath.Join(dir, "pin"), []byte("pin-"+owner+"\n"), 0o600); err != nil {
				return ours.HSMToken{}, err
			}
			return ours.HSMToken{Module: softHSM, Label: owner, PINFile: "pin"}, hsm.InitToken(softHSM, owner, "so-pin-774410", "pin-"+owner)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, owner := range []string{"root", "sae", "kme", "operator"} {
		session, err := crypto11.Configure(&crypto11.Config{Path: softHSM, TokenLabel: owner, Pin: "pin-" + owner})
		if err != nil {
			t.Fatal(err)
		}
		keys, err := session.FindAllKeyPairs()
		if err != nil || len(keys) != 1 {
			t.Fatalf("%s: %d keys, %v", owner, len(keys), err)
		}
		for attribute, want := range map[crypto11.AttributeType]byte{
			crypto11.CkaSensitive: 1, crypto11.CkaAlwaysSensitive: 1, crypto11.CkaNeverExtractable: 1, crypto11.CkaExtractable: 0,
			crypto11.CkaLocal: 1, crypto11.CkaSign: 1, crypto11.CkaDecrypt: 0, crypto11.CkaUnwrap: 0, crypto11.CkaDerive: 0, crypto11.CkaModifiable: 0,
		} {
			got, err := session.GetAttribute(keys[0], attribute)
			if err != nil || len(got.Value) != 1 || got.Value[0] != want {
				t.Errorf("%s: attribute %#x is %v, %v; want %d", owner, attribute, got, err, want)
			}
		}
		if err := session.Close(); err != nil {
			t.Error(err)
		}
		for _, file := range []string{"key.pem", "intermediate.key"} {
			if _, err := os.Stat(filepath.Join(dir, owner, file)); err == nil {
				t.Errorf("%s: its key is in %s, too", owner, file)
			}
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, "root")); err != nil {
		t.Fatal(err)
	}
	stock(t, dir)
}

// stock issues alice's certificate as the stock step-ca would with what Render wrote.
func stock(t *testing.T, dir string) {
	text, err := ours.Render(dir, identity.RoleSAE)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "encryptedKey") || !json.Valid(text) {
		t.Errorf("rendered:\n%s", text)
	}
	file := filepath.Join(t.TempDir(), "ca.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.LoadConfiguration(file)
	if err != nil {
		t.Fatal(err)
	}
	a, err := authority.New(cfg, authority.WithQuietInit())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Shutdown(); err != nil {
			t.Error(err)
		}
	}()
	token, err := ours.Token(dir, identity.RoleSAE, "alice", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	options, err := a.Authorize(provisioner.NewContextWithMethod(t.Context(), provisioner.SignMethod), token)
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyutil.GenerateSigner("EC", "P-256", 0)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509util.CreateCertificateRequest("alice", nil, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.SignWithContext(t.Context(), csr, provisioner.SignOptions{}, options...)
	if err != nil {
		t.Fatal(err)
	}
	if leaf := chain[0]; len(leaf.URIs) != 1 || leaf.URIs[0].String() != "qkd://sae.lab.test/alice" || len(leaf.DNSNames) != 0 || len(leaf.CRLDistributionPoints) != 1 {
		t.Errorf("issued %v %v %v", leaf.URIs, leaf.DNSNames, leaf.CRLDistributionPoints)
	}
}
