package legacy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/etsi014/vector"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/problem"
)

var limits = legacy.Limits{KeySize: 256, MinSize: 64, MaxSize: 4096, TTL: time.Hour, MaxTTL: 24 * time.Hour}

func door(t testing.TB, b legacy.Backend, who func(*http.Request) (identity.Caller, error), kme string) *legacy.Door {
	t.Helper()
	id, err := identity.ParseKME(kme)
	if err != nil {
		t.Fatal(err)
	}
	d, err := legacy.New(legacy.Config{
		KME: id, Backend: b, Identify: who, Limits: limits, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return expires },
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// stage opens the doors of two KMEs, with 014 beside the routes of this package and
// a double behind both.
func stage(t *testing.T, http2 bool) (*vector.Stage, *double) {
	t.Helper()
	s, err := vector.NewStage("alice@qutemail.example", "bob@qutemail.example", "carol")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.HTTP2 = http2
	d := newDouble()
	for name, id := range map[string]string{"KM1": "km1", "KM2": "km2"} {
		kme, err := identity.ParseKME(id)
		if err != nil {
			t.Fatal(err)
		}
		other, err := etsi014.New(etsi014.Config{KME: kme, Backend: d, Identify: s.Identify, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Serve(name, other.Handler(door(t, d, s.Identify, id).Mount)); err != nil {
			t.Fatal(err)
		}
	}
	return s, d
}

func TestVectors(t *testing.T) {
	t.Parallel()
	files, err := vector.Load(os.DirFS("../../testdata/legacy"))
	if err != nil {
		t.Fatal(err)
	}
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("http2=%v", http2), func(t *testing.T) {
			t.Parallel()
			s, d := stage(t, http2)
			place := vector.Place{Names: map[string]string{"KM1": "km1", "KM2": "km2"}, Client: s.Client}
			for _, f := range files {
				t.Run(f.Name, func(t *testing.T) {
					if err := f.Run(context.Background(), place); err != nil {
						t.Error(err)
					}
				})
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			for rid, n := range d.events {
				if n != 1 {
					t.Errorf("request %s: got %d events, want 1", rid, n)
				}
			}
			if len(d.lost) != 0 {
				t.Errorf("answers lost: %v", d.lost)
			}
		})
	}
}

// caller returns the SAE named as its certificate makes it.
func caller(t testing.TB, sae string) func(*http.Request) (identity.Caller, error) {
	t.Helper()
	s, err := vector.NewStage(sae)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var c identity.Caller
	served := make(chan error, 1)
	if err := s.Serve("KM1", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var err error
		c, err = s.Identify(r)
		served <- err
	})); err != nil {
		t.Fatal(err)
	}
	base, hc, err := s.Client("KM1", sae)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Get(base)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	return func(*http.Request) (identity.Caller, error) { return c, nil }
}

func handler(t testing.TB, b legacy.Backend, who func(*http.Request) (identity.Caller, error)) http.Handler {
	r := chi.NewRouter()
	door(t, b, who, "km1").Mount(r)
	return r
}

func post(body string) *http.Request {
	r := httptest.NewRequest("POST", "/api/v1/keys/request", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	return r
}

const order = `{"requester_sae":"alice","recipient_sae":"bob"}`

func TestKindsOnTheWire(t *testing.T) {
	t.Parallel()
	secret := errors.New("SELECT secret FROM key")
	tests := []struct {
		fault  error
		status int
		body   string // RID stands for the request's ID
		retry  string
	}{
		{secret, 500, `{"status":"error","error":"Internal error, request RID"}`, ""},
		{&problem.Error{Kind: problem.Internal, Detail: "secret"}, 500, `{"status":"error","error":"Internal error, request RID"}`, ""},
		{&problem.Error{Kind: problem.Invalid, Detail: "so not", Err: secret}, 400, `{"status":"error","error":"so not"}`, ""},
		{&problem.Error{Kind: problem.Unauthorized, Detail: "secret", Err: secret}, 401, `{"status":"error","error":"Unauthorized"}`, ""},
		{problem.Because(problem.Forbidden, secret), 403, `{"status":"error","error":"Forbidden"}`, ""},
		{problem.Because(problem.NotFound, secret), 404, `{"status":"error","error":"Key not found"}`, ""},
		{problem.Because(problem.Gone, secret), 410, `{"status":"error","error":"Key expired or already consumed"}`, ""},
		{problem.Because(problem.TooLarge, secret), 413, `{"status":"error","error":"The body is larger than 64 KiB"}`, ""},
		{problem.Because(problem.Unavailable, secret), 503, `{"status":"error","error":"Not available at the moment"}`, "2"},
		{&problem.Error{Kind: problem.Unavailable, Detail: "not enough keys", RetryAfter: 1500 * time.Millisecond}, 503, `{"status":"error","error":"not enough keys"}`, "2"},
	}
	alice := caller(t, "alice")
	for _, test := range tests {
		d := newDouble()
		d.fault = test.fault
		h := handler(t, d, alice)
		for _, r := range []*http.Request{
			httptest.NewRequest("GET", "/api/v1/status", nil), post(order),
			httptest.NewRequest("GET", "/api/v1/keys/0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11-bob?requester_sae=alice", nil),
		} {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			rid := w.Header().Get("X-Request-Id")
			body := strings.ReplaceAll(w.Body.String(), rid, "RID")
			if w.Code != test.status || body != test.body || w.Header().Get("Retry-After") != test.retry || d.events[rid] != 1 {
				t.Errorf("%v: got %d %s, Retry-After %q, %d events; want %d %s, %q, 1", test.fault, w.Code, body, w.Header().Get("Retry-After"), d.events[rid], test.status, test.body, test.retry)
			}
		}
	}
}

// The bodies as the seed's README shows them, letter by letter.
func TestAnswersLookLikeTheSeed(t *testing.T) {
	t.Parallel()
	d := newDouble()
	h := handler(t, d, caller(t, "alice"))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, post(order))
	for id, k := range d.keys {
		want := fmt.Sprintf(`{"status":"success","key_id":"%s-alice","key":"%s","size":256,"algorithm":"simulated","expires_at":"2025-12-08T13:00:00","message":"Key retrieved from pool","source":"pool"}`, id, base64(k.secret))
		if got := w.Body.String(); got != want {
			t.Errorf("request: got %s, want %s", got, want)
		}
	}
	w = httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/status", nil))
	want := `{"status":"OK","service":"QuteMail-KM","version":"2.0.0-ETSI","description":"Quantum key management, as QuteMail-KM had it",` +
		`"qkd_orchestrator":{"total_sessions":2,"error_rate":0.0125,"keys_in_store":640},"database":"connected","hsm":"connected","timestamp":"2025-12-08T12:00:00"}`
	if got := w.Body.String(); got != want {
		t.Errorf("status: got %s, want %s", got, want)
	}
}

// The seed answered 200 and "OK" with its database gone.
func TestStatusTellsTheTruth(t *testing.T) {
	t.Parallel()
	for _, service := range []legacy.Service{
		{Database: "error: not reachable", HSM: legacy.Connected}, {Database: legacy.Connected, HSM: "error: no token"}, {},
	} {
		d := newDouble()
		d.service = service
		w := httptest.NewRecorder()
		handler(t, d, caller(t, "alice")).ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/status", nil))
		if w.Code != 503 || !strings.Contains(w.Body.String(), `"status":"ERROR"`) {
			t.Errorf("%+v: got %d %s, want a 503", service, w.Code, w.Body)
		}
	}
}

// keeping remembers the slices that were written, not their bytes.
type keeping struct {
	*httptest.ResponseRecorder
	slices [][]byte
}

func (k *keeping) Write(b []byte) (int, error) {
	k.slices = append(k.slices, b)
	return k.ResponseRecorder.Write(b)
}

// showing remembers the materials that went out.
type showing struct {
	*double
	out []key.Material
}

func (s *showing) RequestKey(ctx context.Context, c identity.Caller, rid string, recipient identity.SAE, bits int, ttl time.Duration) (legacy.Issued, error) {
	got, err := s.double.RequestKey(ctx, c, rid, recipient, bits, ttl)
	s.out = append(s.out, got.Material)
	return got, err
}

func (s *showing) RetrieveKey(ctx context.Context, c identity.Caller, rid string, id key.ID) (legacy.Retrieved, error) {
	got, err := s.double.RetrieveKey(ctx, c, rid, id)
	s.out = append(s.out, got.Material)
	return got, err
}

func TestKeysAreWiped(t *testing.T) {
	t.Parallel()
	s := &showing{double: newDouble()}
	for who, request := range map[string]func() *http.Request{
		"alice": func() *http.Request { return post(order) },
		"bob": func() *http.Request {
			id, m := s.make(identity.SAE{}, sae(t, "bob"), 256, false)
			m.Wipe()
			return httptest.NewRequest("GET", "/api/v1/keys/"+id.String()+"?requester_sae=bob", nil)
		},
	} {
		w := &keeping{ResponseRecorder: httptest.NewRecorder()}
		handler(t, s, caller(t, who)).ServeHTTP(w, request())
		if w.Code != 200 || len(w.slices) != 1 {
			t.Fatalf("%s: got status %d in %d writes", who, w.Code, len(w.slices))
		}
		if b := w.slices[0]; !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("%s: the answer is left in memory", who)
		}
	}
	for _, m := range s.out {
		if b := m.Reveal(); len(b) != 32 || !bytes.Equal(b, make([]byte, 32)) {
			t.Error("a key is left in memory after its answer")
		}
	}
}

