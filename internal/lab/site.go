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
	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

// softHSM is where Debian's package puts the module.
const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// moduleOwner is held while this process has the PKCS#11 module loaded: it has one
// owner and one configuration at a time.
var moduleOwner sync.Mutex

// Site is one KME with its database and token.
type Site struct {
	lab   *Lab
	Name  string // km1 or km2
	End   handover.End
	Nodes []*Node
	*Node // the first of them: where more than one makes no difference, it speaks for the site
	pg    *pgdev.Cluster

	turn      sync.Mutex
	superuser *pgx.Conn // see super; guarded by turn
}

func (l *Lab) site(name, end string) *Site {
	s := &Site{lab: l, Name: name, End: handover.Alice}
	if end == "bob" {
		s.End = handover.Bob
	}
	for i := range max(1, l.Nodes) {
		n := nodeName(name, i)
		s.Nodes = append(s.Nodes, &Node{site: s, Name: n, index: i, env: slices.Concat(l.Env[name], l.Env[n])})
	}
	s.Node = s.Nodes[0]
	return s
}

// nodeName is km1-a and so on.
func nodeName(site string, i int) string { return site + "-" + string(rune('a'+i)) }

// Stop ends all of the site's nodes with SIGTERM.
func (s *Site) Stop() error {
	var g errgroup.Group
	for _, n := range s.Nodes {
		g.Go(n.Stop)
	}
	return g.Wait()
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
	if dsn := s.lab.Database[s.Name]; dsn != nil {
		return dsn(role)
	}
	if s.pg == nil { // another process runs it: see attach
		return fmt.Sprintf("host=%s user=%s dbname=kme", s.path("postgres", "cluster", "run"), role)
	}
	return s.pg.DSN(role, "kme")
}

// super lends the lab's connection to the site's database, as its superuser, until done
// is called. There is one, made again when it has broken, since a new one costs the
// server as much as fifty queries.
func (s *Site) super(ctx context.Context) (conn *pgx.Conn, done func(), err error) {
	s.turn.Lock()
	if s.superuser == nil || s.superuser.Ping(ctx) != nil {
		s.hangUp(ctx)
		if s.superuser, err = pgx.Connect(ctx, s.DSN(pgdev.Superuser)); err != nil {
			s.superuser = nil
			s.turn.Unlock()
			return nil, nil, err
		}
	}
	return s.superuser, s.turn.Unlock, nil
}

// hangUp closes the connection of super. The caller holds turn.
func (s *Site) hangUp(ctx context.Context) {
	if s.superuser != nil {
		_ = s.superuser.Close(ctx) // it has broken, or the database is about to stop
		s.superuser = nil
	}
}

// attach makes the site's database available: the one that runs, or its own.
func (s *Site) attach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, done, err := s.super(ctx); err == nil {
		done()
		return nil
	}
	return s.StartDatabase(ctx)
}

// prepareDatabase starts the site's Postgres and brings its schema up to date.
func (s *Site) prepareDatabase(ctx context.Context) error {
	if s.lab.Template != "" {
		return s.StartDatabase(ctx)
	}
	owner := pgdev.Superuser
	if s.lab.Database[s.Name] != nil {
		owner = store.OwnerRole
	} else if err := s.startOwn(ctx); err != nil {
		return err
	}
	p, err := s.lab.nursery.start("kmed migrate", s.lab.Dir, s.path("log", "migrate"), nil,
		filepath.Join(s.lab.Bin, "kmed"), "migrate", "--database", s.DSN(owner), "--epoch", s.lab.Epoch.String())
	if err != nil {
		return err
	}
	<-p.exited
	if p.err != nil {
		return fmt.Errorf("migrating %s: %w:\n%s", s.Name, p.err, p.lastWords())
	}
	return nil
}

// startOwn starts the site's own Postgres, with a database in it.
func (s *Site) startOwn(ctx context.Context) error {
	if err := s.StartDatabase(ctx); err != nil {
		return err
	}
	return s.pg.EnsureDatabase(ctx, "kme")
}

// StartDatabase starts the site's Postgres.
func (s *Site) StartDatabase(ctx context.Context) (err error) {
	s.pg, err = pgdev.Start(ctx, pgdev.Config{Dir: s.path("postgres"), Template: s.lab.Template, Log: s.lab.Log})
	return err
}

func (s *Site) stopDatabase() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s.turn.Lock()
	s.hangUp(ctx)
	s.turn.Unlock()
	if s.pg == nil {
		return nil
	}
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
	_, err = os.Stat(pin)
	whole := err == nil
	if whole && len(s.lab.Fibres) == 1 {
		return nil
	}
	moduleOwner.Lock()
	defer moduleOwner.Unlock()
	if err := os.Setenv("SOFTHSM2_CONF", conf); err != nil {
		return err
	}
	if whole { // and may have begun with fewer links
		return s.keepLinkSecrets(pin)
	}
	userPIN, soPIN := randomHex(16), randomHex(16)
	if err := hsm.InitToken(softHSM, s.Name, soPIN, userPIN); err != nil {
		return err
	}
	if err := os.WriteFile(s.path("hsm", "so-pin"), []byte(soPIN+"\n"), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(pin+".new", []byte(userPIN+"\n"), 0o600); err != nil {
		return err
	}
	if err := s.keepLinkSecrets(pin + ".new"); err != nil {
		return err
	}
	return os.Rename(pin+".new", pin) // last: it says that the token is whole
}

// keepLinkSecrets has Bob's token keep the secret of each link, as kmed hsm auth-secret
// import does, if it does not have it. Alice reads hers from the file.
func (s *Site) keepLinkSecrets(pinFile string) error {
	if s.End != handover.Bob {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	token, err := hsm.Open(ctx, hsm.Config{Module: softHSM, TokenLabel: s.Name, PINFile: pinFile})
	if err != nil {
		return err
	}
	for _, f := range s.lab.Fibres {
		if _, err = token.AuthSecret(ctx, f.Link); err == nil {
			continue
		}
		if !errors.Is(err, hsm.ErrNoAuthSecret) {
			break
		}
		var secret []byte
		if secret, err = os.ReadFile(f.SecretFile()); err == nil {
			err = token.SetAuthSecret(ctx, f.Link, secret)
		}
		if err != nil {
			break
		}
	}
	return errors.Join(err, token.Close())
}

// TokenDir is where the site's tokens lie.
func (s *Site) TokenDir() string { return s.path("hsm", "tokens") }

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
