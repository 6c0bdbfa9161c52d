package admin_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
)

// furnished is a stage whose node has a link with history, and an alarm, and names
// that would do harm if they were taken for HTML.
func furnished(t *testing.T) *stage {
	t.Helper()
	s := newStage(t)
	s.node = admin.Node{
		KME: "km1", Node: "km1-a", Version: "v1", Run: 3, Started: when, Uptime: 61.5, Policies: "abcdef", HSM: admin.Health{OK: true, Detail: "SoftHSM"},
		Database: admin.Health{Detail: "<img src=x onerror=alert(1)>"}, Peers: []admin.Peer{{KME: "km2", Health: admin.Health{OK: true}, ClockOffset: -0.2}},
		Others: []admin.Other{{Node: "km1-b", Run: 4, Alive: true}},
	}
	s.links = []admin.Link{{
		ID: "km1-km2", Peer: "km2", End: "alice", Provenance: "simulated", State: admin.LinkOpen, Session: 7, Blocks: 2, Aborts: 1,
		Stored: 100, StoredPeer: 90, Current: &admin.Progress{Stage: "reconcile", Step: 3, Steps: 5, Done: 0.5},
		Last: &admin.Block{Session: 7, Block: 2, At: time.Now(), QBER: 0.0123, Efficiency: 1.04, Length: 147_000, Aborted: "<b>Eve</b>"},
	}}
	s.alarms = []admin.Alarm{{Name: "qber-km1-km2", Text: `</script><script>alert(1)</script>`, Since: time.Now().Add(-3 * time.Minute)}}
	s.saes = []admin.SAE{{ID: "alice@example", Homes: []string{"km1"}, Enabled: true}, {ID: "eve", By: "root", Since: when, Reason: "ticket <41>"}}
	s.certificates = []admin.Certificate{
		{SAE: "alice@example", Serial: "4711", Ends: time.Now().Add(5*time.Hour + time.Minute), Last: when, Open: 2},
		{SAE: "<i>", Serial: "4712", Ends: when, Last: time.Now().Add(-90 * time.Second)},
	}
	s.epochs = admin.Epochs{Length: 3600, WorstCase: 90095, Epochs: []admin.Epoch{
		{Epoch: 492204, State: "open", KEKs: []admin.KEK{{ID: 3, Label: "kek-a", State: "open", Wraps: 12, Copies: []string{"km1-a", "km1-b"}}}},
	}}
	s.past = map[string][]admin.Span{"km1-km2": month(time.Now())}
	return s
}

// month is 30 days of a link's history, as the longest chart asks for it.
func month(now time.Time) (list []admin.Span) {
	for at := now.Add(-30 * 24 * time.Hour); at.Before(now); at = at.Add(4 * time.Hour) {
		i := len(list)
		list = append(list, admin.Span{At: at, Blocks: 200, QBER: 0.01 + float64(i%10)/1000, Bits: 30_000_000, Stored: 1000 + 10*i, StoredPeer: 500})
	}
	return list
}

