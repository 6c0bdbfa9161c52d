package etsi014

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
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/nodes"
	"github.com/qutemail/kme/internal/saedoor"
)

// maxAnswer is the most that a Client reads of an answer, in bytes. 128 keys of
// 4096 bits take about 100 KiB.
const maxAnswer = 16 << 20

// Client calls the API of one KME for one SAE, which the certificate of its HTTP
// client names. It repeats nothing: a request whose answer was lost may have
// taken its keys. (net/http itself repeats a GET on a kept connection that breaks;
// the methods that POST are not concerned.)
type Client struct{ nodes *nodes.Client }

// NewClient returns a Client of the KME at base, such as https://kme.example:8443.
// more are its other nodes: each is tried when none before it can be connected to, in
// which case nothing was asked for yet. hc presents the SAE's certificate and trusts
// the KME's CA.
func NewClient(base string, hc *http.Client, more ...string) *Client {
	return &Client{nodes.New(hc, base, more...)}
}

// APIError is an answer other than 200.
type APIError struct {
	Status     int    // HTTP status
	Message    string // of the Error object (clause 6.5); "" if the answer held none
	Details    []map[string]jsontext.Value
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

// Status is Get status (clause 5.2). The error of this and every other method is,
// or wraps, an *APIError if the KME answered other than 200.
func (c *Client) Status(ctx context.Context, slave identity.SAE) (Status, error) {
	body, err := c.call(ctx, http.MethodGet, path(slave, "status", nil), nil)
	if err != nil {
		return Status{}, fmt.Errorf("getting the status: %w", err)
	}
	var s Status
	if err := json.Unmarshal(body, &s); err != nil {
		return Status{}, fmt.Errorf("reading the status: %w", err)
	}
	return s, nil
}

// EncKeys is Get key (clause 5.3) by POST. The caller owns the keys and wipes them.
func (c *Client) EncKeys(ctx context.Context, slave identity.SAE, r KeyRequest) (Container, error) {
	return c.keys(ctx, http.MethodPost, path(slave, "enc_keys", nil), keyRequestBody(r))
}

// EncKeysGET is Get key by GET. A number or size of 0 is left out; r may not ask
// for more than those.
func (c *Client) EncKeysGET(ctx context.Context, slave identity.SAE, r KeyRequest) (Container, error) {
	if len(r.AdditionalSlaves) > 0 || r.Provenance != "" {
		return Container{}, errors.New("getting keys: additional slaves and extensions need a POST")
	}
	q := url.Values{}
	if r.Number != 0 {
		q.Set("number", strconv.Itoa(r.Number))
	}
	if r.Bits != 0 {
		q.Set("size", strconv.Itoa(r.Bits))
	}
	return c.keys(ctx, http.MethodGet, path(slave, "enc_keys", q), nil)
}

// DecKeys is Get key with key IDs (clause 5.4) by POST. The keys come in the order
// of ids. The caller owns them and wipes them.
func (c *Client) DecKeys(ctx context.Context, master identity.SAE, ids []key.ID) (Container, error) {
	got, err := c.keys(ctx, http.MethodPost, path(master, "dec_keys", nil), keyIDsBody(ids))
	if err != nil {
		return Container{}, err
	}
	return named(got, ids)
}

// DecKeysGET is Get key with key IDs by GET, which asks for one key.
func (c *Client) DecKeysGET(ctx context.Context, master identity.SAE, id key.ID) (Container, error) {
	got, err := c.keys(ctx, http.MethodGet, path(master, "dec_keys", url.Values{"key_ID": {id.String()}}), nil)
	if err != nil {
		return Container{}, err
	}
	return named(got, []key.ID{id})
}

// named returns got if it holds exactly the keys that were asked for, and wipes it
// if not.
func named(got Container, ids []key.ID) (Container, error) {
	same := len(got.Keys) == len(ids)
	for i := 0; same && i < len(ids); i++ {
		same = got.Keys[i].ID == ids[i]
	}
	if !same {
		got.Wipe()
		return Container{}, errors.New("getting keys: the KME answered with other keys than were asked for")
	}
	return got, nil
}

func path(sae identity.SAE, method string, q url.Values) string {
	p := "/api/v1/keys/" + url.PathEscape(sae.String()) + "/" + method
	if len(q) > 0 {
		p += "?" + q.Encode()
	}
	return p
}

// keyRequestBody is the body of a POST of Get key. Nothing in it cannot be marshalled.
func keyRequestBody(r KeyRequest) []byte {
	var o keyRequestObject
	if r.Number != 0 {
		o.Number = &r.Number
	}
	if r.Bits != 0 {
		o.Size = &r.Bits
	}
	for _, sae := range r.AdditionalSlaves {
		id := sae.String()
		o.Additional = append(o.Additional, &id)
	}
	if r.Provenance != "" {
		value, _ := jsontext.AppendQuote(nil, string(r.Provenance)) // what cannot be quoted is no provenance
		o.Mandatory = append(o.Mandatory, map[string]jsontext.Value{provenanceName: value})
	}
	if r.TTL != 0 {
		value := jsontext.Value(strconv.FormatInt(int64(r.TTL/time.Second), 10))
		o.Mandatory = append(o.Mandatory, map[string]jsontext.Value{ttlName: value})
	}
	body, _ := json.Marshal(o)
	return body
}

// keyIDsBody is the body of a POST of Get key with key IDs.
func keyIDsBody(ids []key.ID) []byte {
	o := keyIDsObject{KeyIDs: make([]keyIDObject, len(ids))}
	for i, id := range ids {
		s := id.String()
		o.KeyIDs[i].KeyID = &s
	}
	body, _ := json.Marshal(o)
	return body
}

func (c *Client) keys(ctx context.Context, method, path string, body []byte) (Container, error) {
	got, err := c.call(ctx, method, path, body)
	if err != nil {
		return Container{}, fmt.Errorf("getting keys: %w", err)
	}
	defer clear(got)
	container, err := parseContainer(got)
	if err != nil {
		return Container{}, fmt.Errorf("reading the keys: %w", err)
	}
	return container, nil
}

// parseContainer reads a Key container. Key bytes go straight into Materials.
func parseContainer(body []byte) (Container, error) {
	var o struct {
		Keys []struct {
			ID        key.ID         `json:"key_ID"`
			Key       []byte         `json:"key"` // base64, strictly
			Extension jsontext.Value `json:"key_extension"`
		} `json:"keys"`
	}
	err := json.Unmarshal(body, &o)
	var c Container
	for _, k := range o.Keys {
		if err == nil && (len(k.Key) == 0 || k.ID == key.ID{}) {
			err = errors.New("a key has no key_ID or no key")
		}
		var x struct {
			Provenance key.Provenance `json:"qkm_provenance"`
		}
		_ = json.Unmarshal(k.Extension, &x) // other KMEs put there what they like
		c.Keys = append(c.Keys, Key{ID: k.ID, Material: key.NewMaterial(k.Key), Provenance: x.Provenance})
	}
	if err == nil && len(c.Keys) == 0 {
		err = errors.New("the container is empty")
	}
	if err != nil {
		c.Wipe()
		return Container{}, err
	}
	return c, nil
}

// call returns the body of a 200, which the caller wipes.
func (c *Client) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	resp, err := c.nodes.Send(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or the connection is of no use
	got, err := readAnswer(resp)
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, apiError(resp, got)
	}
	return got, nil
}

