package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// Config is what the door is made of. Everything must be set unless said otherwise.
type Config struct {
	KME     identity.KME // names the realm of a 401
	Backend Backend
	// Identify says who makes a request, from its verified certificate and nothing
	// else. It is asked on every request but probes. With an error, the Caller is a
	// stranger with the certificate's facts.
	Identify func(*http.Request) (identity.Caller, error)
	Metrics  http.Handler // serves /metrics to operators
	Trail    TrailBackend // nil: this node does not read the audit log to anybody
	Log      *slog.Logger
	// Certificates are those with which SAEs have come to this node since it started, by
	// SAE; nil: nobody knows.
	Certificates func() []Certificate

	Node     string          // the node's name, for people; may be empty
	Stopping <-chan struct{} // closed when the node stops: streams end then; may be nil
}

// Handler returns the whole door for operators.
func Handler(c Config) (http.Handler, error) {
	if c.KME == (identity.KME{}) || c.Backend == nil || c.Identify == nil || c.Metrics == nil || c.Log == nil {
		return nil, errors.New("configuring the operator door: KME, Backend, Identify, Metrics and Log must be set")
	}
	r := chi.NewRouter()
	r.Get("/api/v1/node", serve(c, c.Backend.Node))
	r.Get("/api/v1/links", serve(c, c.links))
	r.Get("/api/v1/alarms", serve(c, c.alarms))
	r.Get("/api/v1/epochs", serve(c, c.Backend.Epochs))
	r.Get("/api/v1/saes", serve(c, c.saes))
	r.Post(pathDoctor, act(c, identity.Viewer, c.doctor))
	r.Post(pathCleanup, act(c, identity.Operating, c.cleanup))
	r.Post(pathDisable, act(c, identity.Operating, c.disableSAE))
	r.Post(pathEnable, act(c, identity.SecurityOfficer, c.enableSAE))
	r.Post(pathTrust, act(c, identity.SecurityOfficer, c.trustLink))
	r.Get(pathWaiting, serve(c, c.waiting))
	r.Post(pathLeave, act(c, identity.SecurityOfficer, c.leave))
	r.Post(pathReload, act(c, identity.Operating, c.reloadPolicies))
	if c.Trail != nil {
		r.Get(pathTrail, serveTrail(c, c.trail))
		r.Get(pathSearch, serveTrail(c, c.search))
		r.Get(pathProof, serveTrail(c, c.proof))
		r.Get(pathBundle, c.bundle)
	}
	r.Get("/api/v1/keys/{id}/story", answer(c, identity.Auditor, c.story))
	r.Post(pathCompromise, act(c, identity.SecurityOfficer, c.compromise))
	r.Get("/metrics", c.metrics)
	r.Get("/healthz", c.probe(c.Backend.Healthy))
	r.Get("/readyz", c.probe(c.Backend.Ready))
	c.mountConsole(r)
	r.NotFound(c.elsewhere(r, http.StatusNotFound, "Endpoint not found"))
	r.MethodNotAllowed(c.elsewhere(r, http.StatusMethodNotAllowed, "Method not allowed"))
	return r, nil
}

func (c Config) links(ctx context.Context, caller identity.Caller, rid string) (linksObject, error) {
	links, err := c.Backend.Links(ctx, caller, rid)
	return linksObject{links}, err
}

func (c Config) alarms(ctx context.Context, caller identity.Caller, rid string) (alarmsObject, error) {
	alarms, err := c.Backend.Alarms(ctx, caller, rid)
	return alarmsObject{alarms}, err
}

// pathTrust lets a link go on that rests because tags of its peer were wrong.
const pathTrust = "/api/v1/links/trust"

// trusted names the link that is to go on.
type trusted struct {
	Link string `json:"link"`
}

func (c Config) trustLink(ctx context.Context, caller identity.Caller, rid string, q trusted) (trusted, error) {
	return q, c.Backend.TrustLink(ctx, caller, rid, q.Link)
}

// pathCleanup is the QuteMail API's, whose clients were allowed it.
const pathCleanup = "/api/v1/keys/cleanup"

const pathCompromise = "/api/v1/keys/compromise"

