package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// door is one Handler's dependencies.
type door struct {
	backend  Backend
	identify func(*http.Request) (identity.Caller, error)
	log      *slog.Logger
	places   sync.Map // identity.KME -> chan struct{}: one for each message that is worked on
}

// maxAtOnce is how many messages of one peer are worked on at a time, of all its
// nodes. An honest peer waits for answers and says fewer; what is beyond is turned
// away before it is read, so that a peer that does not is no burden on anybody else.
const maxAtOnce = 64

// placeTime is how long a message waits for a place before it is turned away, so that
// whoever does not wait for answers is at least slow.
const placeTime = 250 * time.Millisecond

// enter finds a place for a message, or says that there is none.
func (d *door) enter(ctx context.Context, from identity.KME) (leave func(), ok bool) {
	v, ok := d.places.Load(from)
	if !ok {
		v, _ = d.places.LoadOrStore(from, make(chan struct{}, maxAtOnce))
	}
	places := v.(chan struct{})
	t := time.NewTimer(placeTime)
	defer t.Stop()
	select {
	case places <- struct{}{}:
		return func() { <-places }, true
	case <-t.C:
	case <-ctx.Done():
	}
	return nil, false
}

// Handler serves the messages of peers. identify makes the caller from the
// request's certificate; the listener's TLS must ask for one of the KME CA.
//
// The failpoints of the peer's side are hit here: a message is received once it
// has been read whole, an announce is committed once the Backend has answered.
func Handler(b Backend, identify func(*http.Request) (identity.Caller, error), log *slog.Logger) http.Handler {
	d := &door{backend: b, identify: identify, log: log}
	r := chi.NewRouter()
	r.Post(pathHello, serve(d, pathHello, b.Hello))
	r.Post(pathHeld, serve(d, pathHeld, func(ctx context.Context, from identity.KME, h handover.Held) (heldAnswer, error) {
		a, err := b.Held(ctx, from, h)
		return heldAnswer{a}, err
	}))
	r.Post(pathAnnounce, serve(d, pathAnnounce, func(ctx context.Context, from identity.KME, a handover.Announce) (handover.AnnounceAnswer, error) {
		failpoint.Hit(failpoint.PeerAnnounceReceived)
		answer, err := b.Announce(ctx, from, a)
		failpoint.Hit(failpoint.PeerAnnounceCommitted)
		return answer, err
	}))
	r.Post(pathVoid, serve(d, pathVoid, func(ctx context.Context, from identity.KME, v handover.Void) (done, error) {
		failpoint.Hit(failpoint.PeerVoidReceived)
		return done{}, b.Void(ctx, from, v)
	}))
	r.Post(pathRun, serve(d, pathRun, b.Run))
	r.Post(pathCompromise, serve(d, pathCompromise, func(ctx context.Context, from identity.KME, c handover.Compromise) (done, error) {
		return done{}, b.Compromise(ctx, from, c)
	}))
	r.Post(pathSample, serve(d, pathSample, b.Sample))
	r.Post(pathBurned, serve(d, pathBurned, b.Burned))
	r.Post(pathCheckpoint, serve(d, pathCheckpoint, b.Checkpoint))
	r.Post(pathWitnessed, serve(d, pathWitnessed, func(ctx context.Context, from identity.KME, _ done) (audit.Witnessed, error) {
		return b.Witnessed(ctx, from)
	}))
	r.Post(pathGrant, serve(d, pathGrant, func(ctx context.Context, from identity.KME, g handover.Grant) (handover.GrantAnswer, error) {
		answer, err := b.Grant(ctx, from, g)
		failpoint.Hit(failpoint.PeerGrantCommitted)
		return answer, err
	}))
	r.NotFound(d.lost(http.StatusNotFound, problem.New(problem.NotFound, "no such route")))
	r.MethodNotAllowed(d.lost(http.StatusMethodNotAllowed, problem.New(problem.Invalid, "messages are POSTed")))
	return r
}

