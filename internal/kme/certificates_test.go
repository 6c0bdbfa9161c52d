package kme

import (
	"crypto/x509"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

// TestHandshakesAreRecorded: refused ones, summed up, and what became of the node's own
// certificate.
func TestHandshakesAreRecorded(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	leaf := &x509.Certificate{Raw: []byte("alice"), SerialNumber: big.NewInt(4711), NotAfter: time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)}
	err := k.RecordRefusals(t.Context(), []pki.Refusal{
		{Door: "sae", Reason: "revoked", Detail: "reason 1", Remote: "192.0.2.1:1", Certificate: identity.Stranger(leaf).Certificate(), Count: 3},
		{Door: "assign", Reason: "busy", Count: 1000},
		{Door: "sae", Reason: pki.Flood, Network: "192.0.2.1/32", Remote: "192.0.2.1:1", Count: 7},
	})
	if err != nil {
		t.Fatal(err)
	}
	k.RecordRenewal(t.Context(), leaf, nil)
	k.RecordRenewal(t.Context(), leaf, errors.New("the CA is away"))
	want := []told{
		{"handshake", "refused", "revoked: reason 1", 3},
		{"handshake", "refused", "busy", 1000},
		{"handshake", "refused", "flood: 192.0.2.1/32", 7},
		{"certificate", "done", "serial 4711 until 2026-12-01T00:00:00Z", 0},
		{"certificate", "failed", "the CA is away", 0},
	}
	if diff := cmp.Diff(want, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}
