package authority

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/smallstep/certificates/acme"
	acmeapi "github.com/smallstep/certificates/acme/api"
	acmedb "github.com/smallstep/certificates/acme/db/nosql"
	"github.com/smallstep/certificates/api"
	smallstep "github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql"
	"golang.org/x/sync/errgroup"
)

// ServeConfig says which authority Serve runs.
type ServeConfig struct {
	File string // its configuration: SettingsFile

	// The listeners, which Serve closes. Where nil, Serve listens on the address that
	// Init was given.
	Listener    net.Listener // HTTPS
	CRLListener net.Listener // plain HTTP

	Log *slog.Logger // default slog.Default()
}

// Limits of the listeners. The requests of step are a few kB.
const (
	maxBodyBytes   = 64 << 10
	requestTimeout = 15 * time.Second
	stopTimeout    = 5 * time.Second
)

// Serve runs the CA of one role until ctx ends, then lets requests finish and
// closes the database. It returns nil after an orderly end.
func Serve(ctx context.Context, c ServeConfig) error {
	s, err := loadSettings(c.File)
	if err != nil {
		return err
	}
	if err := c.serve(ctx, s); err != nil {
		return fmt.Errorf("serving the %s CA: %w", s.Role, err)
	}
	return nil
}

func (c ServeConfig) serve(ctx context.Context, s settings) error {
	log := cmp.Or(c.Log, slog.Default()).With("ca", s.Role)
	intermediate, err := s.intermediate()
	if err != nil {
		return err
	}
	listener, crlListener, err := c.listen(s)
	if err != nil {
		return err
	}
	defer listener.Close()
	defer crlListener.Close()

	a, key, err := s.open()
	if err != nil {
		return err
	}
	tlsConfig, err := serverTLS(a, intermediate, log)
	if err != nil {
		return errors.Join(err, a.Shutdown())
	}
	log.Info("serving", "address", listener.Addr().String(), "crl", s.crlURL())

	requests := db.NewContext(smallstep.NewContext(context.WithoutCancel(ctx), a), a.GetDatabase())
	if s.ACME {
		if requests, err = s.withACME(requests, a); err != nil {
			return errors.Join(err, a.Shutdown())
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	if key != nil {
		g.Go(func() error { return heartbeat(ctx, key, heartbeatEvery, log) })
	}
	g.Go(func() error { return run(ctx, newServer(requests, apiHandler(s.ACME, log), log), listener, tlsConfig) })
	g.Go(func() error { return run(ctx, newServer(requests, crlHandler(), log), crlListener, nil) })
	// The database is closed last, so that no request finds it closed.
	return errors.Join(g.Wait(), a.Shutdown())
}

// listen returns the listeners of c, opening those that are missing.
func (c ServeConfig) listen(s settings) (listener, crlListener net.Listener, err error) {
	listener, crlListener = c.Listener, c.CRLListener
	if listener == nil {
		if listener, err = net.Listen("tcp", s.Address); err != nil {
			return nil, nil, err
		}
	}
	if crlListener == nil {
		if crlListener, err = net.Listen("tcp", s.CRLAddress); err != nil {
			listener.Close()
			return nil, nil, err
		}
	}
	return listener, crlListener, nil
}

func newServer(requests context.Context, h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:        http.MaxBytesHandler(h, maxBodyBytes),
		ReadTimeout:    requestTimeout,
		WriteTimeout:   requestTimeout,
		IdleTimeout:    time.Minute,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelInfo), // handshakes that failed, and why,
		BaseContext:    func(net.Listener) context.Context { return requests },
	}
}

// run serves until ctx ends; tlsConfig is nil for plain HTTP.
func run(ctx context.Context, server *http.Server, listener net.Listener, tlsConfig *tls.Config) error {
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		stopped <- server.Shutdown(grace)
	}()
	var err error
	if server.TLSConfig = tlsConfig; tlsConfig != nil {
		// On the bare listener: HTTP/2 is offered and spoken only by ServeTLS itself.
		err = server.ServeTLS(listener, "", "")
	} else {
		err = server.Serve(listener)
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return err // the errgroup ends ctx, and with it the goroutine above
	}
	return <-stopped
}

// withACME adds to requests what the ACME routes look for there.
func (s settings) withACME(requests context.Context, a *smallstep.Authority) (context.Context, error) {
	store, ok := a.GetDatabase().(nosql.DB)
	if !ok {
		return nil, fmt.Errorf("ACME: a database of type %T", a.GetDatabase())
	}
	accounts, err := acmedb.New(store)
	if err != nil {
		return nil, fmt.Errorf("ACME: %w", err)
	}
	acme.InsecurePortHTTP01 = s.ACMEHTTPPort // smallstep has it for the whole process
	return acme.NewContext(requests, accounts, acme.NewClient(), acme.NewLinker(s.Address, "acme"), nil), nil
}

// apiHandler is the API that step speaks, at its two historical places.
func apiHandler(withACME bool, log *slog.Logger) http.Handler {
	mux := chi.NewRouter()
	mux.Use(logged(log), overTLSOnly)
	api.Route(mux)
	mux.Route("/1.0", func(r chi.Router) { api.Route(r) })
	if withACME {
		mux.Route("/acme", func(r chi.Router) { acmeapi.Route(r) })
	}
	return mux
}

// overTLSOnly takes the Authorization header away. smallstep would renew for a
// bearer token signed with a certificate's key, and verifies that certificate
// against the root, which is shared by all roles. Certificates renew over mutual
// TLS, where only this CA's own count.
func overTLSOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Authorization")
		next.ServeHTTP(w, r)
	})
}

// crlHandler serves the CRL, which is signed, to anyone.
func crlHandler() http.Handler {
	mux := chi.NewRouter()
	mux.Get("/crl", api.CRL)
	mux.Get("/1.0/crl", api.CRL)
	return mux
}

// serverTLS takes client certificates of this CA only. smallstep's own server
// would take those of every CA under the root, and a certificate of one role could
// then be renewed, or revoked, at the CA of another.
func serverTLS(a *smallstep.Authority, intermediate *x509.Certificate, log *slog.Logger) (*tls.Config, error) {
	own := ownCertificate{issue: a.GetTLSCertificate, log: log}
	if _, err := own.get(nil); err != nil {
		return nil, fmt.Errorf("issuing the certificate of the listener: %w", err)
	}
	clients := x509.NewCertPool()
	clients.AddCert(intermediate)
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.VerifyClientCertIfGiven,
		ClientCAs:              clients,
		GetCertificate:         own.get,
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil // enrolment, with a token
			}
			if !bytes.Equal(state.PeerCertificates[0].AuthorityKeyId, intermediate.SubjectKeyId) {
				return errors.New("the client's certificate is not of this CA")
			}
			return nil
		},
	}, nil
}

// ownCertificate is the certificate of the CA's own listener. It lasts a day.
type ownCertificate struct {
	issue func() (*tls.Certificate, error)
	log   *slog.Logger

	mu   sync.Mutex
	cert *tls.Certificate
}

// get returns the certificate, renewed when a third of its day is left. It keeps
// the old one if that fails.
func (o *ownCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cert != nil && time.Until(o.cert.Leaf.NotAfter) > 8*time.Hour {
		return o.cert, nil
	}
	cert, err := o.issue()
	if err == nil {
		o.cert = cert
	} else if o.cert != nil {
		o.log.Error("the listener's certificate could not be renewed", "until", o.cert.Leaf.NotAfter, "error", err)
	} else {
		return nil, err
	}
	return o.cert, nil
}