// serve is the one way in for a message: who, what, act, answer. The answer is
// encoded before its status is written.
func serve[Q, A message](d *door, path string, act func(context.Context, identity.KME, Q) (A, error)) http.HandlerFunc {
	route := http.MethodPost + " " + path
	return func(w http.ResponseWriter, r *http.Request) {
		caller, from, err := d.who(r)
		if err != nil {
			d.refuse(w, r, caller, route, err)
			return
		}
		leave, ok := d.enter(r.Context(), from)
		if !ok {
			d.turnAway(w, r, caller, route, http.StatusTooManyRequests, problem.Because(problem.Unavailable, ErrTooMany))
			return
		}
		defer leave()
		body, err := read(w, r)
		if err != nil {
			d.refuse(w, r, caller, route, err)
			return
		}
		question, err := parse[Q](body)
		if err != nil {
			d.refuse(w, r, caller, route, &problem.Error{Kind: problem.Invalid, Detail: problem.Brief(err)})
			return
		}
		answer, err := act(r.Context(), from, question)
		if err != nil {
			d.log.WarnContext(r.Context(), "peer message failed", "route", route, "from", from, "err", err)
			d.fail(w, err)
			return
		}
		text, err := format(answer)
		if err != nil {
			d.log.ErrorContext(r.Context(), "answer to peer is malformed", "route", route, "from", from, "err", err)
			d.fail(w, err)
			return
		}
		d.write(w, http.StatusOK, text)
	}
}

// who makes the caller; one that is not a KME is as good as unknown.
func (d *door) who(r *http.Request) (identity.Caller, identity.KME, error) {
	caller, err := d.identify(r)
	if err != nil {
		return caller, identity.KME{}, problem.Because(problem.Unauthorized, err)
	}
	from, ok := caller.KME()
	if !ok {
		return caller, identity.KME{}, problem.Because(problem.Unauthorized, fmt.Errorf("role %q is no KME", caller.Role()))
	}
	return caller, from, nil
}

func read(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return nil, problem.New(problem.Invalid, "content type is not application/json")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, over := errors.AsType[*http.MaxBytesError](err); over {
		return nil, problem.New(problem.TooLarge, "message of more than %d bytes", maxBody)
	}
	if err != nil {
		return nil, problem.Because(problem.Invalid, fmt.Errorf("reading the message: %w", err))
	}
	return body, nil
}

// refuse ends a message that never reached the Backend's verbs.
func (d *door) refuse(w http.ResponseWriter, r *http.Request, c identity.Caller, route string, err error) {
	d.backend.Refused(r.Context(), c, Refusal{Route: route, Err: err})
	if problem.KindOf(err) == problem.Unauthorized {
		w.Header().Set("WWW-Authenticate", `TLS-Client-Certificate realm="KME"`)
	}
	d.fail(w, err)
}

// lost answers what is no route. It is refused like anything else that reaches
// this door, but with its own status.
func (d *door) lost(status int, err *problem.Error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		caller, _, whoErr := d.who(r)
		if whoErr != nil {
			d.refuse(w, r, caller, "unknown", whoErr)
			return
		}
		d.turnAway(w, r, caller, "unknown", status, err)
	}
}

// turnAway ends a message with a status that its kind of problem does not have.
func (d *door) turnAway(w http.ResponseWriter, r *http.Request, c identity.Caller, route string, status int, err *problem.Error) {
	d.backend.Refused(r.Context(), c, Refusal{Route: route, Err: err})
	d.write(w, status, failureText(err))
}

// fail answers with the status and body of err's kind. The cause stays here.
func (d *door) fail(w http.ResponseWriter, err error) {
	e, ok := errors.AsType[*problem.Error](err)
	if !ok {
		e = problem.Because(problem.Internal, err)
	}
	if e.Kind == problem.Unavailable && e.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(max(1, e.RetryAfter.Seconds()))))
	}
	d.write(w, statuses[e.Kind], failureText(e))
}

func failureText(e *problem.Error) []byte {
	text, err := json.Marshal(failure{Kind: e.Kind.String(), Message: e.Detail}, jsontext.AllowInvalidUTF8(true))
	if err != nil {
		return []byte(`{"kind":"internal","message":""}`)
	}
	return text
}

func (d *door) write(w http.ResponseWriter, status int, text []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	if _, err := w.Write(text); err != nil {
		d.log.Debug("answer to peer not written", "err", err)
	}
}
