package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/qutemail/kme/deploy/runbooks"
	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/pki"
)

// TestDoctor: each thing that may be wrong with certificates and CRLs is, at some time, and
// a node says of it what stands in deploy/runbooks/doctor.md.
func TestDoctor(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(writeCertificate(dir, "km1")) // for an hour
	credential, err := pki.LoadCredential(dir)
	must(err)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA of the test"}, NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	must(err)
	ca, err = x509.ParseCertificate(der)
	must(err)
	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-time.Second), NextUpdate: now.Add(30 * time.Minute)}, ca, key)
	must(err)
	up := false
	publisher := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if up {
			_, _ = w.Write(crl)
			return
		}
		http.Error(w, "the CA is down", http.StatusServiceUnavailable)
	}))
	t.Cleanup(publisher.Close)
	file := filepath.Join(dir, "issuer.pem")
	must(os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	issuers, err := pki.LoadIssuers(file)
	must(err)
	opened := func() *node {
		n := &node{credential: credential, revoked: make(map[string]*pki.Revocations)}
		for _, role := range roles {
			n.revoked[string(role)], err = pki.OpenRevocations(t.Context(), pki.RevocationsConfig{
				Role: role, Issuers: issuers, URLs: []string{publisher.URL}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
			})
			must(err)
		}
		return n
	}

	rows := runbooks.Complaints(runbooks.Certificates)
	says := func(n *node, at time.Time, about, what string) {
		t.Helper()
		want, ok := rows[what]
		if delete(rows, what); !ok {
			t.Errorf("doctor.md has no row %q", what)
			return
		}
		for _, f := range n.examine(at) {
			if f.About == about {
				if err := want.Is(f.About, f.Says, f.Do); err != nil || f.OK {
					t.Errorf("%s: %+v: %v", what, f, err)
				}
				return
			}
		}
		t.Errorf("%s: nothing is said about %s", what, about)
	}
	of := "CRL of role " + string(roles[0])
	says(opened(), now, of, "there is no CRL")
	up = true
	n := opened()
	says(n, now, "certificate", "the node's own ends")
	says(n, now.Add(20*time.Minute), of, "a CRL is old")
	says(n, now.Add(40*time.Minute), of, "a CRL has ended")
	says(n, now.Add(2*time.Hour), "certificate", "the node's own has ended")
	well := n.examine(now.Add(-24 * time.Hour)) // the certificate has long to go
	if i := slices.IndexFunc(well, func(f admin.Finding) bool { return !f.OK }); i >= 0 || len(well) != 1+len(roles) {
		t.Errorf("all is well, and the node says %+v", well)
	}
	for what := range rows {
		t.Errorf("nothing makes %q happen", what)
	}
}
