package nodes

import (
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
)

// TestSend: the next node is asked if no connection could be made, and only then.
func TestSend(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	answering := func(status int) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			asked.Add(1)
			if status == 0 {
				panic(http.ErrAbortHandler) // the connection ends without an answer
			}
			w.WriteHeader(status)
		}))
		t.Cleanup(s.Close)
		return s.URL
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + ln.Addr().String()
	_ = ln.Close()

	for _, tt := range []struct {
		name  string
		bases []string
		want  int // status; 0: an error
		asked int64
	}{
		{"the first", []string{answering(200) + "/", answering(500)}, 200, 1},
		{"the first is not there", []string{nobody, answering(200)}, 200, 1},
		{"the first refuses", []string{answering(503), answering(200)}, 503, 1},
		{"the first may have heard it", []string{answering(0), answering(200)}, 0, 1},
		{"none is there", []string{nobody, nobody}, 0, 0},
	} {
		asked.Store(0)
		resp, err := New(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, tt.bases[0], tt.bases[1:]...).
			Send(t.Context(), http.MethodPost, "/api/v1/keys", []byte("{}"))
		got := 0
		if err == nil {
			got = resp.StatusCode
			_ = resp.Body.Close()
		}
		if got != tt.want || asked.Load() != tt.asked {
			t.Errorf("%s: got %d (%v) after %d were asked, want %d after %d", tt.name, got, err, asked.Load(), tt.want, tt.asked)
		}
	}
}
