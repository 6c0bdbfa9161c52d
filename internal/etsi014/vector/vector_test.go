package vector

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	t.Parallel()
	text := `# What and why.

> KM1 alice POST /api/v1/keys/bob/enc_keys?a=b
Content-Type: application/json
X: 1
X: 2
@pad 4

{}

< 200 stored -2
Cache-Control: no-store

{"keys": "$keys 2 32"}

# On.
> KM2 bob POST /x
@quoted

"\xff\n"

< 400
`
	minus2 := -2
	want := File{Name: "a", Steps: []Step{
		{
			Line: 3, KME: "KM1", Caller: "alice", Method: "POST", Target: "/api/v1/keys/bob/enc_keys?a=b",
			Header: http.Header{"Content-Type": {"application/json"}, "X": {"1", "2"}}, Body: []byte("{}  "),
			Status: 200, Stored: &minus2, AnswerHeader: map[string]string{"Cache-Control": "no-store"}, Answer: `{"keys": "$keys 2 32"}`,
		},
		{
			Line: 17, KME: "KM2", Caller: "bob", Method: "POST", Target: "/x", Header: http.Header{}, Body: []byte("\xff\n"),
			Status: 400, AnswerHeader: map[string]string{},
		},
	}}
	got, err := Parse("a", []byte(text))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Parse: %v (-want +got):\n%s", err, diff)
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"nothing":        "# only a comment\n",
		"no answer":      "> KM1 alice GET /\n",
		"no target":      "> KM1 alice GET\n\n< 200\n",
		"no status":      "> KM1 alice GET /\n\n<\n",
		"bad status":     "> KM1 alice GET /\n\n< OK\n",
		"bad stored":     "> KM1 alice GET /\n\n< 200 stored all\n",
		"bad words":      "> KM1 alice GET /\n\n< 200 or 400\n",
		"bad header":     "> KM1 alice GET /\nHost\n\n< 200\n",
		"bad header out": "> KM1 alice GET /\n\n< 200\nHost\n",
		"bad quotes":     "> KM1 alice GET /\n@quoted\n\n{}\n\n< 200\n",
		"stray text":     "> KM1 alice GET /\n\n< 200\n\n{}\n\nmore\n< 200\n",
	} {
		if f, err := Parse(name, []byte(text)); err == nil {
			t.Errorf("%s: got %+v, want an error", name, f)
		}
	}
	if _, err := Load(fstest.MapFS{"a.json": {}}); err == nil {
		t.Error("Load: an empty folder passes for vectors")
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	const id, key = "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11", "AAECAw=="
	one := `{"key_ID":"` + id + `","key":"` + key + `"}`
	tests := []struct {
		want, got string
		same      bool
	}{
		{`{}`, `{}`, true},
		{`{}`, `{"a":1}`, false},
		{`{"a":1}`, `{}`, false},
		{`{"a?":1}`, `{}`, true},
		{`{"a?":1}`, `{"a":2}`, false},
		{`{"a":null}`, `{"a":null}`, true},
		{`{"a":"$any"}`, `{"a":null}`, true},
		{`{"a":"$any"}`, `{}`, false},
		{`{"a":[1,2]}`, `{"a":[2,1]}`, false},
		{`{"a":[1,2]}`, `{"a":[1,2,3]}`, false},
		{`{"a":{}}`, `{"a":[]}`, false},
		{`{"a":"$string"}`, `{"a":""}`, false},
		{`{"a":"$int"}`, `{"a":2147483648}`, false},
		{`{"a":"$int"}`, `{"a":1.5}`, false},
		{`{"a":"$int"}`, `{"a":"1"}`, false},
		{`{"a":"$int"}`, `{"a":7}`, true},
		{`{"a":"$uuid"}`, `{"a":"` + id + `"}`, true},
		{`{"a":"$uuid"}`, `{"a":"` + strings.ToUpper(id) + `"}`, false},
		{`{"a":"$uuid -bob"}`, `{"a":"` + id + `-bob"}`, true},
		{`{"a":"$uuid -bob"}`, `{"a":"` + id + `"}`, false},
		{`{"a":"$uuid -bob"}`, `{"a":"` + id + `-bob-bob"}`, false},
		{`{"a":"$uuid -bob as k","b":"x-${known}"}`, `{"a":"` + id + `-bob","b":"x-Alice"}`, true},
		{`{"a":"$base64 4"}`, `{"a":"` + key + `"}`, true},
		{`{"a":"$base64 5"}`, `{"a":"` + key + `"}`, false},
		{`{"a":"$base64 4"}`, `{"a":"AAECAx=="}`, false}, // bits beyond the end
		{`{"a":"$base64 4"}`, `{"a":"AAEC\nAw=="}`, false},
		{`{"a":"$base64"}`, `{"a":""}`, false},
		{`{"a":"$time"}`, `{"a":"2025-12-08T12:00:00"}`, true},
		{`{"a":"$time"}`, `{"a":"2025-12-08T12:00:00Z"}`, false},
		{`{"a":"$nonsense"}`, `{"a":"b"}`, false},
		{`{"a":"$keys 1 4"}`, `{"a":[` + one + `]}`, true},
		{`{"a":"$keys 1 4"}`, `{"a":[` + strings.Replace(one, `key_ID`, `key_id`, 1) + `]}`, false},
		{`{"a":"$keys 1 4"}`, `{"a":[` + strings.Replace(one, `}`, `,"key_extension":null}`, 1) + `]}`, false},
		{`{"a":"$keys 2 4"}`, `{"a":[` + one + `]}`, false},
		{`{"a":"$keys 2 4"}`, `{"a":[` + one + `,` + one + `]}`, false},
		{`{"a":"$uuid as k","b":"x"}`, `{"a":"` + id + `","b":"x"}`, true},
		{`{"a":"${nobody}"}`, `{"a":""}`, false},
		{`{"a":"${known}"}`, `{"a":"Alice"}`, true},
		{`{"a":"${known:upper}"}`, `{"a":"ALICE"}`, true},
	}
	for _, test := range tests {
		f := found{"known": "Alice"}
		if err := f.matchJSON(test.want, []byte(test.got)); (err == nil) != test.same {
			t.Errorf("%s and %s: got %v, want same %v", test.want, test.got, err, test.same)
		}
	}
	f := found{}
	if err := f.matchJSON(`{"a":"$keys 1 4 as k","b":"$string as s","c":"$uuid -bob as u"}`, []byte(`{"a":[`+one+`],"b":"t","c":"`+id+`-bob"}`)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(found{"k.0": id, "k.0.key": key, "s": "t", "u": id + "-bob", "u.id": id}, f); diff != "" {
		t.Errorf("remembered (-want +got):\n%s", diff)
	}
}

// A driver that lets everything pass is worth nothing: each answer here has one fault.
func TestRunFindsFaults(t *testing.T) {
	t.Parallel()
	const good = `{"message":"no"}`
	tests := []struct {
		name   string
		change func(h http.Header)
		status int
		body   string
		err    string // that it contains; "" for none
	}{
		{"nothing", nil, 400, good, ""},
		{"status", nil, 401, good, "status 401"},
		{"type", func(h http.Header) { h.Set("Content-Type", "text/plain") }, 400, good, "content type"},
		{"cache", func(h http.Header) { h.Del("Cache-Control") }, 400, good, "cache control"},
		{"request", func(h http.Header) { h.Set("X-Request-Id", "1") }, 400, good, "request ID"},
		{"encoding", func(h http.Header) { h.Set("Content-Encoding", "br") }, 400, good, "compressed"},
		{"header", func(h http.Header) { h.Del("Allow") }, 400, good, "Allow"},
		{"unwanted header", func(h http.Header) { h.Set("Location", "/") }, 400, good, "Location"},
		{"integer header", func(h http.Header) { h.Set("Retry-After", "soon") }, 400, good, "Retry-After"},
		{"body", nil, 400, `{"message":"yes"}`, "/message"},
		{"member", nil, 400, `{"message":"no","details":null}`, "/details"},
		{"twice", nil, 400, `{"message":"no","message":"no"}`, "duplicate"},
		{"array", nil, 400, `[]`, "no JSON object"},
		{"null", nil, 400, `null`, "object"},
		{"redirect", func(h http.Header) { h.Set("Location", "/") }, 307, good, "status 307"},
	}
	f, err := Parse("a", []byte("> KM1 alice GET /\n\n< 400\nAllow: GET\nLocation: $absent\nRetry-After: $int\n\n{\"message\": \"no\"}\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s, err := NewStage("alice")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			err = s.Serve("KM1", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				h := w.Header()
				for name, value := range map[string]string{
					"Content-Type": "application/json", "Cache-Control": "no-store", "X-Request-Id": "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11",
					"Allow": "GET", "Retry-After": "2",
				} {
					h.Set(name, value)
				}
				if test.change != nil {
					test.change(h)
				}
				w.WriteHeader(test.status)
				_, _ = w.Write([]byte(test.body))
			}))
			if err != nil {
				t.Fatal(err)
			}
			err = f.Run(context.Background(), Place{Client: s.Client})
			if (test.err == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("Run: got %v, want %q", err, test.err)
			}
		})
	}
}

