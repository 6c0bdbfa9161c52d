// Package pki is the client's side of the project's certificates: Enrol fetches
// one from a CA (pki/authority) with a one-time token, Credential holds it and
// reloads it, ServerTLS and ClientTLS make the TLS configurations of the project's
// doors and clients, and Identify turns a request into a Caller.
//
// It promises that no configuration made here accepts a peer without a verified
// certificate, and that nothing but that certificate says who the peer is.
//
// It must never link the CA's code, trust the system's roots, or send a token over
// a connection that it has not verified.
package pki

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Enrolment says which certificate Enrol fetches, from where and to where.
type Enrolment struct {
	CA              string // URL of the role's CA, e.g. "https://127.0.0.1:9441"
	RootFingerprint string // SHA-256 of the root certificate in hex, as `kme-ca fingerprint` prints it
	TokenFile       string // holds the one-time token; read only when one is needed
	Dir             string // where key.pem, cert.pem and root.pem go; made if missing
	ID              string // whom the token is for

	// Names are the DNS names and IP addresses that the certificate must hold for; a
	// server needs them. The token decides what the CA puts in: Enrol refuses a
	// certificate without them.
	Names []string

	Log *slog.Logger // default slog.Default()
}

// Files of an enrolled directory.
const (
	keyFile  = "key.pem"  // PKCS #8, mode 0600
	certFile = "cert.pem" // leaf, then intermediate
	rootFile = "root.pem" // the anchor that the CA was pinned to
)

const (
	enrolTimeout   = 30 * time.Second // of one request
	maxAnswerBytes = 1 << 20
)

// Enrol makes sure that e.Dir holds a key and a certificate for e.ID. It does
// nothing if it does and they have not ended; so it can run at each start. Else it
// makes a new P-256 key and fetches a certificate with the token. The certificate
// is written last: if Enrol is cut short, the next one needs a new token.
func Enrol(ctx context.Context, e Enrolment) error {
	if err := e.run(ctx); err != nil {
		return fmt.Errorf("enrolling %s at %s: %w", e.ID, e.CA, err)
	}
	return nil
}

func (e Enrolment) run(ctx context.Context) error {
	log := cmp.Or(e.Log, slog.Default())
	present, err := LoadCredential(e.Dir)
	if err == nil {
		if id := present.Leaf().Subject.CommonName; id != e.ID {
			return fmt.Errorf("%s holds the certificate of %q", e.Dir, id)
		}
		return nil
	}
	log.Info("no certificate to use, enrolling", "id", e.ID, "ca", e.CA, "because", err)

	token, err := os.ReadFile(e.TokenFile)
	if err != nil {
		return fmt.Errorf("reading the one-time token: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	root, err := e.fetchRoot(ctx)
	if err != nil {
		return fmt.Errorf("fetching the root: %w", err)
	}
	chain, err := e.sign(ctx, root, key, strings.TrimSpace(string(token)))
	if err != nil {
		return fmt.Errorf("asking for a certificate: %w", err)
	}
	if err := e.check(chain, root, key); err != nil {
		return fmt.Errorf("checking the certificate: %w", err)
	}
	if err := e.store(chain, root, key); err != nil {
		return fmt.Errorf("storing the certificate: %w", err)
	}
	log.Info("enrolled", "id", e.ID, "ca", e.CA, "serial", chain[0].SerialNumber.String(), "until", chain[0].NotAfter)
	return nil
}

// fetchRoot asks the CA for the root with the pinned fingerprint. Nothing vouches
// for this connection, and nothing has to: the answer must hash to the pin.
func (e Enrolment) fetchRoot(ctx context.Context) (*x509.Certificate, error) {
	pin := strings.ToLower(e.RootFingerprint)
	if raw, err := hex.DecodeString(pin); err != nil || len(raw) != sha256.Size {
		return nil, fmt.Errorf("the root's fingerprint %q is not a SHA-256 in hex", e.RootFingerprint)
	}
	var answer struct {
		CA string `json:"ca"`
	}
	unverified := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
	if err := e.call(ctx, unverified, http.MethodGet, "/root/"+pin, nil, &answer); err != nil {
		return nil, err
	}
	root, err := parseCertificate(answer.CA)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(root.Raw); hex.EncodeToString(sum[:]) != pin {
		return nil, fmt.Errorf("the CA's root has the fingerprint %x, not %s", sum, pin)
	}
	return root, nil
}

// sign sends the request and the token, over a connection verified against root.
func (e Enrolment) sign(ctx context.Context, root *x509.Certificate, key *ecdsa.PrivateKey, token string) ([]*x509.Certificate, error) {
	// The CA takes nothing from the request but its key.
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: e.ID}}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, err
	}
	request := struct {
		CSR   string `json:"csr"`
		Token string `json:"ott"`
	}{string(encodePEM("CERTIFICATE REQUEST", der)), token}
	var answer struct {
		Chain []string `json:"certChain"`
	}
	if err := e.call(ctx, AnonymousTLS(poolOf(root)), http.MethodPost, "/1.0/sign", request, &answer); err != nil {
		return nil, err
	}
	if len(answer.Chain) == 0 {
		return nil, errors.New("the CA's answer holds no certificate")
	}
	var chain []*x509.Certificate
	for _, text := range answer.Chain {
		cert, err := parseCertificate(text)
		if err != nil {
			return nil, err
		}
		chain = append(chain, cert)
	}
	return chain, nil
}

