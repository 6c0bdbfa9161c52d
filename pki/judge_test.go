package pki_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/policies"
)

// TestIdentifyAtGate: what is judged again on every request of a connection that is
// open: the CRLs, the row's wish for a hybrid key exchange; and what is known of the
// connection goes with the caller.
func TestIdentifyAtGate(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	alice := d.alice()
	c := d.client(alice, "h2")
	d.want(c, http.StatusOK)
	s := d.caller.Load().Session()
	if !s.Hybrid() || s.Group != tls.X25519MLKEM768.String() || s.Remote == "" || s.Since.IsZero() || time.Since(s.Since) > time.Minute {
		t.Errorf("the session of alice is %+v", s)
	}
	if !strings.HasPrefix(s.TLS, "TLS 1.3 TLS_") || !strings.HasSuffix(s.TLS, " X25519MLKEM768") {
		t.Errorf("its TLS is recorded as %q", s.TLS)
	}
	first := s.Since
	d.want(c, http.StatusOK)
	if again := d.caller.Load().Session().Since; !again.Equal(first) {
		t.Errorf("the handshake of one connection was at %v and at %v", first, again)
	}

	old := d.client(alice)
	old.Transport.(*http.Transport).TLSClientConfig.CurvePreferences = []tls.CurveID{tls.X25519}
	d.want(old, http.StatusOK)
	d.people.Store(saeMapOf(t, identity.Principal{Enabled: true, RequireHybrid: true}))
	d.want(old, http.StatusUnauthorized)
	d.want(c, http.StatusOK)
	if got := d.reasons(); !strings.Contains(got, identity.NotHybrid) {
		t.Errorf("refused for %q, want %s", got, identity.NotHybrid)
	}
	if got := d.caller.Load(); got.ID() != "alice" || got.Session().Group != "X25519MLKEM768" {
		t.Errorf("alice: %+v", got)
	}

	// Of a request that is under way when her certificate is revoked, before the connection
	// is closed.
	leaf := load(t, alice).Leaf()
	r := &http.Request{TLS: &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf}}, CurveID: tls.X25519MLKEM768}}
	if _, err := d.gate.Identify(r); err != nil {
		t.Error(err)
	}
	d.crl.publish(d.sae.crl(t, 2, nil, leaf))
	d.revoked.Fetch(t.Context())
	if caller, err := d.gate.Identify(r); reasonOf(err) != identity.Revoked || caller.ID() != "" || caller.Certificate().Serial != leaf.SerialNumber.String() {
		t.Errorf("revoked: %v, %+v", err, caller)
	}
}

// want makes a request and wants that status.
func (d *door) want(c *http.Client, status int) {
	d.t.Helper()
	if got, err := d.ask(c); err != nil || got != status {
		d.t.Errorf("got %d, %v, want %d", got, err, status)
	}
}

// cpu is the CPU time that this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// requestOf is a request over a connection of TLS that leaf was shown on.
func requestOf(leaf *x509.Certificate) *http.Request {
	return &http.Request{RemoteAddr: "127.0.0.1:1", TLS: &tls.ConnectionState{
		Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256, CurveID: tls.X25519MLKEM768,
		VerifiedChains: [][]*x509.Certificate{{leaf}},
	}}
}

// TestIdentifyIsCheap: who calls is said on every request, and makes next to nothing that
// has to be collected. Garbage is what it once cost most: five times all else.
func TestIdentifyIsCheap(t *testing.T) { // beside no other test: all of them would be counted
	d := newDoor(t, pki.Limits{})
	r := requestOf(load(t, d.alice()).Leaf()).WithContext(t.Context())
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := d.gate.Identify(r); err != nil {
			t.Fatal(err)
		}
	}); n > 3 {
		t.Errorf("%v allocations a request, want one", n)
	}
}

// BenchmarkJudge is what it takes to say who calls and whether that caller may, on
// every request; of-request is its part of a keep-alive request over mutual TLS whose
// handler does nothing, by CPU time. Half of what client and server take together is
// taken for the server's part. To be at most 0.10.
func BenchmarkJudge(b *testing.B) {
	d := newDoor(b, pki.Limits{})
	set, err := policies.Load("../policies")
	if err != nil {
		b.Fatal(err)
	}
	sae := func(name string) identity.SAE {
		id, err := identity.ParseSAE(name)
		if err != nil {
			b.Fatal(err)
		}
		return id
	}
	q := policies.Question{
		Action: policies.EncKeys, Caller: sae("alice"), Other: sae("bob"), Bits: 256, Number: 1, Provenance: key.QKD, Link: "km1-km2", Group: "X25519MLKEM768",
	}
	alice := d.alice()
	r := requestOf(load(b, alice).Leaf()).WithContext(context.Background())

	request := keepAlive(b, d, alice)
	b.ReportAllocs()
	b.ResetTimer()
	began := cpu()
	for b.Loop() {
		caller, err := d.gate.Identify(r)
		if err != nil {
			b.Fatal(err)
		}
		q.Caller, _ = caller.SAE()
		q.Time = time.Now()
		if !set.Decide(q).Allow {
			b.Fatal("not allowed")
		}
	}
	each := float64(cpu()-began) / float64(b.N)
	b.ReportMetric(each, "cpu-ns/op")
	b.ReportMetric(request, "request-ns")
	b.ReportMetric(each/request, "of-request")
}

// keepAlive is the CPU time of the server's part of a request over an open connection,
// in nanoseconds.
func keepAlive(b *testing.B, d *door, dir string) float64 {
	b.Helper()
	cfg := pki.ClientTLS(load(b, dir), pool(b, filepath.Join(d.ca, "root.pem")), nil)
	cfg.NextProtos = []string{"http/1.1"}
	const connections, requests = 4, 5000
	var all sync.WaitGroup
	var conns []*tls.Conn
	for range connections {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(d.url, "https://"), cfg)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	text := []byte(fmt.Sprintf("GET / HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n", "Accept: */*"))
	began := cpu()
	for _, conn := range conns {
		all.Go(func() {
			in := bufio.NewReader(conn)
			for range requests {
				if _, err := conn.Write(text); err != nil {
					b.Error(err)
					return
				}
				for { // to the blank line; there is no body
					line, err := in.ReadSlice('\n')
					if err != nil && err != io.EOF {
						b.Error(err)
						return
					}
					if len(line) <= 2 {
						break
					}
				}
			}
		})
	}
	all.Wait()
	return float64(cpu()-began) / (connections * requests) / 2
}
