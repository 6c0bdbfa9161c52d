package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/deadpeer"
)

const handshakeTime = 10 * time.Second

// dialTLS connects to address and finishes the handshake. Only the protocols
// named in protos are offered; the name that the certificate must carry is
// cfg.ServerName or, if that is empty, the host of address.
func dialTLS(ctx context.Context, address string, cfg *tls.Config, protos ...string) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("dialling the peer: %w", err)
	}
	deadpeer.Notice(raw)
	cfg = cfg.Clone()
	cfg.NextProtos = protos
	if cfg.ServerName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			_ = raw.Close()
			return nil, fmt.Errorf("dialling the peer: %w", err)
		}
		cfg.ServerName = host
	}
	counted := &countedConn{Conn: raw}
	c := &conn{Conn: tls.Client(counted, cfg), raw: counted}
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("TLS handshake with the peer: %w", err)
	}
	return c, nil
}

// conn is a TLS connection that knows whether anything of the request that it
// carries has left. It carries one request at a time.
type conn struct {
	*tls.Conn
	raw   *countedConn
	state atomic.Int32
}

// The states of a conn's request.
const (
	unsent int32 = iota // not one byte has left
	moving              // a write has begun or is done: bytes may have left
	cut                 // judged unsent, and no byte may leave any more
)

// leaf is the certificate of the other side.
func (c *conn) leaf() *x509.Certificate { return c.ConnectionState().PeerCertificates[0] }

// begin starts a new request.
func (c *conn) begin() { c.state.Store(unsent) }

// cutOff says whether not one byte of the request has left, and if so sees to it
// that none will.
func (c *conn) cutOff() bool { return c.state.CompareAndSwap(unsent, cut) }

// Write sends b. A write that fails before the kernel took one byte counts as
// none.
func (c *conn) Write(b []byte) (int, error) {
	first := c.state.CompareAndSwap(unsent, moving)
	if !first && c.state.Load() != moving {
		return 0, net.ErrClosed
	}
	before := c.raw.sent.Load()
	n, err := c.Conn.Write(b)
	if first && err != nil && c.raw.sent.Load() == before {
		c.state.Store(unsent)
	}
	return n, err
}

// countedConn counts the bytes that the kernel took.
type countedConn struct {
	net.Conn
	sent atomic.Int64
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}
