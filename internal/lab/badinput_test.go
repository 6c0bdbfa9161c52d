package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/key"
)

// nasty are bodies that no route takes, whatever members it knows.
var nasty = map[string]string{
	"nothing but blanks and a comma": "  ,",
	"not closed":                     `{"number": 1`,
	"a comma too many":               `{"number": 1,}`,
	"two values":                     `{} {}`,
	"null":                           `null`,
	"an array":                       `[]`,
	"a string":                       `"number"`,
	"a BOM":                          "\ufeff{}",
	"invalid UTF-8":                  "{\"x\": \"\xff\"}",
	"half a surrogate":               `{"x": "\ud800"}`,
	"NUL":                            "{\"x\": \"\x00\"}",
	"NUL after it":                   "{}\x00",
	"a bare line feed":               "{\"x\": \"a\nb\"}",
	"a member twice":                 `{"x": 1, "x": 2}`,
	"members twice":                  `{"number": 1, "number": 1, "key_IDs": [], "key_IDs": [], "recipient_sae": "bob", "recipient_sae": "bob", "key_id": "", "key_id": ""}`,
	"deep":                           `{"x": ` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + "}",
	"wrong types":                    `{"number": "1", "size": [], "key_IDs": 7, "requester_sae": 1, "recipient_sae": {}, "key_id": [], "key_size": "256"}`,
	"numbers beyond all bounds":      `{"number": 1e400, "size": 99999999999999999999, "key_IDs": -1, "requester_sae": 1e400, "key_id": 1e400}`,
	"YAML":                           "number: 1",
	"a form":                         "number=1&size=256",
}

// spoofed are headers by which other servers let themselves be told who calls.
var spoofed = []string{
	"X-SAE-ID", "X-Cert-CN", "X-Client-Cert", "X-SSL-Client-S-DN", "X-SSL-Client-Verify", "X-Forwarded-Client-Cert", "X-Forwarded-For", "Forwarded",
	"X-Remote-User", "Remote-User", "X-User", "Request-SAE-ID", "Authorization",
}

// badRequest is one that no caller may make; want is its status.
type badRequest struct {
	name, method, path, body string
	want                     int
	chunked                  bool // without a length
}

// badRequests are the nasty bodies at every route that has one, and the nasty paths
// and queries of the others. id is a key of bob's. Cleanup is not among them: it
// refuses SAEs before it reads anything.
func badRequests(id key.ID) (all []badRequest) {
	large := `{"x": "` + strings.Repeat("x", 64<<10) + `"}`
	posts := []string{"/api/v1/keys/bob/enc_keys", "/api/v1/keys/bob/dec_keys", "/api/v1/keys/request", "/api/v1/keys/consume"}
	for _, path := range posts {
		for name, body := range nasty {
			all = append(all, badRequest{name: name, method: http.MethodPost, path: path, body: body, want: 400})
		}
		all = append(all, badRequest{name: "large", method: http.MethodPost, path: path, body: large, want: 413},
			badRequest{name: "large, without a length", method: http.MethodPost, path: path, body: large, want: 413, chunked: true})
	}
	for _, name := range []string{"%00", "%0a", "%7f", "%ff", "%c3%28", "%20", "%ed%a0%80", "%E2%80%8B", strings.Repeat("x", 513), "alice"} {
		for _, end := range []string{"status", "enc_keys", "dec_keys?key_ID=" + id.String()} {
			all = append(all, badRequest{name: "SAE " + name, method: http.MethodGet, path: "/api/v1/keys/" + name + "/" + end, want: 400})
		}
		for _, end := range []string{"enc_keys", "dec_keys"} {
			all = append(all, badRequest{name: "SAE " + name, method: http.MethodPost, path: "/api/v1/keys/" + name + "/" + end, body: `{"key_IDs": []}`, want: 400})
		}
	}
	for _, query := range []string{"number=%00", "number=1%0a", "number=1&number=1", "number=1;size=256", "number=%ff", "size=99999999999999999999", "number=-1", "number", "=1", "%zz=1"} {
		all = append(all, badRequest{name: "query " + query, method: http.MethodGet, path: "/api/v1/keys/bob/enc_keys?" + query, want: 400})
	}
	for _, query := range []string{"", "key_ID=", "key_ID=%00", "key_ID=" + id.String() + "%00", "key_ID=" + id.String() + "&key_ID=" + id.String(), "key_ID=" + strings.Repeat("a", 8000), "key_id=" + id.String(), "key_ID=%zz"} {
		all = append(all, badRequest{name: "query " + query, method: http.MethodGet, path: "/api/v1/keys/bob/dec_keys?" + query, want: 400})
	}
	for _, query := range []string{"", "?requester_sae=", "?requester_sae=%00", "?requester_sae=%ff", "?requester_sae=alice&requester_sae=alice", "?requester_sae=%zz"} {
		want := 400
		if strings.Contains(query, "%00") || strings.Contains(query, "%ff") {
			want = 403 // not the caller's name
		}
		all = append(all, badRequest{name: "legacy " + query, method: http.MethodGet, path: "/api/v1/keys/" + id.String() + query, want: want})
	}
	for _, method := range []string{http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodHead, "PROPFIND"} {
		all = append(all, badRequest{name: method, method: method, path: "/api/v1/keys/bob/enc_keys", want: 405},
			badRequest{name: method, method: method, path: "/api/v1/keys/request", want: 405})
	}
	return all
}

