package admin

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"hash/fnv"
	"html/template"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/problem"
)

// The console is the operator API for people: pages that a browser with an operator's
// certificate shows. They are complete without a script; the one there is keeps the
// parts that change up to date. What acts is a form that is confirmed on a page of its
// own, and refused when it comes from another site's page.

//go:embed console
var consoleFiles embed.FS

var consolePages = template.Must(template.New("console").Funcs(template.FuncMap{
	"ago": ago, "rfc": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"span":    func(seconds float64) string { return roughly(time.Duration(seconds * float64(time.Second))) },
	"hundred": func(v float64) float64 { return 100 * v },
	"percent": percent,
	"left":    leftOf,
	"stamp":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
	"date":    func(t time.Time) string { return t.UTC().Format("2006-01-02") },
	"outcomes": func() []audit.Outcome {
		return []audit.Outcome{audit.Done, audit.Refused, audit.Failed}
	},
}).ParseFS(consoleFiles, "console/pages.html"))

// consolePolicy lets a page load what this door serves, and nothing else; nobody may
// frame it.
const consolePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// consoleView is a page in the list of views.
type consoleView struct{ Path, Name string }

// consoleViews are those that an operator of this node may be shown.
func (c Config) consoleViews() []consoleView {
	views := []consoleView{{"/console/", "Overview"}, {"/console/saes", "SAEs"}, {"/console/keks", "Epochs"}}
	if c.Trail != nil {
		views = append(views, consoleView{"/console/audit", "Audit"})
	}
	return append(views, consoleView{"/console/acts", "Acts"}, consoleView{"/console/approvals", "Approvals"})
}

// mountConsole adds the pages to r.
func (c Config) mountConsole(r chi.Router) {
	r.Get("/", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/console/", http.StatusSeeOther) })
	r.Get("/console", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/console/", http.StatusSeeOther) })
	r.Get("/console/", c.page(c.overview))
	r.Get("/console/saes", c.page(c.saesPage))
	r.Get("/console/keks", c.page(c.keks))
	if c.Trail != nil {
		r.Get("/console/audit", c.page(c.auditPage))
		r.Get("/console/proof", c.proofFile)
	}
	r.Get("/console/acts", c.page(c.listActs))
	r.Get("/console/approvals", c.page(c.approvalsPage))
	for _, a := range c.acts() {
		r.Get(a.Path, c.page(a.ask))
		r.Post(a.Path, c.page(a.do))
	}
	r.Get("/console/events", c.events)
	r.Get("/console/style.css", c.asset("text/css; charset=utf-8", "console/style.css"))
	r.Get("/console/console.js", c.asset("text/javascript; charset=utf-8", "console/console.js"))
}

// content is what a view puts on its page.
type content struct {
	title  string
	status int    // 0 is 200
	events string // where the page's live parts come from; "" if nothing is live
	name   string // of the template
	data   any
}

// page is the way in to every page: identify, show, render, and only then write.
func (c Config) page(show func(*exchange) (content, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := c.begin(w, r)
		w.Header().Set("Content-Security-Policy", consolePolicy)
		w.Header().Set("Referrer-Policy", "no-referrer")
		if err := x.identify(); err != nil {
			x.refuse(err)
			return
		}
		p, err := show(x)
		if unknown, ok := errors.AsType[refusal](err); ok {
			err = x.told(unknown.error)
		}
		if err != nil {
			p = x.sorry(err)
		}
		if err := x.render(p); err != nil {
			x.fail(err)
		}
	}
}

// sorry is the page about an error. Its cause is in the log, under the request's ID.
func (x *exchange) sorry(err error) content {
	kind := problem.KindOf(err)
	says := kind.String()
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Detail != "" {
		says = p.Detail
	}
	x.log(slog.LevelWarn, answers[kind], err)
	return content{title: "That did not work", status: answers[kind], name: "message", data: message{
		Says: fmt.Sprintf("%s (request %s)", says, x.rid), Bad: true, Back: "/console/",
	}}
}

// message is a page with a sentence.
type message struct {
	Says, Back string
	Bad        bool
}

func (x *exchange) render(p content) error {
	body, err := part(p.name, p.data)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	err = consolePages.ExecuteTemplate(&b, "page", map[string]any{
		"KME": x.c.KME.String(), "Node": x.c.Node, "Title": p.title, "Path": x.r.URL.Path, "Views": x.c.consoleViews(),
		"Operator": x.caller.ID(), "Events": p.events, "Now": time.Now(), "Body": template.HTML(body), // of our own template
	})
	if err != nil {
		return fmt.Errorf("rendering a page: %w", err)
	}
	if p.status == 0 {
		p.status = http.StatusOK
	}
	h := x.w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(b.Len()))
	x.w.WriteHeader(p.status)
	_, _ = x.w.Write(b.Bytes()) // nothing hangs on whether it arrives
	return nil
}

// part renders a template.
func part(name string, data any) (string, error) {
	var b strings.Builder
	if err := consolePages.ExecuteTemplate(&b, name, data); err != nil {
		return "", fmt.Errorf("rendering %s: %w", name, err)
	}
	return b.String(), nil
}

// asset serves an embedded file to whoever has a certificate of the operators' CA:
// there is nothing in it.
func (c Config) asset(kind, name string) http.HandlerFunc {
	body, err := consoleFiles.ReadFile(name)
	if err != nil {
		panic(err) // it is part of the program
	}
	sum := fnv.New64a()
	_, _ = sum.Write(body)
	tag := fmt.Sprintf(`"%x"`, sum.Sum64())
	return func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", kind)
		h.Set("ETag", tag)
		h.Set("Cache-Control", "no-cache")
		h.Set("X-Content-Type-Options", "nosniff")
		if r.Header.Get("If-None-Match") == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write(body)
	}
}

