package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
)

// Defaults of a Client.
const (
	callTime  = 10 * time.Second // of a call whose ctx has no deadline
	keptConns = 16               // idle connections
	idleTime  = 90 * time.Second
)

// ClientConfig is what a Client needs. All fields must be set.
type ClientConfig struct {
	Addresses []string    // host:port of the assign door of each of the peer's nodes; the first is tried first
	TLS       *tls.Config // with our certificate; must accept the peer's KME alone
	// Still is asked before each message whether the certificate that the peer has shown is
	// still let in: it may have been revoked since.
	Still func(leaf *x509.Certificate) error
	Log   *slog.Logger
}

// Client says messages to one peer over kept connections. It may be used by
// several goroutines at once.
//
// It speaks to one of the peer's nodes as long as that answers. If none of a message
// has left, another node is tried within the call; after an unknown outcome, or when
// a node declines an announce, the next call goes to another one.
//
// Every method says its message at most once. Its error is one of three: one that
// wraps ErrNotSent (not one byte of the message has left), one that wraps
// *Refused (the peer did not act on this copy and will not), or another: the
// outcome is unknown, and only the same message said again can tell. net/http
// would repeat a request by itself in some cases; here it is kept from doing so.
// A kept connection that turns out dead before a byte left is replaced within the
// call. The deadline is ctx's, 10 s if it has none.
type Client struct {
	addresses []string
	at        atomic.Int64 // the address in use is this one, counted round and round
	transport *http.Transport
	still     func(leaf *x509.Certificate) error
	log       *slog.Logger
}

// NewClient returns a Client; it dials at the first message.
func NewClient(c ClientConfig) (*Client, error) {
	for _, address := range c.Addresses {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, fmt.Errorf("peer address: %w", err)
		}
	}
	if len(c.Addresses) == 0 || c.TLS == nil || c.Still == nil || c.Log == nil {
		return nil, errors.New("peer client: an address, TLS, Still and Log must be set")
	}
	return &Client{
		addresses: slices.Clone(c.Addresses),
		still:     c.Still,
		log:       c.Log,
		transport: &http.Transport{
			// HTTP/1.1 on purpose: one request at a time has a connection to
			// itself, which is how the conn knows what of it has left.
			DialTLSContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				return dialTLS(ctx, address, c.TLS, "http/1.1")
			},
			MaxIdleConns:        keptConns,
			MaxIdleConnsPerHost: keptConns,
			IdleConnTimeout:     idleTime,
			DisableCompression:  true,
		},
	}, nil
}

// Close gives up the kept connections. Calls under way end on their own.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Hello says who we are and returns what the peer says of itself.
func (c *Client) Hello(ctx context.Context, h handover.Hello) (handover.Hello, error) {
	return call[handover.Hello](ctx, c, pathHello, h, maxBody)
}

// Held says that we hold a block.
func (c *Client) Held(ctx context.Context, h handover.Held) (handover.HeldAnswer, error) {
	a, err := call[heldAnswer](ctx, c, pathHeld, h, maxBody)
	return a.Answer, err
}

// Announce asks for the assignment of a batch. After an unknown outcome the same
// batch is to be said again, unchanged: the peer answers the same.
func (c *Client) Announce(ctx context.Context, a handover.Announce) (handover.AnnounceAnswer, error) {
	at := c.at.Load()
	answer, err := call[handover.AnnounceAnswer](ctx, c, pathAnnounce, a, maxBody)
	if err == nil && answer.Standing == handover.Declined {
		c.leave(at) // its HSM may be away, and another node's not
	}
	return answer, err
}

// Void takes assigned keys back. It may be said any number of times.
func (c *Client) Void(ctx context.Context, v handover.Void) error {
	_, err := call[done](ctx, c, pathVoid, v, maxBody)
	return err
}

// Burned says that nothing is left here of what was shared with the peer. It may be
// said any number of times.
func (c *Client) Burned(ctx context.Context, b handover.Burned) (handover.BurnedAnswer, error) {
	return call[handover.BurnedAnswer](ctx, c, pathBurned, b, maxBody)
}

// Checkpoint has the peer witness a checkpoint of our audit log. It may be said any
// number of times.
func (c *Client) Checkpoint(ctx context.Context, s audit.Submission) (audit.Cosigned, error) {
	return call[audit.Cosigned](ctx, c, pathCheckpoint, s, maxBody)
}

// Witnessed asks what the peer has last seen of our audit logs. A peer of an earlier
// release refuses it.
func (c *Client) Witnessed(ctx context.Context) (audit.Witnessed, error) {
	return call[audit.Witnessed](ctx, c, pathWitnessed, done{}, maxBody)
}

// Compromise has the peer burn keys that somebody may know. It may be said any number
// of times.
func (c *Client) Compromise(ctx context.Context, m handover.Compromise) error {
	_, err := call[done](ctx, c, pathCompromise, m, maxBody)
	return err
}

// Sample has the peer burn an atom that we own and have burned, and say what its bytes
// were. Said again it is answered that the atom is lacking.
func (c *Client) Sample(ctx context.Context, s handover.Sample) (handover.SampleAnswer, error) {
	return call[handover.SampleAnswer](ctx, c, pathSample, s, maxBody)
}

// Grant gives chunks to the peer. It may be said any number of times.
func (c *Client) Grant(ctx context.Context, g handover.Grant) (handover.GrantAnswer, error) {
	return call[handover.GrantAnswer](ctx, c, pathGrant, g, maxBody)
}

