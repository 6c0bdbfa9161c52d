// Package saedoor is what the two APIs for SAEs have in common, whatever they say: how a
// request is named, how its body is read, and how an answer leaves: complete before its
// first byte does, told from one that was lost, and wiped. The APIs are the packages
// etsi014 and legacy.
package saedoor

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// maxBody is the most that is read of a request's body, in bytes. 128 key IDs take
// about 6.5 KiB.
const maxBody = 64 << 10

// RequestIDHeader carries the request's ID in every answer.
const RequestIDHeader = "X-Request-Id"

// Exchange is one request on its way to its answer.
type Exchange struct {
	W      http.ResponseWriter
	R      *http.Request
	ID     string // of the request, a UUIDv7
	Route  string // its method and pattern
	Caller identity.Caller
	began  time.Time
	log    *slog.Logger
}

// Begin names a request and sets what every answer carries.
func Begin(w http.ResponseWriter, r *http.Request, route string, log *slog.Logger) *Exchange {
	x := &Exchange{W: w, R: r, ID: uuid.Must(uuid.NewV7()).String(), Route: route, began: time.Now(), log: log}
	h := w.Header()
	h.Set(RequestIDHeader, x.ID)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	return x
}

// Body reads the request's body. Its errors are problems: TooLarge or Invalid.
func (x *Exchange) Body() ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(x.W, x.R.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, problem.Because(problem.TooLarge, err)
	}
	if err != nil {
		return nil, &problem.Error{Kind: problem.Invalid, Detail: "the body could not be read", Err: err}
	}
	return body, nil
}

// Answer is what an SAE gets.
type Answer struct {
	Status int
	Body   []byte // JSON
	Keys   bool   // Body holds keys
	Point  string // failpoint to hit when half of Body has left; "" for none
}

// Succeed answers, wipes the answer's body, and says whether it may not have arrived.
func (x *Exchange) Succeed(a Answer) (lost error) {
	defer clear(a.Body)
	gone := x.R.Context().Err()
	lost = errors.Join(gone, x.Write(a))
	x.Log(slog.LevelDebug, a.Status, lost)
	return lost
}

// Refuse answers cause, which is recorded already, with a status and a body that say no
// more of it than the caller may know. A 401 names the realm; after is when the caller
// may come again, 0 if that is not to be said.
func (x *Exchange) Refuse(realm identity.KME, status int, body []byte, after time.Duration, cause error) {
	h := x.W.Header()
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "TLS-Client-Certificate realm="+strconv.Quote(realm.String()))
	}
	if after > 0 {
		h.Set("Retry-After", strconv.Itoa(int((after+time.Second-1)/time.Second)))
	}
	_ = x.Write(Answer{Status: status, Body: body}) // a refusal that is not heard changes nothing
	level := slog.LevelInfo
	if status >= http.StatusInternalServerError {
		level = slog.LevelWarn
	}
	x.Log(level, status, cause)
}

// Write writes an answer. With keys in it an error also is that the connection has gone.
func (x *Exchange) Write(a Answer) error {
	h := x.W.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(a.Body)))
	x.W.WriteHeader(a.Status)
	if x.R.Method == http.MethodHead {
		return nil
	}
	if err := writeBody(x.W, a.Body, a.Point); err != nil || !a.Keys {
		return err
	}
	return http.NewResponseController(x.W).Flush() // only that tells
}

// Log writes a line of how the request ended.
func (x *Exchange) Log(level slog.Level, status int, err error) {
	attrs := []slog.Attr{
		slog.String("request", x.ID), slog.String("route", x.Route), slog.String("caller", x.Caller.ID()),
		slog.Int("status", status), slog.Duration("took", time.Since(x.began)),
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	x.log.LogAttrs(x.R.Context(), level, "sae request", attrs...)
}
