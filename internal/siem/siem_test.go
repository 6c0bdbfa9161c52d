package siem

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/audit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func record(leaf int64, e audit.Event) Record {
	return Record{Log: "qutemail.example/km1/audit/1", Leaf: leaf, Text: e.AppendText(nil), Event: e}
}

// source is a log in memory, and a cursor that a test can look at.
type source struct {
	away   atomic.Bool  // as a database can be
	asked  atomic.Int64 // how often for the cursor
	read   atomic.Int64 // leaves
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
		s.read.Add(1)
		if err := do(r); err != nil {
			return l, err
		}
	}
	return l, nil
}

func (s *source) Cursor(context.Context, string) (int64, int64, error) {
	s.asked.Add(1)
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
			readFrames(t, conn, 300, 2100, seen)
		} else {
			src.add(1, 100)
			readFrames(t, conn, -1, 2100, seen)
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

// full is a sink that takes some bytes and then has no room.
type full struct{ room int }

func (f *full) Write(b []byte) (int, error) {
	if len(b) > f.room {
		return f.room, syscall.ENOSPC
	}
	f.room -= len(b)
	return len(b), nil
}

func (*full) Close() error { return nil }

// What a sink did not take, or a disk not keep, is not counted as sent, and the cursor stays
// before it: it is sent when there is room again.
func TestFailingWrite(t *testing.T) {
	t.Parallel()
	pipe := func() writer { // takes what is written, and keeps none of it
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return w
	}
	for _, test := range []struct {
		name   string
		leaves int
		conn   writer
	}{
		{"no room for more than a buffer", 500, &full{room: 10}}, // while the leaves are written
		{"no room for the last of it", 3, &full{room: 10}},       // when they are flushed
		{"written and not kept", 3, pipe()},
	} {
		src := &source{}
		src.add(1, test.leaves)
		name := filepath.Join(t.TempDir(), "out")
		f := New(Config{Name: "sink", Format: JSONLine, To: "file:" + name, Log: slog.New(slog.DiscardHandler)})
		f.conn = test.conn
		if more, err := f.step(t.Context(), src); err == nil || more {
			t.Errorf("%s: it went on, %v", test.name, err)
		}
		if f.Sent() != 0 || src.next != 0 || f.Lag() != int64(test.leaves) {
			t.Errorf("%s: %d sent, the cursor is at %d, %d wait", test.name, f.Sent(), src.next, f.Lag())
		}
		f.hangUp()
		if _, err := f.step(t.Context(), src); err != nil || f.Sent() != int64(test.leaves) || src.next != int64(test.leaves) {
			t.Errorf("%s, and then room: %d sent, the cursor is at %d, %v", test.name, f.Sent(), src.next, err)
		}
		f.hangUp()
		text, err := os.ReadFile(name)
		if n := strings.Count(string(text), "\n"); err != nil || n != test.leaves {
			t.Errorf("%s, and then room: %d lines, %v", test.name, n, err)
		}
	}
}

// A sink that is away for an hour, while ten events a second come, is tried each second,
// no more and no less, for nothing but an attempt to open it; then it gets all of them, in
// order and once.
func TestFileAwayForAnHour(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const seconds, rate = 3600, 10
		folder := filepath.Join(t.TempDir(), "not there yet")
		src := &source{}
		f := New(Config{Name: "sink", Format: JSONLine, To: "file:" + filepath.Join(folder, "out"), Every: time.Second, Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.Run(ctx, src) }()
		for range seconds {
			src.add(1, rate)
			time.Sleep(time.Second)
			synctest.Wait()
		}
		if f.Trouble() == "" || f.Sent() != 0 || f.Lag() < (seconds-2)*rate {
			t.Errorf("after an hour: trouble %q, %d sent, %d wait", f.Trouble(), f.Sent(), f.Lag())
		}
		if n := src.asked.Load(); n < seconds-1 || n > seconds+1 {
			t.Errorf("%d attempts in an hour", n)
		}
		if n := src.read.Load(); n != 0 {
			t.Errorf("%d leaves were read for a sink that is away", n)
		}
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		cancel()
		<-done
		if f.Trouble() != "" || f.Lag() != 0 {
			t.Errorf("when it is back: trouble %q, %d wait", f.Trouble(), f.Lag())
		}
		text, err := os.ReadFile(filepath.Join(folder, "out"))
		if err != nil {
			t.Fatal(err)
		}
		leaf := 0
		for line := range strings.Lines(string(text)) {
			if want := fmt.Sprintf(`{"log":"log/1","leaf":%d,`, leaf); !strings.HasPrefix(line, want) {
				t.Fatalf("line %d is %.60s", leaf, line)
			}
			leaf++
		}
		if leaf != seconds*rate {
			t.Errorf("%d lines of %d", leaf, seconds*rate)
		}
	})
}

