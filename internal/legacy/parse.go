package legacy

import (
	"bytes"
	"errors"
	"fmt"
	"mime"
	"net/url"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// Limits is what the door holds requests to, and what it fills in.
type Limits struct {
	KeySize int           // bits; of a request without key_size
	MinSize int           // bits
	MaxSize int           // bits
	TTL     time.Duration // of a request without ttl
	MaxTTL  time.Duration
}

// Everything in this file is a pure function of what came in. Each error is a
// *problem.Error whose Detail is fit for the caller.

// requestObject is the body of POST /api/v1/keys/request. A pointer tells what is
// absent or null, which we take as the same, from a zero.
type requestObject struct {
	Requester *string `json:"requester_sae"`
	Recipient *string `json:"recipient_sae"`
	KeySize   *int    `json:"key_size,omitzero"` // bits
	TTL       *int    `json:"ttl,omitzero"`      // seconds
}

// keyRequest is what a request for a key asks for, with every default filled in.
type keyRequest struct {
	recipient identity.SAE
	bits      int
	ttl       time.Duration
}

// consumeObject is the body of POST /api/v1/keys/consume.
type consumeObject struct {
	KeyID     *string `json:"key_id"`
	Requester *string `json:"requester_sae"`
}

// parseConsume reads the body of a request to consume a key. speak is told who makes
// the request by its own word, before anything else of it is looked at.
func parseConsume(contentType string, body []byte, speak speaker) (key.ID, error) {
	var o consumeObject
	if err := decode(contentType, body, &o); err != nil {
		return key.ID{}, err
	}
	if o.KeyID == nil || *o.KeyID == "" || o.Requester == nil || *o.Requester == "" {
		return key.ID{}, problem.New(problem.Invalid, "key_id and requester_sae are required")
	}
	if err := speak(*o.Requester); err != nil {
		return key.ID{}, err
	}
	return parseKeyID(*o.KeyID)
}

// parseRequest reads the body of a request for a key, as parseConsume does.
func parseRequest(contentType string, body []byte, speak speaker, l Limits) (keyRequest, error) {
	var o requestObject
	if err := decode(contentType, body, &o); err != nil {
		return keyRequest{}, err
	}
	if o.Requester == nil || *o.Requester == "" || o.Recipient == nil || *o.Recipient == "" {
		return keyRequest{}, problem.New(problem.Invalid, "requester_sae and recipient_sae are required")
	}
	if err := speak(*o.Requester); err != nil {
		return keyRequest{}, err
	}
	recipient, err := identity.ParseSAE(*o.Recipient)
	if err != nil {
		return keyRequest{}, invalid(err, "recipient_sae is not an SAE ID")
	}
	r := keyRequest{recipient: recipient, bits: l.KeySize, ttl: l.TTL}
	if o.KeySize != nil {
		r.bits = *o.KeySize
	}
	if r.bits%8 != 0 || r.bits < l.MinSize || r.bits > l.MaxSize {
		return keyRequest{}, problem.New(problem.Invalid, "key_size must be a multiple of 8 from %d to %d bits", l.MinSize, l.MaxSize)
	}
	if o.TTL != nil {
		if *o.TTL < 1 || *o.TTL > int(l.MaxTTL/time.Second) {
			return keyRequest{}, problem.New(problem.Invalid, "ttl must be 1 to %d seconds", l.MaxTTL/time.Second)
		}
		r.ttl = time.Duration(*o.TTL) * time.Second
	}
	return r, nil
}

// parseRetrieve reads the path and the query of GET /api/v1/keys/{key_id}, as
// parseConsume does.
func parseRetrieve(keyID, query string, speak speaker) (key.ID, error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return key.ID{}, invalid(err, "the query is malformed")
	}
	if v := values["requester_sae"]; len(v) != 1 || v[0] == "" {
		return key.ID{}, problem.New(problem.Invalid, "requester_sae is required, once")
	}
	if err := speak(values.Get("requester_sae")); err != nil {
		return key.ID{}, err
	}
	return parseKeyID(keyID)
}

// The ends of key IDs. A key's two ends had two IDs in the seed; here they are two
// names of one key.
const (
	aliceEnd = "-alice"
	bobEnd   = "-bob"
)

// parseKeyID reads <uuid>-alice, <uuid>-bob, or the plain UUID under which 014
// knows the key. A recipient may present any of them.
func parseKeyID(s string) (key.ID, error) {
	plain, found := strings.CutSuffix(s, bobEnd)
	if !found {
		plain = strings.TrimSuffix(s, aliceEnd)
	}
	id, err := key.ParseID(plain)
	if err != nil {
		return key.ID{}, problem.Because(problem.NotFound, err)
	}
	return id, nil
}

// speaker holds what a request says of its maker to what the certificate says: nil,
// or the refusal.
type speaker func(said string) error

// notTheirs refuses a request that is made in the name of somebody else.
func notTheirs(said, why string) error {
	return &problem.Error{Kind: problem.Forbidden, Detail: why, Err: fmt.Errorf("requester_sae %.100q", said)}
}

// decode reads one JSON object into what into points at: exact member names, none
// twice, valid UTF-8, nothing after it. Unknown members are ignored.
func decode(contentType string, body []byte, into any) error {
	if media, _, err := mime.ParseMediaType(contentType); media != "application/json" {
		return invalid(err, "the content type must be application/json")
	}
	if trimmed := bytes.TrimLeft(body, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '{' {
		return problem.New(problem.Invalid, "the body must be a JSON object")
	}
	err := json.Unmarshal(body, into)
	var semantic *json.SemanticError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &semantic):
		return invalid(err, "%s in the body is of the wrong type or out of range", semantic.JSONPointer)
	}
	return invalid(err, "the body is not well-formed JSON")
}

// invalid says detail to the caller and err to the operator.
func invalid(err error, detail string, args ...any) error {
	p := problem.New(problem.Invalid, detail, args...)
	p.Err = err
	return p
}