// unread is a body that nobody may read.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.t.Error("the body was read")
	return 0, errors.New("read")
}

// TestSpentIsNotHeard: whoever has spent its share is refused before its body is read, and
// that is recorded once.
func TestSpentIsNotHeard(t *testing.T) {
	t.Parallel()
	d := newDouble()
	d.spent = &problem.Error{Kind: problem.Unavailable, Detail: "too many", RetryAfter: time.Second}
	h := handler(t, d, caller(t, "alice"))
	for _, path := range []string{"request", "consume"} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("POST", "/api/v1/keys/"+path, unread{t}))
		if w.Code != 503 || d.events[w.Header().Get("X-Request-Id")] != 1 {
			t.Errorf("%s: got %d %s, %d events", path, w.Code, w.Body, d.events[w.Header().Get("X-Request-Id")])
		}
	}
}

// failing is a connection that ends before the answer.
type failing struct{ *httptest.ResponseRecorder }

func (failing) Write([]byte) (int, error) { return 0, errors.New("connection reset") }

func TestAnswerLost(t *testing.T) {
	t.Parallel()
	d := newDouble()
	h := handler(t, d, caller(t, "alice"))
	h.ServeHTTP(failing{httptest.NewRecorder()}, httptest.NewRequest("GET", "/api/v1/status", nil))
	if len(d.lost) != 0 {
		t.Errorf("a status that did not arrive was told as a lost key: %v", d.lost)
	}
	h.ServeHTTP(failing{httptest.NewRecorder()}, post(order))
	if len(d.lost) != 1 || len(d.events) != 2 {
		t.Errorf("got %d lost answers and %d events, want 1 and 2", len(d.lost), len(d.events))
	}
}

func TestConfigIsWhole(t *testing.T) {
	t.Parallel()
	whole := door(t, newDouble(), caller(t, "alice"), "km1").Config
	for name, spoil := range map[string]func(*legacy.Config){
		"backend":  func(c *legacy.Config) { c.Backend = nil },
		"identify": func(c *legacy.Config) { c.Identify = nil },
		"clock":    func(c *legacy.Config) { c.Now = nil },
		"limits":   func(c *legacy.Config) { c.Limits = legacy.Limits{} },
		"ttl":      func(c *legacy.Config) { c.Limits.MaxTTL = time.Second },
	} {
		c := whole
		spoil(&c)
		if _, err := legacy.New(c); err == nil {
			t.Errorf("%s: a door without it was made", name)
		}
	}
}
