package lab

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/qutemail/kme/pki"
)

// badHandshakes is how many connections somebody begins in a second who is nobody.
const badHandshakes = 1000

// BenchmarkBadHandshakes has a few SAEs at KM2 ask for keys now and then, first alone and
// then while somebody begins badHandshakes connections a second to their door that come to
// nothing: what is said is no TLS; or a ClientHello, after which the other side hangs up; or
// the certificate is an operator's, always from one address or each time from another, of
// which no bucket is ever empty. times-alone is what that costs the SAEs: how many times
// their p99 without it. handshakes/s is how many it was, of badHandshakes, on a machine that
// has both sides of them to do; km2-cores how many processors the door's kmed has used.
func BenchmarkBadHandshakes(b *testing.B) {
	l := start(b, func(c *Config) { c.Filler, c.PoolLimit, c.Interval = 1<<16, 1<<17+1, 50*time.Millisecond })
	keysStored(b, l, 50_000)
	door := strings.TrimPrefix(l.KM2.URL(), "https://")
	credential, err := pki.LoadCredential(l.profileDir("operator", "root"))
	if err != nil {
		b.Fatal(err)
	}
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		b.Fatal(err)
	}
	foreign := pki.ClientTLS(credential, roots, nil)
	foreign.ServerName = "localhost"
	hello := clientHello(b, foreign)
	one := func() net.IP { return net.IPv4(127, 0, 0, 2) }
	anywhere := func() net.IP { return net.IPv4(127, byte(rand.N(250)+1), byte(rand.N(256)), byte(rand.N(254)+1)) }
	shows := func(c net.Conn) bool { return !answered(tls.Client(c, foreign), nil) }
	for _, bad := range []struct {
		name string
		from func() net.IP
		say  func(net.Conn) bool // false if it did not end as it should
	}{
		{"no-tls", one, func(c net.Conn) bool { return !answered(c, []byte("GET / HTTP/1.1\r\nHost: kme\r\n\r\n")) }},
		{"hangs-up", one, func(c net.Conn) bool { _ = answered(c, hello); return true }},
		{"foreign", one, shows},
		{"hangs-up-anywhere", anywhere, func(c net.Conn) bool { _ = answered(c, hello); return true }},
		{"foreign-anywhere", anywhere, shows},
	} {
		b.Run(bad.name, func(b *testing.B) {
			pace := rate.NewLimiter(badHandshakes, 1)
			shake := func(ctx context.Context) bool {
				if pace.Wait(ctx) != nil {
					return false
				}
				c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: bad.from()}}).Dial("tcp4", door)
				if err != nil {
					return false
				}
				_ = c.(*net.TCPConn).SetLinger(0) // else the ports are used up soon
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				ended := bad.say(c)
				_ = c.Close()
				return ended
			}
			besides(b, l, func() *bully { return newBully(b, 64, shake) }, "handshakes/s")
		})
	}
}

// answered says something, and whether anything was said in return.
func answered(c net.Conn, words []byte) bool {
	_, err := c.Write(words) // of no words to a TLS connection: the handshake
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	return err == nil
}

// clientHello is how a handshake of a client begins.
func clientHello(b *testing.B, c *tls.Config) []byte {
	b.Helper()
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(client, c).Handshake() // which ends when nobody answers
	}()
	hello := make([]byte, 1<<14)
	n, err := server.Read(hello)
	if err != nil {
		b.Fatal(err)
	}
	_ = server.Close()
	<-done
	return hello[:n]
}
