package etsi014

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// wide are limits that let more through than any KME's.
var wide = Limits{KeySize: 256, MinSize: 8, MaxSize: 4096, MaxPerRequest: 128, MaxSAEs: 3}

func parsed(t testing.TB, id string) identity.SAE {
	t.Helper()
	s, err := identity.ParseSAE(id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// checkRefusal holds every refusal of a parser to what the door tells callers.
func checkRefusal(t *testing.T, err error) {
	t.Helper()
	p, ok := errors.AsType[*problem.Error](err)
	if !ok || p.Kind != problem.Invalid || p.Detail == "" {
		t.Fatalf("got %v, want a problem of the request with a sentence", err)
	}
	_, o, _ := wireError(err, "")
	texts := []string{o.Message}
	for _, d := range o.Details {
		for name, value := range d {
			texts = append(texts, name, value)
		}
	}
	for _, text := range texts {
		if !utf8.ValidString(text) || len(text) > 300 {
			t.Errorf("the answer says %.400q", text)
		}
	}
	if bytes.ContainsFunc([]byte(o.Message), unicode.IsControl) {
		t.Errorf("the message is %q", o.Message)
	}
	var back errorObject
	if err := json.Unmarshal(marshalError(o), &back); err != nil {
		t.Errorf("the answer cannot be read: %v", err)
	}
}

func FuzzKeyRequest(f *testing.F) {
	for _, s := range []string{
		"", "{}", `{"number":3,"size":128}`, `{"number":null,"size":8}`, `{"additional_slave_SAE_IDs":["carol","dave"]}`,
		`{"extension_mandatory":[{"a_b":1}]}`, `{"extension_optional":[{"a_b":{}}],"more":[]}`, `{"number":1,"number":1}`,
	} {
		f.Add([]byte(s))
	}
	master, slave := parsed(f, "alice"), parsed(f, "bob")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parseKeyRequest(body, master, slave, wide)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		if r.Number < 1 || r.Number > wide.MaxPerRequest || r.Bits < wide.MinSize || r.Bits > wide.MaxSize || r.Bits%8 != 0 || len(r.AdditionalSlaves) > wide.MaxSAEs {
			t.Errorf("accepted %+v", r)
		}
		if slices.Contains(r.AdditionalSlaves, master) || slices.Contains(r.AdditionalSlaves, slave) {
			t.Errorf("accepted %+v", r)
		}
		again, err := parseKeyRequest(keyRequestBody(r), master, slave, wide)
		if err != nil || again.Number != r.Number || again.Bits != r.Bits || !slices.Equal(again.AdditionalSlaves, r.AdditionalSlaves) {
			t.Errorf("%+v came back as %+v, %v", r, again, err)
		}
	})
}

func FuzzKeyRequestQuery(f *testing.F) {
	for _, s := range []string{"", "number=3&size=128", "size=8", "number=+3", "number=%33", "number=1&number=1", "a=b", "number=1;size=8"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		r, err := parseKeyRequestQuery(query, wide)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		q := url.Values{"number": {strconv.Itoa(r.Number)}, "size": {strconv.Itoa(r.Bits)}}
		again, err := parseKeyRequestQuery(q.Encode(), wide)
		if err != nil || again.Number != r.Number || again.Bits != r.Bits {
			t.Errorf("%+v came back as %+v, %v", r, again, err)
		}
	})
}

func FuzzKeyIDs(f *testing.F) {
	const id = "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"
	for _, s := range []string{
		`{"key_IDs":[{"key_ID":"` + id + `"}]}`, `{"key_IDs":[{"key_ID":"` + id + `","x":1},{"key_ID":"1` + id[1:] + `"}],"y":{}}`,
		`{"key_IDs":["` + id + `"]}`, `{"key_IDs":[]}`, `{"key_IDs":[null]}`, `{}`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		ids, err := parseKeyIDs(body, wide)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		again, err := parseKeyIDs(keyIDsBody(ids), wide)
		if err != nil || !slices.Equal(ids, again) || len(ids) == 0 || len(ids) > wide.MaxPerRequest {
			t.Errorf("%v came back as %v, %v", ids, again, err)
		}
		slices.SortFunc(ids, func(a, b key.ID) int { return bytes.Compare(a[:], b[:]) })
		if len(slices.Compact(ids)) != len(again) {
			t.Errorf("accepted a key twice: %v", again)
		}
	})
}

