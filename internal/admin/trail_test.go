package admin_test

import (
	"net/http"
	"testing"
)

// TestMalformedTrail: a question to the audit log that does not parse reaches no
// Backend, and is recorded before it is answered.
func TestMalformedTrail(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	root := s.http("root")
	paths := []string{"search?limit=x", "search?first=-1", "search?nothing=1", "proof?leaf=x", "bundle?first=x", "bundle?end=-1"}
	for _, path := range paths {
		resp, err := root.Get(s.server.URL + "/api/v1/audit/" + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	if len(s.refusals) != len(paths) || len(s.callers) != 0 {
		t.Errorf("%d refusals were told, want %d: %q; the Backend saw %q", len(s.refusals), len(paths), s.refusals, s.callers)
	}
}
