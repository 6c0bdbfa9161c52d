package admin_test

import (
	"errors"
	"net/http"
	"testing"

	"github.com/qutemail/kme/internal/admin"
)

// Letting a link go on is a security officer's duty: others are refused, and it is recorded.
func TestTrustLink(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	if err := s.client("root").TrustLink(t.Context(), "km1-km2"); err != nil {
		t.Errorf("with the duty: %v", err)
	}
	err := s.client("vera").TrustLink(t.Context(), "km1-km2")
	var api *admin.APIError
	if !errors.As(err, &api) || api.Status != http.StatusForbidden {
		t.Errorf("without the duty: %v", err)
	}
}
