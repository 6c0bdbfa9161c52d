package siem

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/audit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func record(leaf int64, e audit.Event) Record {
	return Record{Log: "qutemail.example/km1/audit/1", Leaf: leaf, Text: e.AppendText(nil), Event: e}
}

// anyEvent is an event with whatever a caller may have made it say.
func anyEvent(t *rapid.T) audit.Event {
	return audit.Event{
		Site: "km1", Node: "km1-a", Run: 1, Seq: 7, At: time.UnixMilli(rapid.Int64Range(0, 1<<41).Draw(t, "at")),
		Action:  rapid.SampledFrom([]audit.Action{audit.EncKeys, audit.Alarm, audit.Start}).Draw(t, "action"),
		Outcome: rapid.SampledFrom([]audit.Outcome{audit.Done, audit.Refused, audit.Failed}).Draw(t, "outcome"),
		Reason:  rapid.String().Draw(t, "reason"), Request: rapid.SampledFrom([]string{"", "0193"}).Draw(t, "request"),
		Actor: audit.Actor{Role: "sae", ID: rapid.String().Draw(t, "actor"), Remote: rapid.SampledFrom([]string{"127.0.0.1:4000", "[::1]:99", "odd"}).Draw(t, "remote")},
		Peer:  rapid.String().Draw(t, "peer"),
	}
}

// syslogGrammar is RFC 5424, 6, written as an expression of its own: header, one element of
// structured data, a byte order mark and the message.
var syslogGrammar = regexp.MustCompile(`^<(\d{1,3})>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z) ([!-~]{1,255}) ([!-~]{1,48}) ([!-~]{1,128}) ([!-~]{1,32}) ` +
	`\[([!-<>-\\^-~]{1,32})((?: [!#-<>-\\^-~]{1,32}="(?:[^"\\\]]|\\["\\\]])*")*)\] \x{feff}((?s:.*))$`)

func TestSyslogIsRFC5424(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r := record(12, anyEvent(t))
		text, err := Syslog(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		m := syslogGrammar.FindSubmatch(text)
		if m == nil {
			t.Fatalf("not a message of RFC 5424: %q", text)
		}
		if pri, _ := strconv.Atoi(string(m[1])); pri/8 != 13 || pri > 191 {
			t.Fatalf("PRI %s is not of the facility log audit", m[1])
		}
		if !bytes.Equal(m[9], r.Text) {
			t.Fatalf("the message is %q", m[9])
		}
		if !bytes.Contains(m[8], []byte(` leaf="12"`)) {
			t.Fatalf("no leaf in %q", m[8])
		}
	})
}

func TestJSONFormats(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r := record(12, anyEvent(t))
		line, err := JSONLine(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Log   string
			Leaf  int64
			Event json.RawMessage
		}
		if err := json.Unmarshal(line, &got); err != nil || bytes.ContainsRune(line, '\n') || !bytes.Equal(got.Event, r.Text) || got.Leaf != 12 || got.Log != r.Log {
			t.Fatalf("%v: %s", err, line)
		}
		if line, err = OCSF(nil, r); err != nil {
			t.Fatal(err)
		}
		checkOCSF(t, line, r)
	})
}

// checkOCSF holds what OCSF 1.1 requires of each class against an event.
func checkOCSF(t *rapid.T, line []byte, r Record) {
	var o map[string]any
	if err := json.Unmarshal(line, &o); err != nil || bytes.ContainsRune(line, '\n') {
		t.Fatalf("%v: %s", err, line)
	}
	required := []string{"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"}
	switch o["class_uid"] {
	case 6003.0:
		required = append(required, "actor", "api", "src_endpoint")
	case 6002.0:
		required = append(required, "app")
	default:
		t.Fatalf("class %v", o["class_uid"])
	}
	for _, name := range required {
		if o[name] == nil {
			t.Fatalf("%s is missing in %s", name, line)
		}
	}
	if o["type_uid"] != o["class_uid"].(float64)*100+o["activity_id"].(float64) || o["category_uid"] != 6.0 {
		t.Fatalf("its numbers do not fit together: %s", line)
	}
	if m := o["metadata"].(map[string]any); m["version"] == nil || m["product"] == nil || m["uid"] != fmt.Sprintf("%s#%d", r.Log, r.Leaf) {
		t.Fatalf("metadata %v", m)
	}
	if o["raw_data"] != string(r.Text) {
		t.Fatalf("raw_data %q", o["raw_data"])
	}
}

