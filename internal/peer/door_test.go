package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// site is a Backend that notes what it is asked.
type site struct {
	mu       sync.Mutex
	asked    []any
	copies   map[int64]int // of each batch announced
	from     identity.KME
	refused  []Refusal
	strange  []identity.Caller
	err      error                   // what every verb fails with
	answer   handover.AnnounceAnswer // to announces
	assigned handover.RunAnswer
}

func (s *site) note(from identity.KME, m any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.from = from
	s.asked = append(s.asked, m)
	return s.err
}

func (s *site) Hello(_ context.Context, from identity.KME, h handover.Hello) (handover.Hello, error) {
	return h, s.note(from, h)
}

func (s *site) Held(_ context.Context, from identity.KME, h handover.Held) (handover.HeldAnswer, error) {
	return handover.NotYet, s.note(from, h)
}

func (s *site) Announce(_ context.Context, from identity.KME, a handover.Announce) (handover.AnnounceAnswer, error) {
	err := s.note(from, a)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.copies == nil {
		s.copies = make(map[int64]int)
	}
	s.copies[a.Batch]++
	return s.answer, err
}

func (s *site) Void(_ context.Context, from identity.KME, v handover.Void) error {
	return s.note(from, v)
}

func (s *site) Checkpoint(_ context.Context, from identity.KME, c audit.Submission) (audit.Cosigned, error) {
	return audit.Cosigned{Size: c.Old, Line: "line"}, s.note(from, c)
}

func (s *site) Witnessed(_ context.Context, from identity.KME) (audit.Witnessed, error) {
	return audit.Witnessed{Notes: []string{"note"}}, s.note(from, "witnessed")
}

func (s *site) Compromise(_ context.Context, from identity.KME, c handover.Compromise) error {
	return s.note(from, c)
}

func (s *site) Sample(_ context.Context, from identity.KME, q handover.Sample) (handover.SampleAnswer, error) {
	return handover.SampleAnswer{MAC: q.Nonce}, s.note(from, q)
}

func (s *site) Burned(_ context.Context, from identity.KME, b handover.Burned) (handover.BurnedAnswer, error) {
	return handover.BurnedAnswer{Links: []handover.LinkSession{{Link: "l1", Session: 7}}}, s.note(from, b)
}

func (s *site) Grant(_ context.Context, from identity.KME, g handover.Grant) (handover.GrantAnswer, error) {
	return handover.GrantAnswer(g), s.note(from, g)
}

func (s *site) Run(_ context.Context, from identity.KME, r handover.RunStarted) (handover.RunAnswer, error) {
	return s.assigned, s.note(from, r)
}

func (s *site) Refused(_ context.Context, c identity.Caller, r Refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused, s.strange = append(s.refused, r), append(s.strange, c)
}

// saw returns how much was asked, and the refusals.
func (s *site) saw() (asked int, refused []Refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked), slices.Clone(s.refused)
}

func (s *site) count(batch int64) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.copies[batch]
}

func mustSAE(s string) identity.SAE {
	id, err := identity.ParseSAE(s)
	if err != nil {
		panic(err)
	}
	return id
}

func anID(n byte) key.ID { return key.ID{0: 1, 6: 0x70, 8: 0x80, 15: n} }

func anAnnounce(batch int64) handover.Announce {
	return handover.Announce{Node: "a1", Run: 3, Batch: batch, Requests: []handover.Request{{
		ID: "r-1", Link: "l1", Master: mustSAE("alice"), Slaves: []identity.SAE{mustSAE("bob")}, Bits: 256, TTL: 60_000,
		Keys: []handover.Key{{Session: 2, Block: 7, First: 64, Atoms: []key.ID{anID(1)}}},
	}}}
}

func aHeld() handover.Held {
	return handover.Held{
		BlockRef: handover.BlockRef{Link: "l1", Session: 2, Block: 7}, Epoch: 494_000, Atoms: 65, Owners: "ab",
		Digest: handover.DigestOf([]key.ID{anID(1)}, "ab"),
	}
}