// Run says that a node has a new run and returns the next keys that the peer has
// assigned for its lower ones. It may be said any number of times.
func (c *Client) Run(ctx context.Context, r handover.RunStarted) (handover.RunAnswer, error) {
	return call[handover.RunAnswer](ctx, c, pathRun, r, maxBody)
}

// call says one message and reads its answer.
func call[A, Q message](ctx context.Context, c *Client, path string, q Q, limit int64) (A, error) {
	var none A
	body, err := format(q)
	if err != nil {
		return none, fmt.Errorf("%s: %w: %w", path, ErrNotSent, err)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTime)
		defer cancel()
	}
	text, err := c.post(ctx, path, body, limit)
	if err != nil {
		return none, fmt.Errorf("%s: %w", path, err)
	}
	answer, err := parse[A](text)
	if err != nil {
		return none, fmt.Errorf("%s: answer of the peer: %w", path, err)
	}
	return answer, nil
}

// leave has the next call go to the address after at, unless another has seen to that.
func (c *Client) leave(at int64) { c.at.CompareAndSwap(at, at+1) }

// post sends body once, to one of the peer's nodes, and returns the body of a 200.
func (c *Client) post(ctx context.Context, path string, body []byte, limit int64) ([]byte, error) {
	var errs []error
	for left := len(c.addresses); left > 0 && (errs == nil || ctx.Err() == nil); left-- {
		at := c.at.Load()
		text, err := c.postTo(ctx, c.addresses[at%int64(len(c.addresses))], left, path, body, limit)
		if _, refused := errors.AsType[*Refused](err); err == nil || refused {
			return text, err
		}
		c.leave(at)
		if !errors.Is(err, ErrNotSent) {
			return nil, err
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// postTo sends body once to one node. While there is no connection, it leaves time
// for the others: there are left to be tried, this one included.
func (c *Client) postTo(ctx context.Context, address string, left int, path string, body []byte, limit int64) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	connected := func() {}
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		t := time.AfterFunc(time.Until(deadline)/time.Duration(left), cancel)
		connected = func() { t.Stop() }
		defer connected()
	}
	for tries := 0; ; tries++ {
		res, stale, err := c.send(ctx, "https://"+address+path, body, connected)
		if err == nil {
			return finish(res, limit)
		}
		if !stale || tries > keptConns || ctx.Err() != nil {
			c.transport.CloseIdleConnections() // the others are likely to be as dead
			return nil, err
		}
		c.log.DebugContext(ctx, "kept connection to the peer was dead", "path", path, "err", err)
	}
}

// send makes one attempt. stale says that it failed on a kept connection before
// one byte left, so that another connection may be tried. connected is called when
// there is a connection.
func (c *Client) send(ctx context.Context, url string, body []byte, connected func()) (res *http.Response, stale bool, err error) {
	var on *conn
	var kept bool
	var lapsed error
	trace := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		connected()
		on, kept = info.Conn.(*conn), info.Reused
		on.begin()
		if lapsed = c.still(on.leaf()); lapsed != nil {
			_ = on.Close() // before a byte has left
		}
	}})
	req, err := http.NewRequestWithContext(trace, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", ErrNotSent, err)
	}
	req.GetBody = nil // without it the transport cannot repeat the request
	req.Header.Set("Content-Type", "application/json")
	res, err = c.transport.RoundTrip(req)
	switch {
	case err == nil:
		return res, false, nil
	case lapsed != nil:
		return nil, kept, fmt.Errorf("%w: %w", ErrNotSent, lapsed)
	case on == nil || on.cutOff():
		return nil, kept, fmt.Errorf("%w: %w", ErrNotSent, err)
	case !kept && turnedAway(err):
		return nil, false, &Refused{Message: err.Error()}
	}
	return nil, false, fmt.Errorf("outcome unknown: %w", err)
}

// finish reads the answer whole.
func finish(res *http.Response, limit int64) ([]byte, error) {
	defer func() { _ = res.Body.Close() }()
	refused := res.StatusCode >= 400 && res.StatusCode < 500
	if refused {
		limit = maxFailure
	}
	text, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	switch {
	case refused:
		r := &Refused{Status: res.StatusCode}
		var f failure
		if json.Unmarshal(text, &f) == nil {
			r.Kind, r.Message = f.Kind, f.Message
		}
		return nil, r
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("outcome unknown: the peer answered %d", res.StatusCode)
	case err != nil:
		return nil, fmt.Errorf("outcome unknown: reading the answer: %w", err)
	case int64(len(text)) > limit:
		return nil, fmt.Errorf("outcome unknown: answer of more than %d bytes", limit)
	}
	return text, nil
}

// maxFailure is how much of a refusal's body is read, in bytes.
const maxFailure = 4 << 10

// certificateAlerts are the TLS alerts with which a server turns a client's
// certificate away. In TLS 1.3 they arrive after our handshake is done, when the
// request may have left already; the server has not read it and will not.
var certificateAlerts = map[string]bool{
	"tls: bad certificate":               true,
	"tls: unsupported certificate":       true,
	"tls: revoked certificate":           true,
	"tls: expired certificate":           true,
	"tls: unknown certificate":           true,
	"tls: unknown certificate authority": true,
	"tls: access denied":                 true,
	"tls: certificate required":          true,
}

// turnedAway says whether err, on a connection's first request, is the server's
// refusal of our certificate. crypto/tls does not export the type of a received
// alert, only its text.
func turnedAway(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error" && certificateAlerts[op.Err.Error()]
}