// source is a log in memory, and a cursor that a test can look at.
type source struct {
	away   atomic.Bool // as a database can be
	mu     sync.Mutex
	logs   [][]audit.Row // by origin, from 1
	origin int64
	next   int64
}

func (s *source) add(origin, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.logs) < origin {
		s.logs = append(s.logs, nil)
	}
	for range n {
		leaf := int64(len(s.logs[origin-1]))
		e := audit.Event{Site: "km1", Node: "a", Run: 1, Seq: leaf + 1, At: time.UnixMilli(leaf), Action: audit.Alarm, Outcome: audit.Done}
		s.logs[origin-1] = append(s.logs[origin-1], audit.Row{Leaf: leaf, Node: "a", Seq: leaf + 1, Body: e.AppendText(nil)})
	}
}

func (s *source) Leaves(_ context.Context, origin, first int64, limit int, do func(audit.Row) error) (Log, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.logs) == 0 {
		return Log{}, nil
	}
	origin = max(1, origin)
	rows := s.logs[origin-1]
	l := Log{Name: fmt.Sprintf("log/%d", origin), Origin: origin, Size: int64(len(rows))}
	if int(origin) < len(s.logs) {
		l.Following = origin + 1
	}
	for _, r := range rows[min(first, l.Size):min(first+int64(limit), l.Size)] {
		if err := do(r); err != nil {
			return l, err
		}
	}
	return l, nil
}

func (s *source) Cursor(context.Context, string) (int64, int64, error) {
	if s.away.Load() {
		return 0, 0, errAway
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.origin, s.next, nil
}

var errAway = errors.New("the database is away")

func (s *source) MoveCursor(_ context.Context, _ string, origin, next int64) error {
	if s.away.Load() {
		return errAway
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.origin, s.next = origin, next
	return nil
}

// run has a forwarder work until the test's end.
func run(t *testing.T, c Config, src Source) *Forwarder {
	t.Helper()
	c.Name, c.Every, c.Log = "sink", time.Millisecond, slog.New(slog.DiscardHandler)
	f := New(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx, src) }()
	t.Cleanup(func() { cancel(); <-done })
	return f
}

// await waits until a condition holds.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !holds() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never: %s", what)
		}
	}
}

// A file gets every leaf once and in order, over a log of a later origin and what a
// crash had left of a line.
func TestFile(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(name, []byte(`{"log":"torn`), 0o600); err != nil {
		t.Fatal(err)
	}
	src := &source{}
	f := run(t, Config{Format: JSONLine, To: "file:" + name}, src)
	src.add(1, 1200)
	await(t, "the first log sent", func() bool { return f.Sent() == 1200 })
	src.add(2, 3)
	await(t, "the second log sent", func() bool { return f.Sent() == 1203 && f.Lag() == 0 })
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")[1:]
	for i, line := range lines {
		want := fmt.Sprintf(`{"log":"log/%d","leaf":%d,`, 1+i/1200, i%1200)
		if !strings.HasPrefix(line, want) {
			t.Fatalf("line %d is %.60s, want %s", i, line, want)
		}
	}
	if len(lines) != 1203 {
		t.Errorf("%d lines", len(lines))
	}
}

