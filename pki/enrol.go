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
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
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

	dial func(ctx context.Context, network, address string) (net.Conn, error) // for tests
}

func (e Enrolment) client() caClient { return caClient{e.CA, e.dial} }

// Files of an enrolled directory.
const (
	keyFile  = "key.pem"  // PKCS #8, mode 0600
	certFile = "cert.pem" // leaf, then intermediate
	rootFile = "root.pem" // the anchor that the CA was pinned to

	nextCertFile = "cert.pem.next" // what is to become cert.pem: see storeCredential
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
	ca := e.client()
	root, err := ca.root(ctx, e.RootFingerprint)
	if err != nil {
		return fmt.Errorf("fetching the root: %w", err)
	}
	chain, err := ca.sign(ctx, root, e.ID, key, strings.TrimSpace(string(token)))
	if err != nil {
		return fmt.Errorf("asking for a certificate: %w", err)
	}
	if err := e.check(chain, root, key); err != nil {
		return fmt.Errorf("checking the certificate: %w", err)
	}
	if err := storeRoot(e.Dir, root); err != nil {
		return fmt.Errorf("storing the root: %w", err)
	}
	if err := storeCredential(e.Dir, chain, key); err != nil {
		return fmt.Errorf("storing the certificate: %w", err)
	}
	log.Info("enrolled", "id", e.ID, "ca", e.CA, "serial", chain[0].SerialNumber.String(), "until", chain[0].NotAfter)
	return nil
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

func storeRoot(dir string, root *x509.Certificate) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, rootFile), encodePEM("CERTIFICATE", root.Raw), 0o644)
}

// storeCredential replaces key and certificate as one, though they are two files: the
// new certificate lies beside the old one, under another name, when the key is
// replaced. If the process dies before that, the old pair stands; if it dies after it,
// finishStoring completes the new one.
func storeCredential(dir string, chain []*x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var certs []byte
	for _, cert := range chain {
		certs = append(certs, encodePEM("CERTIFICATE", cert.Raw)...)
	}
	if err := replaceFile(filepath.Join(dir, nextCertFile), certs, 0o644); err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(dir, keyFile), encodePEM("PRIVATE KEY", der), 0o600); err != nil {
		return err
	}
	return finishStoring(dir)
}

// finishStoring gives the next certificate its name if it is the key's.
func finishStoring(dir string) error {
	next := filepath.Join(dir, nextCertFile)
	if _, err := tls.LoadX509KeyPair(next, filepath.Join(dir, keyFile)); err != nil {
		return err
	}
	if err := os.Rename(next, filepath.Join(dir, certFile)); err != nil {
		return err
	}
	return syncDir(dir)
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
	return syncDir(filepath.Dir(name))
}

func syncDir(name string) error {
	dir, err := os.Open(name)
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
