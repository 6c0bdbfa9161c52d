package lab

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/qutemail/kme/"

// rings says which packages may import which: a package imports only packages of
// lower rings, and those of one ring are strangers to each other.
var rings = map[string]int{
	"internal/key":        0,
	"internal/identity":   0,
	"internal/problem":    0,
	"internal/approval":   0,
	"internal/nodes":      0,
	"internal/failpoint":  0,
	"internal/deadpeer":   0,
	"internal/release":    0,
	"internal/registers":  0,
	"internal/pgdev":      0,
	"internal/yamlfile":   0,
	"internal/secretfile": 0,

	"internal/bb84":     1,
	"internal/distill":  1,
	"internal/handover": 1,
	"pki/templates":     1,
	"internal/audit":    1,
	"internal/saedoor":  1,

	"internal/store":          2,
	"internal/auditlog":       2,
	"internal/siem":           2,
	"internal/qlink":          2,
	"internal/peer":           2,
	"internal/etsi014":        2,
	"internal/etsi014/vector": 1,
	"internal/legacy":         2,
	"internal/admin":          2,
	"hsm":                     2,
	"pki":                     2,
	"pki/authority":           2,
	"policies":                2,

	"internal/kme": 3,
	"internal/lab": 4,

	"internal/lab/binaries":      0, // for tests
	"internal/lab/freeport":      0,
	"deploy":                     0, // files
	"deploy/runbooks":            0, // a page of them, for tests
	"hsm/hsmtest":                0, // likewise
	"internal/yamlfile/yamltest": 0,
	"internal/audit/audittest":   0,

	"cmd/kmed":   5,
	"cmd/kmectl": 5,
	"cmd/kme-ca": 5,
	"cmd/qlink":  5,
	"cmd/kmelab": 5,
}

// only names the packages that a package may be imported by, where its ring says too little.
var only = map[string][]string{
	"pki/authority":  {"cmd/kme-ca", "internal/lab"},
	"internal/pgdev": {"internal/lab"},
	"internal/lab":   {"cmd/kmelab"},

	"internal/lab/freeport": {"internal/lab"},

	"internal/lab/binaries":      {}, // only tests
	"hsm/hsmtest":                {},
	"internal/yamlfile/yamltest": {},
	"internal/audit/audittest":   {},
}

type listed struct {
	ImportPath string
	Imports    []string
}

func list(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-tags=noyubikey", "-json=ImportPath,Imports"}, args...)...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var ps []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return ps
		} else if err != nil {
			t.Fatalf("reading go list: %v", err)
		}
		ps = append(ps, p)
	}
}

func TestImportsGoDownwards(t *testing.T) {
	t.Parallel()
	for _, p := range list(t, "./...") {
		from := strings.TrimPrefix(p.ImportPath, module)
		ring, ok := rings[from]
		if !ok {
			t.Errorf("%s has no ring: name it in this test, and think about where it belongs", from)
			continue
		}
		for _, i := range p.Imports {
			to, ours := strings.CutPrefix(i, module)
			if !ours {
				continue
			}
			if rings[to] >= ring {
				t.Errorf("%s (ring %d) imports %s (ring %d)", from, ring, to, rings[to])
			}
			if allowed, limited := only[to]; limited && !slices.Contains(allowed, from) {
				t.Errorf("%s imports %s, which only %v may", from, to, allowed)
			}
		}
	}
}

// The daemon that holds keys links nothing it does not need, and kmectl, which
// users build anywhere, needs no C compiler.
func TestWhatTheBinariesLink(t *testing.T) {
	t.Parallel()
	for cmd, forbidden := range map[string][]string{
		"./cmd/kmed":   {"/smallstep/", "go.step.sm/", "/badger", "google.golang.org/grpc", "/ThalesIgnite/", "internal/pgdev"},
		"./cmd/kmectl": {"/smallstep/", "go.step.sm/", "/badger", "google.golang.org/grpc", "/ThalesIgnite/", "/pkcs11", "/pgx/"},
	} {
		for _, p := range list(t, "-deps", cmd) {
			for _, f := range forbidden {
				if strings.Contains(p.ImportPath, f) {
					t.Errorf("%s links %s", cmd, p.ImportPath)
				}
			}
		}
	}
}
