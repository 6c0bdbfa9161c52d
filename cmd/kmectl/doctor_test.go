package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/qutemail/kme/deploy/runbooks"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/pki"
)

// TestDoctor: each thing that may be wrong on the way to a node is made wrong, and kmectl
// doctor says of it what stands in deploy/runbooks/doctor.md, and what to do.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s := &stage{dir: t.TempDir(), table: &table{keys: make(map[key.ID]shared)}}
	t.Cleanup(func() {
		for _, d := range s.doors {
			_ = d.Close()
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.open())
	must(s.people())
	operators := s.doors[1]
	must(s.person("operators/root", "operator", "root", operators.Addr, 24*time.Hour))
	must(s.person("operators/late", "operator", "root", operators.Addr, 50*time.Minute))
	must(s.person("operators/stranger", "operator", "stranger", operators.Addr, 24*time.Hour))

	pool := x509.NewCertPool()
	pool.AddCert(s.roles["operator"].cert)
	elsewhere := func(h http.Handler, config *tls.Config) []string { // another operator door
		t.Helper()
		must(s.serve(h, config))
		return []string{"--as", "root", "--kme", s.doors[len(s.doors)-1].Addr}
	}
	fresh, err := s.server("fresh", 24*time.Hour)
	must(err)
	_, err = s.server("ended", -time.Second) // which is not loaded
	if err == nil {
		t.Fatal("a node takes a certificate that has ended")
	}
	ended, err := tls.LoadX509KeyPair(filepath.Join(s.dir, "ended", "cert.pem"), filepath.Join(s.dir, "ended", "key.pem"))
	must(err)
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", time.Now().Add(-time.Minute).UTC().Format(http.TimeFormat))
		operators.Handler.ServeHTTP(w, r)
	})
	alice := func(file string) string { return filepath.Join(s.dir, "saes", "alice", file) }

	rows := runbooks.Complaints(runbooks.Way)
	for what, args := range map[string][]string{
		"nobody listens there":               {"--as", "root", "--kme", "https://localhost:1"},
		"the root is another":                {"--as", "root", "--ca", alice("cert.pem")},
		"a certificate of another role":      {"--cert", alice("cert.pem"), "--key", alice("key.pem"), "--ca", filepath.Join(s.dir, "root.pem"), "--kme", operators.Addr},
		"an operator whom nobody has let in": {"--as", "stranger"},
		"your certificate ends":              {"--as", "late"},
		"the node's certificate ends":        {"--as", "root"}, // the stage's own does
		"the node's certificate has ended":   elsewhere(operators.Handler, &tls.Config{Certificates: []tls.Certificate{ended}}),
		"the node's clock is not yours":      elsewhere(slow, pki.ServerTLS(fresh, pool, tls.VersionTLS12)),
		"":                                   elsewhere(operators.Handler, pki.ServerTLS(fresh, pool, tls.VersionTLS12)), // nothing: all is well on the way
	} {
		var stdout, stderr bytes.Buffer
		if err := run(t.Context(), append([]string{"--profiles", s.dir, "--json", "doctor"}, args...), &stdout, &stderr); err == nil {
			t.Errorf("%s: doctor ends well: %s", what, &stdout)
		}
		var nodes []doctorNode
		if err := json.Unmarshal(stdout.Bytes(), &nodes); err != nil || len(nodes) != 1 {
			t.Errorf("%s: %v: %s%s", what, err, &stdout, &stderr)
			continue
		}
		want, ok := rows[what]
		if delete(rows, what); !ok && what != "" {
			t.Errorf("doctor.md has no row %q", what)
			continue
		}
		var seen []error
		for _, f := range nodes[0].Findings {
			switch {
			case f.OK || f.About == "peer km2": // which is not well on this stage
			case what == "":
				t.Errorf("nothing is wrong on the way, and doctor says %+v", f)
			default:
				seen = append(seen, want.Is(f.About, f.Says, f.Do))
			}
		}
		if what != "" && !slices.Contains(seen, nil) {
			t.Errorf("%s: %v", what, seen)
		}
	}
	for what := range rows {
		t.Errorf("nothing makes %q happen", what)
	}
}