func TestRunCountsKeys(t *testing.T) {
	t.Parallel()
	s, err := NewStage("alice")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	stored := "7"
	if err := s.Serve("KM1", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Request-Id", "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11")
		_, _ = w.Write([]byte(`{"stored_key_count":` + stored + `}`))
		if r.Method == http.MethodPost {
			stored = "5"
		}
	})); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		stored string
		ok     bool
	}{{"-2", true}, {"same", true}, {"-1", false}} {
		f, err := Parse("a", []byte("> KM1 alice POST /\n\n< 200 stored "+test.stored+"\n"))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Run(context.Background(), Place{Client: s.Client}); (err == nil) != test.ok {
			t.Errorf("stored %s: got %v, want success %v", test.stored, err, test.ok)
		}
	}
}

func TestStageNamesCallers(t *testing.T) {
	t.Parallel()
	s, err := NewStage("alice")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	type judged struct{ id, remote string }
	got := make(chan judged, 1)
	if err := s.Serve("KM1", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		c, err := s.Identify(r)
		if (c.ID() == "") != (err != nil) {
			t.Errorf("caller %q with error %v", c.ID(), err)
		}
		got <- judged{c.ID(), c.Remote()}
	})); err != nil {
		t.Fatal(err)
	}
	for who, want := range map[string]string{"alice": "alice", Stranger: ""} {
		base, hc, err := s.Client("KM1", who)
		if err != nil {
			t.Fatal(err)
		}
		hc.Timeout = 10 * time.Second
		resp, err := hc.Get(base)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if j := <-got; j.id != want || j.remote == "" {
			t.Errorf("%s came in as %+v", who, j)
		}
	}
	if _, _, err := s.Client("KM3", "alice"); err == nil {
		t.Error("there is a KM3")
	}
}