// chartRange is a span of time that the charts may show.
type chartRange struct {
	Query, Name string
	all, each   time.Duration
	Here        bool
}

var chartRanges = []chartRange{
	{Query: "hour", Name: "Last hour", all: time.Hour, each: time.Minute},
	{Query: "day", Name: "Last day", all: 24 * time.Hour, each: 10 * time.Minute},
	{Query: "month", Name: "Last 30 days", all: 30 * 24 * time.Hour, each: 4 * time.Hour},
}

// rangeOf is the one that a query names, or the first.
func rangeOf(r *http.Request) chartRange {
	for _, c := range chartRanges {
		if r.URL.Query().Get("range") == c.Query {
			return c
		}
	}
	return chartRanges[0]
}

// overviewLink is a link with its charts.
type overviewLink struct {
	ID     string
	Link   Link
	Charts []chart
}

func (c Config) overview(x *exchange) (content, error) {
	ctx, at := x.r.Context(), rangeOf(x.r)
	node, err := c.Backend.Node(ctx, x.caller, x.rid)
	if err != nil {
		return content{}, err
	}
	alarms, err := c.Backend.Alarms(ctx, x.caller, x.rid)
	if err != nil {
		return content{}, err
	}
	links, err := c.charted(ctx, x, at)
	if err != nil {
		if problem.KindOf(err) == problem.Invalid {
			return content{}, err
		}
		// The database is away: the rest of the page says so, and must be seen.
		x.log(slog.LevelWarn, http.StatusOK, err)
	}
	var ranges []chartRange
	for _, r := range chartRanges {
		r.Here = r.Query == at.Query
		ranges = append(ranges, r)
	}
	return content{title: "Overview", events: "/console/events?range=" + at.Query, name: "overview", data: map[string]any{
		"Node": node, "Alarms": alarms, "Links": links, "Ranges": ranges,
	}}, nil
}

// keks shows the epochs and their keys in the HSM.
func (c Config) keks(x *exchange) (content, error) {
	epochs, err := c.Backend.Epochs(x.r.Context(), x.caller, x.rid)
	return content{title: "Epochs", name: "keks", data: epochs}, err
}

// charted are the links with their charts.
func (c Config) charted(ctx context.Context, x *exchange, at chartRange) ([]overviewLink, error) {
	links, err := c.Backend.Links(ctx, x.caller, x.rid)
	if err != nil {
		return nil, err
	}
	to := time.Now()
	var list []overviewLink
	for _, l := range links {
		past, err := c.Backend.History(ctx, x.caller, x.rid, l.ID, to.Add(-at.all), at.each)
		if err != nil {
			return nil, err
		}
		list = append(list, overviewLink{l.ID, l, chartsOf(l, past, to.Add(-at.all), to, at.each)})
	}
	return list, nil
}

