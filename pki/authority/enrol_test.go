package authority_test

import (
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/pki/authority"
)

func TestEnrolEachRole(t *testing.T) {
	s := newSite(t)
	clientOnly := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, tt := range []struct {
		role   identity.Role
		id     string
		usages []x509.ExtKeyUsage
		hosts  string
	}{
		{identity.RoleSAE, "alice@qutemail.example", clientOnly, "[] []"},
		{identity.RoleKME, "km1", both, "[localhost] [127.0.0.1]"},
		{identity.RoleOperator, "op-1", clientOnly, "[] []"},
	} {
		t.Run(string(tt.role), func(t *testing.T) {
			s.serve(t, tt.role)
			dir := s.enrol(t, tt.role, tt.id)
			leaf := leafIn(t, dir)

			wantURI := fmt.Sprintf("[qkd://%s.lab.test/%s]", tt.role, tt.id)
			if got := fmt.Sprint(leaf.URIs); got != wantURI {
				t.Errorf("URIs: got %s, want %s", got, wantURI)
			}
			wantSubject := fmt.Sprintf("CN=%s,OU=%s", tt.id, strings.ToUpper(string(tt.role)))
			if got := leaf.Subject.String(); got != wantSubject {
				t.Errorf("subject: got %s, want %s", got, wantSubject)
			}
			if got := fmt.Sprint(leaf.DNSNames, leaf.IPAddresses); got != tt.hosts {
				t.Errorf("hosts: got %s, want %s", got, tt.hosts)
			}
			if leaf.KeyUsage != x509.KeyUsageDigitalSignature || !slices.Equal(leaf.ExtKeyUsage, tt.usages) {
				t.Errorf("usages: got %v %v, want digitalSignature and %v", leaf.KeyUsage, leaf.ExtKeyUsage, tt.usages)
			}
			if got, want := leaf.NotAfter.Sub(leaf.NotBefore), 24*time.Hour+30*time.Second; got != want {
				t.Errorf("lifetime: got %v, want %v", got, want)
			}
			wantCRL := "[http://" + s.addresses[tt.role].CRL + "/crl]"
			if got := fmt.Sprint(leaf.CRLDistributionPoints); got != wantCRL {
				t.Errorf("CRL: got %s, want %s", got, wantCRL)
			}
			info, err := os.Stat(filepath.Join(dir, "key.pem"))
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("key.pem: mode %v (%v), want 0600", info.Mode(), err)
			}
			verifyAtDoor(t, s, tt.role, leaf)
		})
	}
}

// verifyAtDoor checks leaf as a door does: against the intermediate of its role only.
func verifyAtDoor(t *testing.T, s *site, role identity.Role, leaf *x509.Certificate) {
	t.Helper()
	for _, door := range authority.Roles {
		anchor, err := pki.LoadPool(filepath.Join(s.dir, string(door), "intermediate.pem"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: anchor, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if ok := err == nil; ok != (door == role) {
			t.Errorf("a %s certificate at the %s door: %v", role, door, err)
		}
	}
}

func TestEnrolTwiceIsOnce(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleSAE)
	e := s.enrolment(t, identity.RoleSAE, "alice", s.token(t, identity.RoleSAE, "alice"))
	if err := pki.Enrol(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	first := leafIn(t, e.Dir)

	e.TokenFile = filepath.Join(t.TempDir(), "none") // not needed any more
	if err := pki.Enrol(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	if !leafIn(t, e.Dir).Equal(first) {
		t.Error("a second Enrol replaced a good certificate")
	}
	e.ID = "bob"
	if err := pki.Enrol(t.Context(), e); err == nil {
		t.Error("Enrol for bob took alice's directory")
	}
}

func TestTokenWorksOnce(t *testing.T) {
	s := newSite(t)
	stop := s.serve(t, identity.RoleSAE)
	token := s.token(t, identity.RoleSAE, "alice")
	if err := pki.Enrol(t.Context(), s.enrolment(t, identity.RoleSAE, "alice", token)); err != nil {
		t.Fatal(err)
	}
	refused(t, s.enrolment(t, identity.RoleSAE, "alice", token), "401")

	stop()
	fresh := s.token(t, identity.RoleSAE, "bob") // made while the CA is down
	s.serve(t, identity.RoleSAE)
	waitUntilUp(t, s, identity.RoleSAE)
	refused(t, s.enrolment(t, identity.RoleSAE, "alice", token), "401")
	if err := pki.Enrol(t.Context(), s.enrolment(t, identity.RoleSAE, "bob", fresh)); err != nil {
		t.Errorf("a token made before the restart: %v", err)
	}
}

// refused wants Enrol to fail for the reason given and to leave nothing behind.
func refused(t *testing.T, e pki.Enrolment, want string) {
	t.Helper()
	err := pki.Enrol(t.Context(), e)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Enrol: got error %v, want one with %q", err, want)
	}
	if _, err := os.Stat(e.Dir); !os.IsNotExist(err) {
		t.Errorf("a refused Enrol left %s (%v)", e.Dir, err)
	}
}

// waitUntilUp returns when the CA of role listens again.
func waitUntilUp(t *testing.T, s *site, role identity.Role) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		if _, _, err := s.call(t, s.client(t, ""), "GET", role, "/health", nil); err == nil {
			return
		}
		<-tick.C
	}
	t.Fatalf("the %s CA does not come up", role)
}