// page gets a page and its body.
func (s *stage) page(who, path string) (*http.Response, string) {
	s.t.Helper()
	resp, err := s.http(who).Get(s.server.URL + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(body)
}

// inline is what the pages' own policy would not let work.
var inline = regexp.MustCompile(`(?i)<script[^>]*>[^<]|<style|\sstyle=|\son[a-z]+="|javascript:|https?://`)

// TestConsole: every view is there, in one piece, loads nothing from elsewhere, and
// shows what the Backend says as text.
func TestConsole(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	for path, wants := range map[string][]string{
		"/":                     {"<h1>Overview</h1>", `aria-current="page"`, "qber-km1-km2</strong>", "SoftHSM", "km1-b", "1.23", "block under way: reconcile, 50 %"},
		"/console/?range=day":   {"<strong>Last day</strong>", "<svg ", "Keys in the pool"},
		"/console/?range=month": {"<strong>Last 30 days</strong>", "polyline"},
		"/console/saes": {
			"alice@example", `<a href="/console/acts/disable?sae=alice%40example"`, "shut out", "root: ticket &lt;41&gt;", `<a href="/console/acts/enable?sae=eve"`,
			"<code>4711</code>", `<span class="state good">in 5 h`, "now, 2 open", "&lt;i&gt;", `<span class="state bad">over</span>`, "1 min ago",
		},
		"/console/acts/disable?sae=%3Cb%3E": {"Shut out: &lt;b&gt;?", `name="sae" value="&lt;b&gt;"`, `name="reason" required`},
		"/console/keks":                     {"<h1>Epochs</h1>", "after 25 h 1 min at the latest", "kek-a", "km1-b"},
		"/console/audit":                    {"km1/1", "8 events, since 2026-11-23", `<option>enc_keys</option>`},
		"/console/audit?sae=alice&key=&action=enc_keys&from=2026-11-01T00:00": {
			`value="alice"`, "<option selected>enc_keys</option>", "alice through qutemail", "2026-11-23 12:00:00", "&lt;b&gt;because", `href="/console/proof?leaf=7"`, "not an event",
		},
		"/console/acts":          {"/console/acts/cleanup"},
		"/console/acts/cleanup":  {`<form method="post" action="/console/acts/cleanup">`, "End overdue keys?"},
		"/console/style.css":     {"prefers-color-scheme: dark"},
		"/console/console.js":    {"EventSource"},
		"/console/?range=random": {"<strong>Last hour</strong>"},
	} {
		resp, body := s.page("root", path)
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
		for _, want := range wants {
			if !strings.Contains(body, want) {
				t.Errorf("%s does not say %q", path, want)
			}
		}
		if !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html") {
			continue
		}
		if found := inline.FindString(body); found != "" {
			t.Errorf("%s has %q in it", path, found)
		}
		if p := resp.Header.Get("Content-Security-Policy"); !strings.Contains(p, "default-src 'none'") || strings.Contains(p, "unsafe") {
			t.Errorf("%s: policy %q", path, p)
		}
		if !strings.Contains(body, `<html lang="en">`) || strings.Count(body, "<h1>") != 1 || !strings.Contains(body, `<main id="main"`) {
			t.Errorf("%s is not a page:\n%s", path, body)
		}
	}
}

// TestConsoleWeight: what a first view loads, with a month of history in it.
func TestConsoleWeight(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	weight := 0
	for _, path := range []string{"/console/?range=month", "/console/style.css", "/console/console.js"} {
		_, body := s.page("root", path)
		weight += len(body)
	}
	if weight > 200_000 {
		t.Errorf("%d bytes, want at most 200,000", weight)
	}
	t.Logf("%d bytes", weight)
}

// TestConsoleStrangers: no page for those who are no operators.
func TestConsoleStrangers(t *testing.T) {
	t.Parallel()
	for _, who := range []string{"mallory", "alice"} {
		s := furnished(t)
		paths := []string{"/console/", "/console/acts", "/console/acts/cleanup", "/console/events"}
		for _, path := range paths {
			if resp, body := s.page(who, path); resp.StatusCode != http.StatusUnauthorized || strings.Contains(body, "km1-km2") {
				t.Errorf("%s at %s: %d %s", who, path, resp.StatusCode, body)
			}
		}
		if len(s.refusals) != len(paths) || len(s.callers) != 0 {
			t.Errorf("%s: refusals %q, callers %q", who, s.refusals, s.callers)
		}
	}
}

