package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/audit/audittest"
)

// signatory is an operator with the key of a certificate that a CA has issued.
type signatory struct {
	leaf *x509.Certificate
	key  *ecdsa.PrivateKey
}

// begin is when siteLog's events are recorded.
var begin = time.UnixMilli(0)

func newSignatory(t *testing.T, name string, ca issuer) signatory {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: begin.Add(-time.Hour), NotAfter: begin.Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return signatory{leaf, key}
}

// signs is what an officer leaves in the audit of an act.
func (o signatory) signs(t *testing.T, act, node string, until time.Time) string {
	t.Helper()
	a, err := approval.Sign(approval.Act(act), node, until, o.leaf, o.key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func (o signatory) actor() audit.Actor {
	sum := sha256.Sum256(o.leaf.Raw)
	return audit.Actor{Role: "operator", ID: o.leaf.Subject.CommonName, Fingerprint: hex.EncodeToString(sum[:])}
}

// TestApprovals: years later, with nothing but the log, it shows who stood behind an act
// that takes two officers; and what only looks so does not pass.
func TestApprovals(t *testing.T) {
	t.Parallel()
	authority := x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	var cas [2]issuer
	var files [2]string
	for i := range cas {
		ca, err := issue(issuer{}, authority)
		if err != nil {
			t.Fatal(err)
		}
		cas[i], files[i] = ca, filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(files[i], certPEM(ca.cert), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	root, olga, again := newSignatory(t, "root", cas[0]), newSignatory(t, "olga", cas[0]), newSignatory(t, "root", cas[0])
	const act, node = "compromise-keys 2026-03-01T12:00:00Z now", "km1/km1-a"
	soon := begin.Add(10 * time.Minute)
	roots := root.signs(t, act, node, soon)
	event := func(approvals ...string) audit.Event {
		return audit.Event{Action: audit.Compromise, Outcome: audit.Done, Actor: root.actor(), Approvals: approvals}
	}
	good := event(olga.signs(t, act, node, soon), roots)
	cleanup := event(olga.signs(t, "cleanup", node, soon), root.signs(t, "cleanup", node, soon))
	cleanup.Action = audit.Cleanup
	refused := event(roots)
	refused.Outcome = audit.Refused
	peers := audit.Event{Action: audit.Compromise, Outcome: audit.Done, Actor: audit.Actor{Role: "kme", ID: "km2"}}
	others := event(olga.signs(t, act, node, soon), roots)
	others.Actor = newSignatory(t, "mallory", cas[0]).actor()
	elsewhere := event(olga.signs(t, "cleanup", node, soon), root.signs(t, "cleanup", node, soon))
	k := audittest.NewKey(t)
	verify := func(log *siteLog, more ...string) []string {
		bundle := log.bundle("a.bundle", 0, log.c.Size)
		return append([]string{"audit", "approvals", "--offline", bundle, "--vkey", log.key()}, more...)
	}
	log := func(events ...audit.Event) *siteLog { return newSiteLog(t, "km1", 1, k, audit.Head{}, events...) }
	whole := log(refused, good, peers, cleanup)
	for _, w := range []wants{
		{verify(whole, "--officers", files[0]), "2 acts in leaves 0 to 3 of qutemail.example/km1/audit/1, each signed for by two", false},
		{verify(whole, "--officers", files[0]), `"` + act + `", approved by CN=olga and CN=root`, false},
		{verify(whole), "NOT CHECKED: whose the certificates are", false},
		{verify(log(event(good.Approvals[0], root.signs(t, act, node, begin.Add(-time.Second))))), "each signed for by two", false}, // it ended while the act was done
		{verify(whole, "--officers", files[1]), "no CA of operators has issued the certificate of CN=olga", true},
		{verify(whole, "--officers", files[1]), "2 of 2 acts that take two officers are without", true},
		{verify(log(event())), "NOT APPROVED BY TWO: there are 0 approvals", true},
		{verify(log(event(roots))), "there are 1 approvals", true},
		{verify(log(event(roots, again.signs(t, act, node, soon)))), "both are of CN=root", true},
		{verify(log(event(roots, olga.signs(t, act, "km1/km1-b", soon)))), `it is for the node "km1/km1-b"`, true},
		{verify(log(event(roots, olga.signs(t, "cleanup", node, soon)))), `it approves "cleanup"`, true},
		{verify(log(event(roots, olga.signs(t, act, node, begin.Add(-2*time.Minute))))), "it ended at", true},
		{verify(log(event(roots, strings.Replace(good.Approvals[0], "00:10:00", "00:20:00", 1)))), "its signature does not hold", true},
		{verify(log(elsewhere)), `they approve "cleanup", and this is compromise`, true},
		{verify(log(others)), "neither is of mallory", true},
		{verify(whole, "--vkey", newSiteLog(t, "km1", 1, audittest.NewKey(t), audit.Head{}, good).key()), "", true},
	} {
		w.check(t)
	}
}
