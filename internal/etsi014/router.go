package etsi014

import (
	_ "embed"
	"log/slog"
	"net/http"
	"strings"

	"github.com/go-chi/chi/v5"

	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/saedoor"
)

// Handler returns the whole door for SAEs: the routes of this API, the routes of
// others, and an answer to everything else that clients of both understand.
func (d *Door) Handler(others ...func(chi.Router)) http.Handler {
	r := chi.NewRouter()
	r.Use(d.metrics.measure)
	r.NotFound(d.notFound)
	r.MethodNotAllowed(d.methodNotAllowed)
	d.Mount(r)
	r.Get("/api/v1/openapi.json", d.describe)
	for _, mount := range others {
		mount(r)
	}
	return r
}

// openAPI describes the routes of this door, those of the QuteMail API among them, for
// programs. A test holds it against what the doors do.
//
//go:embed openapi.json
var openAPI []byte

func (d *Door) describe(w http.ResponseWriter, r *http.Request) {
	x := d.begin(w, r)
	if err := x.Know(d.Identify); err != nil {
		x.refuse(err)
		return
	}
	err := x.Write(saedoor.Answer{Status: http.StatusOK, Body: openAPI})
	x.Log(slog.LevelDebug, http.StatusOK, err)
}

func (d *Door) notFound(w http.ResponseWriter, r *http.Request) {
	d.elsewhere(w, r, http.StatusNotFound, "Endpoint not found")
}

func (d *Door) methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	methods := allowed(r)
	if len(methods) == 0 { // a method that the router never heard of, on any path
		d.notFound(w, r)
		return
	}
	w.Header().Set("Allow", strings.Join(methods, ", "))
	d.elsewhere(w, r, http.StatusMethodNotAllowed, "Method not allowed")
}

// elsewhere answers a request that no route takes. It is counted and not recorded,
// unless a stranger makes it: that is a refusal like any other of theirs.
func (d *Door) elsewhere(w http.ResponseWriter, r *http.Request, status int, why string) {
	x := d.begin(w, r)
	x.Route = unrouted // a caller may think of any method and path
	if err := x.Know(d.Identify); err != nil {
		x.refuse(err)
		return
	}
	_ = x.Write(saedoor.Answer{Status: status, Body: marshalError(errorObject{Message: why, Status: "error", Error: why})})
	x.Log(slog.LevelInfo, status, problem.New(problem.NotFound, "%s", why))
}

// unrouted is the route of every request that no route takes.
const unrouted = "elsewhere"

// allowed lists the methods that the path of r has, for the Allow header that a 405
// must carry (RFC 9110, 15.5.6).
func allowed(r *http.Request) []string {
	path := r.URL.RawPath
	if path == "" {
		path = r.URL.Path
	}
	var methods []string
	for _, m := range []string{http.MethodGet, http.MethodPost} {
		if chi.RouteContext(r.Context()).Routes.Match(chi.NewRouteContext(), m, path) {
			methods = append(methods, m)
		}
	}
	return methods
}
