package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// shaken is a listener whose connections have shaken hands, as a gate's have.
type shaken struct {
	net.Listener
	cfg *tls.Config
}

func (l shaken) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := tls.Server(raw, l.cfg)
		if c.Handshake() == nil {
			return c, nil
		}
		_ = c.Close() // the client has thought better of it
	}
}

// none is a ConnContext that adds nothing.
func none(ctx context.Context, _ net.Conn) context.Context { return ctx }

// TestWiping: a connection wipes the server's write buffer when it has sent it, and nothing
// that belongs to a handler, over HTTP/1.1 and HTTP/2. Handlers see TLS as before.
func TestWiping(t *testing.T) {
	t.Parallel()
	shaken, cfg := shaking(t)
	ln := wiping{shaken}
	pages := map[string][]byte{"/short": []byte("short"), "/long": bytes.Repeat([]byte("long "), 5000)} // a handler's own
	want := map[string]string{"/short": string(pages["/short"]), "/long": string(pages["/long"])}
	s := &http.Server{TLSConfig: cfg, ConnContext: none, Handler: new(sweeper).watch(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || r.TLS.Version != tls.VersionTLS13 {
			t.Error("the handler does not see the TLS")
		}
		page := pages[r.URL.Path]
		w.Header().Set("Content-Length", strconv.Itoa(len(page)))
		_, _ = w.Write(page)
	}))}
	behindTLS(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	for _, protocol := range []int{1, 2} {
		hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: protocol == 2}}
		for range 2 { // on one connection
			for path, text := range want {
				res, err := hc.Get("https://" + ln.Addr().String() + path)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(res.Body)
				if err != nil || string(got) != text || res.ProtoMajor != protocol {
					t.Errorf("HTTP/%d, %s: %d bytes, want %d; %v", res.ProtoMajor, path, len(got), len(text), err)
				}
				_ = res.Body.Close()
			}
		}
		hc.CloseIdleConnections()
	}
	_ = s.Close()
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}

	near, far := net.Pipe()
	defer near.Close()
	go func() {
		c := tls.Client(far, &tls.Config{InsecureSkipVerify: true})
		_, _ = io.Copy(io.Discard, c)
	}()
	b := bufio.NewWriterSize(&wipingConn{conn: tls.Server(near, cfg)}, httpBuffer)
	if _, err := b.WriteString("a key"); err != nil {
		t.Fatal(err)
	}
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	if sent := b.AvailableBuffer()[:httpBuffer]; !bytes.Equal(sent, make([]byte, httpBuffer)) {
		t.Errorf("what was sent is still in the buffer: %q", sent[:8])
	}
}

// counting is a listener whose connections count what they are given to send.
type counting struct {
	net.Listener
	writes *atomic.Int64
}

func (l counting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countingConn{c, l.writes}, err
}

type countingConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countingConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// TestOneWrite: a short answer over HTTP/1.1 goes out at once, header and body, and so does
// the header of one that has no body.
func TestOneWrite(t *testing.T) {
	t.Parallel()
	ln, cfg := shaking(t)
	var writes atomic.Int64
	raw := ln.(shaken).Listener
	s := &http.Server{TLSConfig: cfg, ConnContext: none, Handler: new(sweeper).watch(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5")
		_, _ = io.WriteString(w, "a key")
		_ = http.NewResponseController(w).Flush()
	}))}
	behindTLS(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(wiping{shaken{counting{raw, &writes}, cfg}}) }()
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	for i, method := range []string{"GET", "GET", "HEAD", "POST"} {
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+raw.Addr().String()+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		before := writes.Load()
		res, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		if want := map[bool]string{true: "", false: "a key"}[method == "HEAD"]; err != nil || string(got) != want || res.ContentLength != 5 {
			t.Errorf("%s: %q, of length %d, %v", method, got, res.ContentLength, err)
		}
		_ = res.Body.Close()
		if n := writes.Load() - before; i > 0 && n != 1 { // the first comes behind the handshake's
			t.Errorf("%s: the answer took %d writes", method, n)
		}
	}
	hc.CloseIdleConnections()
	_ = s.Close()
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}
}

// seeing is the listener of one whose connections note what they are given to send, and how.
type seeing struct {
	net.Listener
	*sent
}

type sent struct {
	sync.Mutex
	written, direct bytes.Buffer
}

func (l seeing) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return seeingConn{c, l.sent}, err
}

type seeingConn struct {
	net.Conn
	*sent
}

func (c seeingConn) Write(b []byte) (int, error) {
	c.Lock()
	defer c.Unlock()
	c.written.Write(b)
	return c.Conn.Write(b)
}

func (c seeingConn) ReadFrom(src io.Reader) (int64, error) {
	c.Lock()
	defer c.Unlock()
	return io.Copy(struct{ io.Writer }{c.Conn}, io.TeeReader(src, &c.direct))
}

// TestPast: a body whose length was said goes to the connection directly, not through a
// buffer of net/http; the header goes before it. One without goes as ever.
func TestPast(t *testing.T) {
	t.Parallel()
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := seeing{raw, new(sent)}
	s := &http.Server{Handler: new(sweeper).watch(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/key" {
			w.Header().Set("Content-Length", "11")
		}
		for _, part := range []string{"half ", "a key "} {
			if _, err := io.WriteString(w, part); err != nil {
				t.Error(err)
			}
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Error(err)
		}
	}))}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	hc := &http.Client{Transport: &http.Transport{}}
	for _, path := range []string{"/other", "/key", "/key"} {
		res, err := hc.Get("http://" + raw.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		if err != nil || string(got) != "half a key " || (res.ContentLength == 11) != (path == "/key") {
			t.Errorf("%s: %q, of length %d, %v", path, got, res.ContentLength, err)
		}
		_ = res.Body.Close()
		if path != "/key" {
			ln.Lock()
			ln.written.Reset()
			ln.Unlock()
		}
	}
	hc.CloseIdleConnections()
	_ = s.Close()
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}
	if got := ln.direct.String(); got != "half a key half a key " {
		t.Errorf("%q went to the connection directly", got)
	}
	if got := ln.written.String(); bytes.Contains([]byte(got), []byte("key ")) {
		t.Errorf("a body went through a buffer:\n%s", got)
	}
}
