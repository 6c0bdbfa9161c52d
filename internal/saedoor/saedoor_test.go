package saedoor

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/policies"
)

// frames is an answer that remembers what went out at each flush.
type frames struct {
	*httptest.ResponseRecorder
	all [][]byte
}

func (f *frames) Flush() {
	f.all = append(f.all, bytes.Clone(f.Body.Bytes()))
	f.Body.Reset()
}

// TestOverwritten: over HTTP/2 keys go in pieces that fit into net/http's buffers, and what
// goes last says nothing and is as long as the longest of them. All else goes as it is.
func TestOverwritten(t *testing.T) {
	t.Parallel()
	for _, length := range []int{1, 200, pieceBytes - 1, pieceBytes, pieceBytes + 1, 3*pieceBytes + 7} {
		for _, protocol := range []int{1, 2} {
			for _, keys := range []bool{true, false} {
				body := bytes.Repeat([]byte{'k'}, length)
				r := httptest.NewRequest(http.MethodGet, "/", nil)
				r.ProtoMajor = protocol
				f := &frames{ResponseRecorder: httptest.NewRecorder()}
				if err := Begin(f, r, "GET /", quiet).Succeed(Answer{Status: 200, Body: body, Keys: keys}); err != nil {
					t.Error(err)
				}
				f.Flush()
				sent := bytes.Join(f.all, nil)
				said, _ := strconv.Atoi(f.Header().Get("Content-Length"))
				if said != len(sent) || !bytes.Equal(bytes.TrimRight(sent, " "), bytes.Repeat([]byte{'k'}, length)) {
					t.Errorf("HTTP/%d, %d bytes: %d were sent and %d announced", protocol, length, len(sent), said)
				}
				if !bytes.Equal(body, make([]byte, length)) {
					t.Errorf("HTTP/%d, %d bytes: the body was not wiped", protocol, length)
				}
				if protocol == 1 || !keys {
					if len(sent) != length {
						t.Errorf("HTTP/%d, %d bytes (keys: %v): %d were sent", protocol, length, keys, len(sent))
					}
					continue
				}
				longest := 0
				for _, frame := range f.all[:len(f.all)-2] { // the last flush is the test's
					longest = max(longest, len(frame))
				}
				if last := f.all[len(f.all)-2]; longest > pieceBytes || len(last) < longest || len(bytes.TrimSpace(last)) > 0 {
					t.Errorf("%d bytes went in frames of up to %d bytes, and after them %d", length, longest, len(last))
				}
			}
		}
	}
}

// caller is the SAE of that name.
func caller(t *testing.T, name string) identity.Caller {
	t.Helper()
	m, err := identity.NewMap(
		[]identity.Rule{{ID: "sae", Pool: "sae", Role: identity.RoleSAE, URI: "qkd://sae.lab.test/{id}", Principal: "{id}"}},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 48 * time.Hour},
		map[string]identity.Principal{identity.PrincipalKey(identity.RoleSAE, name): {Enabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := policies.Recipe{Pool: "sae", URIs: []string{"qkd://sae.lab.test/" + name}, DN: "CN=" + name}.Certificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := m.Judge("sae", leaf, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var quiet = slog.New(slog.DiscardHandler)

// TestBodies: what arrives at one time for a caller is bounded, and each has its own; what
// has been read makes room.
func TestBodies(t *testing.T) {
	t.Parallel()
	var bodies Bodies
	begin := func(sae string, body io.Reader) *Exchange {
		t.Helper()
		r := httptest.NewRequest(http.MethodPost, "/", body)
		x := Begin(httptest.NewRecorder(), r, "POST /", quiet)
		x.Caller = caller(t, sae)
		return x
	}
	var held []*io.PipeWriter
	ended := make(chan error, 64)
	for range 64 { // of unknown length
		out, in := io.Pipe()
		held = append(held, in)
		x := begin("alice", out)
		go func() {
			_, err := x.Body(&bodies)
			ended <- err
		}()
		if _, err := in.Write([]byte("{")); err != nil { // it is being read
			t.Fatal(err)
		}
	}
	_, err := begin("alice", strings.NewReader("{}")).Body(&bodies)
	if p, ok := errors.AsType[*problem.Error](err); !ok || p.Kind != problem.Unavailable || p.RetryAfter == 0 {
		t.Errorf("one body more: %v, want to come again", err)
	}
	if body, err := begin("bob", strings.NewReader("{}")).Body(&bodies); err != nil || string(body) != "{}" {
		t.Errorf("another caller's: %q, %v", body, err)
	}
	if _, err := begin("bob", strings.NewReader(strings.Repeat(" ", maxBody+1))).Body(&bodies); problem.KindOf(err) != problem.TooLarge {
		t.Errorf("a body that is too long: %v", err)
	}
	for i, in := range held {
		if err := in.CloseWithError(errors.New("gone")); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; problem.KindOf(err) != problem.Invalid {
			t.Errorf("body %d: %v", i, err)
		}
	}
	if body, err := begin("alice", strings.NewReader("{}")).Body(&bodies); err != nil || string(body) != "{}" {
		t.Errorf("when there is room again: %q, %v", body, err)
	}
	if len(bodies.arriving) != 0 {
		t.Errorf("room is lost: %v", bodies.arriving)
	}
}
