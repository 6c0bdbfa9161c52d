package etsi014_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/etsi014/vector"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// caller returns the SAE named as its certificate makes it.
func caller(t testing.TB, sae string) identity.Caller {
	t.Helper()
	s, err := vector.NewStage(sae)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := make(chan identity.Caller, 1)
	if err := s.Serve("KM1", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		c, err := s.Identify(r)
		if err != nil {
			t.Error(err)
		}
		got <- c
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
	return <-got
}

func sae(t testing.TB, id string) identity.SAE {
	t.Helper()
	s, err := identity.ParseSAE(id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// alone returns a door with only a Backend behind it, where everyone is c.
func alone(t testing.TB, b etsi014.Backend, c identity.Caller) *etsi014.Door {
	t.Helper()
	kme, err := identity.ParseKME(`KM "1"`)
	if err != nil {
		t.Fatal(err)
	}
	d, err := etsi014.New(etsi014.Config{
		KME: kme, Backend: b, Log: slog.New(slog.DiscardHandler),
		Identify: func(*http.Request) (identity.Caller, error) { return c, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestKindsOnTheWire(t *testing.T) {
	t.Parallel()
	secret := errors.New("SELECT secret FROM key")
	realm := `TLS-Client-Certificate realm="KM \"1\""`
	const notFound = `{"message":"one or more keys specified are not found on KME"}`
	tests := []struct {
		name   string
		fault  error
		status int
		body   string // RID stands for the request's ID
		header map[string]string
	}{
		{"plain", secret, 503, `{"message":"error on server side, request RID"}`, map[string]string{"Retry-After": "2"}},
		{"internal", &problem.Error{Kind: problem.Internal, Detail: "secret", Err: secret}, 503, `{"message":"error on server side, request RID"}`, map[string]string{"Retry-After": "2"}},
		{"invalid", &problem.Error{Kind: problem.Invalid, Detail: "so not", Err: secret}, 400, `{"message":"so not"}`, nil},
		{"invalid without a word", problem.Because(problem.Invalid, secret), 400, `{"message":"bad request format"}`, nil},
		{"unauthorized", &problem.Error{Kind: problem.Unauthorized, Detail: "secret", Err: secret}, 401, `{"message":"unauthorized"}`, map[string]string{"WWW-Authenticate": realm}},
		{"forbidden", problem.New(problem.Forbidden, "secret"), 401, `{"message":"unauthorized"}`, map[string]string{"WWW-Authenticate": realm}},
		{"not found", problem.New(problem.NotFound, "secret"), 400, notFound, nil},
		{"gone", problem.New(problem.Gone, "secret"), 400, notFound, nil},
		{"too large", problem.Because(problem.TooLarge, secret), 413, `{"message":"the body is larger than 64 KiB"}`, nil},
		{"unavailable", problem.Because(problem.Unavailable, secret), 503, `{"message":"not available at the moment"}`, map[string]string{"Retry-After": "2"}},
		{"unavailable for long", &problem.Error{Kind: problem.Unavailable, Detail: "not enough keys", RetryAfter: 61*time.Second + 1, Err: secret}, 503, `{"message":"not enough keys"}`, map[string]string{"Retry-After": "62"}},
		{"wrapped", fmt.Errorf("%w: %w", secret, problem.New(problem.NotFound, "")), 400, notFound, nil},
	}
	alice := caller(t, "alice")
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDouble()
			d.fault = test.fault
			h := alone(t, at{d, "km1"}, alice).Handler()
			for _, target := range []string{"status", "enc_keys", "dec_keys?key_ID=0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"} {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/keys/bob/"+target, nil))
				rid := w.Header().Get("X-Request-Id")
				body := strings.ReplaceAll(w.Body.String(), rid, "RID")
				if w.Code != test.status || body != test.body {
					t.Errorf("%s: got %d %s, want %d %s", target, w.Code, body, test.status, test.body)
				}
				for _, name := range []string{"Retry-After", "WWW-Authenticate"} {
					if got := w.Header().Get(name); got != test.header[name] {
						t.Errorf("%s: got %s %q, want %q", target, name, got, test.header[name])
					}
				}
				if d.events[rid] != 1 {
					t.Errorf("%s: got %d events, want 1", target, d.events[rid])
				}
			}
		})
	}
}

// Row 014-6.3-05, A-03: so many keys or none.
func TestPoolRunsDry(t *testing.T) {
	t.Parallel()
	d := newDouble()
	d.pool = 3
	h := alone(t, at{d, "km1"}, caller(t, "alice")).Handler()
	for _, want := range []struct{ number, status, left int }{{5, 503, 3}, {3, 200, 0}, {1, 503, 0}} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", fmt.Sprintf("/api/v1/keys/bob/enc_keys?number=%d", want.number), nil))
		if w.Code != want.status || d.pool != want.left {
			t.Errorf("asking for %d: got %d and %d left, want %d and %d", want.number, w.Code, d.pool, want.status, want.left)
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
	h := alone(t, at{d, "km1"}, caller(t, "alice")).Handler()
	for _, target := range []string{"enc_keys", "dec_keys"} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("POST", "/api/v1/keys/bob/"+target, unread{t}))
		if w.Code != 503 || w.Header().Get("Retry-After") != "1" || d.events[w.Header().Get("X-Request-Id")] != 1 {
			t.Errorf("%s: got %d %s, %d events", target, w.Code, w.Body, d.events[w.Header().Get("X-Request-Id")])
		}
	}
}

// refusing cannot record a refusal.
type refusing struct{ at }

func (refusing) Refused(context.Context, identity.Caller, string, string, error) error {
	return problem.Because(problem.Unavailable, errors.New("the database is away"))
}

func TestRefusalThatCannotBeRecorded(t *testing.T) {
	t.Parallel()
	h := alone(t, refusing{at{newDouble(), "km1"}}, caller(t, "alice")).Handler()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/keys/bob/enc_keys?number=0", nil))
	if w.Code != 503 {
		t.Errorf("got %d, want 503: no answer without its record", w.Code)
	}
}

func TestOtherRolesAreRefused(t *testing.T) {
	t.Parallel()
	d := newDouble()
	h := alone(t, at{d, "km1"}, identity.Stranger(nil)).Handler() // Identify makes no error of it
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/keys/bob/status", nil))
	if w.Code != 401 || len(d.events) != 1 {
		t.Errorf("got %d and %d events, want 401 and 1", w.Code, len(d.events))
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
	at
	out *[]key.Material
}

func (s showing) EncKeys(ctx context.Context, c identity.Caller, rid string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	got, err := s.at.EncKeys(ctx, c, rid, slave, r)
	for _, k := range got.Keys {
		*s.out = append(*s.out, k.Material)
	}
	return got, err
}

func TestKeysAreWiped(t *testing.T) {
	t.Parallel()
	var out []key.Material
	h := alone(t, showing{at{newDouble(), "km1"}, &out}, caller(t, "alice")).Handler()
	w := &keeping{ResponseRecorder: httptest.NewRecorder()}
	h.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/keys/bob/enc_keys?number=128", nil))
	if w.Code != 200 || len(out) != 128 || len(w.slices) == 0 {
		t.Fatalf("got status %d, %d keys in %d writes", w.Code, len(out), len(w.slices))
	}
	for _, m := range out {
		if b := m.Reveal(); len(b) != 32 || !bytes.Equal(b, make([]byte, 32)) {
			t.Fatal("a key is left in memory after its answer")
		}
	}
	if b := bytes.Join(w.slices, nil); !bytes.Equal(b, make([]byte, len(b))) {
		t.Error("the answer is left in memory")
	}
	if !strings.HasPrefix(w.Body.String(), `{"keys":[{"key_ID":"`) {
		t.Errorf("the answer begins with %.20q", w.Body)
	}
}

// leaving hands out keys once the client has gone.
type leaving struct {
	at
	arrived chan struct{} // closed when a request is as far as the Backend
	lost    chan string
}

func (l leaving) EncKeys(ctx context.Context, c identity.Caller, rid string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	close(l.arrived)
	<-ctx.Done()
	return l.at.EncKeys(ctx, c, rid, slave, r)
}

func (l leaving) AnswerLost(ctx context.Context, _ identity.Caller, rid string, err error) {
	if err == nil || ctx.Err() != nil {
		rid = "" // it could not be recorded
	}
	l.lost <- rid
}

// Row 014-X-17.
func TestClientLeaves(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("http2=%v", http2), func(t *testing.T) {
			t.Parallel()
			s, err := vector.NewStage("alice")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			s.HTTP2 = http2
			ctx, leave := context.WithCancel(context.Background())
			defer leave()
			b := leaving{at{newDouble(), "km1"}, make(chan struct{}), make(chan string, 1)}
			if err := s.Serve("KM1", alone(t, b, caller(t, "alice")).Handler()); err != nil {
				t.Fatal(err)
			}
			base, hc, err := s.Client("KM1", "alice")
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				<-b.arrived
				leave()
			}()
			if _, err := etsi014.NewClient(base, hc).EncKeys(ctx, sae(t, "bob"), etsi014.KeyRequest{}); !errors.Is(err, context.Canceled) {
				t.Errorf("EncKeys: got %v, want that it was cancelled", err)
			}
			if rid := <-b.lost; b.events[rid] != 1 {
				t.Errorf("the answer to request %q was lost: got %d outcome events, want 1", rid, b.events[rid])
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	door := alone(t, at{newDouble(), "km1"}, caller(t, "alice"))
	h := door.Handler()
	for _, target := range []string{"/api/v1/keys/bob/status", "/api/v1/keys/carol/status", "/api/v1/keys/bob/enc_keys?number=0", "/a", "/b", "/api/v1/keys/bob/status/"} {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", target, nil))
	}
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("BREW", "/api/v1/keys/bob/enc_keys", nil))
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(door)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, family := range families {
		if family.GetName() == "kme_sae_requests_total" {
			for _, m := range family.GetMetric() {
				got[m.GetLabel()[0].GetValue()+" "+m.GetLabel()[1].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	want := map[string]float64{
		"GET /api/v1/keys/{sae}/status 200": 2, "GET /api/v1/keys/{sae}/enc_keys 400": 1, "elsewhere 404": 3, "elsewhere 405": 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestConfigIsWhole(t *testing.T) {
	t.Parallel()
	if _, err := etsi014.New(etsi014.Config{}); err == nil {
		t.Error("a door without a Backend was made")
	}
}

// Row 014-5.3-02 as far as it is the door's: answers to requests at the same time
// are not mixed up.
func TestParallelRequests(t *testing.T) {
	t.Parallel()
	s, d, _ := stage(t, true)
	base, hc, err := s.Client("KM1", "alice")
	if err != nil {
		t.Fatal(err)
	}
	c := etsi014.NewClient(base, hc)
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[key.ID]bool)
	for range 8 {
		wg.Go(func() {
			for range 25 {
				got, err := c.EncKeys(context.Background(), sae(t, "bob"), etsi014.KeyRequest{Number: 5})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, k := range got.Keys {
					d.mu.Lock()
					if seen[k.ID] || !bytes.Equal(d.keys[k.ID].secret, k.Material.Reveal()) {
						t.Errorf("key %s came twice, or with other bytes", k.ID)
					}
					d.mu.Unlock()
					seen[k.ID] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) != 8*25*5 {
		t.Errorf("got %d keys, want %d", len(seen), 8*25*5)
	}
}