// The cursor is moved over what a connection has taken a minute ago, and no further: there
// it is begun again, whether the connection breaks or the process ends.
func TestSettles(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, test := range []struct {
		name  string
		marks []mark
		next  int64 // where it is begun again
	}{
		{"nothing", nil, 5},
		{"lately", []mark{{now.Add(-40 * time.Second), place{1, 20}}, {now, place{1, 60}}}, 5},
		{"and long ago", []mark{{now.Add(-2 * time.Hour), place{1, 8}}, {now.Add(-61 * time.Second), place{1, 30}}, {now.Add(-59 * time.Second), place{1, 40}}}, 30},
		{"long ago", []mark{{now.Add(-2 * time.Hour), place{1, 50}}}, 50},
	} {
		src := &source{origin: 1, next: 5}
		src.add(1, 100)
		f := New(Config{Name: "sink", Format: JSONLine, To: "file:" + filepath.Join(t.TempDir(), "out"), Log: slog.New(slog.DiscardHandler)})
		f.unsettled = test.marks
		if err := f.settle(t.Context(), src, now); err != nil {
			t.Fatal(err)
		}
		if src.next != test.next {
			t.Errorf("taken %s: the cursor is at %d, want %d", test.name, src.next, test.next)
		}
		f.hangUp()
		if _, err := f.step(t.Context(), src); err != nil || f.Sent() != 100-test.next {
			t.Errorf("taken %s: %d leaves are sent again, want those from %d on: %v", test.name, f.Sent(), test.next, err)
		}
		f.hangUp()
	}
}

// A collector reads some of what was sent to it and dies with the rest, in the moment in
// which the daemon ends, or the lead goes to another node: whoever sends next sends all
// that may not have been read.
func TestRestartLosesNothing(t *testing.T) {
	t.Parallel()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := ln.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute)); err != nil { // whoever has nothing to send does not come
		t.Fatal(err)
	}
	const leaves = 400 // which the buffers of a connection hold
	src := &source{}
	src.add(1, leaves)
	seen := make(map[int64]bool)
	for _, reads := range []int{50, 150, -1} {
		f := New(Config{Name: "sink", Format: Syslog, To: "tcp:" + ln.Addr().String(), Framed: true, Every: time.Millisecond, Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.Run(ctx, src) }()
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if reads >= 0 {
			await(t, "everything taken by the connection", func() bool { return f.Sent() == leaves })
		}
		readFrames(t, conn, reads, leaves, seen)
		cancel()
		<-done
		_ = conn.Close()
	}
	for leaf := range int64(leaves) {
		if !seen[leaf] {
			t.Fatalf("leaf %d never came", leaf)
		}
	}
}

// readFrames reads n messages framed by their length (RFC 5425, 4.3), or, if n is
// below 0, until so many leaves have come.
func readFrames(t *testing.T, conn net.Conn, n, leaves int, seen map[int64]bool) {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(conn)
	for ; n != 0 && (n > 0 || len(seen) < leaves); n-- {
		length, err := r.ReadString(' ')
		if err != nil {
			t.Fatal(err)
		}
		size, err := strconv.Atoi(strings.TrimSuffix(length, " "))
		if err != nil {
			t.Fatal(err)
		}
		message := make([]byte, size)
		if _, err := io.ReadFull(r, message); err != nil {
			t.Fatal(err)
		}
		seen[leafOf(t, parseSyslog(t, message))] = true
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
