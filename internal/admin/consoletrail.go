package admin

import (
	"encoding/json"
	"net/http"
	"net/url"
	"time"

	"github.com/google/uuid"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// auditView is the page of the audit log: how it stands, a search, and what was found.
type auditView struct {
	Trail    Trail
	Query    map[string]string // as it was typed
	Searched bool
	Found    []auditRow
	More     string // of a search for what follows; "" if nothing does
	Actions  []audit.Action
}

// auditRow is an event as people read it.
type auditRow struct {
	Leaf            int64
	Event           audit.Event
	Who, With, Text string
	Done            bool
}

// searchable are the actions that people look for.
var searchable = []audit.Action{
	audit.EncKeys, audit.DecKeys, audit.Assign, audit.Consume, audit.Expire, audit.Burn, audit.VoidKeys, audit.Compare, audit.Malformed, audit.Status, audit.Lost, audit.Cleanup,
	audit.Alarm, audit.Start, audit.Stop, audit.Takeover, audit.LinkAbort, audit.LinkOpen, audit.Hold, audit.DropBlock, audit.KEKMade, audit.KEKGone,
	audit.Disable, audit.Enable, audit.Policies, audit.TrustLink, audit.Approve, audit.Compromise, audit.KeyShown, audit.Certificate, audit.Handshake, audit.Outage, audit.Recover, audit.AuditRead,
}

// foundOnPage is how many events a page shows.
const foundOnPage = 50

// auditPage shows how the log stands, and searches it when something is looked for.
func (c Config) auditPage(x *exchange) (content, error) {
	if !x.caller.Has(identity.Auditor) {
		return content{}, refusal{problem.New(problem.Forbidden, "the audit log is for operators with the duty %s", identity.Auditor)}
	}
	v := auditView{Query: make(map[string]string), Actions: searchable}
	var err error
	if v.Trail, err = c.Trail.Trail(x.r.Context(), x.caller, x.rid); err != nil {
		return content{}, err
	}
	if q := x.r.URL.Query(); len(q) > 0 {
		v.Searched = true
		if err := c.searchForPage(x, q, &v); err != nil {
			return content{}, err
		}
	}
	return content{title: "Audit", name: "audit", data: v}, nil
}

func (c Config) searchForPage(x *exchange, typed url.Values, v *auditView) error {
	asked := url.Values{}
	for name := range typed {
		text := typed.Get(name)
		v.Query[name] = text
		if text == "" {
			continue // a field that was left empty asks for nothing
		}
		if name == "from" || name == "to" { // as a browser's field gives it: UTC, without a zone
			if at, err := time.Parse("2006-01-02T15:04", text); err == nil {
				text = at.Format(time.RFC3339)
			}
		}
		asked.Set(name, text)
	}
	q, err := parseQuery(asked)
	if err != nil {
		return refusal{err}
	}
	q.Limit = foundOnPage
	// The page has read how the log stands under its own ID, and each reading has its record.
	found, err := c.Trail.Search(x.r.Context(), x.caller, uuid.Must(uuid.NewV7()).String(), q)
	if err != nil {
		return err
	}
	for _, f := range found.Events {
		v.Found = append(v.Found, rowOf(f))
	}
	if last := len(found.Events) - 1; found.More && found.Events[last].Leaf >= 0 {
		next := url.Values{}
		for name := range typed {
			next.Set(name, typed.Get(name))
		}
		q.First = found.Events[last].Leaf + 1
		next.Set("first", q.values().Get("first"))
		v.More = "/console/audit?" + next.Encode()
	}
	return nil
}

// rowOf reads what the log has. What does not parse is shown as it is.
func rowOf(f Found) auditRow {
	row := auditRow{Leaf: f.Leaf, Text: f.Text}
	if err := json.Unmarshal([]byte(f.Text), &row.Event); err != nil {
		return row
	}
	e := row.Event
	row.Done = e.Outcome == audit.Done
	row.Who = e.Actor.ID
	if row.Who == "" {
		row.Who = "a stranger"
	}
	if e.Actor.Gateway != "" {
		row.Who += " through " + e.Actor.Gateway
	}
	row.With = e.Peer
	if e.Master != "" {
		row.With = e.Master + " to " + join(e.Slaves)
	}
	return row
}

func join(names []string) string {
	text := ""
	for i, n := range names {
		if i > 0 {
			text += ", "
		}
		text += n
	}
	return text
}

// proofFile gives the proof that the log has a leaf, as a file that kmectl audit
// verifies without us.
func (c Config) proofFile(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Disposition", `attachment; filename="proof-`+numeric(r.URL.Query().Get("leaf"))+`.json"`)
	serveTrail(c, c.proof)(w, r)
}

// numeric is text without what is no digit: it goes into a header.
func numeric(text string) string {
	var b []byte
	for i := range len(text) {
		if text[i] >= '0' && text[i] <= '9' && len(b) < 20 {
			b = append(b, text[i])
		}
	}
	return string(b)
}