var unexported = cmp.Options{
	cmp.Comparer(func(a, b identity.SAE) bool { return a == b }),
	cmp.Comparer(func(a, b identity.KME) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

// knock returns a site behind a real door and a client of km1 to it.
func knock(t *testing.T, ca *authority) (*site, *Client) {
	s := &site{answer: handover.AnnounceAnswer{Standing: handover.Fresh, Results: []handover.Result{{ID: "r-1", Accepted: true}}}}
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
	return s, newClient(t, addr, ca.client(ca.issue(t, "kme", "km1")))
}

func TestEveryMessageArrives(t *testing.T) {
	s, c := knock(t, newAuthority(t))
	s.assigned = handover.RunAnswer{Assigned: []handover.Assigned{{Run: 2, Batch: 1, Key: anID(4), Atoms: []key.ID{anID(4), anID(5)}}}, UpTo: anID(7)}
	ctx := within(t, time.Minute)

	hello := handover.Hello{KME: mustKME(t, "km1"), Node: "a1", Run: 3, Clock: 1, Links: []handover.HelloLink{{Link: "l1", Session: 2, TTL: 3600_000, Pool: 9}}}
	if got, err := c.Hello(ctx, hello); err != nil || !cmp.Equal(got, hello, unexported) {
		t.Errorf("Hello: %+v, %v", got, err)
	}
	if got, err := c.Held(ctx, aHeld()); err != nil || got != handover.NotYet {
		t.Errorf("Held: %q, %v", got, err)
	}
	if got, err := c.Announce(ctx, anAnnounce(1)); err != nil || !cmp.Equal(got, s.answer, unexported) {
		t.Errorf("Announce: %+v, %v", got, err)
	}
	void := handover.Void{Node: "a1", Run: 3, Batch: 1, Keys: []key.ID{anID(1)}}
	if err := c.Void(ctx, void); err != nil {
		t.Errorf("Void: %v", err)
	}
	grant := handover.Grant{Chunks: []handover.Granted{{ChunkRef: handover.ChunkRef{BlockRef: aHeld().BlockRef, First: 64}, Grants: 1}}}
	if got, err := c.Grant(ctx, grant); err != nil || !cmp.Equal(got, handover.GrantAnswer(grant)) {
		t.Errorf("Grant: %+v, %v", got, err)
	}
	run := handover.RunStarted{Node: "a1", Run: 4}
	if got, err := c.Run(ctx, run); err != nil || !cmp.Equal(got, s.assigned, unexported) {
		t.Errorf("Run: %+v, %v", got, err)
	}
	submission := audit.Submission{Key: "k", Old: 3, Proof: []tlog.Hash{{1}}, Note: "n"}
	if got, err := c.Checkpoint(ctx, submission); err != nil || got.Size != 3 || got.Line != "line" {
		t.Errorf("Checkpoint: %+v, %v", got, err)
	}
	if got, err := c.Witnessed(ctx); err != nil || !cmp.Equal(got.Notes, []string{"note"}) {
		t.Errorf("Witnessed: %+v, %v", got, err)
	}
	burned := handover.Burned{Origin: 2}
	if got, err := c.Burned(ctx, burned); err != nil || len(got.Links) != 1 || got.Links[0] != (handover.LinkSession{Link: "l1", Session: 7}) {
		t.Errorf("Burned: %+v, %v", got, err)
	}
	compromise := handover.Compromise{Act: 3, Link: "l1", First: 492204, Last: 492205, Session: 2, Block: 9}
	if err := c.Compromise(ctx, compromise); err != nil {
		t.Errorf("Compromise: %v", err)
	}
	sample := handover.Sample{Link: "l1", Key: handover.Key{Session: 2, Block: 7, First: 3, Atoms: []key.ID{anID(1)}}, Nonce: handover.Digest{1}}
	if got, err := c.Sample(ctx, sample); err != nil || got != (handover.SampleAnswer{MAC: sample.Nonce}) {
		t.Errorf("Sample: %+v, %v", got, err)
	}
	if diff := cmp.Diff([]any{hello, aHeld(), anAnnounce(1), void, grant, run, submission, "witnessed", burned, compromise, sample}, s.asked, unexported); diff != "" {
		t.Errorf("what the Backend was asked (-want +got):\n%s", diff)
	}
	if s.from != mustKME(t, "km1") {
		t.Errorf("from %v, want km1", s.from)
	}
}

func TestBackendErrorsOnTheWire(t *testing.T) {
	s, c := knock(t, newAuthority(t))
	for _, tc := range []struct {
		err     error
		refused *Refused // nil: unknown
	}{
		{problem.New(problem.Invalid, "link l9 is not ours"), &Refused{400, "invalid", "link l9 is not ours"}},
		{problem.New(problem.Unauthorized, ""), &Refused{401, "unauthorized", ""}},
		{problem.New(problem.Forbidden, "no"), &Refused{403, "forbidden", "no"}},
		{problem.New(problem.NotFound, "no"), &Refused{404, "not-found", "no"}},
		{problem.New(problem.Gone, "no"), &Refused{410, "gone", "no"}},
		{problem.New(problem.TooLarge, "no"), &Refused{413, "too-large", "no"}},
		{problem.Because(problem.Unavailable, errors.New("database")), nil},
		{problem.Because(problem.Internal, errors.New("secret cause")), nil},
		{errors.New("secret cause"), nil},
	} {
		s.err = tc.err
		_, err := c.Announce(within(t, time.Minute), anAnnounce(1))
		got, _ := errors.AsType[*Refused](err)
		if diff := cmp.Diff(tc.refused, got); diff != "" || err == nil || errors.Is(err, ErrNotSent) {
			t.Errorf("%v: got %v (-want +got):\n%s", tc.err, err, diff)
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("%v: the peer reads our cause: %v", tc.err, err)
		}
	}
}

// TestMalformedAnswer: what our own Backend says is checked like what a peer says.
func TestMalformedAnswer(t *testing.T) {
	s, c := knock(t, newAuthority(t))
	s.answer = handover.AnnounceAnswer{Standing: "sure"}
	_, err := c.Announce(within(t, time.Minute), anAnnounce(1))
	if got, ok := errors.AsType[*Refused](err); err == nil || ok || errors.Is(err, ErrNotSent) {
		t.Errorf("got %v (%v), want an unknown outcome", err, got)
	}
}

func TestStrangersAreTurnedAwayAndRecorded(t *testing.T) {
	ca := newAuthority(t)
	s, _ := knock(t, ca)
	for _, who := range [][2]string{{"sae", "alice"}, {"kme", "km9"}} {
		s := &site{}
		addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
		c := newClient(t, addr, ca.client(ca.issue(t, who[0], who[1])))
		_, err := c.Announce(within(t, time.Minute), anAnnounce(1))
		if r, ok := errors.AsType[*Refused](err); !ok || r.Status != 401 || r.Message != "" {
			t.Errorf("%v: got %v, want 401 without a reason", who, err)
		}
		asked, refused := s.saw()
		if asked != 0 || len(refused) != 1 || refused[0].Route != "POST "+pathAnnounce || s.strange[0].Certificate().Serial == "" {
			t.Errorf("%v: asked %d, refused %+v", who, asked, refused)
		}
	}
	if _, refused := s.saw(); len(refused) != 0 {
		t.Errorf("another site recorded %+v", refused)
	}
}

func TestWhatTheDoorRefuses(t *testing.T) {
	ca := newAuthority(t)
	s, _ := knock(t, ca)
	addr := serveHTTP(t, ca.server(ca.issue(t, "kme", "km2")), Handler(s, identifyHTTP(t), quiet()))
	tr := &http.Transport{TLSClientConfig: ca.client(ca.issue(t, "kme", "km1")), ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	good := `{"node":"a1","run":3}`
	for _, tc := range []struct {
		name, method, path, media, body string
		status                          int
	}{
		{"good", "POST", pathRun, "application/json; charset=utf-8", good, 200},
		{"no such route", "POST", "/peer/v1/nowhere", "application/json", good, 404},
		{"GET", "GET", pathRun, "application/json", "", 405},
		{"no media type", "POST", pathRun, "", good, 400},
		{"form", "POST", pathRun, "application/x-www-form-urlencoded", good, 400},
		{"empty", "POST", pathRun, "application/json", "", 400},
		{"unknown member", "POST", pathRun, "application/json", `{"node":"a1","run":3,"x":1}`, 400},
		{"member twice", "POST", pathRun, "application/json", `{"node":"a1","run":3,"run":3}`, 400},
		{"other case", "POST", pathRun, "application/json", `{"Node":"a1","run":3}`, 400},
		{"two values", "POST", pathRun, "application/json", good + good, 400},
		{"bad UTF-8", "POST", pathRun, "application/json", "{\"node\":\"\xff\",\"run\":3}", 400},
		{"out of bounds", "POST", pathRun, "application/json", `{"node":"a1","run":0}`, 400},
		{"too long", "POST", pathRun, "application/json", strings.Repeat(" ", maxBody) + good, 413},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, before := s.saw()
			req, err := http.NewRequestWithContext(t.Context(), tc.method, "https://"+addr+tc.path, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", tc.media)
			res, err := tr.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if res.StatusCode != tc.status || res.Header.Get("Content-Type") != "application/json" {
				t.Errorf("got %d %s, want %d", res.StatusCode, body, tc.status)
			}
			want := 1
			if tc.status == 200 {
				want = 0
			}
			if _, after := s.saw(); len(after)-len(before) != want {
				t.Errorf("%d refusals recorded, want %d", len(after)-len(before), want)
			}
		})
	}
}

// TestHTTP2 shows that the door itself does not care: it is the Client that wants
// HTTP/1.1.
func TestHTTP2(t *testing.T) {
	ca := newAuthority(t)
	s := &site{}
	ln := listen(t)
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	srv := &http.Server{Handler: Handler(s, identifyHTTP(t), quiet()), TLSConfig: ca.server(ca.issue(t, "kme", "km2")), Protocols: &p}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(ln, "", "") }()
	defer func() { _ = srv.Close(); <-done }()

	tr := &http.Transport{TLSClientConfig: ca.client(ca.issue(t, "kme", "km1")), ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Post("https://"+ln.Addr().String()+pathRun, "application/json", bytes.NewReader([]byte(`{"node":"a1","run":3}`)))
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.ProtoMajor != 2 || res.StatusCode != 200 {
		t.Errorf("got %s %d", res.Proto, res.StatusCode)
	}
	c := newClient(t, ln.Addr().String(), ca.client(ca.issue(t, "kme", "km1")))
	if _, err := c.Run(within(t, time.Minute), handover.RunStarted{Node: "a1", Run: 3}); err != nil {
		t.Error(err)
	}
}

func TestClientCertificateTurnedAway(t *testing.T) {
	ca := newAuthority(t)
	s := &site{}
	cfg := ca.server(ca.issue(t, "kme", "km2"))
	cfg.VerifyConnection = func(tls.ConnectionState) error { return errors.New("revoked") }
	addr := serveHTTP(t, cfg, Handler(s, identifyHTTP(t), quiet()))
	c := newClient(t, addr, ca.client(ca.issue(t, "kme", "km1")))
	for range 20 {
		_, err := c.Announce(within(t, time.Minute), anAnnounce(1))
		// Whether the request was written before the alert came is a race; that the
		// peer did not act on it is known either way.
		r, ok := errors.AsType[*Refused](err)
		if !errors.Is(err, ErrNotSent) && (!ok || r.Status != 0) {
			t.Fatalf("got %v, want a refusal or not sent", err)
		}
	}
	if asked, refused := s.saw(); asked+len(refused) != 0 {
		t.Errorf("the door saw %d messages, refused %v", asked, refused)
	}
}
