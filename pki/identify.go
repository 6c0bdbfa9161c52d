package pki

import (
	"fmt"
	"net/http"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Identify returns the function with which the door of a pool asks who is calling.
// It is the only place that looks at a request's certificate. The chain has been
// verified by the handshake (ServerTLS); the certificate is judged again on every
// request, against the map and at the time of that moment. On an error the Caller
// is a stranger that still carries what is known of the certificate, and where it
// called from.
func Identify(pool string, current func() *identity.Map, now func() time.Time) func(*http.Request) (identity.Caller, error) {
	return func(r *http.Request) (identity.Caller, error) {
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
			denial := &identity.Denial{Reason: identity.NoCertificate}
			return identity.Stranger(nil).WithRemote(r.RemoteAddr), fmt.Errorf("identifying the caller: %w", denial)
		}
		caller, err := current().Judge(pool, r.TLS.VerifiedChains[0][0], now())
		if err != nil {
			err = fmt.Errorf("identifying the caller: %w", err)
		}
		return caller.WithRemote(r.RemoteAddr), err
	}
}
