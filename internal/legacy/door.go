package legacy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/qutemail/kme/internal/identity"
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
	Limits   Limits
	Now      func() time.Time
	Log      *slog.Logger
}

// Door serves the routes to SAEs.
type Door struct {
	Config
	bodies saedoor.Bodies
}

// New returns a Door.
func New(c Config) (*Door, error) {
	if c.KME == (identity.KME{}) || c.Backend == nil || c.Identify == nil || c.Now == nil || c.Log == nil {
		return nil, errors.New("configuring the legacy door: KME, Backend, Identify, Now and Log must be set")
	}
	l := c.Limits
	if l.MinSize <= 0 || l.KeySize < l.MinSize || l.MaxSize < l.KeySize || l.TTL < time.Second || l.MaxTTL < l.TTL {
		return nil, fmt.Errorf("configuring the legacy door: the limits %+v leave out their own defaults", l)
	}
	return &Door{Config: c}, nil
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

// refusal is an error that came before any call of the Backend, which does not
// know of it yet.
type refusal struct{ error }

// Unwrap returns the problem.
func (r refusal) Unwrap() error { return r.error }

// serve is the one door of all routes: identity, then act, which parses and calls
// the Backend. The answer is complete before its first byte leaves.
func (d *Door) serve(route string, act func(*exchange) (saedoor.Answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		x := &exchange{saedoor.Begin(w, r, route, d.Log), d}
		err := x.identify()
		var a saedoor.Answer
		if err == nil {
			a, err = act(x)
		}
		if unknown, ok := errors.AsType[refusal](err); ok {
			err = d.Backend.Refused(context.WithoutCancel(r.Context()), x.Caller, x.ID, x.Route, unknown.error)
		} else if err == nil {
			x.succeed(a)
			return
		}
		x.fail(err)
	}
}

// body reads the request's body, unless its caller has spent its share.
func (x *exchange) body() ([]byte, error) {
	if err := x.d.Backend.Admit(x.Caller); err != nil {
		return nil, err
	}
	return x.Body(&x.d.bodies)
}

func (d *Door) status(x *exchange) (saedoor.Answer, error) {
	s, err := d.Backend.Service(x.R.Context(), x.Caller, x.ID)
	if err != nil {
		return saedoor.Answer{}, err
	}
	status, body, err := wireService(s, d.Now())
	return saedoor.Answer{Status: status, Body: body}, err
}

func (d *Door) request(x *exchange) (saedoor.Answer, error) {
	body, err := x.body()
	if err != nil {
		return saedoor.Answer{}, refusal{err}
	}
	q, err := parseRequest(x.R.Header.Get("Content-Type"), body, x.speak, d.Limits)
	if err != nil {
		return saedoor.Answer{}, refusal{err}
	}
	k, err := d.Backend.RequestKey(x.R.Context(), x.Caller, x.ID, q.recipient, q.bits, q.ttl)
	defer k.Material.Wipe()
	if err != nil {
		return saedoor.Answer{}, err
	}
	return saedoor.Answer{Status: 200, Body: appendIssued(make([]byte, 0, answerSize(k.Material)), k), Keys: true}, nil
}

func (d *Door) retrieve(x *exchange) (saedoor.Answer, error) {
	id, err := parseRetrieve(chi.URLParam(x.R, "key_id"), x.R.URL.RawQuery, x.speak)
	if err != nil {
		return saedoor.Answer{}, refusal{err}
	}
	k, err := d.Backend.RetrieveKey(x.R.Context(), x.Caller, x.ID, id)
	defer k.Material.Wipe()
	if err != nil {
		return saedoor.Answer{}, err
	}
	return saedoor.Answer{Status: 200, Body: appendRetrieved(make([]byte, 0, answerSize(k.Material)), k), Keys: true}, nil
}

func (d *Door) consume(x *exchange) (saedoor.Answer, error) {
	body, err := x.body()
	if err != nil {
		return saedoor.Answer{}, refusal{err}
	}
	id, err := parseConsume(x.R.Header.Get("Content-Type"), body, x.speak)
	if err != nil {
		return saedoor.Answer{}, refusal{err}
	}
	if err := d.Backend.ConsumeKey(x.R.Context(), x.Caller, x.ID, id); err != nil {
		return saedoor.Answer{}, err
	}
	return saedoor.Answer{Status: 200, Body: []byte(`{"status":"success","message":"Key marked as consumed"}`)}, nil
}

// cleanup is what the seed let anybody do.
func (d *Door) cleanup(*exchange) (saedoor.Answer, error) {
	return saedoor.Answer{}, refusal{problem.New(problem.Forbidden, "cleanup is for operators, at their own door")}
}

// exchange is one request on its way to its answer.
type exchange struct {
	*saedoor.Exchange
	d *Door
}

func (x *exchange) identify() error {
	if err := x.Know(x.d.Identify); err != nil {
		return refusal{err}
	}
	return nil
}

// speak is the speaker of the request. An SAE speaks for itself; a gateway becomes
// the SAE that it names, if its row lists that.
func (x *exchange) speak(said string) error {
	if x.Caller.Role() == identity.RoleSAE {
		if said != x.Caller.ID() {
			return notTheirs(said, "requester_sae is not the SAE that the certificate names")
		}
		return nil
	}
	sae, err := identity.ParseSAE(said)
	if err != nil {
		return invalid(err, "requester_sae is not an SAE ID")
	}
	acting, ok := x.Caller.For(sae)
	if !ok {
		return notTheirs(said, "requester_sae is not an SAE that this gateway acts for")
	}
	x.Caller = acting
	return nil
}

// fail answers err, which is recorded already.
func (x *exchange) fail(err error) {
	status, body, after := wireError(err, x.ID)
	x.Refuse(x.d.KME, status, body, after, err)
}

// succeed answers. A key that may not have arrived is told to the Backend.
func (x *exchange) succeed(a saedoor.Answer) {
	if lost := x.Succeed(a); lost != nil && a.Keys {
		x.d.Backend.AnswerLost(context.WithoutCancel(x.R.Context()), x.Caller, x.ID, fmt.Errorf("answering: %w", lost))
	}
}
