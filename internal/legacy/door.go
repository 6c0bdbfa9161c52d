package legacy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/uuid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// maxBody is the most that is read of a request's body, in bytes.
const maxBody = 64 << 10

// requestIDHeader carries the request's ID in every answer.
const requestIDHeader = "X-Request-Id"

// Config is what a Door is made of. Everything must be set.
type Config struct {
	KME     identity.KME // names the realm of a 401
	Backend Backend
	// Identify says who makes a request, from its verified certificate and nothing
	// else. It is asked on every request. With an error, the Caller is a stranger
	// with the certificate's facts.
	Identify func(*http.Request) (identity.Caller, error)
	Limits   Limits
	Now      func() time.Time
	Log      *slog.Logger
}

// Door serves the routes to SAEs.
type Door struct{ Config }

// New returns a Door.
func New(c Config) (*Door, error) {
	if c.KME == (identity.KME{}) || c.Backend == nil || c.Identify == nil || c.Now == nil || c.Log == nil {
		return nil, errors.New("configuring the legacy door: KME, Backend, Identify, Now and Log must be set")
	}
	l := c.Limits
	if l.MinSize <= 0 || l.KeySize < l.MinSize || l.MaxSize < l.KeySize || l.TTL < time.Second || l.MaxTTL < l.TTL {
		return nil, fmt.Errorf("configuring the legacy door: the limits %+v leave out their own defaults", l)
	}
	return &Door{c}, nil
}

// Mount adds the routes to r. Those of 014 may stand beside them: these have one
// segment after /keys, those have two. What no route takes is r's to answer.
func (d *Door) Mount(r chi.Router) {
	r.Get("/api/v1/status", d.serve("GET /api/v1/status", d.status))
	r.Post("/api/v1/keys/request", d.serve("POST /api/v1/keys/request", d.request))
	r.Post("/api/v1/keys/consume", d.serve("POST /api/v1/keys/consume", d.consume))
	r.Post("/api/v1/keys/cleanup", d.serve("POST /api/v1/keys/cleanup", d.cleanup))
	// The names of the seed's other routes (list among them) are no key IDs.
	r.Get("/api/v1/keys/{key_id:[0-9A-Fa-f-]{36}(-alice|-bob)?}", d.serve("GET /api/v1/keys/{key_id}", d.retrieve))
}

// answer is what a route gives back.
type answer struct {
	status int
	body   []byte
	keys   bool // body holds a key: it is wiped, and an answer that fails is told
}

// refusal is an error that came before any call of the Backend, which does not
// know of it yet.
type refusal struct{ error }

// Unwrap returns the problem.
func (r refusal) Unwrap() error { return r.error }

// serve is the one door of all routes: identity, then act, which parses and calls
// the Backend. The answer is complete before its first byte leaves.
func (d *Door) serve(route string, act func(*exchange) (answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := d.begin(w, r, route)
		err := x.identify()
		var a answer
		if err == nil {
			a, err = act(x)
		}
		if unknown, ok := errors.AsType[refusal](err); ok {
			err = d.Backend.Refused(context.WithoutCancel(r.Context()), x.caller, x.rid, x.route, unknown.error)
		} else if err == nil {
			x.succeed(a)
			return
		}
		x.fail(err)
	}
}

func (d *Door) status(x *exchange) (answer, error) {
	s, err := d.Backend.Service(x.r.Context(), x.caller, x.rid)
	if err != nil {
		return answer{}, err
	}
	status, body, err := wireService(s, d.Now())
	return answer{status: status, body: body}, err
}

func (d *Door) request(x *exchange) (answer, error) {
	body, err := x.readBody()
	if err != nil {
		return answer{}, refusal{err}
	}
	q, err := parseRequest(x.r.Header.Get("Content-Type"), body, x.speak, d.Limits)
	if err != nil {
		return answer{}, refusal{err}
	}
	k, err := d.Backend.RequestKey(x.r.Context(), x.caller, x.rid, q.recipient, q.bits, q.ttl)
	defer k.Material.Wipe()
	if err != nil {
		return answer{}, err
	}
	return answer{200, appendIssued(make([]byte, 0, answerSize(k.Material)), k), true}, nil
}

func (d *Door) retrieve(x *exchange) (answer, error) {
	id, err := parseRetrieve(chi.URLParam(x.r, "key_id"), x.r.URL.RawQuery, x.speak)
	if err != nil {
		return answer{}, refusal{err}
	}
	k, err := d.Backend.RetrieveKey(x.r.Context(), x.caller, x.rid, id)
	defer k.Material.Wipe()
	if err != nil {
		return answer{}, err
	}
	return answer{200, appendRetrieved(make([]byte, 0, answerSize(k.Material)), k), true}, nil
}

