package etsi014

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/saedoor"
)

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
	bodies  saedoor.Bodies
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

// serve is the one door of all routes: identity, path, body, parse, act, answer.
// What goes wrong before act is told to Backend.Refused, since act's Backend call
// would have recorded it. The answer is complete before its first byte leaves.
func serve[Q any](d *Door, parse func(request) (Q, error), act func(context.Context, string, request, Q) (saedoor.Answer, error)) http.HandlerFunc {
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
		a, err := act(r.Context(), x.ID, in, q)
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

func (d *Door) status(ctx context.Context, rid string, in request, _ struct{}) (saedoor.Answer, error) {
	s, err := d.Backend.Status(ctx, in.caller, rid, in.other)
	if err != nil {
		return saedoor.Answer{}, err
	}
	body, err := json.Marshal(s)
	return saedoor.Answer{Status: http.StatusOK, Body: body}, err
}

func (d *Door) encKeys(ctx context.Context, rid string, in request, q KeyRequest) (saedoor.Answer, error) {
	c, err := d.Backend.EncKeys(ctx, in.caller, rid, in.other, q)
	a, err := handOut(c, err)
	a.Point = failpoint.EncHalfAnswered
	return a, err
}

func (d *Door) decKeys(ctx context.Context, rid string, in request, ids []key.ID) (saedoor.Answer, error) {
	return handOut(d.Backend.DecKeys(ctx, in.caller, rid, in.other, ids))
}

// handOut is the answer that keys are in, whose own bytes it wipes.
func handOut(c Container, err error) (saedoor.Answer, error) {
	defer c.Wipe()
	if err != nil {
		return saedoor.Answer{}, err
	}
	return saedoor.Answer{Status: http.StatusOK, Body: appendContainer(make([]byte, 0, containerSize(c)), c), Keys: true}, nil
}

// exchange is one request on its way to its answer.
type exchange struct {
	*saedoor.Exchange
	d *Door
}

func (d *Door) begin(w http.ResponseWriter, r *http.Request) *exchange {
	return &exchange{saedoor.Begin(w, r, r.Method+" "+chi.RouteContext(r.Context()).RoutePattern(), d.Log), d}
}

// identify sets the caller, who must be an SAE.
func (x *exchange) identify() (identity.SAE, error) {
	if err := x.Know(x.d.Identify); err != nil {
		return identity.SAE{}, err
	}
	sae, ok := x.Caller.SAE()
	if !ok {
		return identity.SAE{}, problem.Because(problem.Unauthorized, fmt.Errorf("a %s has no keys of its own", x.Caller.Role()))
	}
	return sae, nil
}

// read judges the caller before it looks at anything else, then reads what the
// parsers need. The body of a GET is never read.
func (x *exchange) read() (request, error) {
	in := request{query: x.R.URL.RawQuery, limits: x.d.Backend.Limits()}
	var err error
	if in.self, err = x.identify(); err != nil {
		return request{}, err
	}
	in.caller = x.Caller
	if in.other, err = parsePathSAE(chi.URLParam(x.R, "sae"), x.R.URL.RawPath != ""); err != nil {
		return request{}, err
	}
	if in.other == in.self {
		return request{}, problem.New(problem.Invalid, "the SAE ID in the path is the caller's own")
	}
	if x.R.Method != http.MethodPost {
		return in, nil
	}
	if err = x.d.Backend.Admit(x.Caller); err != nil {
		return request{}, err
	}
	if in.body, err = x.Body(&x.d.bodies); err != nil {
		return request{}, err
	}
	return in, checkPost(x.R.Header.Get("Content-Type"), in.query, in.body)
}

// refuse has err recorded, since no Backend call will, and answers it.
func (x *exchange) refuse(err error) {
	x.fail(x.d.Backend.Refused(context.WithoutCancel(x.R.Context()), x.Caller, x.ID, x.Route, err))
}

// fail answers err, which is recorded already.
func (x *exchange) fail(err error) {
	status, o, after := wireError(err, x.ID)
	x.Refuse(x.d.KME, status, marshalError(o), after, err)
}

// succeed answers. Keys that may not have arrived are told to the Backend; they are
// never answered again.
func (x *exchange) succeed(a saedoor.Answer) {
	if lost := x.Succeed(a); lost != nil && a.Keys {
		x.d.Backend.AnswerLost(context.WithoutCancel(x.R.Context()), x.Caller, x.ID, fmt.Errorf("answering: %w", lost))
	}
}
