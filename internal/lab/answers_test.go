package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptrace"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// notes are what the people of a lab were answered, whatever they asked.
type notes struct {
	mu      sync.Mutex
	answers map[string]*answer // by request ID
	sent    map[string]int     // by host: requests that a connection was there for; what comes to a handler is one of them
	got     map[string]int     // by host: answers
	unnamed []string           // answers without a request ID
}

// answer is one, by its first line and headers: its body may have been lost.
type answer struct {
	host      string
	status    int
	forgotten bool // the site was restored since
}

func newNotes() *notes {
	return &notes{answers: make(map[string]*answer), sent: make(map[string]int), got: make(map[string]int)}
}

// over is a lab's Watch.
func (n *notes) over(next http.RoundTripper) http.RoundTripper { return &noting{n, next} }

type noting struct {
	notes *notes
	next  http.RoundTripper
}

// RoundTrip notes the request each time that it goes out: a GET whose connection has
// ended without an answer goes out again by itself.
func (n *noting) RoundTrip(req *http.Request) (*http.Response, error) {
	host := req.URL.Host
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { n.notes.goes(host) }}
	res, err := n.next.RoundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
	if err == nil {
		n.notes.comes(host, res)
	}
	return res, err
}

// CloseIdleConnections is for http.Client, which looks for it.
func (n *noting) CloseIdleConnections() {
	n.next.(interface{ CloseIdleConnections() }).CloseIdleConnections()
}

func (n *notes) goes(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sent[host]++
}

func (n *notes) comes(host string, res *http.Response) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.got[host]++
	id := res.Header.Get("X-Request-Id")
	if id == "" || n.answers[id] != nil {
		n.unnamed = append(n.unnamed, fmt.Sprintf("%s answered %s with the request ID %q", host, res.Status, id))
		return
	}
	n.answers[id] = &answer{host: host, status: res.StatusCode}
}

// forget enters that a site is restored: events of what it has answered so far may be
// lost.
func (n *notes) forget(s *Site) {
	n.mu.Lock()
	defer n.mu.Unlock()
	hosts := s.saeDoors()
	for _, a := range n.answers {
		a.forgotten = a.forgotten || hosts[a.host]
	}
}

// saeDoors are the hosts of the SAE doors of the site's nodes.
func (s *Site) saeDoors() map[string]bool {
	hosts := make(map[string]bool)
	for _, n := range s.Nodes {
		hosts[strings.TrimPrefix(n.URL(), "https://")] = true
	}
	return hosts
}

// told is what a site's audit says of one request at an SAE door.
type told struct {
	outcomes int
	outcome  string // of the last one
	lost     bool   // it has an answer-lost event besides
}

// fits says whether an answer is what the audit tells of it. A caller whose time was
// over when the outcome was being committed was told 503 (deploy/AUDIT.md).
func (t told) fits(status int) bool {
	switch {
	case status < 300:
		return t.outcome == "done"
	case status < 500:
		return t.outcome == "refused"
	}
	return t.outcome == "failed" || t.outcome == "refused" || t.lost
}

// trail is what a site's audit says of the requests at its SAE doors.
type trail struct {
	site    *Site
	told    map[string]told // by request ID
	summed  int             // requests that its summaries count
	waiting int             // that its nodes have counted for summaries to come
}

