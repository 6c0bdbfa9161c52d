package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// ServerTLS is the configuration of a door: it shows c and lets nobody in without a
// certificate for clients that clientCAs signed. Give it the issuing CA of the
// door's role alone, not the root, which the roles share. minVersion is at least
// TLS 1.2 whatever is given.
//
// Tickets are off: a resumed session would be an identity that nobody has judged
// afresh.
func ServerTLS(c *Credential, clientCAs *x509.CertPool, minVersion uint16) *tls.Config {
	return &tls.Config{
		MinVersion:             max(minVersion, tls.VersionTLS12),
		CipherSuites:           forwardSecret,
		CurvePreferences:       groups,
		NextProtos:             []string{"h2", "http/1.1"},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              orNobody(clientCAs),
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return c.current.Load(), nil
		},
	}
}

// forwardSecret are the cipher suites of TLS 1.2 that we take; those of TLS 1.3 are
// not for choice.
var forwardSecret = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
}

// groups are those of the key exchange. The first protects what is recorded today from
// a quantum computer of tomorrow; two of our own always agree on it.
var groups = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384}

// ClientTLS is the configuration of a client: it shows c, speaks TLS 1.3 only, and
// takes a server whose certificate chains to roots, holds for the host name that
// was dialled, and passes verify (see PeerURI). With a nil verify chain and host
// name are enough.
func ClientTLS(c *Credential, roots *x509.CertPool, verify func(leaf *x509.Certificate) error) *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: groups,
		RootCAs:          orNobody(roots),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return c.current.Load(), nil
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.VerifiedChains) == 0 {
				return errors.New("the server's certificate was not verified")
			}
			if verify == nil {
				return nil
			}
			return verify(state.PeerCertificates[0])
		},
	}
}

// AnonymousTLS is the configuration of a client that shows no certificate: to ask a
// CA for its health, its CRL or, with a token, a first certificate. It checks the
// server as ClientTLS does.
func AnonymousTLS(roots *x509.CertPool) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: orNobody(roots)}
}

// orNobody keeps crypto/tls from taking a missing pool for the system's roots.
func orNobody(pool *x509.CertPool) *x509.CertPool {
	if pool == nil {
		return x509.NewCertPool()
	}
	return pool
}

// PeerURI accepts a certificate whose only URI is uri, e.g. "qkd://kme.lab.test/km2".
// A KME must know which KME it speaks to: host names do not tell them apart.
func PeerURI(uri string) func(leaf *x509.Certificate) error {
	return func(leaf *x509.Certificate) error {
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != uri {
			return fmt.Errorf("the server is %v, not %s", leaf.URIs, uri)
		}
		return nil
	}
}