func (c Config) cleanup(ctx context.Context, caller identity.Caller, rid string, q approved) (cleanupObject, error) {
	n, err := c.Backend.Cleanup(ctx, caller, rid, q.Approvals)
	return cleanupObject{"success", n, fmt.Sprintf("Cleaned up %d expired keys", n)}, err
}

func (c Config) compromise(ctx context.Context, caller identity.Caller, rid string, q suspicionObject) (Compromised, error) {
	return c.Backend.Compromise(ctx, caller, rid, q.Approvals, q.Suspicion)
}

// serve is the way in for what shows, and any operator may see: identify, ask,
// marshal, and only then write.
func serve[A any](c Config, show func(context.Context, identity.Caller, string) (A, error)) http.HandlerFunc {
	return answer(c, identity.Viewer, func(ctx context.Context, x *exchange) (A, error) { return show(ctx, x.caller, x.rid) })
}

// act is the way in for what changes something, and takes a duty: identify, read the
// body, which may be empty, act, marshal, and only then write. A browser that has the
// operator's certificate sends it with what any page asks for: see ownPage.
func act[Q, A any](c Config, d identity.Duty, do func(context.Context, identity.Caller, string, Q) (A, error)) http.HandlerFunc {
	return answer(c, d, func(ctx context.Context, x *exchange) (a A, err error) {
		var q Q
		if err := ownPage(x.r); err != nil {
			return a, refusal{err}
		}
		if err := x.read(&q); err != nil {
			return a, refusal{err}
		}
		return do(ctx, x.caller, x.rid, q)
	})
}

// refusal is an error that came before any call of the Backend, which does not know
// of it yet.
type refusal struct{ error }

// Unwrap returns the problem.
func (r refusal) Unwrap() error { return r.error }

// maxBody is the most that is read of a request's body, in bytes.
const maxBody = 64 << 10

// read reads a JSON object, or nothing.
func (x *exchange) read(into any) error {
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return problem.Because(problem.TooLarge, err)
	}
	if err == nil && len(body) > 0 {
		err = json.Unmarshal(body, into, json.RejectUnknownMembers(true))
	}
	if err != nil {
		return &problem.Error{Kind: problem.Invalid, Detail: "the body is not the JSON object that is wanted", Err: err}
	}
	return nil
}

func answer[A any](c Config, d identity.Duty, do func(context.Context, *exchange) (A, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := c.begin(w, r)
		if err := cmp.Or(x.identify(), x.may(d)); err != nil {
			x.refuse(err)
			return
		}
		a, err := do(r.Context(), x)
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

// story tells of the key that the path names.
func (c Config) story(ctx context.Context, x *exchange) (KeyStory, error) {
	id, err := key.ParseID(chi.URLParam(x.r, "id"))
	if err != nil {
		return KeyStory{}, refusal{&problem.Error{Kind: problem.Invalid, Detail: "that is no key_ID", Err: err}}
	}
	return c.Backend.KeyStory(ctx, x.caller, x.rid, id)
}

func (c Config) metrics(w http.ResponseWriter, r *http.Request) {
	x := c.begin(w, r)
	if err := x.identify(); err != nil {
		x.refuse(err)
		return
	}
	c.Metrics.ServeHTTP(w, r)
}

// probe answers a load balancer or a supervisor. What is wrong is for operators.
func (c Config) probe(how func(context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := c.begin(w, r)
		if err := how(r.Context()); err != nil {
			x.log(slog.LevelWarn, http.StatusServiceUnavailable, err)
			x.write(http.StatusServiceUnavailable, []byte(`{"status":"unavailable"}`))
			return
		}
		x.write(http.StatusOK, []byte(`{"status":"ok"}`))
	}
}

// elsewhere answers what no route of routes takes; a stranger is refused like anywhere.
func (c Config) elsewhere(routes chi.Routes, status int, why string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := c.begin(w, r)
		x.route = "elsewhere" // a caller may think of any method and path
		if err := x.identify(); err != nil {
			x.refuse(err)
			return
		}
		if status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", strings.Join(methods(routes, cmp.Or(r.URL.RawPath, r.URL.Path)), ", "))
		}
		x.writeError(status, why)
		x.log(slog.LevelInfo, status, errors.New(why))
	}
}

