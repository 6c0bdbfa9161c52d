package etsi014_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

func TestClientRoundTrip(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, d, _ := stage(t, false)
	client := func(kme, who string) *etsi014.Client {
		base, hc, err := s.Client(kme, who)
		if err != nil {
			t.Fatal(err)
		}
		return etsi014.NewClient(base+"/", hc)
	}
	alice, bob := client("KM1", "alice"), client("KM2", "bob")

	status, err := alice.Status(ctx, sae(t, "bob"))
	if err != nil {
		t.Fatal(err)
	}
	want := etsi014.Status{
		SourceKME: "km1", TargetKME: "km2", Master: "alice", Slave: "bob", KeySize: 256, Stored: d.pool,
		Max: 1_000_000, MaxPerRequest: 128, MaxSize: 4096, MinSize: 64, MaxSAEs: 32,
	}
	if diff := cmp.Diff(want, status); diff != "" {
		t.Errorf("Status (-want +got):\n%s", diff)
	}

	var issued []etsi014.Key
	for _, r := range []etsi014.KeyRequest{{}, {Number: 2}, {Bits: 256}, {Number: 3, Bits: 256}} {
		post, err := alice.EncKeys(ctx, sae(t, "bob"), r)
		if err != nil {
			t.Fatal(err)
		}
		get, err := alice.EncKeysGET(ctx, sae(t, "bob"), r)
		if err != nil {
			t.Fatal(err)
		}
		if n := max(1, r.Number); len(post.Keys) != n || len(get.Keys) != n {
			t.Errorf("EncKeys(%+v): got %d and %d keys, want %d", r, len(post.Keys), len(get.Keys), n)
		}
		issued = append(append(issued, post.Keys...), get.Keys...)
	}
	var ids []key.ID
	for _, k := range issued[1:] {
		ids = append(ids, k.ID)
		if k.Provenance != key.Simulated {
			t.Errorf("key %s: got provenance %q, want %q", k.ID, k.Provenance, key.Simulated)
		}
	}
	one, err := bob.DecKeysGET(ctx, sae(t, "alice"), issued[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	rest, err := bob.DecKeys(ctx, sae(t, "alice"), ids)
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range append(one.Keys, rest.Keys...) {
		if k.ID != issued[i].ID || string(k.Material.Reveal()) != string(issued[i].Material.Reveal()) {
			t.Errorf("key %d differs between its master and its slave", i)
		}
	}
	more, err := alice.EncKeys(ctx, sae(t, "bob"), etsi014.KeyRequest{AdditionalSlaves: []identity.SAE{sae(t, "erin")}, Provenance: key.Simulated})
	if err != nil {
		t.Fatal(err)
	}
	for _, who := range []string{"bob", "erin"} {
		if got, err := client("KM2", who).DecKeysGET(ctx, sae(t, "alice"), more.Keys[0].ID); err != nil || string(got.Keys[0].Material.Reveal()) != string(more.Keys[0].Material.Reveal()) {
			t.Errorf("%s does not get the key: %v", who, err)
		}
	}
	for _, r := range []etsi014.KeyRequest{{AdditionalSlaves: []identity.SAE{sae(t, "erin")}}, {Provenance: key.Simulated}} {
		if _, err := alice.EncKeysGET(ctx, sae(t, "bob"), r); err == nil || statusOf(err) != 0 {
			t.Errorf("a GET of %+v: %v, want it not to be sent", r, err)
		}
	}
	if _, err = alice.EncKeys(ctx, sae(t, "bob"), etsi014.KeyRequest{Provenance: key.QKD}); statusOf(err) != 400 || !strings.Contains(err.Error(), "could be met") {
		t.Errorf("EncKeys of what there is not: got %v, want a 400", err)
	}
	if _, err = alice.EncKeys(ctx, sae(t, "bob"), etsi014.KeyRequest{Number: 129}); statusOf(err) != 400 {
		t.Errorf("EncKeys of 129 keys: got %v, want a 400", err)
	}
}

func statusOf(err error) int {
	if e, ok := errors.AsType[*etsi014.APIError](err); ok {
		return e.Status
	}
	return 0
}

func TestClientErrors(t *testing.T) {
	t.Parallel()
	s, d, _ := stage(t, true)
	base, hc, err := s.Client("KM1", "alice")
	if err != nil {
		t.Fatal(err)
	}
	d.fault = &problem.Error{Kind: problem.Unavailable, Detail: "not enough keys", RetryAfter: 3 * time.Second}
	_, err = etsi014.NewClient(base, hc).EncKeys(context.Background(), sae(t, "bob"), etsi014.KeyRequest{})
	e, ok := errors.AsType[*etsi014.APIError](err)
	if !ok || e.Status != 503 || e.Message != "not enough keys" || e.RetryAfter != 3*time.Second || d.events[e.RequestID] != 1 {
		t.Errorf("EncKeys: got %#v, want a 503", err)
	}
}

// Answers of other KMEs, some of which do not keep to the standard.
func TestClientReadsOthers(t *testing.T) {
	t.Parallel()
	const id = "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"
	tests := []struct {
		name   string
		status int
		body   string
		err    string // that it contains; "" for none
	}{
		{"plain", 200, `{"keys":[{"key_ID":"` + id + `","key":"AAECAw=="}]}`, ""},
		{"escaped", 200, `{"keys":[{"key_ID":"` + id + `","key":"\u0041AECAw=="}]}`, ""},
		{"extensions", 200, `{"keys":[{"key_ID":"` + strings.ToUpper(id) + `","key":"AAECAw==","key_extension":"","key_ID_extension":null}],"key_container_extension":{}}`, ""},
		{"capital", 200, `{"Keys":[{"key_ID":"` + id + `","key":"AAECAw=="}]}`, "empty"},
		{"none", 200, `{"keys":[]}`, "empty"},
		{"no key", 200, `{"keys":[{"key_ID":"` + id + `"}]}`, "no key"},
		{"no ID", 200, `{"keys":[{"key":"AAECAw=="}]}`, "no key_ID"},
		{"bad base64", 200, `{"keys":[{"key_ID":"` + id + `","key":"AAECAw"}]}`, "base64"},
		{"other key", 200, `{"keys":[{"key_ID":"1193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11","key":"AAECAw=="}]}`, "other keys"},
		{"more keys", 200, `{"keys":[{"key_ID":"` + id + `","key":"AAECAw=="},{"key_ID":"` + id + `","key":"AAECAw=="}]}`, "other keys"},
		{"no JSON", 200, `<html>`, "invalid character"},
		{"details as strings", 400, `{"message":"so not","details":["a"]}`, "400: so not"},
		{"no body", 401, ``, "401"},
		{"no JSON error", 502, `<html>`, "502"},
	}
	for _, test := range tests {
		for _, chunked := range []bool{false, true} {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(test.status)
				if chunked {
					_ = http.NewResponseController(w).Flush()
				}
				_, _ = w.Write([]byte(test.body))
			}))
			want, err := key.ParseID(id)
			if err != nil {
				t.Fatal(err)
			}
			got, err := etsi014.NewClient(server.URL, server.Client()).DecKeysGET(context.Background(), sae(t, "alice"), want)
			server.Close()
			switch {
			case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err) || len(got.Keys) != 0):
				t.Errorf("%s: got %v and %d keys, want an error with %q", test.name, err, len(got.Keys), test.err)
			case test.err == "" && (err != nil || string(got.Keys[0].Material.Reveal()) != "\x00\x01\x02\x03"):
				t.Errorf("%s: got %v", test.name, err)
			}
		}
	}
}

func TestClientReadsLongAnswers(t *testing.T) {
	t.Parallel()
	for size, want := range map[int]bool{100_000: true, 17 << 20: false} {
		for _, announced := range []bool{true, false} {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if !announced {
					_ = http.NewResponseController(w).Flush()
				}
				_, _ = w.Write(append([]byte(`{"master_SAE_ID":"alice"}`), strings.Repeat(" ", size)...))
			}))
			got, err := etsi014.NewClient(server.URL, server.Client()).Status(context.Background(), sae(t, "bob"))
			server.Close()
			if (err == nil && got.Master == "alice") != want {
				t.Errorf("an answer of %d bytes: got %v, want accepted %v", size, err, want)
			}
		}
	}
}
