package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/lab/freeport"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kmed": main, "answerer": answerer, "beginner": beginner})
}

// TestScripts: kmed as an operator sees it. Each script has a folder with the
// shipped policies and a certificate of km1, and asks for a token, a database and a
// configuration as it needs them.
func TestScripts(t *testing.T) {
	s := stage{cluster: startPostgres(t)}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"certificate": certificate,
			"config":      config,
			"softhsm":     s.softHSM,
			"status":      status,
			"token":       s.token,
			"database":    s.database,
			"waitfor":     waitFor,
			"sigterm":     sigTerm,
			"folded":      folded,
			"said":        said,
			"suspended":   suspended,
			"file":        file,
		},
	})
}

func startPostgres(t *testing.T) *pgdev.Cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmed-test-") // a test's own folder has too long a name for a socket
	if err != nil {
		t.Fatal(err)
	}
	c, err := pgdev.Start(t.Context(), pgdev.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Kill(), c.Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return c
}

// setup makes what every node has: policies, with doors at free addresses, and a
// certificate.
func setup(env *testscript.Env) error {
	env.Setenv("SOFTHSM2_CONF", filepath.Join(env.WorkDir, "hsm", "softhsm2.conf"))
	env.Setenv("MODULE", softHSM)
	dir := filepath.Join(env.WorkDir, "policies")
	if err := os.CopyFS(dir, policies.Shipped); err != nil {
		return err
	}
	file := filepath.Join(dir, policies.NetworkFile)
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for door, name := range map[string]string{"8443": "SAE", "8444": "ASSIGN", "8445": "CLASSICAL", "8446": "OPERATOR"} {
		address, err := freeAddress()
		if err != nil {
			return err
		}
		env.Setenv(name, address)
		text = []byte(strings.Replace(string(text), "localhost:"+door, address, 1))
	}
	port, err := freeport.Find()
	env.Setenv("PORT", fmt.Sprint(port))
	return errors.Join(err, os.WriteFile(file, text, 0o600), writeCertificate(filepath.Join(env.WorkDir, "tls"), "km1"))
}

func freeAddress() (string, error) {
	port, err := freeport.Find()
	return fmt.Sprintf("127.0.0.1:%d", port), err
}

// writeCertificate writes a certificate that signs itself, with its key.
func writeCertificate(dir, id string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: id}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	encoded := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "cert.pem"), encoded, 0o600),
		os.WriteFile(filepath.Join(dir, "root.pem"), encoded, 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600),
	)
}

// certificate DIR KME: make a certificate.
func certificate(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: certificate DIR KME")
	}
	ts.Check(writeCertificate(ts.MkAbs(args[0]), args[1]))
}

// wellFormed is a configuration with nothing wrong in it, of members that must be there.
const wellFormed = `kme: km1
node: km1-a
data: data
policies: policies
database: "$DSN"
hsm:
  module: $MODULE
  token: km1
  pin_file: hsm/pin
certificates:
  dir: tls
  ca: https://localhost:9000
  root_fingerprint: 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
  crls: {sae: ["http://localhost:9001/crl"], kme: ["http://localhost:9001/crl"], operator: ["http://localhost:9001/crl"]}
  issuers:
    sae: tls/root.pem
    kme: tls/root.pem
    operator: tls/root.pem
`

// config CHANGE...: write kmed.yaml. "name: value" replaces the first line of that
// name, -name takes it away, +line puts a line at the end.
func config(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("usage: config CHANGE...")
	}
	text := wellFormed
	for _, change := range args {
		if line, ok := strings.CutPrefix(change, "+"); ok {
			text += line + "\n"
			continue
		}
		name, gone := strings.CutPrefix(change, "-")
		name, _, _ = strings.Cut(name, ":")
		line := regexp.MustCompile(`(?m)^( *)` + name + `:.*\n`).FindStringSubmatchIndex(text)
		if line == nil {
			ts.Fatalf("no line is called %s", name)
		}
		with := ""
		if !gone {
			with = text[line[2]:line[3]] + change + "\n"
		}
		text = text[:line[0]] + with + text[line[1]:]
	}
	text = os.Expand(text, ts.Getenv)
	ts.Check(os.WriteFile(ts.MkAbs("kmed.yaml"), []byte(text), 0o600))
}

// stage is what the scripts share.
type stage struct {
	cluster   *pgdev.Cluster
	databases atomic.Int64
	module    sync.Mutex // the PKCS#11 module has one owner and one configuration in a process
}

