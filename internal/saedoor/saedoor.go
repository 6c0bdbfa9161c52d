// Package saedoor is what the two APIs for SAEs have in common, whatever they say: how a
// request is named, how its body is read, and how an answer leaves: complete before its
// first byte does, told from one that was lost, and wiped. The APIs are the packages
// etsi014 and legacy.
package saedoor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/registers"
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

// Know sets the caller, as identify says, who must be an SAE, or a gateway that speaks for
// some. Its error is a problem, Unauthorized.
func (x *Exchange) Know(identify func(*http.Request) (identity.Caller, error)) error {
	caller, err := identify(x.R)
	if x.Caller = caller.OnRoute(x.Route); err != nil {
		return problem.Because(problem.Unauthorized, err)
	}
	if role := x.Caller.Role(); role != identity.RoleSAE && role != identity.RoleGateway {
		return problem.Because(problem.Unauthorized, fmt.Errorf("a caller of role %q is no SAE", role))
	}
	return nil
}

// Bodies bounds what the bodies of one caller's requests take in memory while they arrive,
// which a client may draw out for as long as the server lets it (http.Server.ReadTimeout),
// on as many connections as it has. The zero value has room.
type Bodies struct {
	mu       sync.Mutex
	arriving map[string]int // bytes, of each caller that has any
}

// bodiesRoom is the most of it, in bytes, of one caller: all that 64 requests at a time can
// be, or six hundred with 128 key IDs each.
const bodiesRoom = 64 * maxBody

// enter takes room for n bytes, if the caller may have so much more. Whoever has it leaves.
func (b *Bodies) enter(caller string, n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.arriving[caller]+n > bodiesRoom {
		return false
	}
	if b.arriving == nil {
		b.arriving = make(map[string]int)
	}
	b.arriving[caller] += n
	return true
}

func (b *Bodies) leave(caller string, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.arriving[caller] -= n; b.arriving[caller] == 0 {
		delete(b.arriving, caller)
	}
}

// Body reads the request's body, if its caller's others leave room for it. Its errors are
// problems: TooLarge, Invalid or Unavailable.
func (x *Exchange) Body(others *Bodies) ([]byte, error) {
	most := maxBody // if it does not say how long it is
	if n := x.R.ContentLength; n >= 0 {
		most = int(min(n, maxBody))
	}
	if !others.enter(x.Caller.ID(), most) {
		return nil, &problem.Error{
			Kind: problem.Unavailable, Detail: "too many requests are on their way", RetryAfter: time.Second,
			Err: fmt.Errorf("the bodies of %s that have not arrived are of %d bytes or more", x.Caller.ID(), bodiesRoom-most+1),
		}
	}
	defer others.leave(x.Caller.ID(), most)
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
	defer registers.Clear() // whoever put the body together has copied it, and so does Write
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

// Over HTTP/2 an answer passes through buffers of net/http that live as long as the
// connection, or are handed on to others: the response's, of 4 KiB, and one in which each
// frame is put together, from its start. So keys go piece by piece, each a frame of its
// own, and blanks follow, which mean nothing in JSON: as long as the longest piece, they
// stand in both buffers where that stood. (A client that has let its window run out gets
// the blanks in shorter frames: then the end of a piece is left until the next long one.)
// What a frame goes through on its way from there to TLS is the connection's to wipe.
const pieceBytes = 4000 // with the frame's header it fits into net/http's buffers

var blanks = bytes.Repeat([]byte{' '}, pieceBytes)

// Write writes an answer. With keys in it an error also is that the connection has gone.
func (x *Exchange) Write(a Answer) error {
	pieces, length := [][]byte{a.Body}, len(a.Body)
	if a.Keys && x.R.ProtoMajor == 2 {
		after := blanks[:min(length, pieceBytes)]
		pieces, length = append(slices.Collect(slices.Chunk(a.Body, pieceBytes)), after), length+len(after)
	}
	h := x.W.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(length))
	x.W.WriteHeader(a.Status)
	if x.R.Method == http.MethodHead {
		return nil
	}
	for _, piece := range pieces {
		if err := writeBody(x.W, piece, a.Point); err != nil || !a.Keys {
			return err
		}
		if err := http.NewResponseController(x.W).Flush(); err != nil { // only that tells
			return err
		}
	}
	return nil
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
