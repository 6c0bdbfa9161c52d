package admin_test

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

var when = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// What the Backend says is what the client hears.
func TestRoundTrip(t *testing.T) {
	s := newStage(t)
	s.node = admin.Node{
		KME: "km1", Node: "a", Version: "v1", Run: 3, Started: when, Uptime: 61.5, Policies: "ab", HSM: admin.Health{OK: true, Detail: "SoftHSM"},
		Database: admin.Health{OK: true}, Peers: []admin.Peer{{KME: "km2", Health: admin.Health{Detail: "refused"}, ClockOffset: -0.2}},
	}
	s.links = []admin.Link{
		{
			ID: "km1-km2", Peer: "km2", End: "alice", Provenance: "simulated", State: admin.LinkOpen, Session: 7, Blocks: 2, Aborts: 1,
			Stored: 100, StoredPeer: 90, Current: &admin.Progress{Stage: "reconcile", Step: 3, Steps: 5, Done: 0.5},
			Last: &admin.Block{Session: 7, Block: 2, At: when, Took: 1.5, QBER: 0.01, Efficiency: 1.04, Length: 147_000, Gates: 5_200_000, Detected: 600_000},
		},
		{ID: "other", State: admin.LinkDown, Why: "cut"},
	}
	s.alarms = []admin.Alarm{{Name: "peer-km2", Text: "refused", Since: when}}
	c, ctx := s.client("root"), context.Background()

	node, err := c.Node(ctx)
	if diff := cmp.Diff(s.node, node); diff != "" || err != nil {
		t.Errorf("Node: %v (-want +got):\n%s", err, diff)
	}
	links, err := c.Links(ctx)
	if diff := cmp.Diff(s.links, links); diff != "" || err != nil {
		t.Errorf("Links: %v (-want +got):\n%s", err, diff)
	}
	s.epochs = admin.Epochs{Length: 3600, WorstCase: 7260, Epochs: []admin.Epoch{{
		Epoch: 7, Starts: when, Ends: when.Add(time.Hour), State: "sealed", Stored: 3, Waiting: 2,
		KEKs: []admin.KEK{{ID: 4, Label: "kek", CheckValue: "010203", State: "sealed", Wraps: 9, Copies: []string{"a"}}},
	}}}
	epochs, err := c.Epochs(ctx)
	if diff := cmp.Diff(s.epochs, epochs); diff != "" || err != nil {
		t.Errorf("Epochs: %v (-want +got):\n%s", err, diff)
	}
	id := key.NewLocalID(when)
	story, err := c.KeyStory(ctx, id)
	if err != nil || story.ID != id.String() || len(story.Events) != 1 {
		t.Errorf("KeyStory: %+v, %v", story, err)
	}
	what := admin.Suspicion{Since: when.UTC().Truncate(time.Second), Until: when.UTC().Truncate(time.Second).Add(time.Hour), Link: "km1-km2"}
	burned, err := c.Compromise(ctx, what, approval.Approval{Act: "of one"}, approval.Approval{Act: "and of another"})
	if diff := cmp.Diff(admin.Compromised{From: what.Since, To: what.Until, Burned: 7, Voided: 2, Untold: []string{"km1-km2"}}, burned); diff != "" || err != nil {
		t.Errorf("Compromise: %v (-want +got):\n%s", err, diff)
	}
	alarms, err := c.Alarms(ctx)
	if diff := cmp.Diff(s.alarms, alarms); diff != "" || err != nil {
		t.Errorf("Alarms: %v (-want +got):\n%s", err, diff)
	}
	s.findings = []admin.Finding{admin.Good("hsm", "answered in %d ms", 2), admin.Bad("peer km2", "call them", "refused")}
	found, err := c.Doctor(ctx)
	if diff := cmp.Diff(s.findings, found); diff != "" || err != nil {
		t.Errorf("Doctor: %v (-want +got):\n%s", err, diff)
	}
	if removed, err := c.Cleanup(ctx); removed != 7 || err != nil {
		t.Errorf("Cleanup: %d, %v", removed, err)
	}
	if want := []string{"root", "root", "root", "root", "root", "root", "root", "root"}; !slices.Equal(s.callers, want) {
		t.Errorf("callers seen by the Backend: got %v, want %v", s.callers, want)
	}
	if len(s.refusals) != 0 {
		t.Errorf("refusals: %v", s.refusals)
	}
}

