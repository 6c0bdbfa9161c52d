package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/legacy"
)

// advised is an error together with what to do next.
type advised struct {
	err  error
	next string
}

// Error is the error without the advice, which main prints on a line of its own.
func (a *advised) Error() string { return a.err.Error() }

// Unwrap returns the error.
func (a *advised) Unwrap() error { return a.err }

func advise(err error, next string, args ...any) error {
	return &advised{err, fmt.Sprintf(next, args...)}
}

// explain adds to the error of a call what its caller can do about it. denied is
// the advice for a 401.
func (p party) explain(err error, denied string) error {
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	if answer, ok := errors.AsType[*etsi014.APIError](err); ok {
		return explainStatus(err, answer.Status, answer.RetryAfter.String(), denied)
	}
	if answer, ok := errors.AsType[*legacy.APIError](err); ok {
		return explainStatus(err, answer.Status, answer.RetryAfter.String(), denied)
	}
	if answer, ok := errors.AsType[*admin.APIError](err); ok {
		return explainStatus(err, answer.Status, "a few seconds", denied)
	}
	op, _ := errors.AsType[*net.OpError](err)
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, syscall.ECONNREFUSED):
		return advise(err, "nobody listens at %s: is the KME running (for the lab: make run), and is --kme right?", p.kme)
	case errors.As(err, &unknown):
		return advise(err, "the KME at %s does not chain to %s: name its root by --ca", p.kme, p.ca)
	case errors.As(err, &host):
		return advise(err, "use in --kme a name that the KME's certificate holds for")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return advise(err, "the certificate of the KME at %s has ended, or this machine's clock is wrong: runbooks/certificates.md", p.kme)
	case op != nil && op.Op == "remote error":
		return advise(err, "the KME does not take the certificate %s: this door may be another role's, or its CA another", p.cert)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF):
		return advise(err, "the KME hung up: it is going down, or it does not take the certificate %s at this door", p.cert)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return advise(err, "the KME at %s is slow or unreachable: try again, or raise --timeout", p.kme)
	}
	return err
}

func asAPIError(err error) (*etsi014.APIError, bool) { return errors.AsType[*etsi014.APIError](err) }

func explainStatus(err error, status int, after, denied string) error {
	switch status {
	case 401:
		return advise(err, "%s", denied)
	case 403:
		return advise(err, "principals.yaml says what an operator may do: its duties")
	case 404:
		return advise(err, "this door has no such call: is --kme the right door?")
	case 503:
		if after == "0s" {
			after = "a few seconds"
		}
		return advise(err, "try again in %s; to operators, kmectl node and kmectl link say what is missing", after)
	}
	return err
}
