package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/pgdev"
)

// softHSM is where Debian's package puts the module.
const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// moduleOwner is held while this process has the PKCS#11 module loaded: it has one
// owner and one configuration at a time.
var moduleOwner sync.Mutex

// Site is one KME with its database and token.
type Site struct {
	lab  *Lab
	Name string // km1 or km2
	End  handover.End
	pg   *pgdev.Cluster
	kmed *process
}

func (l *Lab) site(name, end string) *Site {
	s := &Site{lab: l, Name: name, End: handover.Alice}
	if end == "bob" {
		s.End = handover.Bob
	}
	return s
}

// KME is the site's KME ID.
func (s *Site) KME() identity.KME {
	id, err := identity.ParseKME(s.Name)
	if err != nil {
		panic(err) // the names are constants
	}
	return id
}

func (s *Site) path(parts ...string) string {
	return s.lab.path(append([]string{s.Name}, parts...)...)
}

// DSN is how role reaches the site's database.
func (s *Site) DSN(role string) string {
	if s.pg == nil { // another process runs it: see attach
		return fmt.Sprintf("host=%s user=%s dbname=kme", s.path("postgres", "cluster", "run"), role)
	}
	return s.pg.DSN(role, "kme")
}

// attach makes the site's database available: the one that runs, or its own.
func (s *Site) attach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if conn, err := pgx.Connect(ctx, s.DSN(pgdev.Superuser)); err == nil {
		return conn.Close(ctx)
	}
	return s.StartDatabase(ctx)
}

// URL is the base URL of the site's SAE door.
func (s *Site) URL() string { return fmt.Sprintf("https://localhost:%d", s.lab.Ports.of(s.Name)[0]) }

// OperatorURL is the base URL of the site's operator door.
func (s *Site) OperatorURL() string {
	return fmt.Sprintf("https://localhost:%d", s.lab.Ports.of(s.Name)[3])
}

// prepareDatabase starts the site's Postgres and brings its schema up to date.
func (s *Site) prepareDatabase(ctx context.Context) error {
	if err := s.StartDatabase(ctx); err != nil {
		return err
	}
	if err := s.pg.EnsureDatabase(ctx, "kme"); err != nil {
		return err
	}
	p, err := s.lab.nursery.start("kmed migrate", s.lab.Dir, s.path("log", "migrate"), nil,
		filepath.Join(s.lab.Bin, "kmed"), "migrate", "--database", s.DSN(pgdev.Superuser))
	if err != nil {
		return err
	}
	<-p.exited
	if p.err != nil {
		return fmt.Errorf("migrating %s: %w:\n%s", s.Name, p.err, p.lastWords())
	}
	return nil
}

// StartDatabase starts the site's Postgres.
func (s *Site) StartDatabase(ctx context.Context) (err error) {
	s.pg, err = pgdev.Start(ctx, pgdev.Config{Dir: s.path("postgres"), Log: s.lab.Log})
	return err
}

func (s *Site) stopDatabase() error {
	if s.pg == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return s.pg.Stop(ctx)
}

// StopDatabase stops the site's Postgres, as an administrator would.
func (s *Site) StopDatabase() error { return s.stopDatabase() }

// KillDatabase ends the site's Postgres with SIGKILL.
func (s *Site) KillDatabase() error { return s.pg.Kill() }

// prepareToken makes the site's SoftHSM token if it has none.
func (s *Site) prepareToken() error {
	conf, err := hsm.WriteSoftHSMConfig(s.path("hsm"))
	if err != nil {
		return err
	}
	pin := s.path("hsm", "pin")
	if _, err := os.Stat(pin); err == nil {
		return nil
	}
	userPIN, soPIN := randomHex(16), randomHex(16)
	moduleOwner.Lock()
	defer moduleOwner.Unlock()
	if err := os.Setenv("SOFTHSM2_CONF", conf); err != nil {
		return err
	}
	if err := hsm.InitToken(softHSM, s.Name, soPIN, userPIN); err != nil {
		return err
	}
	if err := os.WriteFile(s.path("hsm", "so-pin"), []byte(soPIN+"\n"), 0o600); err != nil {
		return err
	}
	return os.WriteFile(pin, []byte(userPIN+"\n"), 0o600) // last: it says that the token is whole
}

// TokenDir is where the site's tokens lie.
func (s *Site) TokenDir() string { return s.path("hsm", "tokens") }

// env is the environment of the site's kmed.
func (s *Site) env() []string {
	return append([]string{"SOFTHSM2_CONF=" + s.path("hsm", "softhsm2.conf")}, s.lab.Env[s.Name]...)
}

// Start writes the site's configuration and starts its kmed.
func (s *Site) Start(ctx context.Context) error {
	if err := s.writeConfig(ctx); err != nil {
		return err
	}
	var err error
	s.kmed, err = s.lab.nursery.start("kmed of "+s.Name, s.lab.path("qlink"), s.LogFile(), s.env(), filepath.Join(s.lab.Bin, "kmed"), "serve", "--config", s.path("kmed.yaml"))
	return err
}

// LogFile is what the site's kmed has written.
func (s *Site) LogFile() string { return s.path("log", "kmed") }

// Await returns when the site's kmed answers alice's or bob's Get status.
func (s *Site) Await(ctx context.Context) error {
	return s.kmed.await(ctx, func() error {
		me, other := "alice", "bob"
		if s.Name == "km2" {
			me, other = other, me
		}
		c, err := s.lab.SAE(me)
		if err != nil {
			return err
		}
		defer c.HTTP.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = c.Client.Status(ctx, SAEID(other))
		return err
	})
}

// Stop ends the site's kmed with SIGTERM.
func (s *Site) Stop() error { return s.kmed.stop() }

// Kill ends the site's kmed with SIGKILL.
func (s *Site) Kill() { s.kmed.kill() }

// Running says whether the site's kmed runs.
func (s *Site) Running() bool { return s.kmed.running() }

// Exited is closed when the site's kmed has ended.
func (s *Site) Exited() <-chan struct{} { return s.kmed.exited }

// Restart starts the site's kmed again, with env added to its environment, and
// waits until it answers.
func (s *Site) Restart(ctx context.Context, env ...string) error {
	if s.Running() {
		return errors.New(s.Name + " is still running")
	}
	if s.lab.Env == nil {
		s.lab.Env = make(map[string][]string)
	}
	s.lab.Env[s.Name] = slices.Clone(env)
	if err := s.Start(ctx); err != nil {
		return err
	}
	return s.Await(ctx)
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: it ends the process instead
	return hex.EncodeToString(b)
}

// secretFile makes a file with a random secret, unless it is there.
func secretFile(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	return os.WriteFile(path, []byte(randomHex(32)+"\n"), 0o600)
}