// call makes one request on a connection of its own: no proxy, no redirect, a
// bounded answer.
func (e Enrolment) call(ctx context.Context, tlsConfig *tls.Config, method, path string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if method == http.MethodGet {
		body = nil
	}
	transport := &http.Transport{TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := http.Client{
		Transport:     transport,
		Timeout:       enrolTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(e.CA, "/")+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return refusal(resp.StatusCode, text)
	}
	return json.Unmarshal(text, answer)
}

// refusal is the CA's error, in its own words if it has any.
func refusal(status int, body []byte) error {
	var problem struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &problem) != nil || problem.Message == "" {
		problem.Message = http.StatusText(status)
	}
	return fmt.Errorf("the CA refused: %d: %s", status, problem.Message)
}

// check makes sure that what the CA sent is what was asked for.
func (e Enrolment) check(chain []*x509.Certificate, root *x509.Certificate, key *ecdsa.PrivateKey) error {
	leaf := chain[0]
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return errors.New("it is for another key")
	}
	if leaf.Subject.CommonName != e.ID || len(leaf.URIs) != 1 || leaf.URIs[0].Path != "/"+e.ID {
		return fmt.Errorf("it names %q with URIs %v, not %q", leaf.Subject.CommonName, leaf.URIs, e.ID)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots:         poolOf(root),
		Intermediates: poolOf(chain[1:]...),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return err
	}
	for _, name := range e.Names {
		if err := leaf.VerifyHostname(name); err != nil {
			return err
		}
	}
	return nil
}

// store writes the certificate last: it is what says that the others are good.
func (e Enrolment) store(chain []*x509.Certificate, root *x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var certs []byte
	for _, cert := range chain {
		certs = append(certs, encodePEM("CERTIFICATE", cert.Raw)...)
	}
	if err := os.MkdirAll(e.Dir, 0o700); err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(e.Dir, rootFile), encodePEM("CERTIFICATE", root.Raw), 0o644); err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(e.Dir, keyFile), encodePEM("PRIVATE KEY", der), 0o600); err != nil {
		return err
	}
	return replaceFile(filepath.Join(e.Dir, certFile), certs, 0o644)
}

// replaceFile writes a file whole or not at all: under another name, synced, then
// renamed, then the directory synced.
func replaceFile(name string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-") // made with mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func parseCertificate(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("the CA's answer holds no PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func poolOf(certs ...*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, cert := range certs {
		pool.AddCert(cert)
	}
	return pool
}