// Nobody but an operator gets an answer, and each refusal is told once.
func TestStrangers(t *testing.T) {
	for _, who := range []string{"mallory", "alice"} { // nobody; an SAE
		s := newStage(t)
		hc := s.http(who)
		paths := []string{"/api/v1/node", "/api/v1/links", "/api/v1/alarms", "/api/v1/epochs", "/metrics", "/nowhere"}
		for _, path := range paths {
			resp, err := hc.Get(s.server.URL + path)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			want := `{"message":"unauthorized","request_id":"` + resp.Header.Get("X-Request-Id") + `"}`
			if err != nil || resp.StatusCode != 401 || string(body) != want {
				t.Errorf("%s: GET %s: got %d %s, %v, want 401 %s", who, path, resp.StatusCode, body, err, want)
			}
			if got := resp.Header.Get("WWW-Authenticate"); got != `TLS-Client-Certificate realm="km1"` {
				t.Errorf("%s: GET %s: WWW-Authenticate: %s", who, path, got)
			}
		}
		if len(s.refusals) != len(paths) || len(s.callers) != 0 || !strings.Contains(s.refusals[0], "GET /api/v1/node 47") {
			t.Errorf("%s: refusals %q, callers %q", who, s.refusals, s.callers)
		}
	}
}

func TestElsewhere(t *testing.T) {
	s := newStage(t)
	hc := s.http("root")
	for _, tt := range []struct {
		method, path string
		want         int
		allow        string
	}{
		{"GET", "/nowhere", 404, ""},
		{"GET", "/api/v1/node/", 404, ""},
		{"GET", "/api/v1/keys/bob/status", 404, ""},
		{"POST", "/api/v1/node", 405, "GET"},
		{"HEAD", "/api/v1/node", 405, "GET"},
		{"DELETE", "/metrics", 405, "GET"},
		{"GET", "/api/v1/keys/cleanup", 405, "POST"},
		{"GET", "/api/v1/links/trust", 405, "POST"},
		{"PUT", "/console/acts/cleanup", 405, "GET, POST"},
		{"POST", "/api/v1/keys/a%2Fb/story", 405, "GET"},
	} {
		req, err := http.NewRequestWithContext(context.Background(), tt.method, s.server.URL+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		h := resp.Header
		if resp.StatusCode != tt.want || h.Get("Content-Type") != "application/json" || h.Get("Allow") != tt.allow {
			t.Errorf("%s %s: got %d %v, want %d", tt.method, tt.path, resp.StatusCode, h, tt.want)
		}
	}
	if len(s.callers)+len(s.refusals) != 0 {
		t.Errorf("callers %v, refusals %v", s.callers, s.refusals)
	}
}

func TestErrors(t *testing.T) {
	s := newStage(t)
	c := s.client("root")
	for _, tt := range []struct {
		err     error
		status  int
		message string
	}{
		{errors.New("the DSN is postgres://secret"), 500, "internal"},
		{problem.Because(problem.Unavailable, errors.New("postgres://secret")), 503, "unavailable"},
		{problem.New(problem.Unavailable, "the database is away"), 503, "the database is away"},
		{problem.New(problem.Unauthorized, "because"), 401, "unauthorized"},
		{problem.New(problem.Invalid, "no"), 400, "no"},
	} {
		s.err = tt.err
		_, err := c.Node(context.Background())
		got, ok := errors.AsType[*admin.APIError](err)
		if !ok || got.Status != tt.status || got.Message != tt.message || got.RequestID == "" || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v: got %v, want %d %s", tt.err, err, tt.status, tt.message)
		}
	}
	s.err, s.links = nil, []admin.Link{{Last: &admin.Block{QBER: math.NaN()}}}
	if _, err := c.Links(context.Background()); err == nil || !strings.Contains(err.Error(), "500") {
		t.Errorf("an answer that cannot be written: got %v, want a 500", err)
	}
}

