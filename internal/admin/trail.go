package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// Trail is how the audit log of a site stands, and what it has witnessed of others.
type Trail struct {
	Logs      []TrailLog  `json:"logs"`              // of each origin of the account, the present one last
	Waiting   int64       `json:"waiting"`           // events that are not in the tree yet
	Witness   string      `json:"witness"`           // the verifier key with which this site cosigns
	Witnessed []Witnessed `json:"witnessed"`         // what it has last seen of others
	Distrust  string      `json:"distrust,omitzero"` // why the log is not to be trusted
}

// TrailLog is the log of one origin.
type TrailLog struct {
	Origin     int64     `json:"origin"`
	Name       string    `json:"name"`
	Key        string    `json:"key"` // its verifier key, as the node's token has it for the present origin
	Size       int64     `json:"size"`
	Begun      time.Time `json:"begun"`
	Checkpoint string    `json:"checkpoint,omitzero"` // the last one, with the witnesses' signatures
}

// Witnessed is the last checkpoint that was seen of the log of another KME.
type Witnessed struct {
	KME        string `json:"kme"`
	Log        string `json:"log"`
	Key        string `json:"key"`
	Size       int64  `json:"size"`
	Checkpoint string `json:"checkpoint"`
}

// Query says which events are looked for. What is empty asks for any.
type Query struct {
	From, To time.Time // of the event, from and without
	Origin   int64     // of the log; 0 is the present one. If nothing is found in one that has ended, it is Gone
	First    int64     // leaf: those before are left out
	SAE      string    // who asked, or was named
	Key      string    // a key_ID
	Request  string
	Action   string
	Outcome  string
	Serial   string // of the certificate that asked, decimal
	Operator string
	Limit    int  // at most; 0 is 100
	Watch    bool // it is asked again and again, and recorded once a minute; only what is in the log is found
}

// maxFound is the most that one search returns.
const maxFound = 1000

// values is q as a query of a URL, and parseQuery reads it again.
func (q Query) values() url.Values {
	v := url.Values{}
	set := func(name, text string) {
		if text != "" {
			v.Set(name, text)
		}
	}
	for name, at := range map[string]time.Time{"from": q.From, "to": q.To} {
		if !at.IsZero() {
			v.Set(name, at.UTC().Format(time.RFC3339Nano))
		}
	}
	for name, n := range map[string]int64{"origin": q.Origin, "first": q.First} {
		if n > 0 {
			v.Set(name, strconv.FormatInt(n, 10))
		}
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Watch {
		v.Set("watch", "true")
	}
	set("sae", q.SAE)
	set("key", q.Key)
	set("request", q.Request)
	set("action", q.Action)
	set("outcome", q.Outcome)
	set("serial", q.Serial)
	set("operator", q.Operator)
	return v
}

func parseQuery(v url.Values) (q Query, err error) {
	invalid := func(name string) error { return problem.New(problem.Invalid, "%s=%q", name, v.Get(name)) }
	q = Query{
		SAE: v.Get("sae"), Key: v.Get("key"), Request: v.Get("request"), Action: v.Get("action"), Outcome: v.Get("outcome"),
		Serial: v.Get("serial"), Operator: v.Get("operator"), Limit: 100,
		Watch: v.Get("watch") == "true",
	}
	for name := range v {
		switch name {
		case "from", "to", "origin", "first", "limit", "sae", "key", "request", "action", "outcome", "serial", "operator", "watch":
		default:
			return q, problem.New(problem.Invalid, "nothing is looked for by %q", name)
		}
	}
	for name, at := range map[string]*time.Time{"from": &q.From, "to": &q.To} {
		if text := v.Get(name); text != "" {
			if *at, err = time.Parse(time.RFC3339Nano, text); err != nil {
				return q, invalid(name)
			}
		}
	}
	for name, n := range map[string]*int64{"origin": &q.Origin, "first": &q.First} {
		if *n, err = number(v, name); err != nil {
			return q, err
		}
	}
	if text := v.Get("limit"); text != "" {
		if q.Limit, err = strconv.Atoi(text); err != nil || q.Limit < 1 || q.Limit > maxFound {
			return q, invalid("limit")
		}
	}
	return q, nil
}

// Found is an event and where it stands.
type Found struct {
	Leaf int64  `json:"leaf"` // -1: it is not in the tree yet
	Text string `json:"text"` // the canonical one, which is JSON and the leaf
}

// Findings are what a search found, in the log's order.
type Findings struct {
	Events []Found `json:"events"`
	More   bool    `json:"more"` // there may be others behind these
}

// TrailBackend is what stands behind the routes of the audit log. Each call is of an
// operator who may read it, and records that he did.
type TrailBackend interface {
	Trail(ctx context.Context, c identity.Caller, rid string) (Trail, error)
	// Search lists events of the log of an origin in the order of its leaves, and then
	// those that are in no log yet.
	Search(ctx context.Context, c identity.Caller, rid string, q Query) (Findings, error)
	// Proof proves that the log of an origin (0: the present one) has a leaf. If its event
	// is in a bundle and not in the database any more, that is Gone, and Detail says which.
	Proof(ctx context.Context, c identity.Caller, rid string, origin, leaf int64) (audit.Proof, error)
	// Bundle writes the leaves from first up to, and without, end of the log of an origin
	// to w; an end of 0 is that of the log, and what is not in it yet follows. ready is
	// called before the first byte, and not if there is an error before that.
	Bundle(ctx context.Context, c identity.Caller, rid string, origin, first, end int64, ready func() io.Writer) error
}

// The routes of the audit log.
const (
	pathTrail  = "/api/v1/audit"
	pathSearch = "/api/v1/audit/search"
	pathProof  = "/api/v1/audit/proof"
	pathBundle = "/api/v1/audit/bundle"
)

// auditor says whether the caller may read the log.
func (x *exchange) auditor() error {
	if err := x.identify(); err != nil {
		return err
	}
	if !x.caller.Has(identity.Auditor) {
		return problem.Because(problem.Forbidden, fmt.Errorf("operator %s has not the duty %s", x.caller.ID(), identity.Auditor))
	}
	return nil
}

// serveTrail is serve for those who may read the log.
func serveTrail[A any](c Config, act func(ctx context.Context, x *exchange) (A, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := c.begin(w, r)
		if err := x.auditor(); err != nil {
			x.refuse(err)
			return
		}
		a, err := act(r.Context(), x)
		if unknown, ok := errors.AsType[refusal](err); ok {
			x.refuse(unknown.error)
			return
		}
		if err != nil {
			x.fail(err)
			return
		}
		body, err := json.Marshal(a)
		if err != nil {
			x.fail(fmt.Errorf("marshalling the answer: %w", err))
			return
		}
		x.write(http.StatusOK, body)
	}
}

func (c Config) trail(ctx context.Context, x *exchange) (Trail, error) {
	return c.Trail.Trail(ctx, x.caller, x.rid)
}

func (c Config) search(ctx context.Context, x *exchange) (Findings, error) {
	q, err := parseQuery(x.r.URL.Query())
	if err != nil {
		return Findings{}, refusal{err}
	}
	return c.Trail.Search(ctx, x.caller, x.rid, q)
}

func (c Config) proof(ctx context.Context, x *exchange) (audit.Proof, error) {
	leaf, err := number(x.r.URL.Query(), "leaf")
	origin, oerr := number(x.r.URL.Query(), "origin")
	if err = errors.Join(err, oerr); err != nil {
		return audit.Proof{}, refusal{err}
	}
	return c.Trail.Proof(ctx, x.caller, x.rid, origin, leaf)
}

func number(v url.Values, name string) (int64, error) {
	text := v.Get(name)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, problem.New(problem.Invalid, "%s=%q", name, text)
	}
	return n, nil
}

