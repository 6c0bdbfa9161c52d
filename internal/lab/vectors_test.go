package lab

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/qutemail/kme/internal/etsi014/vector"
)

// vectorPolicy lets carol share keys with some, which vectors want for keys that are
// somebody else's; with erin only if they are not served by one KME, which they are.
const vectorPolicy = `@id("vectors")
permit (principal, action, resource)
when { [principal, resource].contains(SAE::"carol") && [SAE::"alice", SAE::"bob", SAE::"erin"].containsAny([principal, resource]) };
@id("not-at-one-kme")
forbid (principal, action, resource)
when { [principal, resource].containsAll([SAE::"carol", SAE::"erin"]) && context.same_kme };
`

// The vectors of both doors, against two real KMEs.
func TestVectors(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) {
		c.Settings = map[string]string{"km2": "strict: true\n"}
		c.Filler, c.PoolLimit = 32_768, 8192 // one block is enough, and so large that no chunk is granted: only requests change the count
		if err := os.MkdirAll(filepath.Join(c.Dir, "policies"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(c.Dir, "policies", "vectors.cedar"), []byte(vectorPolicy), 0o644); err != nil {
			t.Fatal(err)
		}
	})
	for _, name := range []string{vector.Stranger, "dave"} {
		if err := l.enrol(t.Context(), "sae", name, l.KM1.URL()); err != nil {
			t.Fatal(err)
		}
	}
	keysStored(t, l, 2048)
	doc := describe(t)
	for _, folder := range []string{"etsi014", "legacy"} {
		files, err := vector.Load(os.DirFS("../../testdata/" + folder))
		if err != nil {
			t.Fatal(err)
		}
		for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
			place, protos := vectorPlace(t, l, doc, protocol == "HTTP/2")
			for _, f := range files {
				t.Run(fmt.Sprintf("%s/%s/%s", folder, protocol, f.Name), func(t *testing.T) {
					if err := f.Run(context.Background(), place); err != nil {
						t.Error(err)
					}
				})
			}
			if got := protos(); len(got) != 1 || got[0] != map[string]string{"HTTP/1.1": "HTTP/1.1", "HTTP/2": "HTTP/2.0"}[protocol] {
				t.Errorf("the vectors of %s were run over %v, want %s", folder, got, protocol)
			}
		}
	}
	if err := doc.whole(); err != nil {
		t.Error(err)
	}
}

// vectorPlace is the lab as a place for vectors, over one version of HTTP. protos
// lists those that were spoken.
func vectorPlace(t *testing.T, l *Lab, doc *described, http2 bool) (place vector.Place, protos func() []string) {
	t.Helper()
	var mu sync.Mutex
	seen := make(map[string]bool)
	clients := make(map[string]*http.Client)
	client := func(kme, sae string) (string, *http.Client, error) {
		site := map[string]*Site{"KM1": l.KM1, "KM2": l.KM2}[kme]
		if site == nil {
			return "", nil, fmt.Errorf("there is no %s", kme)
		}
		if hc := clients[sae]; hc != nil {
			return site.URL(), hc, nil
		}
		hc, err := l.httpClient(l.profileDir("sae", sae))
		if err != nil {
			return "", nil, err
		}
		transport := hc.Transport.(*http.Transport)
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetHTTP2(http2)
		transport.Protocols.SetHTTP1(!http2)
		t.Cleanup(transport.CloseIdleConnections)
		hc.Transport = watching{doc.on(transport), func(proto string) {
			mu.Lock()
			defer mu.Unlock()
			seen[proto] = true
		}}
		clients[sae] = hc
		return site.URL(), hc, nil
	}
	return vector.Place{Names: map[string]string{"KM1": l.KM1.Name, "KM2": l.KM2.Name}, Client: client}, func() (list []string) {
		mu.Lock()
		defer mu.Unlock()
		for proto := range seen {
			list = append(list, proto)
		}
		return list
	}
}

// watching is a transport that tells which protocol each answer came over.
type watching struct {
	http.RoundTripper
	saw func(proto string)
}

func (w watching) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := w.RoundTripper.RoundTrip(r)
	if err == nil {
		w.saw(res.Proto)
	}
	return res, err
}