// methods are those that the routes take at a path.
func methods(routes chi.Routes, path string) (taken []string) {
	for _, m := range []string{http.MethodGet, http.MethodPost} {
		if routes.Match(chi.NewRouteContext(), m, path) {
			taken = append(taken, m)
		}
	}
	return taken
}

// exchange is one request on its way to its answer.
type exchange struct {
	c      Config
	w      http.ResponseWriter
	r      *http.Request
	rid    string
	route  string
	caller identity.Caller
	began  time.Time
}

func (c Config) begin(w http.ResponseWriter, r *http.Request) *exchange {
	x := &exchange{c: c, w: w, r: r, rid: uuid.Must(uuid.NewV7()).String(), began: time.Now()}
	x.route = r.Method + " " + chi.RouteContext(r.Context()).RoutePattern()
	h := w.Header()
	h.Set("X-Request-Id", x.rid)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	return x
}

// identify sets the caller, who must be an operator.
func (x *exchange) identify() error {
	caller, err := x.c.Identify(x.r)
	if x.caller = caller.OnRoute(x.route); err != nil {
		return problem.Because(problem.Unauthorized, err)
	}
	if _, ok := x.caller.Operator(); !ok {
		return problem.Because(problem.Unauthorized, fmt.Errorf("a caller of role %q is no operator", x.caller.Role()))
	}
	return nil
}

// may is nil if the caller has the duty.
func (x *exchange) may(d identity.Duty) error {
	if x.caller.Role() == identity.RoleOperator && !x.caller.Has(d) {
		return &problem.Error{
			Kind: problem.Forbidden, Detail: fmt.Sprintf("this takes the duty %s", d), Err: fmt.Errorf("operator %s does not have it", x.caller.ID()),
		}
	}
	return nil
}

// refuse has err recorded, since no Backend call will, and answers it.
func (x *exchange) refuse(err error) { x.fail(x.told(err)) }

// told has err recorded, and returns what to answer.
func (x *exchange) told(err error) error {
	return x.c.Backend.Refused(context.WithoutCancel(x.r.Context()), x.caller, x.rid, x.route, err)
}

// answers is the table from a problem's kind to its status here.
var answers = map[problem.Kind]int{
	problem.Internal:     http.StatusInternalServerError,
	problem.Invalid:      http.StatusBadRequest,
	problem.Unauthorized: http.StatusUnauthorized,
	problem.Forbidden:    http.StatusForbidden,
	problem.NotFound:     http.StatusNotFound,
	problem.Gone:         http.StatusGone,
	problem.TooLarge:     http.StatusRequestEntityTooLarge,
	problem.Unavailable:  http.StatusServiceUnavailable,
}

// fail answers err. Its cause is in the log, under the request's ID.
func (x *exchange) fail(err error) {
	kind := problem.KindOf(err)
	status := answers[kind]
	level := slog.LevelInfo
	message := kind.String()
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Detail != "" {
		message = p.Detail
	}
	h := x.w.Header()
	switch status {
	case http.StatusUnauthorized:
		message = "unauthorized" // and no word of why
		h.Set("WWW-Authenticate", "TLS-Client-Certificate realm="+strconv.Quote(x.c.KME.String()))
	case http.StatusServiceUnavailable:
		level = slog.LevelWarn
		h.Set("Retry-After", "2")
	case http.StatusInternalServerError:
		level = slog.LevelError
	}
	x.writeError(status, message)
	x.log(level, status, err)
}

// errorObject is the body of every answer but 200.
type errorObject struct {
	Message string `json:"message"`
	Request string `json:"request_id"`
}

func (x *exchange) writeError(status int, message string) {
	body, _ := json.Marshal(errorObject{message, x.rid}) // two strings of ours
	x.write(status, body)
}

func (x *exchange) write(status int, body []byte) {
	h := x.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	x.w.WriteHeader(status)
	if x.r.Method != http.MethodHead {
		_, _ = x.w.Write(body) // nothing hangs on whether it arrives
	}
}

func (x *exchange) log(level slog.Level, status int, err error) {
	x.c.Log.LogAttrs(x.r.Context(), level, "operator request",
		slog.String("request", x.rid), slog.String("route", x.route), slog.String("caller", x.caller.ID()),
		slog.Int("status", status), slog.Duration("took", time.Since(x.began)), slog.String("err", err.Error()))
}