// TestBadInput sends everything that nobody may send to every route of both APIs.
// The answer is the one for it, and neither site has changed.
func TestBadInput(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 16_384, 8192 }) // one block, and then only requests change anything
	keysStored(t, l, 2048)
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	id := get(t, alice, bob, 1).ids()[0]
	settled(t, l)
	before, doc := l.content(t), describe(t)
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
		place, _ := vectorPlace(t, l, doc, protocol == "HTTP/2")
		url, hc, err := place.Client("KM1", "alice")
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range badRequests(id) {
			if status, err := r.send(t.Context(), hc, url); err != nil || status != r.want {
				t.Errorf("%s %s %.80s (%s): %d, %v, want %d", protocol, r.method, r.path, r.name, status, err, r.want)
			}
		}
		// The key is there, and alice is not bob, whatever she says.
		r := badRequest{method: http.MethodPost, path: "/api/v1/keys/alice/dec_keys", body: fmt.Sprintf(`{"key_IDs": [{"key_ID": %q}]}`, id), want: 401}
		url, hc, err = place.Client("KM2", "carol")
		if err != nil {
			t.Fatal(err)
		}
		if status, err := r.send(t.Context(), hc, url); err != nil || status != r.want {
			t.Errorf("%s: carol with bob's headers: %d, %v, want %d", protocol, status, err, r.want)
		}
		if diff := cmp.Diff(before, l.content(t)); diff != "" {
			t.Errorf("%s: what the sites have has changed (-before +after):\n%s", protocol, diff)
		}
	}
	taken, err := bob.Client.DecKeys(t.Context(), alice.ID, []key.ID{id})
	if err != nil {
		t.Errorf("bob's key at the end: %v", err)
	}
	taken.Wipe()
}

// send makes the request with all spoofed headers, and reads the answer.
func (r badRequest) send(ctx context.Context, hc *http.Client, url string) (status int, err error) {
	var body io.Reader
	if r.body != "" {
		body = bytes.NewReader([]byte(r.body))
	}
	if r.chunked {
		body = io.MultiReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, url, body)
	if err != nil {
		return 0, err
	}
	path, query, _ := strings.Cut(r.path, "?")
	req.URL.Opaque = "//" + req.URL.Host + path // as it stands
	req.URL.RawQuery = query
	req.Header.Set("Content-Type", "application/json")
	for _, h := range spoofed {
		req.Header.Set(h, "bob")
	}
	res, err := hc.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && (res.Header.Get("Content-Type") != "application/json" || r.method != http.MethodHead && !bytes.HasPrefix(text, []byte("{"))) {
		err = errors.New("the answer is not a JSON object")
	}
	return res.StatusCode, err
}

// content is what the sites have to hand out, and what they tell of it.
func (l *Lab) content(t testing.TB) map[string]int64 {
	t.Helper()
	all := make(map[string]int64)
	for _, s := range []*Site{l.KM1, l.KM2} {
		conn, done, err := s.super(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for name, sql := range map[string]string{
			"keys":      "SELECT count(*) FROM kme.key",
			"remaining": "SELECT sum(remaining) FROM kme.chunk",
			"due":       "SELECT count(*) FROM kme.due",
			"waiting":   "SELECT count(*) FROM kme.due WHERE ct IS NOT NULL",
			"parked":    "SELECT count(*) FROM kme.parked",
			"voids":     "SELECT count(*) FROM kme.void_out",
		} {
			var n int64
			if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
				done()
				t.Fatal(err)
			}
			all[s.Name+" "+name] = n
		}
		done()
	}
	for _, pair := range [][2]string{{"alice", "bob"}, {"bob", "alice"}} {
		status, err := sae(t, l, pair[0]).Client.Status(t.Context(), SAEID(pair[1]))
		if err != nil {
			t.Fatal(err)
		}
		all["stored for "+pair[0]] = int64(status.Stored)
	}
	return all
}
