package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/lab/freeport"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/policies"
)

// Trouble is what is wrong on the way to a node's peer doors. The zero Trouble is a
// way on which nothing is. Lose, Twice and Swap are for messages at the assign door.
type Trouble struct {
	Delay time.Duration // for a message, or bytes of the classical channel, in each direction
	Cut   bool          // connections are closed, those that are open and those that come
	Hole  bool          // connections stay open, and nothing passes: what was on its way is lost
	Lose  bool          // a message arrives, and its answer does not
	Twice bool          // a message arrives twice, the second copy at some later moment
	Swap  bool          // a message waits until the next one has passed it, or for a while
}

// swapTime is how long a message waits for another that may pass it, and the most
// that a second copy is behind the first.
const swapTime = 200 * time.Millisecond

// Proxy stands in front of a node's peer doors, where the nodes of the other site
// come. It reads whole messages, by the credentials of both ends, which a lab has.
type Proxy struct {
	node   *Node
	from   *Node // a node of the other site: whose name the proxy bears towards the node
	doors  [2]net.Listener
	server *http.Server
	ended  sync.WaitGroup

	mu      sync.Mutex
	client  *http.Transport // to the node, once both ends have certificates
	trouble Trouble
	changed chan struct{} // closed when trouble is another
	open    map[net.Conn]bool
	waiting chan struct{} // of the message that waits to be passed, if one does: closed when it has been
}

// startProxies puts one in front of each node.
func (l *Lab) startProxies() error {
	for _, n := range l.nodes() {
		from := l.KM1.Node
		if n.site == l.KM1 {
			from = l.KM2.Node
		}
		p := &Proxy{node: n, from: from, changed: make(chan struct{}), open: make(map[net.Conn]bool)}
		for i := range p.doors {
			var err error
			if p.doors[i], err = freeport.Listen(); err != nil {
				return err
			}
		}
		p.server = &http.Server{
			Handler: p, TLSConfig: &tls.Config{GetConfigForClient: p.serverTLS}, ReadHeaderTimeout: 10 * time.Second,
			ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), // it is there for trouble
		}
		p.ended.Go(func() { _ = p.server.ServeTLS(door{p.doors[0], p}, "", "") })
		p.ended.Go(p.serveClassical)
		n.Proxy = p
	}
	return errors.Join(l.KM1.proxyPolicies(l.KM2), l.KM2.proxyPolicies(l.KM1))
}

// policies is the site's folder of policies.
func (s *Site) policies() string {
	if s.lab.Proxy {
		return s.path("policies")
	}
	return s.lab.path("policies")
}

// proxyPolicies gives a site policies of its own, in which the other site's nodes are
// where their proxies are.
func (s *Site) proxyPolicies(other *Site) error {
	if err := os.RemoveAll(s.policies()); err != nil {
		return err
	}
	if err := os.CopyFS(s.policies(), os.DirFS(s.lab.path("policies"))); err != nil {
		return err
	}
	file := filepath.Join(s.policies(), policies.NetworkFile)
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for _, n := range other.Nodes {
		for door := range n.Proxy.doors {
			text = bytes.ReplaceAll(text, []byte(n.Proxy.behind(door)), []byte(n.Proxy.address(door)))
		}
	}
	return os.WriteFile(file, text, 0o644)
}

// Set makes the trouble that there is from now on. What a Hole has swallowed stays lost.
func (p *Proxy) Set(t Trouble) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trouble = t
	close(p.changed)
	p.changed = make(chan struct{})
	if t.Cut {
		for c := range p.open {
			_ = c.Close()
		}
	}
}

func (p *Proxy) now() (Trouble, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.trouble, p.changed
}

func (p *Proxy) close() {
	if p == nil {
		return
	}
	p.Set(Trouble{Cut: true})
	_ = p.server.Close()
	_ = p.doors[1].Close()
	p.ended.Wait()
	if p.client != nil {
		p.client.CloseIdleConnections()
	}
}

// address is where the other site finds a door of the node: 0 assign, 1 classical.
func (p *Proxy) address(door int) string {
	return fmt.Sprintf("localhost:%d", p.doors[door].Addr().(*net.TCPAddr).Port)
}

// behind is where the door is.
func (p *Proxy) behind(door int) string {
	return fmt.Sprintf("localhost:%d", p.node.site.lab.Ports.of(p.node.site.Name)[p.node.index][1+door])
}

// errLost is the end of a message or connection that does not come through.
var errLost = errors.New("lost on the way")

// pass returns when something that is on its way has got over it.
func (p *Proxy) pass() error {
	t, changed := p.now()
	switch {
	case t.Cut:
		return errLost
	case t.Hole:
		<-changed
		return errLost
	case t.Delay > 0:
		time.Sleep(t.Delay)
		return p.lost()
	}
	return nil
}

// lost is errLost while nothing comes through.
func (p *Proxy) lost() error {
	if t, _ := p.now(); t.Cut || t.Hole {
		return errLost
	}
	return nil
}