// chartsOf draws how a link did.
func chartsOf(l Link, past []Span, from, to time.Time, each time.Duration) []chart {
	var qber, rate, here, there []point
	for _, s := range past {
		at := s.At.Add(each / 2)
		if at.Before(from) {
			at = from
		} else if at.After(to) {
			at = to
		}
		if s.QBER > 0 { // light has some errors always
			qber = append(qber, point{at, s.QBER})
		}
		if passed := min(each, to.Sub(s.At)); passed >= time.Minute/2 { // the span under way is not over yet
			rate = append(rate, point{at, float64(s.Bits) / passed.Seconds()})
		}
		here, there = append(here, point{at, float64(s.Stored)}), append(there, point{at, float64(s.StoredPeer)})
	}
	gap := 3 * each
	pool := newChart("Keys in the pool", from, to, gap, 0, short, curve{"alice", "to assign here", here}, curve{"bob", "to assign at " + l.Peer, there})
	pool.Key = "Solid: to assign here. Dashed: to assign at " + l.Peer + "."
	return []chart{
		newChart("Error rate (QBER)", from, to, gap, 0.11, percent, curve{"", "", qber}),
		newChart("Secret rate, bit/s", from, to, gap, 0, short, curve{"", "", rate}),
		pool,
	}
}

// The rhythm of live parts.
const (
	liveEvery   = 2 * time.Second
	chartsEvery = 10 * time.Second
)

// events sends the parts of the overview that have changed, as server-sent events
// whose id is that of the part, until the client or the node goes.
func (c Config) events(w http.ResponseWriter, r *http.Request) {
	x := c.begin(w, r)
	if err := x.identify(); err != nil {
		x.refuse(err)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	out, sent := http.NewResponseController(w), make(map[string]string)
	tick := time.NewTicker(liveEvery)
	defer tick.Stop()
	for {
		if err := x.identify(); err != nil { // who is no operator any more sees no more
			return
		}
		parts, err := c.live(x, rangeOf(r))
		if err != nil {
			x.log(slog.LevelWarn, http.StatusOK, err)
		}
		_ = out.SetWriteDeadline(time.Now().Add(10 * time.Second)) // a client that reads nothing is let go
		for _, p := range parts {
			if sent[p.id] == p.html {
				continue
			}
			sent[p.id] = p.html
			if _, err := fmt.Fprintf(w, "id: %s\ndata: %s\n\n", p.id, eventLines.Replace(p.html)); err != nil {
				return
			}
		}
		if _, err := fmt.Fprint(w, ": still here\n\n"); err != nil || out.Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-c.Stopping:
			return
		case <-tick.C:
		}
	}
}

// eventLines keeps each line of a part within its event: a carriage return ends one too, and
// what alarms say of others may have one in it.
var eventLines = strings.NewReplacer("\r\n", "\ndata: ", "\r", "\ndata: ", "\n", "\ndata: ")

// livePart is a part of the page and what is in it now.
type livePart struct{ id, html string }

func (c Config) live(x *exchange, at chartRange) (parts []livePart, err error) {
	ctx, cancel := context.WithTimeout(x.r.Context(), chartsEvery)
	defer cancel()
	add := func(id, name string, data any) {
		html, failed := part(name, data)
		if failed != nil {
			err = errors.Join(err, failed)
			return
		}
		parts = append(parts, livePart{id, html})
	}
	if alarms, failed := c.Backend.Alarms(ctx, x.caller, x.rid); failed == nil {
		add("alarms", "alarms", alarms)
	}
	if node, failed := c.Backend.Node(ctx, x.caller, x.rid); failed == nil {
		add("node", "node", node)
	}
	links, failed := c.charted(ctx, x, at)
	for _, l := range links {
		add("link-"+l.ID, "link", l.Link)
		add("charts-"+l.ID, "charts", l.Charts)
	}
	return parts, errors.Join(err, failed)
}

// remaining is how long a certificate lasts.
type remaining struct {
	Good bool // for an hour or more
	Says string
}

func leftOf(end time.Time) remaining {
	left := time.Until(end)
	if left <= 0 {
		return remaining{Says: "over"}
	}
	return remaining{left >= time.Hour, "in " + roughly(left)}
}

// ago writes how long ago something was.
func ago(t time.Time) string {
	if since := time.Since(t); since >= time.Second {
		return roughly(since) + " ago"
	}
	return "now"
}

// roughly writes a duration in one or two units.
func roughly(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	case d >= time.Hour:
		return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	}
	return fmt.Sprintf("%d s", int(d.Seconds()))
}
