package legacy_test

import (
	"encoding/json"
	"os"
	"testing"
)

// TestDescribed: what may come of any request, whatever it asks for, stands in the
// description of each of the routes.
func TestDescribed(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../etsi014/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	var api struct {
		Paths map[string]map[string]struct {
			Tags      []string                   `json:"tags"`
			Responses map[string]json.RawMessage `json:"responses"`
		} `json:"paths"`
	}
	if err := json.Unmarshal(text, &api); err != nil {
		t.Fatal(err)
	}
	routes := 0
	for path, methods := range api.Paths {
		for method, route := range methods {
			if len(route.Tags) != 1 || route.Tags[0] != "QuteMail" {
				continue
			}
			routes++
			for _, status := range []string{"401", "500", "503"} {
				if route.Responses[status] == nil {
					t.Errorf("%s %s: no %s", method, path, status)
				}
			}
		}
	}
	if routes != 5 {
		t.Errorf("%d routes are described", routes)
	}
}
