package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/saedoor"
)

// shaking is a listener whose connections have shaken hands, and by which configuration.
func shaking(t *testing.T) (net.Listener, *tls.Config) {
	t.Helper()
	dir := t.TempDir()
	if err := writeCertificate(dir, "km1"); err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
	return shaken{raw, cfg}, cfg
}

// opened serves a door, as it is but for its gate, and returns where.
func opened(t *testing.T, d door, change func(*http.Server)) string {
	t.Helper()
	ln, cfg := shaking(t)
	if d.keys {
		ln = wiping{ln}
	}
	d.log = slog.New(slog.DiscardHandler)
	s := d.server(cfg, none)
	change(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-served; err != http.ErrServerClosed {
			t.Error(err)
		}
	})
	return "https://" + ln.Addr().String()
}

// client is one of a door, of HTTP/1.1 or HTTP/2.
func client(t *testing.T, protocol int) *http.Client {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: protocol == 2,
	}}
	t.Cleanup(hc.CloseIdleConnections)
	return hc
}

// TestStreams: of the requests that come over one connection of HTTP/2, a door works on so
// many at a time. A client that has more opens another connection, and none is lost.
func TestStreams(t *testing.T) {
	t.Parallel()
	const all = 3 * maxStreams
	for _, keys := range []bool{true, false} {
		var mu sync.Mutex
		inside := make(map[string]int) // by connection
		entered, release := make(chan struct{}, all), make(chan struct{})
		base := opened(t, door{keys: keys, handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/first" {
				return
			}
			mu.Lock()
			inside[r.RemoteAddr]++
			mu.Unlock()
			entered <- struct{}{}
			<-release
		})}, func(*http.Server) {})
		hc := client(t, 2)
		ask := func(path string) error {
			res, err := hc.Get(base + path)
			if err != nil {
				return err
			}
			_ = res.Body.Close()
			if res.ProtoMajor != 2 || res.StatusCode != http.StatusOK {
				return fmt.Errorf("HTTP/%d, status %d", res.ProtoMajor, res.StatusCode)
			}
			return nil
		}
		if err := ask("/first"); err != nil { // from here on the client knows what the door takes
			t.Fatal(err)
		}
		ended := make(chan error, all)
		for range all {
			go func() { ended <- ask("/") }()
		}
		for n := 0; n < all; {
			select {
			case <-entered:
				n++
			case err := <-ended:
				t.Fatalf("a request has ended: %v", err)
			}
		}
		for connection, n := range inside {
			if n > maxStreams {
				t.Errorf("%d requests of %s are worked on at a time, want at most %d", n, connection, maxStreams)
			}
		}
		close(release)
		for range all {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}
}

// TestLongHeaders: headers are read up to a length, over either protocol; what is longer gets
// to no handler.
func TestLongHeaders(t *testing.T) {
	t.Parallel()
	for _, protocol := range []int{1, 2} {
		var served atomic.Int64
		base := opened(t, door{keys: true, handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) })}, func(*http.Server) {})
		hc := client(t, protocol)
		ask := func(length int) (status int, err error) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Long", strings.Repeat("a", length))
			res, err := hc.Do(req)
			if err != nil {
				return 0, err
			}
			return res.StatusCode, res.Body.Close()
		}
		if status, err := ask(8 << 10); err != nil || status != http.StatusOK || served.Load() != 1 {
			t.Errorf("HTTP/%d: 8 kB: %d, %v", protocol, status, err)
		}
		// A client may be told, or hung up on, or of HTTP/2 not even try.
		if status, err := ask(32 << 10); err == nil && status != http.StatusRequestHeaderFieldsTooLarge || served.Load() != 1 {
			t.Errorf("HTTP/%d: 32 kB: %d, %v; %d requests were served, want one", protocol, status, err, served.Load())
		}
		if status, err := ask(1); err != nil || status != http.StatusOK {
			t.Errorf("HTTP/%d: after that: %d, %v", protocol, status, err)
		}
	}
}

// TestSlowBody: a body that does not arrive is not waited for, over either protocol, and its
// room is there again. (A door waits for 15 s, this test's for less.)
func TestSlowBody(t *testing.T) {
	t.Parallel()
	for _, protocol := range []int{1, 2} {
		var bodies saedoor.Bodies
		ended := make(chan error, 1)
		base := opened(t, door{keys: true, handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, err := saedoor.Begin(w, r, "POST /", slog.New(slog.DiscardHandler)).Body(&bodies)
			ended <- err
		})}, func(s *http.Server) {
			if s.ReadTimeout == 0 || s.ReadTimeout > 15*time.Second {
				t.Errorf("a door waits %v for a body", s.ReadTimeout)
			}
			s.ReadTimeout = 100 * time.Millisecond
		})
		out, in := io.Pipe()
		asked := make(chan struct{})
		hc := client(t, protocol)
		go func() {
			defer close(asked)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base, out)
			if err != nil {
				t.Error(err)
				return
			}
			if res, err := hc.Do(req); err == nil { // it may be told, or hung up on
				_ = res.Body.Close()
			}
		}()
		_, _ = in.Write([]byte(`{"number":`))
		if err := <-ended; problem.KindOf(err) != problem.Invalid {
			t.Errorf("HTTP/%d: a body that does not end: %v", protocol, err)
		}
		_ = in.CloseWithError(errors.New("over"))
		<-asked
	}
}
