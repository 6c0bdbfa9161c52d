package qlink

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/handover"
)

const (
	helloTimeout = 5 * time.Second // from connecting to a whole hello
	maxConns     = 16              // on one socket, waiting ones included
)

// Server is the quantum channel.
type Server struct {
	cfg     Config
	fibre   fibre
	alice   socket
	bob     socket
	control *net.UnixListener // nil if not wanted
}

// socket is the local socket of one end.
type socket struct {
	end      handover.End
	secret   []byte
	listener *net.UnixListener

	mu   sync.Mutex
	live context.CancelFunc // ends the connection that has the end; nil if there is none
}

// Listen reads the secrets and opens the sockets, so that a Box that is opened
// from now on will be answered by Serve.
func Listen(ctx context.Context, cfg Config) (_ *Server, err error) {
	if err := cfg.Params.Validate(); err != nil {
		return nil, fmt.Errorf("link parameters: %w", err)
	}
	if err := cfg.Eve.Validate(); err != nil {
		return nil, fmt.Errorf("eavesdropper: %w", err)
	}
	s := &Server{
		cfg:   cfg,
		fibre: fibre{params: cfg.Params, seed: cfg.PhysicsSeed, log: cfg.Log, eve: cfg.Eve},
		alice: socket{end: handover.Alice}, bob: socket{end: handover.Bob},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.alice.secret, s.bob.secret, err = cfg.secrets(); err != nil {
		return nil, err
	}
	if s.alice.listener, err = listen(ctx, cfg.AliceSocket); err != nil {
		return nil, err
	}
	if s.bob.listener, err = listen(ctx, cfg.BobSocket); err != nil {
		return nil, err
	}
	if cfg.ControlSocket != "" {
		if s.control, err = listen(ctx, cfg.ControlSocket); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// CheckSecrets says what is wrong with the files of the secrets, and opens no socket.
func (c Config) CheckSecrets() error {
	_, _, err := c.secrets()
	return err
}

// secrets reads those of both ends.
func (c Config) secrets() (alice, bob []byte, err error) {
	var errs [2]error
	alice, errs[0] = readSecret(c.AliceSecretFile)
	bob, errs[1] = readSecret(c.BobSecretFile)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, nil, err
	}
	if sameSecret(alice, bob) {
		return nil, nil, errors.New("both ends have the same secret: either could open the other's device")
	}
	return alice, bob, nil
}

// Close gives up the sockets of a Server that will not Serve.
func (s *Server) Close() error {
	var errs []error
	for _, l := range []*net.UnixListener{s.alice.listener, s.bob.listener, s.control} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// Serve carries light until ctx ends, then closes and removes the sockets, waits
// for its connections and returns nil. Any other end is an error.
func (s *Server) Serve(ctx context.Context) error {
	s.cfg.Log.Info("quantum channel open", "km", s.cfg.Params.Km, "alice", s.cfg.AliceSocket, "bob", s.cfg.BobSocket)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return s.accept(ctx, s.alice.listener, func(ctx context.Context, c net.Conn, hangUp context.CancelFunc) {
			s.serveEnd(ctx, c, hangUp, &s.alice, s.newAlice)
		})
	})
	g.Go(func() error {
		return s.accept(ctx, s.bob.listener, func(ctx context.Context, c net.Conn, hangUp context.CancelFunc) {
			s.serveEnd(ctx, c, hangUp, &s.bob, s.newBob)
		})
	})
	if s.control != nil {
		g.Go(func() error {
			return s.accept(ctx, s.control, func(_ context.Context, c net.Conn, _ context.CancelFunc) { s.serveControl(c) })
		})
	}
	err := g.Wait()
	s.cfg.Log.Info("quantum channel closed")
	return err
}

// Serve opens the sockets and serves until ctx ends.
func Serve(ctx context.Context, cfg Config) error {
	s, err := Listen(ctx, cfg)
	if err != nil {
		return err
	}
	return s.Serve(ctx)
}

// accept hands each connection of l to handle, in a goroutine that it waits for.
// The context that handle gets, and hangUp, end the connection.
func (s *Server) accept(ctx context.Context, l *net.UnixListener, handle func(ctx context.Context, conn net.Conn, hangUp context.CancelFunc)) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer func() { _ = l.Close() }() // the socket is gone when this returns; a second Close is harmless
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	slots := make(chan struct{}, maxConns)
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accepting on %v: %w", l.Addr(), errors.Join(err, l.Close()))
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			_ = conn.Close()
			return nil
		}
		conns.Go(func() {
			defer func() { <-slots }()
			ctx, hangUp := context.WithCancel(ctx)
			defer hangUp()
			done := make(chan struct{})
			context.AfterFunc(ctx, func() { _ = conn.Close(); close(done) })
			handle(ctx, conn, hangUp)
			hangUp()
			<-done
		})
	}
}
