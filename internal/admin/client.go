package admin

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/key"
)

// maxAnswer is the most that a Client reads of an answer, in bytes.
const maxAnswer = 4 << 20

// Client calls the operator API of one node for one operator, whom the certificate
// of its HTTP client names.
type Client struct {
	base string
	http *http.Client
}

// NewClient returns a Client of the node at base, such as https://kme.example:8446.
// hc presents the operator's certificate and trusts the KME's CA.
func NewClient(base string, hc *http.Client) *Client {
	return &Client{base: strings.TrimRight(base, "/"), http: hc}
}

// APIError is an answer other than 200.
type APIError struct {
	Status    int    // HTTP status
	Message   string // "" if the answer held none
	RequestID string // by which the cause is found in the node's log
}

// Error says what the node said.
func (e *APIError) Error() string {
	s := fmt.Sprintf("the KME answered %d", e.Status)
	if e.Message != "" {
		s += ": " + e.Message
	}
	if e.RequestID != "" {
		s += " (request " + e.RequestID + ")"
	}
	return s
}

// Node says how the node stands. The error of this and every other method is, or
// wraps, an *APIError if the node answered other than 200.
func (c *Client) Node(ctx context.Context) (Node, error) {
	var n Node
	err := c.get(ctx, "/api/v1/node", &n)
	return n, err
}

// Links says how the node's links stand.
func (c *Client) Links(ctx context.Context) ([]Link, error) {
	var o linksObject
	err := c.get(ctx, "/api/v1/links", &o)
	return o.Links, err
}

// Alarms lists the alarms that stand, oldest first.
func (c *Client) Alarms(ctx context.Context) ([]Alarm, error) {
	var o alarmsObject
	err := c.get(ctx, "/api/v1/alarms", &o)
	return o.Alarms, err
}

// Epochs says how the epochs of the node's site stand.
func (c *Client) Epochs(ctx context.Context) (Epochs, error) {
	var e Epochs
	err := c.get(ctx, "/api/v1/epochs", &e)
	return e, err
}

// TrustLink lets a link go on that rests because tags of its peer were wrong.
func (c *Client) TrustLink(ctx context.Context, link string) error {
	return c.post(ctx, pathTrust, trusted{link}, &trusted{})
}

// KeyStory tells what the node's site knows of a key.
func (c *Client) KeyStory(ctx context.Context, id key.ID) (KeyStory, error) {
	var s KeyStory
	err := c.get(ctx, "/api/v1/keys/"+id.String()+"/story", &s)
	return s, err
}

// Compromise has keys that somebody may know burned, here and at the other ends.
func (c *Client) Compromise(ctx context.Context, s Suspicion, given ...approval.Approval) (Compromised, error) {
	var done Compromised
	err := c.post(ctx, pathCompromise, suspicionObject{s, approved{given}}, &done)
	return done, err
}

// Cleanup ends what is overdue at the node's site, now, and says how many keys that
// were.
func (c *Client) Cleanup(ctx context.Context, given ...approval.Approval) (int, error) {
	var o cleanupObject
	err := c.post(ctx, pathCleanup, approved{given}, &o)
	return o.Removed, err
}

// Healthy is nil if the node's process does its work.
func (c *Client) Healthy(ctx context.Context) error { return c.probe(ctx, "/healthz") }

// Ready is nil if the node can hand out keys.
func (c *Client) Ready(ctx context.Context) error { return c.probe(ctx, "/readyz") }

func (c *Client) probe(ctx context.Context, path string) error {
	var o struct {
		Status string `json:"status"`
	}
	return c.get(ctx, path, &o)
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	if err := c.call(ctx, http.MethodGet, path, nil, into); err != nil {
		return fmt.Errorf("getting %s: %w", path, err)
	}
	return nil
}

func (c *Client) post(ctx context.Context, path string, object, into any) error {
	body, err := json.Marshal(object)
	if err == nil {
		err = c.call(ctx, http.MethodPost, path, body, into)
	}
	if err != nil {
		return fmt.Errorf("calling %s: %w", path, err)
	}
	return nil
}

func (c *Client) call(ctx context.Context, method, path string, body []byte, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or the connection is of no use
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return apiError(resp, answer)
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	return nil
}

// apiError is an answer other than 200.
func apiError(resp *http.Response, body []byte) *APIError {
	e := &APIError{Status: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id")}
	var o errorObject
	if json.Unmarshal(body, &o) == nil {
		e.Message = o.Message
	}
	return e
}