func TestEnrolRefuses(t *testing.T) {
	s := newSite(t)
	for _, role := range authority.Roles {
		s.serve(t, role)
	}
	sae, kme := identity.RoleSAE, identity.RoleKME

	t.Run("wrong pin", func(t *testing.T) {
		e := s.enrolment(t, sae, "alice", s.token(t, sae, "alice"))
		e.RootFingerprint = strings.Repeat("ab", 32)
		refused(t, e, "was not found")
		e.RootFingerprint = "../roots.pem"
		refused(t, e, "not a SHA-256 in hex")
	})
	t.Run("another's token", func(t *testing.T) {
		refused(t, s.enrolment(t, sae, "bob", s.token(t, sae, "alice")), "403")
	})
	t.Run("expired token", func(t *testing.T) {
		old, err := authority.Token(s.dir, sae, "alice", time.Now().Add(-7*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		refused(t, s.enrolment(t, sae, "alice", old), "401")
	})
	t.Run("token of another role", func(t *testing.T) {
		refused(t, s.enrolment(t, kme, "alice", s.token(t, sae, "alice")), "401")
	})
	t.Run("token of another role that poses as ours", func(t *testing.T) {
		key := s.tokenKey(t, kme)
		posing := s.forge(t, sae, map[string]any{
			"iss": "enrol-kme", "aud": "https://" + s.addresses[kme].HTTPS + "/1.0/sign", "kid": key.KeyID,
		})
		refused(t, s.enrolment(t, kme, "alice", posing), "401")
	})
	t.Run("names that the certificate does not get", func(t *testing.T) {
		e := s.enrolment(t, kme, "km1", s.token(t, kme, "km1", "km1.site-a.example"))
		e.Names = []string{"km2.site-a.example"}
		refused(t, e, "km2.site-a.example")
	})
	t.Run("garbage", func(t *testing.T) {
		refused(t, s.enrolment(t, sae, "alice", `{"eyJ": 1}`), "401")
	})
}

func TestBrokenCredentialIsReplaced(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleSAE)
	e := s.enrolment(t, identity.RoleSAE, "alice", s.token(t, identity.RoleSAE, "alice"))
	if err := os.MkdirAll(e.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"key.pem", "cert.pem"} { // cut short: no pair
		if err := os.WriteFile(filepath.Join(e.Dir, file), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := pki.Enrol(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	if got := leafIn(t, e.Dir).Subject.CommonName; got != "alice" {
		t.Errorf("CN: got %s, want alice", got)
	}
}

func TestKMENames(t *testing.T) {
	s := newSite(t)
	s.serve(t, identity.RoleKME)
	kme := identity.RoleKME
	e := s.enrolment(t, kme, "km1.site-a.example", s.token(t, kme, "km1.site-a.example", "km1.site-a.example", "192.0.2.7"))
	e.Names = []string{"localhost", "127.0.0.1", "km1.site-a.example", "192.0.2.7"}
	if err := pki.Enrol(t.Context(), e); err != nil {
		t.Error(err)
	}
	refused(t, s.enrolment(t, kme, "km1", s.token(t, kme, "km1", "km1.evil.example")), "403")
	refused(t, s.enrolment(t, kme, "km1", s.token(t, kme, "km1", "198.51.100.7")), "403")
	if _, err := authority.Token(s.dir, identity.RoleSAE, "alice", time.Now(), "alice.site-a.example"); err == nil {
		t.Error("Token gave an SAE a host name")
	}
}
