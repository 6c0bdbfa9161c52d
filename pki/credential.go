package pki

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/secretfile"
)

// Credential is a certificate and its key, from a directory that Enrol or the step
// CLI keeps fresh. The TLS configurations made from it show, at each handshake,
// what the last load found; connections that are open keep what they began with.
type Credential struct {
	dir      string
	current  atomic.Pointer[tls.Certificate]
	reloaded chan struct{} // something else than before may be current: for its Renewal
}

// LoadCredential reads dir/cert.pem (leaf, then intermediate) and dir/key.pem. It is
// an error if others can read the key, if the two do not belong together, or if the
// certificate has ended.
func LoadCredential(dir string) (*Credential, error) {
	c := &Credential{dir: dir, reloaded: make(chan struct{}, 1)}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again, by the rules of LoadCredential. On an error the
// credential stays what it was.
func (c *Credential) Reload() error {
	cert, err := readCredential(c.dir, time.Now())
	if err != nil {
		return fmt.Errorf("loading credential %s: %w", c.dir, err)
	}
	c.current.Store(cert)
	select {
	case c.reloaded <- struct{}{}:
	default:
	}
	return nil
}

// Leaf is the certificate in use.
func (c *Credential) Leaf() *x509.Certificate { return c.current.Load().Leaf }

func readCredential(dir string, now time.Time) (*tls.Certificate, error) {
	key := filepath.Join(dir, keyFile)
	if err := secretfile.Check(key); err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, certFile), key)
	if err != nil && finishStoring(dir) == nil {
		cert, err = tls.LoadX509KeyPair(filepath.Join(dir, certFile), key)
	}
	if err != nil {
		return nil, err
	}
	if now.After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate ended at %s", cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return &cert, nil
}

// LoadPool reads the PEM certificates of files, e.g. ROLE/intermediate.pem for the
// clients of a door or root.pem for servers. The pool trusts these and no other.
func LoadPool(files ...string) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("loading certificate pool: %w", err)
		}
		if !pool.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("loading certificate pool: %s holds no certificate", file)
		}
	}
	return pool, nil
}