// TestConsoleAudit: what is typed is what is looked for, page by page; a proof is a file;
// and none of it is for operators who are no auditors.
func TestConsoleAudit(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	s.many = 100
	resp, body := s.page("root", "/console/audit?sae=alice&outcome=&from=2026-11-01T10:00&to=2026-12-01T10:00")
	if resp.StatusCode != http.StatusOK || len(s.queries) != 1 {
		t.Fatalf("%d, %v, %s", resp.StatusCode, s.queries, body)
	}
	want := admin.Query{SAE: "alice", Limit: 50, From: time.Date(2026, 11, 1, 10, 0, 0, 0, time.UTC), To: time.Date(2026, 12, 1, 10, 0, 0, 0, time.UTC)}
	if diff := cmp.Diff(want, s.queries[0]); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	next := regexp.MustCompile(`<a href="(/console/audit\?[^"]*)">What follows`).FindStringSubmatch(body)
	if next == nil {
		t.Fatalf("no next page in %s", body)
	}
	s.page("root", strings.ReplaceAll(next[1], "&amp;", "&"))
	if want.First = 57; len(s.queries) != 2 || cmp.Diff(want, s.queries[1]) != "" {
		t.Errorf("the next page: %+v", s.queries)
	}
	if resp, body := s.page("root", "/console/audit?nothing=1"); resp.StatusCode != http.StatusBadRequest || !strings.Contains(body, "nothing is looked for by") {
		t.Errorf("a field that there is not: %d %s", resp.StatusCode, body)
	}
	resp, body = s.page("root", "/console/proof?leaf=7")
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Disposition") != `attachment; filename="proof-7.json"` || !strings.HasPrefix(body, "{") {
		t.Errorf("a proof: %d %v %s", resp.StatusCode, resp.Header, body)
	}
	for _, path := range []string{"/console/audit", "/console/audit?sae=alice", "/console/proof?leaf=7"} {
		if resp, body := s.page("vera", path); resp.StatusCode != http.StatusForbidden || strings.Contains(body, "km1/1") {
			t.Errorf("%s, for one who is no auditor: %d %s", path, resp.StatusCode, body)
		}
	}
	if len(s.refusals) != 4 {
		t.Errorf("%d refusals are recorded, want 4: %q", len(s.refusals), s.refusals)
	}
}

