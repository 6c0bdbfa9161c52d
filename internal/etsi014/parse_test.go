package etsi014

import (
	"errors"
	"slices"
	"testing"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// Rows 014-6.2-08 and 014-6.2-09 for a KME that can serve several slaves.
func TestAdditionalSlaves(t *testing.T) {
	t.Parallel()
	const tooMany = "additional_slave_SAE_IDs shall have at most 3 entries"
	const repeated = "additional_slave_SAE_IDs shall name each SAE once, and neither the master nor the slave"
	const noSAE = "an entry of additional_slave_SAE_IDs is not an SAE ID"
	for body, want := range map[string]struct {
		saes   []string
		detail string // of the refusal
	}{
		`["carol"]`:                 {saes: []string{"carol"}},
		`["carol","dave","b/c é@"]`: {saes: []string{"carol", "dave", "b/c é@"}},
		`["Carol","carol"]`:         {saes: []string{"Carol", "carol"}},
		`[]`:                        {},
		`null`:                      {},
		`["a","b","c","d"]`:         {detail: tooMany},
		`["carol","dave","carol"]`:  {detail: repeated},
		`["carol","bob"]`:           {detail: repeated},
		`["alice"]`:                 {detail: repeated},
		`["carol",""]`:              {detail: noSAE},
		`["  "]`:                    {detail: noSAE},
		`["a\nb"]`:                  {detail: noSAE},
		`[null]`:                    {detail: "additional_slave_SAE_IDs shall be an array of strings"},
		`["carol",1]`:               {detail: "/additional_slave_SAE_IDs/1 in the body is of the wrong type or out of range"},
	} {
		r, err := parseKeyRequest([]byte(`{"additional_slave_SAE_IDs":`+body+`}`), parsed(t, "alice"), parsed(t, "bob"), wide)
		var saes []identity.SAE
		for _, id := range want.saes {
			saes = append(saes, parsed(t, id))
		}
		var detail string
		if p, ok := errors.AsType[*problem.Error](err); ok {
			detail = p.Detail
		}
		if detail != want.detail || !slices.Equal(r.AdditionalSlaves, saes) {
			t.Errorf("%s: got %v, %q; want %v, %q", body, r.AdditionalSlaves, detail, saes, want.detail)
		}
	}
}

// What an answer repeats of a request is bounded.
func TestUnsupportedExtensionsAreCutShort(t *testing.T) {
	t.Parallel()
	body := `{"extension_mandatory":[{"0":0`
	for i := range 20 {
		body += `,"` + string(rune('a'+i)) + `_ä` + longName + `":0`
	}
	_, err := parseKeyRequest([]byte(body+`}]}`), parsed(t, "alice"), parsed(t, "bob"), wide)
	checkRefusal(t, err)
	if _, o, _ := wireError(err, ""); len(o.Details) != maxDetails || o.Message != msgMandatory {
		t.Errorf("got %d details and %q", len(o.Details), o.Message)
	}
}

const longName = "äääääääääääääääääääääääääääääääääääääääääääääääääääääääääääääää"
