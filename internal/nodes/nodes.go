// Package nodes speaks to a KME of several nodes: to the first of them that can be
// connected to. It says a request once: what may have been heard by one node is not
// said to another, since it may have taken keys.
package nodes

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
)

// Client speaks to the nodes of one KME, as whoever the certificate of its HTTP client
// names.
type Client struct {
	bases []string
	http  *http.Client
}

// New returns a Client of the KME at base, such as https://kme.example:8443, and more,
// which are its other nodes in the order in which they are tried.
func New(hc *http.Client, base string, more ...string) *Client {
	c := &Client{http: hc}
	for _, b := range append([]string{base}, more...) {
		c.bases = append(c.bases, strings.TrimRight(b, "/"))
	}
	return c
}

// Send says a request with a JSON body, or with none if body is nil. The caller closes
// the answer's body.
func (c *Client) Send(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	var errs []error
	for _, base := range c.bases {
		req, err := http.NewRequestWithContext(ctx, method, base+path, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		if body != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		resp, err := c.http.Do(req)
		if err == nil {
			return resp, nil
		}
		errs = append(errs, err)
		if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "dial" || ctx.Err() != nil {
			break // it may have been heard
		}
	}
	return nil, errors.Join(errs...)
}
