package etsi014_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"testing"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/etsi014/vector"
	"github.com/qutemail/kme/internal/identity"
)

// stage opens the doors of two KMEs with a double behind them. seen collects the
// request IDs of all answers of a route.
func stage(t *testing.T, http2 bool) (*vector.Stage, *double, *seen) {
	t.Helper()
	s, err := vector.NewStage("alice", "bob", "carol", "dave", "erin", "alice@qutemail.example", "bob@qutemail.example")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.HTTP2 = http2
	d, requests := newDouble(), &seen{status: make(map[string]int)}
	for name, id := range map[string]string{"KM1": "km1", "KM2": "km2"} {
		kme, err := identity.ParseKME(id)
		if err != nil {
			t.Fatal(err)
		}
		door, err := etsi014.New(etsi014.Config{KME: kme, Backend: at{d, id}, Identify: s.Identify, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Serve(name, requests.watch(door.Handler())); err != nil {
			t.Fatal(err)
		}
	}
	return s, d, requests
}

// seen remembers the status that each request was answered with.
type seen struct {
	mu     sync.Mutex
	status map[string]int
	protos map[string]bool
}

func (s *seen) watch(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sw := &watched{ResponseWriter: w}
		next.ServeHTTP(sw, r)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.status[w.Header().Get("X-Request-Id")] = sw.status
		if s.protos == nil {
			s.protos = make(map[string]bool)
		}
		s.protos[r.Proto] = true
	})
}

type watched struct {
	http.ResponseWriter
	status int
}

func (w *watched) WriteHeader(status int) { w.status = status; w.ResponseWriter.WriteHeader(status) }

func (w *watched) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func TestVectors(t *testing.T) {
	t.Parallel()
	files, err := vector.Load(os.DirFS("../../testdata/etsi014"))
	if err != nil {
		t.Fatal(err)
	}
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("http2=%v", http2), func(t *testing.T) {
			t.Parallel()
			s, d, requests := stage(t, http2)
			place := vector.Place{Names: map[string]string{"KM1": "km1", "KM2": "km2"}, Client: s.Client}
			for _, f := range files {
				t.Run(f.Name, func(t *testing.T) {
					if err := f.Run(context.Background(), place); err != nil {
						t.Error(err)
					}
				})
			}
			s.Close()
			checkEvents(t, d, requests)
			if want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]; len(requests.protos) != 1 || !requests.protos[want] {
				t.Errorf("the vectors were run over %v, want %s", requests.protos, want)
			}
		})
	}
}

// checkEvents holds the door to its part of I4: a request that a route took has
// exactly one outcome event, a request that none took has none.
func checkEvents(t *testing.T, d *double, requests *seen) {
	t.Helper()
	requests.mu.Lock()
	defer requests.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	for rid, status := range requests.status {
		want := 1
		if status == http.StatusNotFound || status == http.StatusMethodNotAllowed {
			want = 0
		}
		if d.events[rid] != want {
			t.Errorf("request %s, answered %d: got %d events, want %d", rid, status, d.events[rid], want)
		}
	}
	if len(requests.status) == 0 {
		t.Error("no request was seen")
	}
	if len(d.lost) != 0 {
		t.Errorf("answers lost: %v", d.lost)
	}
}
