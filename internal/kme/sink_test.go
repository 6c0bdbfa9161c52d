package kme

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	syslog "github.com/leodido/go-syslog/v4"
	"github.com/leodido/go-syslog/v4/octetcounting"
	"github.com/leodido/go-syslog/v4/rfc5424"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/siem"
)

// collector is a syslog server over TLS, behind a port that is always open: while it is
// down, each connection is closed at once.
type collector struct {
	t *testing.T
	net.Listener
	client *tls.Config // of those who trust it
	up     atomic.Bool
	hungUp atomic.Int64 // connections that were closed at once
	serves sync.WaitGroup

	mu    sync.Mutex
	next  int64 // the leaf that was not seen yet
	texts map[int64][sha256.Size]byte
}

func newCollector(t *testing.T) *collector {
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
	c := &collector{t: t, client: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, texts: make(map[int64][sha256.Size]byte)}
	var lc net.ListenConfig
	if c.Listener, err = lc.Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	server := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
	c.serves.Go(func() {
		for {
			conn, err := c.Accept()
			if err != nil {
				return
			}
			if !c.up.Load() {
				_ = conn.Close()
				c.hungUp.Add(1)
				continue
			}
			c.serves.Go(func() { c.read(tls.Server(conn, server)) })
		}
	})
	t.Cleanup(func() { _ = c.Close(); c.serves.Wait() })
	return c
}

// read takes in a connection's frames (RFC 5425), which begin again where they like and
// leave none out.
func (c *collector) read(conn net.Conn) {
	defer conn.Close()
	expected := int64(-1)
	octetcounting.NewParser(syslog.WithMaxMessageLength(1<<20), syslog.WithListener(func(r *syslog.Result) {
		if r.Error != nil {
			if !strings.Contains(r.Error.Error(), "EOF") { // it ended between two frames
				c.t.Error(r.Error)
			}
			return
		}
		m := r.Message.(*rfc5424.SyslogMessage)
		leaf, err := strconv.ParseInt((*m.StructuredData)["kme@32473"]["leaf"], 10, 64)
		if err != nil {
			c.t.Error(err)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if expected >= 0 && leaf != expected || leaf > c.next {
			c.t.Errorf("leaf %d came where leaf %d or, at the start of a connection, one before %d was expected", leaf, expected, c.next)
		}
		expected = leaf + 1
		c.next = max(c.next, expected)
		c.texts[leaf] = sha256.Sum256([]byte(strings.TrimPrefix(*m.Message, "\ufeff")))
	})).Parse(conn)
}

func (c *collector) seen() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.next
}

// TestSinkAwayForAnHour: a sink is away while the site records what a busy hour has, five
// events a second, over midnight and a restart of the daemon. Nothing waits for it; the day
// that is over is not archived without it; and when it is back it is sent all of it, in
// order, each event's text as the log has it.
func TestSinkAwayForAnHour(t *testing.T) {
	t.Parallel()
	const minutes, each = 60, 300 // 18,000 events
	s := newSite(t)
	s.ms.Store(time.Date(2026, 3, 1, 23, 30, 0, 0, time.UTC).UnixMilli())
	k, q := s.trailed()
	k.Trail.Archive = t.TempDir() // with what is over for 0 hours
	soc := newCollector(t)
	sink := siem.Config{
		Name: "soc", Format: siem.Syslog, To: "tls:" + soc.Addr().String(), TLS: soc.client, Framed: true, Every: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
	}
	var stop context.CancelFunc
	var forwarding sync.WaitGroup
	begin := func() {
		k.sinks = []*siem.Forwarder{siem.New(sink)}
		ctx, cancel := context.WithCancel(context.Background())
		stop = cancel
		forwarding.Go(func() { _ = k.forward(ctx) }) // ends as its context does
	}
	begin()
	t.Cleanup(func() { stop(); forwarding.Wait() })
	fold := func() {
		t.Helper()
		for more := true; more; {
			f, err := q.Step(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			more = f.More
		}
	}
	events := make([]audit.Event, each/6)
	for i := range events {
		events[i] = audit.Event{
			Action: audit.EncKeys, Outcome: audit.Done, Request: fmt.Sprintf("0193e6c0-1a00-7c41-9f6e-0d2f6a4b%04x", i), Route: "POST /api/v1/keys/{slave}/enc_keys",
			Actor: audit.Actor{Role: "sae", ID: "alice", Rule: "sae-uri", Serial: "1234567890", Remote: "127.0.0.1:4000"},
			Peer:  "bob", Master: "alice", Slaves: []string{"bob"}, Policy: []string{"same-group"}, Bits: 256, Provenance: "simulated",
		}
	}
	for minute := range minutes {
		s.step(time.Minute)
		for range each / len(events) {
			if err := k.Store.Record(t.Context(), slices.Clone(events)...); err != nil {
				t.Fatal(err)
			}
		}
		fold()
		if minute == minutes/2 { // the daemon begins anew
			stop()
			forwarding.Wait()
			begin()
		}
	}
	eventually(t, "an alarm that the sink is away", func() bool {
		s.step(time.Second) // it is given patience by this clock
		return slices.ContainsFunc(k.Alarms(), func(a Alarm) bool { return a.Name == "audit-sink-soc" })
	})
	hungUp := soc.hungUp.Load()
	eventually(t, "another attempt", func() bool { return soc.hungUp.Load() > hungUp })
	// The day that is over could go, and stays: the sink has nothing of it.
	if err := k.archiveDays(t.Context()); err == nil || !strings.Contains(err.Error(), "sink soc has not been sent it") {
		t.Errorf("archiving the day that is over: %v", err)
	}

	soc.up.Store(true)
	eventually(t, "the end of the alarm", func() bool { return len(k.Alarms()) == 0 })
	fold() // the alarm's events are the last of the log
	var size int64
	texts := make(map[int64][sha256.Size]byte)
	err := k.Trail.Reader.Snapshot(t.Context(), 0, func(l *auditlog.Snapshot) error {
		size = l.Size
		return l.Rows(t.Context(), 0, l.Size, func(r audit.Row) error {
			texts[r.Leaf] = sha256.Sum256(r.Body)
			return nil
		})
	})
	if err != nil || size < minutes*each {
		t.Fatalf("the log has %d leaves, error %v", size, err)
	}
	eventually(t, "the last leaf at the sink", func() bool { return soc.seen() >= size })
	soc.mu.Lock()
	for leaf := range size {
		if soc.texts[leaf] != texts[leaf] {
			t.Errorf("leaf %d came as another text, or not at all", leaf)
			break
		}
	}
	soc.mu.Unlock()
	t.Logf("%d leaves, %d attempts that were hung up on", size, soc.hungUp.Load())

	// It may not have read it, for a minute.
	if err := k.archiveDays(t.Context()); err == nil || !strings.Contains(err.Error(), "sink soc has not been sent it, or may not have read it") {
		t.Errorf("archiving the day that is over, when it was just sent: %v", err)
	}
}