// softhsm: a folder for tokens, without any.
func (s *stage) softHSM(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: softhsm")
	}
	_, err := hsm.WriteSoftHSMConfig(ts.MkAbs("hsm"))
	ts.Check(err)
}

// status N COMMAND...: run it, and see that it ends with exit status N.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N COMMAND...")
	}
	err := ts.Exec(args[1], args[2:]...)
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || fmt.Sprint(exit.ExitCode()) != args[0] {
		ts.Fatalf("%v ended with %v, want exit status %s", args[1:], err, args[0])
	}
}

// token LABEL: make a SoftHSM token, and hsm/pin with its PIN.
func (s *stage) token(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: token LABEL")
	}
	s.module.Lock()
	defer s.module.Unlock()
	conf, err := hsm.WriteSoftHSMConfig(ts.MkAbs("hsm"))
	ts.Check(err)
	ts.Check(os.Setenv("SOFTHSM2_CONF", conf))
	ts.Check(hsm.InitToken(softHSM, args[0], "so-pin-774410", "pin-483920"))
	ts.Check(os.WriteFile(ts.MkAbs("hsm/pin"), []byte("pin-483920\n"), 0o600))
}

// database: make an empty one. $OWNER, $DSN and $SEQUENCER are how its owner, kmed and
// kmed sequencer reach it, and $URL is how kmed does as the old service said it.
func (s *stage) database(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: database")
	}
	name := fmt.Sprintf("script%d", s.databases.Add(1))
	ts.Check(s.cluster.EnsureDatabase(context.Background(), name))
	ts.Setenv("OWNER", s.cluster.DSN(pgdev.Superuser, name))
	ts.Setenv("DSN", s.cluster.DSN(store.AppRole, name))
	ts.Setenv("SEQUENCER", s.cluster.DSN(store.SequencerRole, name))
	at, err := pgx.ParseConfig(ts.Getenv("DSN"))
	ts.Check(err)
	ts.Setenv("URL", fmt.Sprintf("postgresql://%s@/%s?host=%s&port=%d", store.AppRole, name, url.QueryEscape(at.Host), at.Port))
}

// waitfor HOST:PORT...: until something listens at each.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: waitfor HOST:PORT...")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, address := range args {
		for {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
			if err == nil {
				ts.Check(conn.Close())
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				ts.Fatalf("nothing listens at %s: %v", address, err)
			}
		}
	}
}

// said FILE PATTERN: wait until a process has written what matches.
func said(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: said FILE PATTERN")
	}
	pattern, err := regexp.Compile(args[1])
	ts.Check(err)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && pattern.Match(text) {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			ts.Fatalf("%s never had %s: %s", args[0], args[1], text)
		}
	}
}

// sigterm: to every process in the background.
func sigTerm(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: sigterm")
	}
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	}
}

// folded: wait until each event is a leaf of a tree that has its checkpoint.
func folded(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: folded")
	}
	inDatabase(ts, `SELECT count(*) > 0 AND count(*) = coalesce((SELECT c.size FROM kme.audit_log l JOIN kme.audit_checkpoint c USING (origin, size)), 0)
		FROM kme.audit`)
}

// suspended: wait until the site is.
func suspended(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: suspended")
	}
	inDatabase(ts, "SELECT suspended IS NOT NULL FROM kme.settings")
}

// inDatabase waits until a query is answered with true.
func inDatabase(ts *testscript.TestScript, query string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, ts.Getenv("OWNER"))
	ts.Check(err)
	defer conn.Close(context.WithoutCancel(ctx))
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var holds bool
		if err := conn.QueryRow(ctx, query).Scan(&holds); err == nil && holds {
			return
		} else if ctx.Err() != nil {
			ts.Fatalf("not within a minute: %s: %v", query, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// file NAME GLOB: wait until there is one that is not empty, and set $NAME to its path.
func file(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: file NAME GLOB")
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		found, err := filepath.Glob(ts.MkAbs(args[1]))
		ts.Check(err)
		for _, name := range found {
			if info, err := os.Stat(name); err == nil && info.Size() > 0 {
				ts.Setenv(args[0], name)
				return
			}
		}
		select {
		case <-tick.C:
		case <-late:
			ts.Fatalf("there is no %s with anything in it", args[1])
		}
	}
}