// readAnswer reads a body. A buffer that it outgrows is wiped, so that no copy of
// key material is left behind.
func readAnswer(resp *http.Response) ([]byte, error) {
	buf := make([]byte, 0, 1+min(max(resp.ContentLength, 4095), maxAnswer))
	for {
		n, err := resp.Body.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case errors.Is(err, io.EOF):
			return buf, nil
		case err == nil && len(buf) > maxAnswer:
			err = fmt.Errorf("it is longer than %d bytes", maxAnswer)
			fallthrough
		case err != nil:
			clear(buf)
			return nil, err
		case len(buf) == cap(buf):
			grown := append(make([]byte, 0, 2*cap(buf)), buf...)
			clear(buf)
			buf = grown
		}
	}
}

func apiError(resp *http.Response, body []byte) error {
	e := &APIError{Status: resp.StatusCode, RequestID: resp.Header.Get(saedoor.RequestIDHeader)}
	var message struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &message) == nil {
		e.Message = message.Message
	}
	var details struct { // apart, since servers disagree on what they are made of
		Details []map[string]jsontext.Value `json:"details"`
	}
	if json.Unmarshal(body, &details) == nil {
		e.Details = details.Details
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		e.RetryAfter = time.Duration(s) * time.Second
	}
	return e
}