func FuzzKeyIDsQuery(f *testing.F) {
	for _, s := range []string{"key_ID=0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11", "key_ID=x", "", "key_ID=%7B0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11%7D"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		ids, err := parseKeyIDsQuery(query)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		again, err := parseKeyIDsQuery("key_ID=" + ids[0].String())
		if err != nil || len(ids) != 1 || !slices.Equal(ids, again) {
			t.Errorf("%v came back as %v, %v", ids, again, err)
		}
	})
}

// Whatever SAE ID a client names, the door reads that one: the two ways in which
// the router hands over a segment are told apart.
func FuzzPathSAE(f *testing.F) {
	for _, s := range []string{"bob", "a/b", "a%2Fb", "100%", "%41", "alice@example.com", "é", "a b", "a+b", "a;b", "a?b#c", "..", "\x00", "%zz", "a:b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, id string) {
		want, err := identity.ParseSAE(id)
		if err != nil {
			if _, err := parsePathSAE(id, false); err == nil {
				t.Errorf("accepted %q", id)
			} else {
				checkRefusal(t, err)
			}
			return
		}
		var got identity.SAE
		r := chi.NewRouter()
		r.Get("/api/v1/keys/{sae}/status", func(_ http.ResponseWriter, r *http.Request) {
			var err error
			if got, err = parsePathSAE(chi.URLParam(r, "sae"), r.URL.RawPath != ""); err != nil {
				t.Error(err)
			}
		})
		r.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", path(want, "status", nil), nil))
		if got != want {
			t.Errorf("%q came in as %q", want, got)
		}
	})
}

func FuzzContainer(f *testing.F) {
	id := key.NewLocalID(key.Epoch(480_000).Start(3_600_000_000_000))
	f.Add(appendContainer(nil, Container{Keys: []Key{{ID: id, Material: key.NewMaterial([]byte("0123456789abcdef")), Provenance: key.QKD}}}))
	f.Add([]byte(`{"keys":[{"key_ID":"` + id.String() + `","key":"AA==","key_extension":{"qkm_provenance":"\""}}]}`))
	f.Add([]byte(`{"keys":[]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := parseContainer(body)
		if err != nil {
			return
		}
		buf := appendContainer(make([]byte, 0, containerSize(c)), c)
		if len(buf) > containerSize(c) {
			t.Errorf("%d bytes do not fit into %d", len(buf), containerSize(c))
		}
		again, err := parseContainer(buf)
		if err != nil || len(again.Keys) != len(c.Keys) {
			t.Fatalf("the container came back as %d keys, %v", len(again.Keys), err)
		}
		for i, k := range again.Keys {
			if k.ID != c.Keys[i].ID || k.Provenance != c.Keys[i].Provenance || !bytes.Equal(k.Material.Reveal(), c.Keys[i].Material.Reveal()) {
				t.Errorf("key %d came back otherwise", i)
			}
		}
	})
}

func TestContainerSize(t *testing.T) {
	t.Parallel()
	for _, provenance := range []key.Provenance{"", key.QKD, key.Simulated, key.LocalRNG} {
		for bytes := 1; bytes <= 512; bytes++ {
			c := Container{Keys: []Key{{Material: key.NewMaterial(make([]byte, bytes)), Provenance: provenance}, {Material: key.NewMaterial(make([]byte, bytes))}}}
			if n := len(appendContainer(nil, c)); n > containerSize(c) {
				t.Errorf("2 keys of %d bytes: %d bytes do not fit into %d", bytes, n, containerSize(c))
			}
		}
	}
}