func (d *Door) consume(x *exchange) (answer, error) {
	body, err := x.readBody()
	if err != nil {
		return answer{}, refusal{err}
	}
	id, err := parseConsume(x.r.Header.Get("Content-Type"), body, x.speak)
	if err != nil {
		return answer{}, refusal{err}
	}
	if err := d.Backend.ConsumeKey(x.r.Context(), x.caller, x.rid, id); err != nil {
		return answer{}, err
	}
	return answer{status: 200, body: []byte(`{"status":"success","message":"Key marked as consumed"}`)}, nil
}

// cleanup is what the seed let anybody do.
func (d *Door) cleanup(*exchange) (answer, error) {
	return answer{}, refusal{problem.New(problem.Forbidden, "cleanup is for operators, at their own door")}
}

// exchange is one request on its way to its answer.
type exchange struct {
	d      *Door
	w      http.ResponseWriter
	r      *http.Request
	rid    string
	route  string
	caller identity.Caller
	began  time.Time
}

// begin names the request and sets what every answer carries.
func (d *Door) begin(w http.ResponseWriter, r *http.Request, route string) *exchange {
	x := &exchange{d: d, w: w, r: r, rid: uuid.Must(uuid.NewV7()).String(), route: route, began: time.Now()}
	h := w.Header()
	h.Set(requestIDHeader, x.rid)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	return x
}

// identify sets the caller, who must be an SAE, or a gateway that speaks for some.
func (x *exchange) identify() error {
	var err error
	if x.caller, err = x.d.Identify(x.r); err != nil {
		return refusal{problem.Because(problem.Unauthorized, err)}
	}
	if role := x.caller.Role(); role != identity.RoleSAE && role != identity.RoleGateway {
		return refusal{problem.Because(problem.Unauthorized, fmt.Errorf("a caller of role %q is no SAE", role))}
	}
	return nil
}

// speak is the speaker of the request. An SAE speaks for itself; a gateway becomes
// the SAE that it names, if its row lists that.
func (x *exchange) speak(said string) error {
	if x.caller.Role() == identity.RoleSAE {
		if said != x.caller.ID() {
			return notTheirs(said, "requester_sae is not the SAE that the certificate names")
		}
		return nil
	}
	sae, err := identity.ParseSAE(said)
	if err != nil {
		return invalid(err, "requester_sae is not an SAE ID")
	}
	acting, ok := x.caller.For(sae)
	if !ok {
		return notTheirs(said, "requester_sae is not an SAE that this gateway acts for")
	}
	x.caller = acting
	return nil
}

func (x *exchange) readBody() ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, problem.Because(problem.TooLarge, err)
	}
	if err != nil {
		return nil, invalid(err, "the body could not be read")
	}
	return body, nil
}

// fail answers err, which is recorded already.
func (x *exchange) fail(err error) {
	status, body, after := wireError(err, x.rid)
	h := x.w.Header()
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "TLS-Client-Certificate realm="+strconv.Quote(x.d.KME.String()))
	}
	if after > 0 {
		h.Set("Retry-After", strconv.Itoa(int((after+time.Second-1)/time.Second)))
	}
	_ = x.write(answer{status: status, body: body}) // a refusal that is not heard changes nothing
	level := slog.LevelInfo
	if status >= 500 {
		level = slog.LevelWarn
	}
	x.log(level, status, err)
}

// succeed answers. A key that may not have arrived is told to the Backend.
func (x *exchange) succeed(a answer) {
	defer clear(a.body)
	gone := x.r.Context().Err()
	err := errors.Join(gone, x.write(a))
	if err != nil && a.keys {
		x.d.Backend.AnswerLost(context.WithoutCancel(x.r.Context()), x.caller, x.rid, fmt.Errorf("answering: %w", err))
	}
	x.log(slog.LevelDebug, a.status, err)
}

func (x *exchange) write(a answer) error {
	h := x.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(a.body)))
	x.w.WriteHeader(a.status)
	if _, err := x.w.Write(a.body); err != nil {
		return err
	}
	if !a.keys {
		return nil
	}
	// Only a flush tells that the connection is gone.
	return http.NewResponseController(x.w).Flush()
}

func (x *exchange) log(level slog.Level, status int, err error) {
	attrs := []slog.Attr{
		slog.String("request", x.rid), slog.String("route", x.route), slog.String("caller", x.caller.ID()),
		slog.Int("status", status), slog.Duration("took", time.Since(x.began)),
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	x.d.Log.LogAttrs(x.r.Context(), level, "sae request", attrs...)
}
