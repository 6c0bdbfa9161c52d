package authority

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/qutemail/kme/deploy"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/yamlfile/yamltest"
)

// TestExample: the shipped example is whole, loads, and what it says of defaults is so.
func TestExample(t *testing.T) {
	t.Parallel()
	got := yamltest.Example(t, deploy.KMECAYAML, func(text string) (settings, error) { return parseSettings("/var/lib/kme-ca/sae/ca.yaml", []byte(text)) })
	want := settings{
		Role: identity.RoleSAE, TrustDomain: "lab.test", Address: "ca.example.net:9441", CRLAddress: "ca.example.net:9451",
		HSM:          HSMToken{Module: "/usr/lib/softhsm/libsofthsm2.so", Label: "kme-ca-sae", PINFile: "/var/lib/kme-ca/sae/hsm/pin"},
		ACMEHTTPPort: 80,
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(settings{})); diff != "" { // its folder
		t.Errorf("the example (-want +got):\n%s", diff)
	}
	if defaults := yamltest.Default.FindAllString(deploy.KMECAYAML, -1); len(defaults) != 3 {
		t.Errorf("the example shows %d defaults: %q", len(defaults), defaults)
	}
}

// TestWritten: what Init writes is read as what it was, whatever the names are.
func TestWritten(t *testing.T) {
	t.Parallel()
	want := settings{
		Role: identity.RoleKME, TrustDomain: "123.test", Address: "[::1]:9442", CRLAddress: "localhost:9452",
		HSM:          HSMToken{Module: "/opt/\"vendor's\" \\ HSM\n.so", Label: "0123", PINFile: "/etc/pin: #1"},
		ACMEHTTPPort: 80, dir: t.TempDir(),
	}
	if err := want.write(want.path(settingsFile)); err != nil {
		t.Fatal(err)
	}
	got, err := loadSettings(want.path(settingsFile))
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
