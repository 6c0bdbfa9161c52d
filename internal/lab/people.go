package lab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/pki"
)

// people are the SAEs that a lab begins with, and the KME that serves each.
var people = map[string]string{
	"alice": "km1", "bob": "km2", "erin": "km2", "carol": "km2",
	"alice@qutemail.example": "km1", "bob@qutemail.example": "km2",
	"qutemail": "km1", // the mail server, which acts for the two before it
}

// operators of a lab.
var operators = []string{"root", "olga"}

// startCAs makes the authorities if there are none and serves each in a process.
func (l *Lab) startCAs(ctx context.Context) error {
	dir := l.path("ca")
	if _, err := os.Stat(filepath.Join(dir, "root.pem")); err != nil {
		args := []string{"init", "--dir", dir, "--trust-domain", trustDomain}
		for _, role := range []string{"sae", "kme", "operator"} {
			args = append(args,
				fmt.Sprintf("--address=%s=localhost:%d", role, l.Ports.ca(role)),
				fmt.Sprintf("--crl-address=%s=localhost:%d", role, l.Ports.crl(role)))
		}
		if _, err := l.kmeCA(ctx, args...); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "sae", "ca.yaml")); err != nil {
		return fmt.Errorf("%w (a lab of an older version? remove %s and begin anew)", err, l.Dir)
	}
	root, err := os.ReadFile(filepath.Join(dir, "root.pem"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.path("root.pem"), root, 0o644); err != nil {
		return err
	}
	if l.pin, err = l.kmeCA(ctx, "fingerprint", "--dir", dir); err != nil {
		return err
	}
	for _, role := range []string{"sae", "kme", "operator"} {
		p, err := l.nursery.start("kme-ca "+role, l.Dir, l.path("log", "ca-"+role), nil, filepath.Join(l.Bin, "kme-ca"), "serve", "--config", filepath.Join(dir, role, "ca.yaml"))
		if err != nil {
			return err
		}
		l.cas = append(l.cas, p)
	}
	for i, role := range []string{"sae", "kme", "operator"} {
		if err := l.cas[i].await(ctx, func() error { return l.caHealthy(ctx, role) }); err != nil {
			return err
		}
	}
	return nil
}

// caHealthy asks a CA how it is.
func (l *Lab) caHealthy(ctx context.Context, role string) error {
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("https://localhost:%d/health", l.Ports.ca(role)), nil)
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// kmeCA runs a kme-ca command and returns what it printed.
func (l *Lab) kmeCA(ctx context.Context, args ...string) (string, error) {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, filepath.Join(l.Bin, "kme-ca"), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("kme-ca %s: %w: %s", args[0], err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// tokenUnlessEnrolled puts a one-time token into file, unless dir holds a
// certificate that is good for another hour. One that ends sooner is taken away.
func (l *Lab) tokenUnlessEnrolled(ctx context.Context, role, id, dir, file string) error {
	if c, err := pki.LoadCredential(dir); err == nil && time.Until(c.Leaf().NotAfter) > time.Hour {
		return nil
	}
	if err := os.RemoveAll(filepath.Join(dir, "cert.pem")); err != nil {
		return err
	}
	token, err := l.kmeCA(ctx, "token", "--dir", l.path("ca"), role, id)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(token+"\n"), 0o600)
}

// enrolPeople gets certificates for the lab's SAEs and operators.
func (l *Lab) enrolPeople(ctx context.Context) error {
	for name, home := range people {
		n, err := l.node(home)
		if err != nil {
			return err
		}
		if err := l.enrol(ctx, "sae", name, n.URL()); err != nil {
			return err
		}
	}
	for _, name := range operators {
		if err := l.enrol(ctx, "operator", name, l.KM1.OperatorURL()); err != nil {
			return err
		}
	}
	return nil
}

// profileDir is where the certificate of an SAE or operator lies.
func (l *Lab) profileDir(role, name string) string { return l.path(role+"s", name) }

func (l *Lab) enrol(ctx context.Context, role, name, url string) error {
	dir := l.profileDir(role, name)
	token := filepath.Join(dir, "token")
	if err := l.tokenUnlessEnrolled(ctx, role, name, dir, token); err != nil {
		return err
	}
	if err := pki.Enrol(ctx, pki.Enrolment{
		CA: fmt.Sprintf("https://localhost:%d", l.Ports.ca(role)), RootFingerprint: l.pin,
		TokenFile: token, Dir: dir, ID: name, Log: l.Log,
	}); err != nil {
		return err
	}
	if err := os.RemoveAll(token); err != nil { // it is spent
		return err
	}
	return os.WriteFile(filepath.Join(dir, "profile.yaml"), []byte("kme: "+url+"\n"), 0o644)
}

// Person is an SAE of the lab with its certificate and the shipped clients.
type Person struct {
	ID     identity.SAE
	HTTP   *http.Client
	Client *etsi014.Client // at its home
	Legacy *legacy.Client  // likewise
}

// SAEID is the ID of that name. It is for names written in code.
func SAEID(name string) identity.SAE {
	id, err := identity.ParseSAE(name)
	if err != nil {
		panic(err)
	}
	return id
}

// SAE returns an SAE of the lab, speaking to its home.
func (l *Lab) SAE(name string) (*Person, error) { return l.SAEAt(name, people[name]) }

// SAEAt returns an SAE of the lab, speaking to a node or to the first of a site.
func (l *Lab) SAEAt(name, where string) (*Person, error) {
	n, err := l.node(where)
	if err != nil {
		return nil, err
	}
	hc, err := l.httpClient(l.profileDir("sae", name))
	if err != nil {
		return nil, err
	}
	url := n.URL()
	return &Person{ID: SAEID(name), HTTP: hc, Client: etsi014.NewClient(url, hc), Legacy: legacy.NewClient(url, hc)}, nil
}

// httpClient speaks with the certificate in dir.
func (l *Lab) httpClient(dir string) (*http.Client, error) {
	c, err := pki.LoadCredential(dir)
	if err != nil {
		return nil, err
	}
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		return nil, err
	}
	hc := &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: pki.ClientTLS(c, roots, nil), MaxIdleConnsPerHost: 64},
	}
	if l.Watch != nil {
		hc.Transport = l.Watch(hc.Transport)
	}
	return hc, nil
}

// Operator returns an operator of the lab, speaking to a node or to the first of a site.
func (l *Lab) Operator(name, where string) (*admin.Client, error) {
	n, err := l.node(where)
	if err != nil {
		return nil, err
	}
	hc, err := l.httpClient(l.profileDir("operator", name))
	if err != nil {
		return nil, err
	}
	return admin.NewClient(n.OperatorURL(), hc), nil
}

// Ready is nil if a node hands out keys over each of its links: it is ready, and no peer
// has yet to say what it assigned for the node's earlier runs.
func Ready(ctx context.Context, op *admin.Client) error {
	if err := op.Ready(ctx); err != nil {
		return err
	}
	alarms, err := op.Alarms(ctx)
	for _, a := range alarms {
		if strings.HasPrefix(a.Name, "takeover-") {
			return errors.New(a.Text)
		}
	}
	return err
}