// A sink that is dead for a while, and one that dies with what it had not read yet,
// loses nothing.
func TestDeadSinkLosesNothing(t *testing.T) {
	t.Parallel()
	server, client := certificates(t)
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	_ = ln.Close() // nobody listens yet
	src := &source{}
	src.add(1, 2000)
	f := run(t, Config{Format: Syslog, To: "tls:" + address, TLS: client, Framed: true}, src)
	await(t, "trouble", func() bool { return f.Trouble() != "" && f.Lag() == 2000 })

	seen := make(map[int64]bool)
	for round := range 3 {
		if ln, err = lc.Listen(t.Context(), "tcp", address); err != nil {
			t.Fatal(err)
		}
		conn, err := tls.NewListener(ln, server).Accept()
		if err != nil {
			t.Fatal(err)
		}
		if round < 2 { // it reads some, and dies with the rest
			readFrames(t, conn, 300, seen)
		} else {
			src.add(1, 100)
			readFrames(t, conn, -1, seen)
		}
		_ = conn.Close()
		_ = ln.Close()
	}
	for leaf := range int64(2100) {
		if !seen[leaf] {
			t.Fatalf("leaf %d never came", leaf)
		}
	}
}

// It is begun again where the cursor was a minute before a connection broke, no
// earlier, and also if the cursor cannot be moved back at once.
func TestBeginsAgain(t *testing.T) {
	t.Parallel()
	src := &source{}
	src.add(1, 100)
	name := filepath.Join(t.TempDir(), "out")
	f := New(Config{Name: "sink", Format: JSONLine, To: "file:" + name, Log: slog.New(slog.DiscardHandler)})
	defer f.close()
	now := time.Now()
	for _, test := range []struct {
		name  string
		marks []mark
		next  int64
	}{
		{"lately", []mark{{now.Add(-40 * time.Second), 1, 20}, {now, 1, 60}}, 20},
		{"and long ago", []mark{{now.Add(-2 * time.Hour), 1, 5}, {now.Add(-61 * time.Second), 1, 30}, {now.Add(-59 * time.Second), 1, 40}}, 40},
		{"long ago", []mark{{now.Add(-2 * time.Hour), 1, 5}}, 100},
	} {
		f.close()
		conn, other := net.Pipe()
		_ = other.Close()
		f.conn, f.recent = conn, test.marks
		if err := src.MoveCursor(t.Context(), "sink", 1, 100); err != nil {
			t.Fatal(err)
		}
		src.away.Store(true)
		f.hangUp(now)
		if _, err := f.step(t.Context(), src); err == nil {
			t.Errorf("sent %s: the cursor was moved while the database was away", test.name)
		}
		f.hangUp(now)
		src.away.Store(false)
		before := f.Sent()
		if _, err := f.step(t.Context(), src); err != nil || f.Sent()-before != 100-test.next {
			t.Errorf("sent %s: %d leaves are sent again, want those from %d on: %v", test.name, f.Sent()-before, test.next, err)
		}
	}
}

// readFrames reads n messages framed by their length (RFC 5425, 4.3), or, if n is
// below 0, until every leaf up to 2100 has come.
func readFrames(t *testing.T, conn net.Conn, n int, seen map[int64]bool) {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(conn)
	for ; n != 0 && (n > 0 || len(seen) < 2100); n-- {
		length, err := r.ReadString(' ')
		if err != nil {
			t.Fatal(err)
		}
		size, err := strconv.Atoi(strings.TrimSpace(length))
		if err != nil {
			t.Fatal(err)
		}
		message := make([]byte, size)
		if _, err := io.ReadFull(r, message); err != nil {
			t.Fatal(err)
		}
		if !syslogGrammar.Match(message) {
			t.Fatalf("not a message of RFC 5424: %q", message)
		}
		leaf, err := strconv.ParseInt(string(regexp.MustCompile(` leaf="(\d+)"`).FindSubmatch(message)[1]), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seen[leaf] = true
	}
}

// certificates are those of a TLS server at 127.0.0.1 and of who trusts it.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	server = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}
	return server, &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}
