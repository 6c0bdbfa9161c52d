package vector

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json"
)

// Place is where vectors are run.
type Place struct {
	// Names is what ${KM1} and ${KM2} stand for.
	Names map[string]string
	// Client returns the base URL of a KME, "KM1" or "KM2", and an HTTP client that
	// presents the certificate of an SAE. "stranger" has a certificate of the SAEs'
	// CA that no rule names.
	Client func(kme, sae string) (base string, hc *http.Client, err error)
}

// Run makes the exchanges of f in order. The error says what differs first.
func (f File) Run(ctx context.Context, p Place) error {
	known := found{}
	for name, id := range p.Names {
		known[name] = id
	}
	for _, s := range f.Steps {
		if err := p.run(ctx, s, known); err != nil {
			return fmt.Errorf("%s.txt:%d: %s %s: %w", f.Name, s.Line, s.Method, s.Target, err)
		}
	}
	return nil
}

func (p Place) run(ctx context.Context, s Step, known found) error {
	before, err := p.stored(ctx, s)
	if err != nil {
		return err
	}
	resp, body, err := p.do(ctx, s, known)
	if err != nil {
		return err
	}
	if resp.StatusCode != s.Status {
		return fmt.Errorf("got status %d, want %d: %.200s", resp.StatusCode, s.Status, shown(resp, body))
	}
	if err := always(s, resp, body); err != nil {
		return err
	}
	for name, want := range s.AnswerHeader {
		if err := known.matchHeader(name, want, resp.Header); err != nil {
			return err
		}
	}
	if s.Answer != "" {
		if err := known.matchJSON(s.Answer, body); err != nil {
			return fmt.Errorf("%w in %.200s", err, shown(resp, body))
		}
	}
	after, err := p.stored(ctx, s)
	if err != nil {
		return err
	}
	if s.Stored != nil && after-before != *s.Stored {
		return fmt.Errorf("stored_key_count went from %d to %d, want a change of %d", before, after, *s.Stored)
	}
	return nil
}

// shown is what an error message may show of a body: not of one that holds keys.
func shown(resp *http.Response, body []byte) []byte {
	if resp.StatusCode == http.StatusOK {
		return []byte("the answer")
	}
	return body
}

// do makes a request exactly as the vector spells it.
func (p Place) do(ctx context.Context, s Step, known found) (*http.Response, []byte, error) {
	base, hc, err := p.Client(s.KME, s.Caller)
	if err != nil {
		return nil, nil, err
	}
	target, err := known.expand(s.Target)
	if err != nil {
		return nil, nil, err
	}
	text, err := known.expand(string(s.Body))
	if err != nil {
		return nil, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, s.Method, base+target, strings.NewReader(text))
	if err != nil {
		return nil, nil, err
	}
	req.Header = s.Header.Clone()
	direct := *hc
	direct.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := direct.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }() // it is read to its end
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

// always checks what holds for every answer: rows 014-4-04, 014-5.1-07 and 014-X-14.
func always(s Step, resp *http.Response, body []byte) error {
	h := resp.Header
	switch {
	case h.Get("Content-Type") != "application/json":
		return fmt.Errorf("the content type is %q", h.Get("Content-Type"))
	case h.Get("Cache-Control") != "no-store":
		return fmt.Errorf("the cache control is %q", h.Get("Cache-Control"))
	case h.Get("Content-Encoding") != "" || resp.Uncompressed:
		return fmt.Errorf("the answer is compressed")
	case !uuidForm.MatchString(h.Get("X-Request-Id")):
		return fmt.Errorf("the request ID is %q", h.Get("X-Request-Id"))
	case s.Method == http.MethodHead:
		return nil
	}
	var object map[string]any
	if err := json.Unmarshal(body, &object); err != nil {
		return fmt.Errorf("the body is no JSON object: %w", err)
	}
	if !bytes.HasPrefix(body, []byte("{")) {
		return fmt.Errorf("the body does not begin with its object")
	}
	return nil
}

func (f found) matchHeader(name, want string, h http.Header) error {
	want, err := f.expand(want)
	if err != nil {
		return err
	}
	got := h.Get(name)
	switch {
	case want == "$absent" && got == "":
		return nil
	case want == "$int" && got != "" && strings.Trim(got, "0123456789") == "":
		return nil
	}
	return f.match("header "+name, want, got)
}

// stored asks for the stored_key_count of alice for bob, if s cares.
func (p Place) stored(ctx context.Context, s Step) (int, error) {
	if s.Stored == nil {
		return 0, nil
	}
	resp, body, err := p.do(ctx, Step{KME: "KM1", Caller: "alice", Method: http.MethodGet, Target: "/api/v1/keys/bob/status"}, found{})
	if err != nil {
		return 0, err
	}
	var status struct {
		Stored int `json:"stored_key_count"`
	}
	if err := json.Unmarshal(body, &status); err != nil || resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("asking for stored_key_count: status %d (%w)", resp.StatusCode, err)
	}
	return status.Stored, nil
}
