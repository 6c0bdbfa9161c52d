package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"testing"
)

// TestExpired: of a KME whose certificate has ended, that is said, and no guess is made.
func TestExpired(t *testing.T) {
	t.Parallel()
	ended := &url.Error{Op: "Get", URL: "https://km1", Err: &tls.CertificateVerificationError{Err: x509.CertificateInvalidError{Reason: x509.Expired}}}
	advice, ok := errors.AsType[*advised](party{kme: "https://km1"}.explain(ended, ""))
	if !ok || !strings.Contains(advice.next, "https://km1 has ended") {
		t.Errorf("%+v", advice)
	}
}
