package lab

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
// has both sides of them to do, theirs in a process that gives way to all others;
// km2-cores how many processors the door's kmed has used.
func BenchmarkBadHandshakes(b *testing.B) {
	l := start(b, func(c *Config) { c.Filler, c.PoolLimit, c.Interval = 1<<16, 1<<17+1, 50*time.Millisecond })
	keysStored(b, l, 50_000)
	for _, bad := range []string{"no-tls", "hangs-up", "foreign", "hangs-up-anywhere", "foreign-anywhere"} {
		b.Run(bad, func(b *testing.B) {
			besides(b, l, func() func() int64 { return startNobody(b, l, bad) }, "handshakes/s")
		})
	}
}

// What somebody who is nobody is told, in the environment.
const (
	nobodyDoes  = "KME_NOBODY_DOES"
	nobodyDoor  = "KME_NOBODY_DOOR"  // host:port
	nobodyTLS   = "KME_NOBODY_TLS"   // the folder of a certificate that is no SAE's
	nobodyRoots = "KME_NOBODY_ROOTS" // verifies the door
)

// startNobody starts the process of somebody who is nobody, which is this program with
// TestNobody to run, and returns when its first connection has come to nothing. end says
// how many have since.
func startNobody(b *testing.B, l *Lab, does string) (end func() int64) {
	b.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestNobody$")
	cmd.Env = append(os.Environ(), nobodyDoes+"="+does, nobodyDoor+"="+address(l.KM2), nobodyTLS+"="+l.profileDir("operator", "root"), nobodyRoots+"="+l.path("root.pem"))
	cmd.Stderr = os.Stderr
	said, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	stop, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	var n int64
	end = sync.OnceValue(func() int64 {
		_ = stop.Close()
		if _, err := fmt.Fscanln(said, &n); err != nil {
			b.Errorf("nobody does not say how many connections it has begun: %v", err)
		}
		_ = cmd.Wait()
		return n
	})
	b.Cleanup(func() { end() })
	if _, err := fmt.Fscanln(said, &n); err != nil {
		b.Fatalf("nobody has begun no connection: %v", err)
	}
	return end
}

// TestNobody is the process of startNobody, when that asks for it. It ends when its standard
// input does.
func TestNobody(t *testing.T) {
	does, anywhere := strings.CutSuffix(os.Getenv(nobodyDoes), "-anywhere")
	if does == "" {
		return
	}
	giveWay()
	credential, err := pki.LoadCredential(os.Getenv(nobodyTLS))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := pki.LoadPool(os.Getenv(nobodyRoots))
	if err != nil {
		t.Fatal(err)
	}
	foreign := pki.ClientTLS(credential, roots, nil)
	foreign.ServerName = "localhost"
	hello := clientHello(t, foreign)
	say := map[string]func(net.Conn) (ended bool){
		"no-tls":   func(c net.Conn) bool { return !answered(c, []byte("GET / HTTP/1.1\r\nHost: kme\r\n\r\n")) },
		"hangs-up": func(c net.Conn) bool { _ = answered(c, hello); return true },
		"foreign":  func(c net.Conn) bool { return !answered(tls.Client(c, foreign), nil) },
	}[does]
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var begun atomic.Int64
	first := make(chan struct{})
	pace := rate.NewLimiter(badHandshakes, 1)
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for pace.Wait(ctx) == nil {
				from := net.IPv4(127, 0, 0, 2)
				if anywhere {
					from = net.IPv4(127, byte(rand.N(250)+1), byte(rand.N(256)), byte(rand.N(254)+1))
				}
				c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}).Dial("tcp4", os.Getenv(nobodyDoor))
				if err == nil { // else it may be closed again already: it was one all the same
					_ = c.(*net.TCPConn).SetLinger(0) // else the ports are used up soon
					_ = c.SetDeadline(time.Now().Add(10 * time.Second))
					if !say(c) {
						t.Error("nobody was let in")
					}
					_ = c.Close()
				}
				if begun.Add(1) == 1 {
					close(first)
				}
			}
		})
	}
	<-first
	before := begun.Load()
	fmt.Println(before)
	_, _ = io.Copy(io.Discard, os.Stdin)
	fmt.Println(begun.Load() - before)
	stop()
	all.Wait()
}

// giveWay lets every other process run before this one.
func giveWay() {
	threads, _ := os.ReadDir("/proc/self/task") // those that follow have it from the one that makes them
	for _, thread := range threads {
		id, _ := strconv.Atoi(thread.Name())
		_ = syscall.Setpriority(syscall.PRIO_PROCESS, id, 19)
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
func clientHello(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(client, c).Handshake() // which ends when nobody answers
	}()
	hello := make([]byte, 1<<14)
	n, err := server.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	<-done
	return hello[:n]
}
