package legacy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/nodes"
	"github.com/qutemail/kme/internal/saedoor"
)

// maxAnswer is the most that a Client reads of an answer, in bytes.
const maxAnswer = 64 << 10

// Client calls the routes of one KME for the SAE that the certificate of its HTTP
// client names. It repeats nothing by itself.
type Client struct{ nodes *nodes.Client }

// NewClient returns a Client of the KME at base, such as https://kme.example:8443.
// more are its other nodes: each is tried when none before it can be connected to, in
// which case nothing was asked for yet. hc presents the SAE's certificate and trusts
// the KME's CA.
func NewClient(base string, hc *http.Client, more ...string) *Client {
	return &Client{nodes.New(hc, base, more...)}
}

// APIError is an answer other than 200. The seed's clients tell 403, 404 and 410
// apart.
type APIError struct {
	Status     int           // HTTP status
	Message    string        // "" if the answer held none
	RetryAfter time.Duration // 0 if the answer named none
	RequestID  string        // by which the KME's operators find the cause; "" if the answer named none
}

// Error says what the KME said.
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

// Status asks how the KME is. The error of this and every other method is, or
// wraps, an *APIError if the KME answered other than 200; with a 503, the Service
// says what is wrong.
func (c *Client) Status(ctx context.Context) (Service, error) {
	body, err := c.call(ctx, http.MethodGet, "/api/v1/status", nil)
	var o serviceObject
	if err != nil {
		err = fmt.Errorf("getting the status: %w", err)
		_ = json.Unmarshal(body, &o) // of a 503, if it is one of ours
	} else if err = json.Unmarshal(body, &o); err != nil {
		err = fmt.Errorf("reading the status: %w", err)
	}
	return Service{
		Sessions: o.Orchestrator.Sessions, ErrorRate: o.Orchestrator.ErrorRate, Stored: o.Orchestrator.Stored,
		Database: o.Database, HSM: o.HSM,
	}, err
}

// RequestKey asks for a key of bits bits, for requester (who the certificate must
// name) and recipient, that lives for ttl in whole seconds. A size or lifetime of 0
// leaves it to the KME. The caller owns the key and wipes it.
func (c *Client) RequestKey(ctx context.Context, requester, recipient identity.SAE, bits int, ttl time.Duration) (Issued, error) {
	from, to := requester.String(), recipient.String()
	o := requestObject{Requester: &from, Recipient: &to}
	if bits != 0 {
		o.KeySize = &bits
	}
	if ttl != 0 {
		seconds := int(ttl / time.Second)
		o.TTL = &seconds
	}
	body, err := json.Marshal(o)
	if err != nil {
		return Issued{}, fmt.Errorf("writing the request: %w", err)
	}
	got, err := c.key(ctx, http.MethodPost, "/api/v1/keys/request", body)
	if err != nil {
		return Issued{}, fmt.Errorf("requesting a key: %w", err)
	}
	expires, err := time.Parse(timeForm, got.ExpiresAt)
	if err != nil {
		clear(got.Key)
		return Issued{}, fmt.Errorf("requesting a key: reading expires_at: %w", err)
	}
	return Issued{
		ID: got.id, Material: key.NewMaterial(got.Key), Bits: got.Size, Algorithm: got.Algorithm, Source: got.Source, ExpiresAt: expires,
	}, nil
}

// RetrieveKey reads the key that was made for requester, who the certificate must
// name. The caller owns the key and wipes it.
func (c *Client) RetrieveKey(ctx context.Context, requester identity.SAE, id key.ID) (Retrieved, error) {
	q := url.Values{"requester_sae": {requester.String()}}
	got, err := c.key(ctx, http.MethodGet, "/api/v1/keys/"+id.String()+bobEnd+"?"+q.Encode(), nil)
	if err != nil {
		return Retrieved{}, fmt.Errorf("retrieving a key: %w", err)
	}
	if got.id != id {
		clear(got.Key)
		return Retrieved{}, errors.New("retrieving a key: the KME answered with another")
	}
	return Retrieved{ID: id, Material: key.NewMaterial(got.Key), Bits: got.Size, Algorithm: got.Algorithm}, nil
}

// ConsumeKey has a key erased that was made for requester, who the certificate must
// name.
func (c *Client) ConsumeKey(ctx context.Context, requester identity.SAE, id key.ID) error {
	end, from := id.String()+bobEnd, requester.String()
	body, err := json.Marshal(consumeObject{&end, &from})
	if err != nil {
		return fmt.Errorf("writing the request: %w", err)
	}
	if _, err := c.call(ctx, http.MethodPost, "/api/v1/keys/consume", body); err != nil {
		return fmt.Errorf("consuming a key: %w", err)
	}
	return nil
}

// keyObject is a key in an answer.
type keyObject struct {
	Status    string `json:"status"`
	KeyID     string `json:"key_id"`
	Key       []byte `json:"key"` // base64, strictly
	Size      int    `json:"size"`
	Algorithm string `json:"algorithm"`
	ExpiresAt string `json:"expires_at"`
	Source    string `json:"source"`

	id key.ID
}

// key returns the key of an answer, whose bytes the caller owns.
func (c *Client) key(ctx context.Context, method, path string, body []byte) (keyObject, error) {
	got, err := c.call(ctx, method, path, body)
	defer clear(got)
	if err != nil {
		return keyObject{}, err
	}
	return parseKey(got)
}

func parseKey(body []byte) (keyObject, error) {
	var o keyObject
	err := json.Unmarshal(body, &o)
	if err == nil && (o.Status != "success" || len(o.Key) == 0 || 8*len(o.Key) != o.Size) {
		err = errors.New("the answer holds no key of the size it says")
	}
	if err == nil {
		o.id, err = parseKeyID(o.KeyID)
	}
	if err != nil {
		clear(o.Key)
		return keyObject{}, fmt.Errorf("reading the key: %w", err)
	}
	return o, nil
}

// call returns the body of an answer, which the caller wipes, with an *APIError if
// it is not a 200.
func (c *Client) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	resp, err := c.nodes.Send(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or the connection is of no use
	buf := make([]byte, maxAnswer+1)         // one buffer: no outgrown copy of a key is left behind
	n, err := io.ReadFull(resp.Body, buf)
	switch {
	case err == nil:
		clear(buf)
		return nil, fmt.Errorf("reading the answer: it is longer than %d bytes", maxAnswer)
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) || resp.ContentLength > int64(n):
		clear(buf)
		return nil, fmt.Errorf("reading the answer: %w", err)
	case resp.StatusCode != http.StatusOK:
		return buf[:n], apiError(resp, buf[:n])
	}
	return buf[:n], nil
}

func apiError(resp *http.Response, body []byte) error {
	e := &APIError{Status: resp.StatusCode, RequestID: resp.Header.Get(saedoor.RequestIDHeader)}
	var o errorObject
	if json.Unmarshal(body, &o) == nil {
		e.Message = o.Error
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		e.RetryAfter = time.Duration(s) * time.Second
	}
	return e
}
