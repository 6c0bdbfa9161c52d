package legacy_test

import (
	"context"
	encoding "encoding/base64"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/problem"
)

func base64(b []byte) string { return encoding.StdEncoding.EncodeToString(b) }

func sae(t testing.TB, id string) identity.SAE {
	t.Helper()
	s, err := identity.ParseSAE(id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestClientRoundTrip(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, d := stage(t, true)
	client := func(kme, who string) *legacy.Client {
		base, hc, err := s.Client(kme, who)
		if err != nil {
			t.Fatal(err)
		}
		return legacy.NewClient(base+"/", hc)
	}
	alice, bob := client("KM1", "alice@qutemail.example"), client("KM2", "bob@qutemail.example")
	from, to := sae(t, "alice@qutemail.example"), sae(t, "bob@qutemail.example")

	issued, err := alice.RequestKey(ctx, from, to, 0, 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if issued.Bits != 256 || issued.Source != "pool" || !issued.ExpiresAt.Equal(expires.Add(2*time.Hour).Truncate(time.Second)) {
		t.Errorf("RequestKey: got %+v", issued)
	}
	got, err := bob.RetrieveKey(ctx, to, issued.ID)
	if err != nil || got.ID != issued.ID || string(got.Material.Reveal()) != string(issued.Material.Reveal()) {
		t.Errorf("RetrieveKey: got %+v, %v, want the key that was issued", got, err)
	}
	if _, err := bob.RetrieveKey(ctx, from, issued.ID); statusOf(err) != 403 {
		t.Errorf("RetrieveKey in another's name: got %v, want a 403", err)
	}
	if _, err := alice.RequestKey(ctx, from, to, 257, 0); statusOf(err) != 400 {
		t.Errorf("RequestKey of 257 bits: got %v, want a 400", err)
	}

	service, err := alice.Status(ctx)
	if diff := cmp.Diff(d.service, service); err != nil || diff != "" {
		t.Errorf("Status: %v (-want +got):\n%s", err, diff)
	}
	d.mu.Lock()
	d.service.Database = "error: gone"
	d.mu.Unlock()
	if service, err = alice.Status(ctx); statusOf(err) != 503 || service.Database != "error: gone" {
		t.Errorf("Status: got %+v, %v, want a 503 that says why", service, err)
	}
	d.mu.Lock()
	d.fault = &problem.Error{Kind: problem.Unavailable, Detail: "not enough keys", RetryAfter: 3 * time.Second}
	d.mu.Unlock()
	_, err = alice.RequestKey(ctx, from, to, 256, 0)
	if e, ok := errors.AsType[*legacy.APIError](err); !ok || e.Status != 503 || e.Message != "not enough keys" || e.RetryAfter != 3*time.Second || d.events[e.RequestID] != 1 {
		t.Errorf("RequestKey: got %v, want a 503", err)
	}
}

func statusOf(err error) int {
	if e, ok := errors.AsType[*legacy.APIError](err); ok {
		return e.Status
	}
	return 0
}

// Answers of a server that is not ours, or not well.
func TestClientReadsOthers(t *testing.T) {
	t.Parallel()
	const id = "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"
	good := `{"status":"success","key_id":"` + id + `-bob","key":"AAECAw==","size":32,"algorithm":"BB84"}`
	tests := []struct {
		name   string
		status int
		body   string
		err    string // that it contains; "" for none
	}{
		{"plain", 200, good, ""},
		{"no success", 200, strings.Replace(good, "success", "error", 1), "no key"},
		{"other size", 200, strings.Replace(good, "32", "256", 1), "no key"},
		{"other key", 200, strings.Replace(good, id, "1"+id[1:], 1), "another"},
		{"no key ID", 200, strings.Replace(good, id, "abc123", 1), "UUID"},
		{"bad base64", 200, strings.Replace(good, "==", "", 1), "base64"},
		{"no JSON", 200, `<html>`, "invalid character"},
		{"long", 200, strings.Repeat(" ", 65537), "longer"},
		{"error", 410, `{"status":"error","error":"over"}`, "410: over"},
		{"no body", 502, ``, "502"},
	}
	want, err := key.ParseID(id)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(test.status)
			_, _ = w.Write([]byte(test.body))
		}))
		got, err := legacy.NewClient(server.URL, server.Client()).RetrieveKey(context.Background(), sae(t, "bob"), want)
		server.Close()
		switch {
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err) || got.Material.Bits() != 0):
			t.Errorf("%s: got %v, want an error with %q", test.name, err, test.err)
		case test.err == "" && (err != nil || string(got.Material.Reveal()) != "\x00\x01\x02\x03"):
			t.Errorf("%s: got %v", test.name, err)
		}
	}
}