func (s *Site) readTrail(ctx context.Context) (*trail, error) {
	t := &trail{site: s, told: make(map[string]told)}
	for _, n := range s.Nodes { // before the events: what is told of in between is in both, and not in neither
		for _, file := range []string{"outage", "overflow"} {
			text, err := os.ReadFile(n.path("data", file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			waiting, bad := strconv.Atoi(strings.TrimSpace(string(text)))
			if err := cmp.Or(err, bad); err != nil {
				return nil, err
			}
			t.waiting += waiting
		}
	}
	e, err := s.gather(ctx)
	if err != nil {
		return nil, err
	}
	for _, ev := range e.events {
		of := t.told[ev.Request]
		switch ev.Action {
		case "outage-summary", "audit-overflow":
			t.summed += ev.Count
			continue
		case encKeys, decKeys, status, consume, malformed:
			of.outcomes++
			of.outcome = ev.Outcome
		case "answer-lost":
			of.lost = true
		default:
			continue
		}
		if ev.Request != "" {
			t.told[ev.Request] = of
		}
	}
	return t, nil
}

// compare holds each answer of the site's SAE doors against what its audit tells of
// it: exactly one outcome event, which fits. A 503 may have none, or the event of an
// act of which its caller did not hear, if a summary counts it instead.
func (n *notes) compare(t *trail) (report string, wrong []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	hosts := t.site.saeDoors()
	byStatus := make(map[int]int)
	alone, counted := 0, 0
	for id, a := range n.answers {
		if !hosts[a.host] || a.forgotten {
			continue
		}
		byStatus[a.status]++
		of := t.told[id]
		switch {
		case of.outcomes == 1 && of.fits(a.status):
			alone++
		case of.outcomes <= 1 && a.status == http.StatusServiceUnavailable:
			counted++
		default:
			wrong = append(wrong, fmt.Sprintf("%s answered request %s with %d, and tells of it in %d outcome events, %q", t.site.Name, id, a.status, of.outcomes, of.outcome))
		}
	}
	if counted > t.summed+t.waiting {
		wrong = append(wrong, fmt.Sprintf("%s answered 503 to %d requests without an event that says so, and its summaries count %d (%d more wait)", t.site.Name, counted, t.summed, t.waiting))
	}
	var statuses []string
	for _, status := range slices.Sorted(maps.Keys(byStatus)) {
		statuses = append(statuses, fmt.Sprintf("%d: %d", status, byStatus[status]))
	}
	return fmt.Sprintf("%s answered %d requests (%s): %d have one outcome event that fits, %d are in summaries, which count %d",
		t.site.Name, alone+counted+len(wrong), strings.Join(statuses, ", "), alone, counted, t.summed+t.waiting), append(wrong, n.unnamed...)
}

// unanswered is how many requests of the site's SAE doors were noted without an answer,
// and how many the audit tells of that have none.
func (n *notes) unanswered(t *trail) (noted, told int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for host := range t.site.saeDoors() {
		noted += n.sent[host] - n.got[host]
	}
	for id, of := range t.told {
		if of.outcomes > 0 && n.answers[id] == nil {
			told++
		}
	}
	return noted, told
}

// compareAnswers holds what the clients were answered against the audit of both sites,
// when what was in doubt has been recorded.
func (f *traffic) compareAnswers(t testing.TB) {
	t.Helper()
	for _, s := range []*Site{f.lab.KM1, f.lab.KM2} {
		var report string
		eventually(t, "the audit of "+s.Name+" to tell of every answer", func(ctx context.Context) error {
			trail, err := s.readTrail(ctx)
			if err != nil {
				return err
			}
			var wrong []string
			if report, wrong = f.notes.compare(trail); len(wrong) > 0 {
				return fmt.Errorf("%d findings:\n%s", len(wrong), strings.Join(wrong[:min(len(wrong), 20)], "\n"))
			}
			return nil
		})
		t.Log(report)
	}
}

// onlyAnswers: no outcome event at an SAE door is of a request that nobody made. It is
// for labs whose people are noted from the start, and where nobody else asks.
func (f *traffic) onlyAnswers(t testing.TB) {
	t.Helper()
	for _, s := range []*Site{f.lab.KM1, f.lab.KM2} {
		trail, err := s.readTrail(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		noted, told := f.notes.unanswered(trail)
		t.Logf("%s: %d requests went out without an answer, and the audit tells of %d", s.Name, noted, told)
		if told > noted {
			t.Errorf("the audit of %s tells of %d requests that had no answer, and %d went out", s.Name, told, noted)
		}
	}
}
