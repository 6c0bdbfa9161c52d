package policies

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Recipe is a certificate that an operator wants to know the verdict on before any CA
// issues it. What is left out is as our CAs issue it. It is never signed by a CA.
type Recipe struct {
	Pool string // the door's

	URIs, Emails, DNS []string // SANs, byte for byte
	DN                string   // the whole subject, RFC 4514

	CA       bool     // a CA's certificate
	EKU      []string // clientAuth, serverAuth, any; nil: those of the pool's role, by its name
	KeyUsage []string // digitalSignature, keyEncipherment, certSign, crlSign; nil: digitalSignature
	Key      string   // ecdsa-p256 (default), ecdsa-p384, ed25519, rsa
	Role     string   // of the role extension; "": that of the pool, by its name; none: it has no such extension
	Lifetime time.Duration
	Starts   time.Duration // from now; before now if negative
}

var (
	ekus = map[string]x509.ExtKeyUsage{
		"clientAuth": x509.ExtKeyUsageClientAuth, "serverAuth": x509.ExtKeyUsageServerAuth, "any": x509.ExtKeyUsageAny,
	}
	keyUsages = map[string]x509.KeyUsage{
		"digitalSignature": x509.KeyUsageDigitalSignature, "keyEncipherment": x509.KeyUsageKeyEncipherment,
		"certSign": x509.KeyUsageCertSign, "crlSign": x509.KeyUsageCRLSign,
	}
)

// Certificate makes the certificate, signed by its own key.
func (r Recipe) Certificate(now time.Time) (*x509.Certificate, error) {
	begins := now.Add(r.Starts).Add(-time.Minute)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: begins, NotAfter: begins.Add(24 * time.Hour),
		IsCA: r.CA, BasicConstraintsValid: r.CA, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if r.Lifetime > 0 {
		c.NotAfter = begins.Add(r.Lifetime)
	}
	if r.Pool == string(identity.RoleKME) {
		c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if role := cmp.Or(r.Role, r.Pool); role != "none" {
		c.ExtraExtensions = append(c.ExtraExtensions, identity.RoleExtension(identity.Role(role)))
	}
	if r.EKU != nil {
		c.ExtKeyUsage = nil
		for _, name := range r.EKU {
			usage, ok := ekus[name]
			if !ok {
				return nil, fmt.Errorf("eku %q is not known here", name)
			}
			c.ExtKeyUsage = append(c.ExtKeyUsage, usage)
		}
	}
	if r.KeyUsage != nil {
		c.KeyUsage = 0
		for _, name := range r.KeyUsage {
			usage, ok := keyUsages[name]
			if !ok {
				return nil, fmt.Errorf("key_usage %q is not known here", name)
			}
			c.KeyUsage |= usage
		}
	}
	var err error
	if r.DN != "" {
		if c.RawSubject, err = identity.SubjectDER(r.DN); err != nil {
			return nil, err
		}
	}
	if err := r.addNames(c); err != nil {
		return nil, err
	}
	key, err := newKey(r.Key)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// addNames writes the SANs by hand: x509.CreateCertificate would tidy them up.
func (r Recipe) addNames(c *x509.Certificate) error {
	var names []asn1.RawValue
	for tag, list := range map[int][]string{1: r.Emails, 2: r.DNS, 6: r.URIs} { // RFC 5280, 4.2.1.6
		for _, name := range list {
			names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(name)})
		}
	}
	if len(names) == 0 {
		return nil
	}
	value, err := asn1.Marshal(names)
	if err != nil {
		return err
	}
	c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: value})
	return nil
}

func newKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "", string(identity.ECDSAP256):
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case string(identity.ECDSAP384):
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case string(identity.Ed25519):
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	case "rsa":
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("key %q is not known here", kind)
}

// Case is a Recipe with the verdict that is expected.
type Case struct {
	Name string
	Recipe
	Principal string // whom it names; "" if Refused
	Refused   string // the reason of the Denial
	place
}

// Verdict is what a Set makes of a Recipe: whom it names, or why nobody.
func (s *Set) Verdict(r Recipe, now time.Time) (principal, refused string, err error) {
	leaf, err := r.Certificate(now)
	if err != nil {
		return "", "", err
	}
	c, err := s.Principals.Judge(r.Pool, leaf, now)
	if denial, ok := errors.AsType[*identity.Denial](err); ok {
		return "", denial.Reason, nil
	}
	return c.ID(), "", err
}

// Check is nil if s says what the Case expects.
func (c Case) Check(s *Set, now time.Time) error {
	principal, refused, err := s.Verdict(c.Recipe, now)
	if err != nil {
		return c.errorf("%s: %w", c.Name, err)
	}
	if principal != c.Principal || refused != c.Refused {
		return c.errorf("%s: got %s, want %s", c.Name, verdictWord(principal, refused), verdictWord(c.Principal, c.Refused))
	}
	return nil
}

func verdictWord(principal, refused string) string {
	if refused != "" {
		return "refused: " + refused
	}
	return "the principal " + principal
}

type casesDoc struct {
	Version version   `yaml:"version"`
	Cases   []caseDoc `yaml:"cases"`
}

type caseDoc struct {
	Name      word     `yaml:"name"`
	Pool      word     `yaml:"pool"`
	URIs      []string `yaml:"uris"`
	Emails    []string `yaml:"emails"`
	DNS       []string `yaml:"dns"`
	DN        string   `yaml:"dn"`
	CA        bool     `yaml:"ca"`
	EKU       []string `yaml:"eku"`
	KeyUsage  []string `yaml:"key_usage"`
	Key       string   `yaml:"key"`
	Role      string   `yaml:"role"`
	Lifetime  lifetime `yaml:"lifetime"`
	Starts    string   `yaml:"starts"`
	Principal word     `yaml:"principal"`
	Refused   word     `yaml:"refused"`
}

// ParseCases reads a file of Cases.
func ParseCases(file string, text []byte) ([]Case, error) {
	var doc casesDoc
	where, err := decode(file, text, &doc)
	if err != nil {
		return nil, err
	}
	if doc.Version != 1 || len(doc.Cases) == 0 {
		return nil, place{file, 1, 1}.errorf("no version: 1, or no cases")
	}
	cases := make([]Case, len(doc.Cases))
	for i, d := range doc.Cases {
		at := where.entry("cases", i).or(d.Name)
		var starts time.Duration
		if d.Starts != "" {
			if starts, err = time.ParseDuration(d.Starts); err != nil {
				return nil, at.errorf("starts: %w", err)
			}
		}
		if d.Name.text == "" || d.Pool.text == "" || (d.Principal.text == "") == (d.Refused.text == "") {
			return nil, at.errorf("a case needs a name, a pool, and either the principal or why it is refused")
		}
		cases[i] = Case{
			Name: d.Name.text, Principal: d.Principal.text, Refused: d.Refused.text, place: at,
			Recipe: Recipe{
				Pool: d.Pool.text, URIs: d.URIs, Emails: d.Emails, DNS: d.DNS, DN: d.DN, CA: d.CA, EKU: d.EKU, KeyUsage: d.KeyUsage,
				Key: d.Key, Role: d.Role, Lifetime: time.Duration(d.Lifetime), Starts: starts,
			},
		}
	}
	return cases, nil
}
