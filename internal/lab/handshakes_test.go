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
// nobody-cores how many processors that has used, km2-cores how many the door's kmed has.
//
// at-null-door is what all of this costs without a door of ours: the same from other addresses
// at a listener that hangs up at once.
func BenchmarkBadHandshakes(b *testing.B) {
	l := start(b, func(c *Config) { c.Filler, c.PoolLimit, c.Interval = 1<<16, 1<<17+1, 50*time.Millisecond })
	keysStored(b, l, 50_000)
	run := func(name, door, bad string) {
		b.Run(name, func(b *testing.B) {
			var n *nobody
			besides(b, l, func() func() int64 { n = startNobody(b, l, door, bad); return n.end }, "handshakes/s")
			b.ReportMetric(n.used.Seconds()/b.Elapsed().Seconds(), "nobody-cores")
		})
	}
	run("at-null-door", nullDoor(b), "foreign-anywhere")
	for _, bad := range []string{"no-tls", "hangs-up", "foreign", "hangs-up-anywhere", "foreign-anywhere"} {
		run(bad, address(l.KM2), bad)
	}
}

// nullDoor is the address of a listener that hangs up on everybody.
func nullDoor(b *testing.B) string {
	b.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var listening sync.WaitGroup
	listening.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
	})
	b.Cleanup(func() { _ = ln.Close(); listening.Wait() })
	return ln.Addr().String()
}

// What somebody who is nobody is told, in the environment.
const (
	nobodyDoes  = "KME_NOBODY_DOES"
	nobodyDoor  = "KME_NOBODY_DOOR"  // host:port
	nobodyTLS   = "KME_NOBODY_TLS"   // the folder of a certificate that is no SAE's
	nobodyRoots = "KME_NOBODY_ROOTS" // verifies the door
)

// nobody is a process of somebody who is nobody.
type nobody struct {
	end  func() int64  // has it end, and says how many connections have come to nothing since the first
	used time.Duration // of processors meanwhile, when it has ended
}

// startNobody starts the process, which is this program with TestNobody to run, and returns
// when its first connection has come to nothing.
func startNobody(b *testing.B, l *Lab, door, does string) *nobody {
	b.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestNobody$")
	cmd.Env = append(os.Environ(), nobodyDoes+"="+does, nobodyDoor+"="+door, nobodyTLS+"="+l.profileDir("operator", "root"), nobodyRoots+"="+l.path("root.pem"))
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
	n := new(nobody)
	n.end = sync.OnceValue(func() (begun int64) {
		_ = stop.Close()
		if _, err := fmt.Fscanln(said, &begun, &n.used); err != nil {
			b.Errorf("nobody does not say how many connections it has begun: %v", err)
		}
		_ = cmd.Wait()
		return begun
	})
	b.Cleanup(func() { n.end() })
	var first int64
	if _, err := fmt.Fscanln(said, &first); err != nil {
		b.Fatalf("nobody has begun no connection: %v", err)
	}
	return n
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
	before, used := begun.Load(), ownCPU()
	fmt.Println(before)
	_, _ = io.Copy(io.Discard, os.Stdin)
	fmt.Println(begun.Load()-before, int64(ownCPU()-used))
	stop()
	all.Wait()
}

// ownCPU is what this process has used of processors.
func ownCPU() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // has no errors for ourselves
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
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