// TestConsoleActs: what acts is done by a form of ours, and not by another site's page
// in a browser that carries the operator's certificate.
func TestConsoleActs(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	path, who, form := "/console/acts/cleanup", "root", url.Values{}
	post := func(headers ...string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL+path, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		resp, err := s.http(who).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	for _, foreign := range [][]string{
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site"},
		{"Origin", "https://evil.example"},
	} {
		if status, _ := post(foreign...); status != http.StatusForbidden || len(s.callers) != 0 {
			t.Errorf("%v: %d, and the Backend saw %v", foreign, status, s.callers)
		}
	}
	if len(s.refusals) != 3 {
		t.Errorf("%d refusals are recorded, want 3: %q", len(s.refusals), s.refusals)
	}
	if status, body := post("Sec-Fetch-Site", "same-origin", "Origin", s.server.URL); status != http.StatusOK || !strings.Contains(body, "7 overdue keys were ended") {
		t.Errorf("of our own page: %d %s", status, body)
	}
	s.acts = nil
	for _, tt := range []struct {
		who, path string
		form      url.Values
		status    int
		says      string
	}{
		{"vera", "/console/acts/disable", url.Values{"sae": {"bob"}, "reason": {"ticket 41"}}, http.StatusForbidden, ""},
		{"root", "/console/acts/disable", url.Values{"sae": {"bob"}}, http.StatusBadRequest, "a reason of 1 to 200 bytes is wanted"},
		{"root", "/console/acts/disable", url.Values{"reason": {"ticket 41"}}, http.StatusBadRequest, "no SAE is named"},
		{"root", "/console/acts/disable", url.Values{"sae": {"bob"}, "reason": {"ticket 41"}}, http.StatusOK, "bob is shut out."},
		{"root", "/console/acts/enable", url.Values{"sae": {"bob"}}, http.StatusOK, "bob is let in again."},
		{"root", "/console/acts/reload", url.Values{"files": {"0ddba11"}}, http.StatusOK, "digest abc"},
	} {
		who, path, form = tt.who, tt.path, tt.form
		if status, body := post("Sec-Fetch-Site", "same-origin"); status != tt.status || !strings.Contains(body, tt.says) {
			t.Errorf("%s at %s with %v: %d %s", tt.who, tt.path, tt.form, status, body)
		}
	}
	if len(s.given) != 0 {
		t.Errorf("approvals that nobody gave: %v", s.given)
	}
	if want := []string{"disable bob ticket 41", "enable bob", "reload 0ddba11"}; !slices.Equal(s.acts, want) {
		t.Errorf("acts %q, want %q", s.acts, want)
	}
	who, path = "root", "/console/acts/cleanup"
	s.err = errors.New("postgres://secret")
	if status, body := post("Sec-Fetch-Site", "same-origin"); status != http.StatusInternalServerError || strings.Contains(body, "secret") || !strings.Contains(body, `role="alert"`) {
		t.Errorf("an act that fails: %d %s", status, body)
	}
}

// TestConsoleApprovals: what one officer has left waits on a page for others, who add
// their own on the page of the act.
func TestConsoleApprovals(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	mine := approval.Approval{Act: "enable-sae eve", Node: "km1/km1-a", Expires: time.Now().Add(time.Minute), Nonce: []byte{1}}
	hers, other, foreign := mine, mine, mine
	hers.Nonce, other.Nonce, other.Act = []byte{2}, []byte{3}, "erase <all>"
	foreign.Nonce, foreign.Act = []byte{4}, `enable-sae "CN=eve, O=Other \\ Sons"`
	if _, body := s.page("root", "/console/approvals"); !strings.Contains(body, "Nothing waits") {
		t.Errorf("nothing waits:\n%s", body)
	}
	if _, body := s.page("root", "/console/acts/enable?sae=eve"); !strings.Contains(body, "kmectl approve --node km1/km1-a 'enable-sae eve'") || strings.Contains(body, `name="other"`) {
		t.Errorf("the page of an act that may take two:\n%s", body)
	}
	if _, body := s.page("root", "/console/acts/disable?sae=eve"); strings.Contains(body, "approve") {
		t.Errorf("the page of an act that takes one:\n%s", body)
	}
	files := mine
	files.Act, files.Nonce = "reload-policies 0ddba11", []byte{4}
	before := files
	before.Act, before.Nonce = "reload-policies 01d", []byte{5}
	s.waiting = []admin.Waiting{{Officer: "olga", Approval: before}, {Officer: "olga", Approval: files}, {Officer: "olga", Approval: before}}
	if _, body := s.page("root", "/console/acts/reload"); !strings.Contains(body, "kmectl approve --node km1/km1-a 'reload-policies 0ddba11'") ||
		!strings.Contains(body, `name="files" value="0ddba11"`) || !strings.Contains(body, `name="other" value="04"`) {
		t.Errorf("the page of an act on the files of policies does not say which are there now, or who has approved those:\n%s", body)
	}
	if _, body := s.page("root", "/console/approvals"); strings.Count(body, `<a href="/console/acts/reload"`) != 3 {
		t.Errorf("approvals of policies cannot be acted on:\n%s", body)
	}
	s.waiting = nil
	if err := s.client("root").LeaveApproval(t.Context(), mine); err != nil {
		t.Fatal(err)
	}
	if err := s.client("vera").LeaveApproval(t.Context(), mine); err == nil {
		t.Error("who is no security officer has left an approval")
	}
	s.waiting = append(s.waiting, admin.Waiting{Officer: "olga", Approval: hers}, admin.Waiting{Officer: "olga", Approval: other}, admin.Waiting{Officer: "olga", Approval: foreign})
	if list, err := s.client("vera").Waiting(t.Context()); err != nil || len(list) != 4 || list[0].Officer != "root" || list[1].Approval.Act != mine.Act {
		t.Errorf("waiting: %+v, %v", list, err)
	}
	_, body := s.page("root", "/console/approvals")
	for _, want := range []string{"another officer&#39;s turn", `<a href="/console/acts/enable?sae=eve"`, `<a href="/console/acts/enable?sae=CN%3Deve%2C&#43;O%3DOther&#43;%5C&#43;Sons"`, "olga", "erase &lt;all&gt;", "by kmectl"} {
		if !strings.Contains(strings.ReplaceAll(body, "another officer's", "another officer&#39;s"), want) {
			t.Errorf("the page does not say %q:\n%s", want, body)
		}
	}
	if found := inline.FindString(body); found != "" {
		t.Errorf("it has %q in it", found)
	}
	if _, body := s.page("root", "/console/acts/enable?sae=eve"); !strings.Contains(body, "olga has approved it") || !strings.Contains(body, `name="other" value="02"`) {
		t.Errorf("the page of the act:\n%s", body)
	}
	text, err := json.Marshal(mine)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		other, pasted string
		status        int
		given         int
	}{
		{"02", string(text), http.StatusOK, 2},
		{"", string(text) + "\n" + string(text) + "\n", http.StatusOK, 2},
		{"02", "", http.StatusOK, 0},
		{"02", "  \r\n", http.StatusOK, 0},
		{"07", string(text), http.StatusGone, 0},
		{"02", string(text[:20]), http.StatusBadRequest, 0},
		{"", "let her in", http.StatusBadRequest, 0},
	} {
		s.given, s.acts = nil, nil
		form := url.Values{"sae": {"eve"}, "other": {tt.other}, "approvals": {tt.pasted}}
		resp, err := s.http("root").PostForm(s.server.URL+"/console/acts/enable", form)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != tt.status || len(s.given) != tt.given || (len(s.acts) == 1) != (tt.status == http.StatusOK) {
			t.Errorf("%+v: %d, given %+v, acts %q", tt, resp.StatusCode, s.given, s.acts)
		}
		if tt.given == 2 && tt.other != "" && (s.given[0].Nonce[0] != 2 || s.given[1].Nonce[0] != 1) {
			t.Errorf("given: %+v, want olga's and root's", s.given)
		}
	}
}