// bundleTime is how long a bundle may take to be written.
const bundleTime = time.Hour

// bundle streams: what goes wrong after its first byte cuts it off, which its reader
// cannot take for the end.
func (c Config) bundle(w http.ResponseWriter, r *http.Request) {
	x := c.begin(w, r)
	if err := x.auditor(); err != nil {
		x.refuse(err)
		return
	}
	var at [3]int64
	for i, name := range []string{"origin", "first", "end"} {
		var err error
		if at[i], err = number(r.URL.Query(), name); err != nil {
			x.refuse(err)
			return
		}
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(bundleTime)) // not every writer has one
	began := false
	err := c.Trail.Bundle(r.Context(), x.caller, x.rid, at[0], at[1], at[2], func() io.Writer {
		began = true
		w.Header().Set("Content-Type", "application/x-tar")
		w.WriteHeader(http.StatusOK)
		return w
	})
	switch {
	case err == nil:
	case began:
		x.log(-4, http.StatusOK, err)
		panic(http.ErrAbortHandler)
	default:
		x.fail(err)
	}
}

// Trail says how the audit log of the node's site stands.
func (c *Client) Trail(ctx context.Context) (t Trail, err error) {
	return t, c.get(ctx, pathTrail, &t)
}

// Search looks for events.
func (c *Client) Search(ctx context.Context, q Query) (f Findings, err error) {
	return f, c.get(ctx, pathSearch+"?"+q.values().Encode(), &f)
}

// Proof proves that the log of an origin (0: the present one) has a leaf. Whoever gets the
// proof verifies it.
func (c *Client) Proof(ctx context.Context, origin, leaf int64) (p audit.Proof, err error) {
	return p, c.get(ctx, fmt.Sprintf("%s?origin=%d&leaf=%d", pathProof, origin, leaf), &p)
}

// Bundle copies a bundle of the log of an origin (0: the present one) to w: the leaves
// from first up to, and without, end; an end of 0 is that of the log, and what is not
// in it yet follows.
func (c *Client) Bundle(ctx context.Context, w io.Writer, origin, first, end int64) error {
	path := fmt.Sprintf("%s?origin=%d&first=%d&end=%d", pathBundle, origin, first, end)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("getting a bundle: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) // what there is of it
		return fmt.Errorf("getting a bundle: %w", apiError(resp, body))
	}
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("getting a bundle: %w", err)
	}
	return nil
}