// door is a listener whose connections the proxy can close.
type door struct {
	net.Listener
	p *Proxy
}

func (d door) Accept() (net.Conn, error) {
	c, err := d.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return d.p.keep(c), nil
}

// keep has a connection closed when the way is cut.
func (p *Proxy) keep(c net.Conn) net.Conn {
	k := &kept{c, p}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open[k] = true
	if p.trouble.Cut {
		_ = c.Close()
	}
	return k
}

type kept struct {
	net.Conn
	p *Proxy
}

func (k *kept) Close() error {
	go func() { // Set closes while it holds the lock
		k.p.mu.Lock()
		defer k.p.mu.Unlock()
		delete(k.p.open, k)
	}()
	return k.Conn.Close()
}

// serveClassical passes on the bytes of the classical channel, which it cannot read.
func (p *Proxy) serveClassical() {
	in := door{p.doors[1], p}
	for {
		c, err := in.Accept()
		if err != nil {
			return
		}
		p.ended.Go(func() {
			defer c.Close()
			to, err := net.Dial("tcp", p.behind(1))
			if err != nil {
				return
			}
			to = p.keep(to)
			var both sync.WaitGroup
			both.Go(func() { p.pump(to, c) })
			both.Go(func() { p.pump(c, to) })
			both.Wait()
		})
	}
}

// pump passes bytes on until one end has closed, and then closes the other.
func (p *Proxy) pump(to, from net.Conn) {
	defer to.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err == nil || n > 0 {
			err = errors.Join(err, p.pass())
		}
		if err == nil {
			_, err = to.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// serverTLS is the node's own: to the other site the proxy is the node.
func (p *Proxy) serverTLS(*tls.ClientHelloInfo) (*tls.Config, error) {
	c, err := pki.LoadCredential(p.node.path("tls"))
	if err != nil {
		return nil, err
	}
	issuers, err := pki.LoadPool(p.node.site.lab.path("ca", "kme", "intermediate.pem"))
	if err != nil {
		return nil, err
	}
	return pki.ServerTLS(c, issuers, tls.VersionTLS13), nil
}

// transport leads to the node.
func (p *Proxy) transport() (*http.Transport, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client != nil {
		return p.client, nil
	}
	cfg, err := p.clientTLS()
	if err != nil {
		return nil, err
	}
	p.client = &http.Transport{TLSClientConfig: cfg, MaxIdleConnsPerHost: 64}
	return p.client, nil
}

// clientTLS is the other site's: to the node the proxy is a node of that.
func (p *Proxy) clientTLS() (*tls.Config, error) {
	c, err := pki.LoadCredential(p.from.path("tls"))
	if err != nil {
		return nil, err
	}
	roots, err := pki.LoadPool(p.from.path("tls", "root.pem"))
	if err != nil {
		return nil, err
	}
	return pki.ClientTLS(c, roots, pki.PeerURI(fmt.Sprintf("qkd://kme.%s/%s", trustDomain, p.node.site.Name))), nil
}

// ServeHTTP passes a message on, and its answer back.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if t, _ := p.now(); t.Twice {
		p.ended.Go(func() {
			time.Sleep(time.Duration(len(body)) * time.Millisecond % swapTime) // as good as random, and the same each time
			_, _, _ = p.say(r, body)
		})
	}
	header, answer, err := p.say(r, body)
	if err == nil {
		err = p.pass()
	}
	if t, _ := p.now(); err != nil || t.Lose {
		panic(http.ErrAbortHandler) // closes the connection
	}
	w.Header().Set("Content-Type", header.Header.Get("Content-Type"))
	if retry := header.Header.Get("Retry-After"); retry != "" {
		w.Header().Set("Retry-After", retry)
	}
	w.WriteHeader(header.StatusCode)
	_, _ = w.Write(answer) // it is lost, then
}

// say brings one copy of a message to the node.
func (p *Proxy) say(r *http.Request, body []byte) (*http.Response, []byte, error) {
	if err := p.pass(); err != nil {
		return nil, nil, err
	}
	defer p.swap()()
	client, err := p.transport()
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 10*time.Second) // it is on its way, whoever waits
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.Method, "https://"+p.behind(0)+r.URL.Path, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Content-Type", r.Header.Get("Content-Type"))
	res, err := client.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	return res, answer, err
}

// swap has every other message wait until another has been answered, or for a while.
// The other calls the function when it has been.
func (p *Proxy) swap() (passed func()) {
	p.mu.Lock()
	if !p.trouble.Swap {
		p.mu.Unlock()
		return func() {}
	}
	if other := p.waiting; other != nil {
		p.waiting = nil
		p.mu.Unlock()
		return func() { close(other) }
	}
	mine := make(chan struct{})
	p.waiting = mine
	p.mu.Unlock()
	select {
	case <-mine:
	case <-time.After(swapTime):
		p.mu.Lock()
		if p.waiting == mine {
			p.waiting = nil
		}
		p.mu.Unlock()
	}
	return func() {}
}