// TestConsoleWithoutDatabase: the overview is there all the same, and says so.
func TestConsoleWithoutDatabase(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	s.linksErr = errors.New("away")
	if resp, body := s.page("root", "/console/"); resp.StatusCode != http.StatusOK || !strings.Contains(body, "not ok") || !strings.Contains(body, "qber-km1-km2") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// TestConsoleLive: the stream brings the parts of the page, then only what has changed,
// and ends when the node stops.
func TestConsoleLive(t *testing.T) {
	t.Parallel()
	s := furnished(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.server.URL+"/console/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.http("root").Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	// round reads one round: the ids of the parts in it.
	round := func() (ids []string) {
		for lines.Scan() {
			if id, ok := strings.CutPrefix(lines.Text(), "id: "); ok {
				ids = append(ids, id)
			}
			if strings.HasPrefix(lines.Text(), ": still here") {
				return ids
			}
		}
		return append(ids, "the end")
	}
	if got := strings.Join(round(), " "); got != "alarms node link-km1-km2 charts-km1-km2" {
		t.Errorf("the first round: %s", got)
	}
	s.mu.Lock()
	s.alarms = nil
	s.mu.Unlock()
	for { // what depends on the time of day may change as well
		if got := round(); len(got) > 0 {
			if got[0] != "alarms" {
				t.Errorf("an alarm is over, and the stream says: %v", got)
			}
			break
		}
	}
	close(s.stopping)
	for {
		if got := round(); len(got) > 0 && got[len(got)-1] == "the end" {
			break
		}
	}
	if lines.Err() != nil {
		t.Error(lines.Err())
	}
}
