package pki

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
)

// Issuers are the issuing CAs whose certificates the doors of one role take, and no
// others: give each role its own, not the root, which the roles share. More than one
// is a file's normal state while one CA follows another.
type Issuers struct {
	file    string
	current atomic.Pointer[issuerSet]
}

type issuerSet struct {
	certs []*x509.Certificate
	pool  *x509.CertPool
}

// LoadIssuers reads the PEM certificates of file.
func LoadIssuers(file string) (*Issuers, error) {
	i := &Issuers{file: file}
	if err := i.Reload(); err != nil {
		return nil, err
	}
	return i, nil
}

// Reload reads the file again. On an error the issuers stay what they were.
func (i *Issuers) Reload() error {
	certs, err := readCertificates(i.file)
	if err != nil {
		return fmt.Errorf("loading the issuing CAs %s: %w", i.file, err)
	}
	for _, c := range certs {
		if !c.IsCA || len(c.SubjectKeyId) == 0 {
			return fmt.Errorf("loading the issuing CAs %s: %s is no CA", i.file, c.Subject)
		}
	}
	i.current.Store(&issuerSet{certs, poolOf(certs...)})
	return nil
}

// Pool is the issuers as crypto/tls wants them. It is not to be changed.
func (i *Issuers) Pool() *x509.CertPool { return i.current.Load().pool }

// Issued says whether one of the issuers has signed a certificate, whatever the time.
func (i *Issuers) Issued(leaf *x509.Certificate) bool {
	return slices.ContainsFunc(i.all(), func(ca *x509.Certificate) bool { return leaf.CheckSignatureFrom(ca) == nil })
}

func (i *Issuers) all() []*x509.Certificate { return i.current.Load().certs }

// readCertificates reads a file of one or more PEM certificates and nothing else.
func readCertificates(file string) ([]*x509.Certificate, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a %s beside certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("it holds no certificate")
	}
	return certs, nil
}