func TestHealthAndMetrics(t *testing.T) {
	s := newStage(t)
	ctx := context.Background()
	if err := s.client("mallory").Healthy(ctx); err != nil {
		t.Errorf("Healthy, asked by a load balancer: %v", err)
	}
	s.ready = errors.New("the HSM is away")
	err := s.client("mallory").Ready(ctx)
	if got, ok := errors.AsType[*admin.APIError](err); !ok || got.Status != 503 || strings.Contains(err.Error(), "HSM") {
		t.Errorf("Ready of a node that is not: got %v", err)
	}
	if err := s.client("root").Healthy(ctx); err != nil {
		t.Errorf("Healthy, of a node that is not ready: %v", err)
	}
	s.ready, s.healthy = nil, errors.New("stuck")
	err = s.client("root").Healthy(ctx)
	if got, ok := errors.AsType[*admin.APIError](err); !ok || got.Status != 503 || s.client("root").Ready(ctx) != nil {
		t.Errorf("Healthy of a node that is not: got %v", err)
	}
	resp, err := s.http("root").Get(s.server.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "kme_up 1\n" {
		t.Errorf("metrics: got %q, %v", body, err)
	}
	if _, err := admin.Handler(admin.Config{}); err == nil {
		t.Error("a door made of nothing: no error")
	}
}

func TestNodeOK(t *testing.T) {
	well := admin.Health{OK: true}
	for _, tt := range []struct {
		node admin.Node
		want bool
	}{
		{admin.Node{HSM: well, Database: well}, true},
		{admin.Node{HSM: well, Database: well, Peers: []admin.Peer{{Health: well}}}, true},
		{admin.Node{HSM: well, Database: well, Peers: []admin.Peer{{Health: well}, {}}}, false},
		{admin.Node{HSM: well}, false},
		{admin.Node{Database: well}, false},
	} {
		if got := tt.node.OK(); got != tt.want {
			t.Errorf("OK of %+v: got %v", tt.node, got)
		}
	}
}

func TestProgressBlock(t *testing.T) {
	for _, tt := range []struct {
		p    admin.Progress
		want float64
	}{
		{admin.Progress{}, 0},
		{admin.Progress{Step: 1, Steps: 5}, 0},
		{admin.Progress{Step: 3, Steps: 5, Done: 0.5}, 0.5},
		{admin.Progress{Step: 5, Steps: 5, Done: 1}, 1},
		{admin.Progress{Step: 9, Steps: 5, Done: 1}, 1},
	} {
		if got := tt.p.Block(); got != tt.want {
			t.Errorf("Block of %+v: got %v, want %v", tt.p, got, tt.want)
		}
	}
}

// TestActs: who acts must have the duty; the Backend hears of nobody else, and of no
// act that is not well said.
func TestActs(t *testing.T) {
	s, ctx := newStage(t), context.Background()
	s.saes = []admin.SAE{{ID: "alice", Homes: []string{"km1"}, Enabled: true}, {ID: "bob", Homes: []string{"km2"}, Reason: "ticket 41", By: "root", Since: when}}
	root, vera := s.client("root"), s.client("vera")
	for _, c := range []*admin.Client{root, vera} {
		saes, err := c.SAEs(ctx)
		if diff := cmp.Diff(s.saes, saes); diff != "" || err != nil {
			t.Errorf("SAEs: %v (-want +got):\n%s", err, diff)
		}
	}
	if p, err := root.ReloadPolicies(ctx, "abc"); err != nil || p.Digest != "abc" {
		t.Errorf("ReloadPolicies: got %+v, %v", p, err)
	}
	for _, tt := range []struct {
		act  string
		err  error
		want int // status
	}{
		{"disable", root.DisableSAE(ctx, "alice", "ticket 41"), 200},
		{"enable", root.EnableSAE(ctx, "alice"), 200},
		{"disable without a reason", root.DisableSAE(ctx, "alice", ""), 400},
		{"disable for a long reason", root.DisableSAE(ctx, "alice", strings.Repeat("x", 201)), 400},
		{"disable nobody", root.DisableSAE(ctx, "", "x"), 400},
		{"enable nobody", root.EnableSAE(ctx, "a\x00"), 400},
		{"a viewer's disable", vera.DisableSAE(ctx, "alice", "x"), 403},
		{"a viewer's enable", vera.EnableSAE(ctx, "alice"), 403},
		{"a viewer's reload", second(vera.ReloadPolicies(ctx, "")), 403},
		{"a viewer's cleanup", second(vera.Cleanup(ctx)), 403},
		{"a stranger's disable", s.client("mallory").DisableSAE(ctx, "alice", "x"), 401},
	} {
		got := 200
		if e, ok := errors.AsType[*admin.APIError](tt.err); ok {
			got = e.Status
		}
		if got != tt.want {
			t.Errorf("%s: got %d (%v), want %d", tt.act, got, tt.err, tt.want)
		}
	}
	if want := []string{"reload abc", "disable alice ticket 41", "enable alice"}; !slices.Equal(s.acts, want) {
		t.Errorf("the Backend was told %q, want %q", s.acts, want)
	}
	if len(s.refusals) != 9 {
		t.Errorf("%d refusals were told: %q", len(s.refusals), s.refusals)
	}
	for _, body := range []string{`[]`, `{"id":"alice","reason":"x","more":1}`, `{"id":1}`, `{"id":"alice","id":"bob","reason":"x"}`} {
		resp, err := s.http("root").Post(s.server.URL+"/api/v1/saes/disable", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != 400 || len(s.acts) != 3 {
			t.Errorf("%s: got %d, acts %q", body, resp.StatusCode, s.acts)
		}
	}
}

// TestForeignPages: a browser that has an operator's certificate shows it for what any page
// asks for. Nothing is done at the word of one that is not ours.
func TestForeignPages(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, path := range []string{"saes/disable", "saes/enable", "keys/cleanup", "policies/reload", "links/trust", "keys/compromise", "doctor", "approvals/leave"} {
		for _, foreign := range [][2]string{{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}, {"Origin", "https://evil.example"}, {"Origin", "null"}} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL+"/api/v1/"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set(foreign[0], foreign[1])
			resp, err := s.http("root").Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusForbidden || len(s.callers) != 0 || len(s.acts) != 0 {
				t.Errorf("%s with %v: %d, and the Backend saw %v", path, foreign, resp.StatusCode, s.callers)
			}
		}
	}
}

func second[A any](_ A, err error) error { return err }
