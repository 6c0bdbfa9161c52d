package etsi014

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
	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// maxBody is the most that is read of a request's body, in bytes. 128 key IDs take
// about 6.5 KiB.
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
	Log      *slog.Logger
}

// Door serves the API to SAEs.
type Door struct {
	Config
	metrics metrics
}

// New returns a Door.
func New(c Config) (*Door, error) {
	if c.KME == (identity.KME{}) || c.Backend == nil || c.Identify == nil || c.Log == nil {
		return nil, errors.New("configuring the 014 door: KME, Backend, Identify and Log must be set")
	}
	return &Door{Config: c, metrics: newMetrics()}, nil
}

// Mount adds the three methods of the API (clause 5, Table 2) to r.
func (d *Door) Mount(r chi.Router) {
	for _, route := range []struct {
		method, path string
		serve        http.HandlerFunc
	}{
		{"GET", "/api/v1/keys/{sae}/status", serve(d, readNothing, d.status)},
		{"GET", "/api/v1/keys/{sae}/enc_keys", serve(d, readKeyRequestQuery, d.encKeys)},
		{"POST", "/api/v1/keys/{sae}/enc_keys", serve(d, readKeyRequest, d.encKeys)},
		{"GET", "/api/v1/keys/{sae}/dec_keys", serve(d, readKeyIDsQuery, d.decKeys)},
		{"POST", "/api/v1/keys/{sae}/dec_keys", serve(d, readKeyIDs, d.decKeys)},
	} {
		r.Method(route.method, route.path, route.serve)
	}
}

// request is what a route's parser sees of a request, and what its Backend call needs.
type request struct {
	caller identity.Caller
	self   identity.SAE // the caller
	other  identity.SAE // of the path
	limits Limits
	query  string // raw
	body   []byte // of a POST
}

// answer is the body of a 200.
type answer struct {
	body  []byte
	keys  bool   // body holds keys: it is wiped, and an answer that fails is told
	point string // failpoint to hit when half of body has left; "" for none
}

// serve is the one door of all routes: identity, path, body, parse, act, answer.
// What goes wrong before act is told to Backend.Refused, since act's Backend call
// would have recorded it. The answer is complete before its first byte leaves.
func serve[Q any](d *Door, parse func(request) (Q, error), act func(context.Context, string, request, Q) (answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := d.begin(w, r)
		var q Q
		in, err := x.read()
		if err == nil {
			q, err = parse(in)
		}
		if err != nil {
			x.refuse(err)
			return
		}
		a, err := act(r.Context(), x.rid, in, q)
		if err != nil {
			x.fail(err)
			return
		}
		x.succeed(a)
	}
}

func readNothing(request) (struct{}, error) { return struct{}{}, nil }

func readKeyRequest(in request) (KeyRequest, error) {
	return parseKeyRequest(in.body, in.self, in.other, in.limits)
}

func readKeyRequestQuery(in request) (KeyRequest, error) {
	return parseKeyRequestQuery(in.query, in.limits)
}

func readKeyIDs(in request) ([]key.ID, error)      { return parseKeyIDs(in.body, in.limits) }
func readKeyIDsQuery(in request) ([]key.ID, error) { return parseKeyIDsQuery(in.query) }

func (d *Door) status(ctx context.Context, rid string, in request, _ struct{}) (answer, error) {
	s, err := d.Backend.Status(ctx, in.caller, rid, in.other)
	if err != nil {
		return answer{}, err
	}
	body, err := json.Marshal(s)
	return answer{body: body}, err
}

func (d *Door) encKeys(ctx context.Context, rid string, in request, q KeyRequest) (answer, error) {
	c, err := d.Backend.EncKeys(ctx, in.caller, rid, in.other, q)
	defer c.Wipe()
	if err != nil {
		return answer{}, err
	}
	return answer{body: appendContainer(make([]byte, 0, containerSize(c)), c), keys: true, point: failpoint.EncHalfAnswered}, nil
}

