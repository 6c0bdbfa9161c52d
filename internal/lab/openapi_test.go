package lab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// described holds what passes between clients and the SAE door against the
// description that the door gives of itself: each answer must be among those that are
// described for its route, and of their form; and what was answered 200 must have been
// of the form described for requests.
type described struct {
	t      *testing.T
	schema *jsonschema.Compiler
	routes []*describedRoute

	mu   sync.Mutex
	seen map[string]bool // "operationId status"
}

type describedRoute struct {
	method  string
	path    *regexp.Regexp
	fixed   int    // characters of the path that are not a parameter's: the closest route wins
	pointer string // of the operation
	op      operation
}

type operation struct {
	ID        string            `json:"operationId"`
	Body      *media            `json:"requestBody"`
	Responses map[string]*media `json:"responses"`
}

type media struct {
	Ref     string `json:"$ref"`
	Content map[string]struct {
		Schema json.RawMessage `json:"schema"`
	} `json:"content"`
}

const openapi = "../etsi014/openapi.json"

func describe(t *testing.T) *described {
	t.Helper()
	text, err := os.ReadFile(openapi)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	d := &described{t: t, schema: jsonschema.NewCompiler(), seen: make(map[string]bool)}
	if err := d.schema.AddResource("openapi.json", whole); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths map[string]map[string]operation `json:"paths"`
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	parameter := regexp.MustCompile(`\\\{[a-z_]+\\\}`)
	for path, methods := range doc.Paths {
		pattern := parameter.ReplaceAllString(regexp.QuoteMeta(path), "[^/]+")
		escaped := strings.NewReplacer("~", "~0", "/", "~1", "{", "%7B", "}", "%7D").Replace(path)
		for method, op := range methods {
			d.routes = append(d.routes, &describedRoute{
				method: strings.ToUpper(method), path: regexp.MustCompile("^" + pattern + "$"), fixed: strings.Count(path, "{")*-1000 + len(path),
				pointer: "/paths/" + escaped + "/" + method, op: op,
			})
		}
	}
	slices.SortFunc(d.routes, func(a, b *describedRoute) int { return b.fixed - a.fixed })
	return d
}

// on is next with every exchange judged.
func (d *described) on(next http.RoundTripper) http.RoundTripper {
	return roundTrip(func(r *http.Request) (*http.Response, error) {
		var sent []byte
		if r.Body != nil {
			var err error
			if sent, err = io.ReadAll(r.Body); err != nil {
				return nil, err
			}
			r.Body = io.NopCloser(bytes.NewReader(sent))
		}
		res, err := next.RoundTrip(r)
		if err != nil {
			return nil, err
		}
		got, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil {
			return nil, err
		}
		res.Body = io.NopCloser(bytes.NewReader(got))
		if err := d.judge(r, sent, res.StatusCode, got); err != nil {
			d.t.Errorf("%s %s, answered %d: %v\nsent %.300s", r.Method, r.URL, res.StatusCode, err, sent)
		}
		return res, nil
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (d *described) judge(r *http.Request, sent []byte, status int, got []byte) error {
	for _, x := range d.routes {
		if x.method != r.Method || !x.path.MatchString(r.URL.EscapedPath()) {
			continue
		}
		code := fmt.Sprint(status)
		answer := x.op.Responses[code]
		if answer == nil {
			if status == http.StatusNotFound || status == http.StatusMethodNotAllowed {
				continue // no key ID: another route's, or nobody's
			}
			return fmt.Errorf("%s does not list it", x.op.ID)
		}
		d.mu.Lock()
		d.seen[x.op.ID+" "+code] = true
		d.mu.Unlock()
		at := x.pointer + "/responses/" + code
		if answer.Ref != "" {
			at = strings.TrimPrefix(answer.Ref, "#")
		}
		if err := d.valid(at+"/content/application~1json/schema", got); err != nil {
			return fmt.Errorf("the answer: %w", err)
		}
		if status == http.StatusOK && x.op.Body != nil && len(bytes.TrimSpace(sent)) > 0 {
			if err := d.valid(x.pointer+"/requestBody/content/application~1json/schema", sent); err != nil {
				return fmt.Errorf("the request: %w", err)
			}
		}
		return nil
	}
	if status == http.StatusOK {
		return fmt.Errorf("nothing describes it")
	}
	return nil
}

func (d *described) valid(pointer string, text []byte) error {
	d.mu.Lock()
	schema, err := d.schema.Compile("openapi.json#" + pointer)
	d.mu.Unlock()
	if err != nil {
		return err
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

// whole is nil if every answer that is described was seen, but for those that take
// trouble to get.
func (d *described) whole() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	missing := make(map[string]bool)
	for _, x := range d.routes {
		for code := range x.op.Responses {
			if key := x.op.ID + " " + code; code != "500" && code != "503" && !d.seen[key] {
				missing[key] = true
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("described, and never seen: %v", slices.Sorted(maps.Keys(missing)))
	}
	return nil
}
