package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestBlockAlice: from the answer on to an operator's switch, none of alice's requests
// is served at that node, over whatever connection, and soon after at the other one;
// her connections are closed; nobody else notices.
func TestBlockAlice(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit, c.Nodes = 4096, 16384, 2 })
	keysStored(t, l, 2000)
	if err := l.enrol(t.Context(), "sae", "dave", l.KM1.URL()); err != nil {
		t.Fatal(err)
	}
	here, there := l.KM1.Nodes[0], l.KM1.Nodes[1]
	root := operator(t, l.KM1)
	bob := &Person{ID: SAEID("bob")}

	others, stop := context.WithCancel(t.Context())
	var served atomic.Int64
	undisturbed := make(chan error, 2)
	for _, n := range []*Node{here, there} {
		dave := at(t, l, "dave", n.Name)
		go func() {
			for others.Err() == nil {
				if _, err := patiently(others, dave, bob, 1); err == nil {
					served.Add(1)
				} else if others.Err() == nil {
					undisturbed <- err
					return
				}
			}
			undisturbed <- nil
		}()
	}

	raw := rawAlice(t, l, here)
	h1, h2 := overHTTP(t, l, here, false), overHTTP(t, l, there, true)
	for name, c := range map[string]*alicesClient{"HTTP/1.1": h1, "HTTP/2": h2} {
		first := c.served(t)
		if _, again := c.ask(t, "bob"); again != first {
			t.Errorf("alice over %s: her connection is not used again", name)
		}
		c.first = first
	}

	if err := root.DisableSAE(t.Context(), "alice", "lost laptop"); err != nil {
		t.Fatal(err)
	}
	switched := time.Now()
	if status, _ := h1.ask(t, "bob"); status != http.StatusUnauthorized {
		t.Errorf("alice over HTTP/1.1, after the switch was answered: %d", status)
	}
	eventually(t, "alice is refused at the other node", func(context.Context) error {
		if status, _ := h2.ask(t, "bob"); status != http.StatusUnauthorized {
			return fmt.Errorf("answered %d", status)
		}
		return nil
	})
	t.Logf("refused at the other node %v after the switch was answered", time.Since(switched).Round(time.Millisecond))
	if _, err := raw.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("alice's idle connection: %v, want its end", err)
	}
	for name, c := range map[string]*alicesClient{"HTTP/1.1": h1, "HTTP/2": h2} {
		eventually(t, "alice's connection over "+name+" is closed", func(context.Context) error {
			if _, now := c.ask(t, "bob"); now == c.first {
				return errors.New("it is open")
			}
			return nil // open again as nobody's: what she asks is refused, and recorded
		})
	}

	before := served.Load()
	eventually(t, "the others go on", func(context.Context) error {
		if n := served.Load() - before; n < 50 {
			return fmt.Errorf("%d requests", n)
		}
		return nil
	})
	stop()
	for range 2 {
		if err := <-undisturbed; err != nil {
			t.Errorf("dave, meanwhile: %v", err)
		}
	}
	noOracle(t, l, here)

	if n := recorded(t, l.KM1, `e->>'action' = 'disable' AND e->>'outcome' = 'done' AND e->>'peer' = 'alice' AND e->>'reason' = 'lost laptop' AND e->'actor'->>'id' = 'root'`); n != 1 {
		t.Errorf("%d switches are recorded", n)
	}
	if n := recorded(t, l.KM1, `e->>'outcome' = 'refused' AND e->>'reason' LIKE '%disabled: sae/alice: lost laptop%'`); n < 2 {
		t.Errorf("%d refusals of alice are recorded", n)
	}
	if err := root.EnableSAE(t.Context(), "alice"); err != nil {
		t.Fatal(err)
	}
	h1.served(t)
}

// rawAlice is a connection of alice's that has been used, and is idle.
func rawAlice(t *testing.T, l *Lab, n *Node) *bufio.Reader {
	t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(n.URL(), "https://"), tlsOf(t, l, "sae", "alice"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, "GET /api/v1/keys/bob/status HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("alice, before: %v, %v", res, err)
	}
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return r
}

// alicesClient asks a node for alice, over one version of HTTP.
type alicesClient struct {
	*http.Client
	base  string
	first net.Conn // over which she was served
}

func overHTTP(t *testing.T, l *Lab, n *Node, http2 bool) *alicesClient {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: tlsOf(t, l, "sae", "alice"), Protocols: new(http.Protocols)}
	transport.Protocols.SetHTTP2(http2)
	transport.Protocols.SetHTTP1(!http2)
	t.Cleanup(transport.CloseIdleConnections)
	return &alicesClient{Client: &http.Client{Transport: transport, Timeout: 10 * time.Second}, base: n.URL()}
}

// ask asks for a key, and says what the answer was and over which connection it came.
func (c *alicesClient) ask(t *testing.T, other string) (status int, conn net.Conn) {
	t.Helper()
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { conn = i.Conn }})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/api/v1/keys/"+other+"/enc_keys", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Logf("asking: %v", err) // the connection ended under the request, which is not answered then
		return 0, conn
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Logf("asking: %v", err) // or under its answer
		return 0, conn
	}
	return res.StatusCode, conn
}

// served returns when a key was got, and over which connection.
func (c *alicesClient) served(t *testing.T) (conn net.Conn) {
	t.Helper()
	eventually(t, "alice is served", func(context.Context) error {
		var status int
		if status, conn = c.ask(t, "bob"); status != http.StatusOK {
			return fmt.Errorf("answered %d", status)
		}
		return nil
	})
	return conn
}

// noOracle: whoever asks for keys to share with an SAE that nobody knows, one that policy
// forbids, and one that is disabled, gets the same bytes, whatever is asked and how.
func noOracle(t *testing.T, l *Lab, n *Node) {
	t.Helper()
	dave := at(t, l, "dave", n.Name)
	for _, ask := range []struct {
		name, method, path, body string // of which %s is the other SAE
		status                   int
	}{
		{"status", http.MethodGet, "%s/status", "", http.StatusUnauthorized},
		{"enc_keys", http.MethodGet, "%s/enc_keys", "", http.StatusUnauthorized},
		{"enc_keys, beside bob", http.MethodPost, "bob/enc_keys", `{"additional_slave_SAE_IDs": ["%s"]}`, http.StatusUnauthorized},
		{"dec_keys", http.MethodGet, "%s/dec_keys?key_ID=01a20a35-6080-7d42-a9b0-32f7aade4f11", "", http.StatusBadRequest},
	} {
		answer := func(other string) string {
			path, body := strings.ReplaceAll(ask.path, "%s", other), strings.ReplaceAll(ask.body, "%s", other)
			req, err := http.NewRequestWithContext(t.Context(), ask.method, n.URL()+"/api/v1/keys/"+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			res, err := dave.HTTP.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			said, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != ask.status {
				t.Errorf("%s: dave for %s: %d, %v, want %d", ask.name, other, res.StatusCode, err, ask.status)
			}
			id := res.Header.Get("X-Request-Id")
			res.Header.Del("Date")
			var head strings.Builder
			_ = res.Header.Write(&head) // sorted
			return strings.ReplaceAll(res.Status+"\n"+head.String()+"\n"+string(said), id, strings.Repeat("#", len(id)))
		}
		unknown := answer("nobodyx")
		for _, other := range []string{"carol", "alice"} { // forbidden; disabled
			if got := answer(other); got != unknown {
				t.Errorf("%s: %s is answered\n%s\nand an unknown SAE\n%s", ask.name, other, got, unknown)
			}
		}
	}
}