func (d *Door) decKeys(ctx context.Context, rid string, in request, ids []key.ID) (answer, error) {
	c, err := d.Backend.DecKeys(ctx, in.caller, rid, in.other, ids)
	defer c.Wipe()
	if err != nil {
		return answer{}, err
	}
	return answer{body: appendContainer(make([]byte, 0, containerSize(c)), c), keys: true}, nil
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
func (d *Door) begin(w http.ResponseWriter, r *http.Request) *exchange {
	x := &exchange{d: d, w: w, r: r, rid: uuid.Must(uuid.NewV7()).String(), began: time.Now()}
	x.route = r.Method + " " + chi.RouteContext(r.Context()).RoutePattern()
	h := w.Header()
	h.Set(requestIDHeader, x.rid)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	return x
}

// identify sets the caller, who must be an SAE.
func (x *exchange) identify() (identity.SAE, error) {
	var err error
	if x.caller, err = x.d.Identify(x.r); err != nil {
		return identity.SAE{}, problem.Because(problem.Unauthorized, err)
	}
	sae, ok := x.caller.SAE()
	if !ok {
		return identity.SAE{}, problem.Because(problem.Unauthorized, fmt.Errorf("a caller of role %q is no SAE", x.caller.Role()))
	}
	return sae, nil
}

// read judges the caller before it looks at anything else, then reads what the
// parsers need. The body of a GET is never read.
func (x *exchange) read() (request, error) {
	in := request{query: x.r.URL.RawQuery, limits: x.d.Backend.Limits()}
	var err error
	if in.self, err = x.identify(); err != nil {
		return request{}, err
	}
	in.caller = x.caller
	if in.other, err = parsePathSAE(chi.URLParam(x.r, "sae"), x.r.URL.RawPath != ""); err != nil {
		return request{}, err
	}
	if in.other == in.self {
		return request{}, problem.New(problem.Invalid, "the SAE ID in the path is the caller's own")
	}
	if x.r.Method != http.MethodPost {
		return in, nil
	}
	if in.body, err = readBody(x.w, x.r); err != nil {
		return request{}, err
	}
	return in, checkPost(x.r.Header.Get("Content-Type"), in.query, in.body)
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, problem.Because(problem.TooLarge, err)
	}
	if err != nil {
		return nil, invalid(err, "the body could not be read")
	}
	return body, nil
}

// refuse has err recorded, since no Backend call will, and answers it.
func (x *exchange) refuse(err error) {
	x.fail(x.d.Backend.Refused(context.WithoutCancel(x.r.Context()), x.caller, x.rid, x.route, err))
}

// fail answers err, which is recorded already.
func (x *exchange) fail(err error) {
	status, o, after := wireError(err, x.rid)
	h := x.w.Header()
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "TLS-Client-Certificate realm="+strconv.Quote(x.d.KME.String()))
	}
	if after > 0 {
		h.Set("Retry-After", strconv.Itoa(int((after+time.Second-1)/time.Second)))
	}
	_ = x.write(status, answer{body: marshalError(o)}) // a refusal that is not heard changes nothing
	level := slog.LevelInfo
	if status == http.StatusServiceUnavailable {
		level = slog.LevelWarn
	}
	x.log(level, status, err)
}

// succeed answers 200. Keys that may not have arrived are told to the Backend; they
// are never answered again.
func (x *exchange) succeed(a answer) {
	defer clear(a.body)
	gone := x.r.Context().Err()
	err := errors.Join(gone, x.write(http.StatusOK, a))
	if err != nil && a.keys {
		x.d.Backend.AnswerLost(context.WithoutCancel(x.r.Context()), x.caller, x.rid, fmt.Errorf("answering: %w", err))
	}
	x.log(slog.LevelDebug, http.StatusOK, err)
}

func (x *exchange) write(status int, a answer) error {
	h := x.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(a.body)))
	x.w.WriteHeader(status)
	if x.r.Method == http.MethodHead {
		return nil
	}
	if err := writeBody(x.w, a.body, a.point); err != nil {
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
