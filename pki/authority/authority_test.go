package authority_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.step.sm/crypto/jose"
	"go.uber.org/goleak"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/pki/authority"
)

// TestMain checks that Serve leaves nothing running. A logger that smallstep links
// starts a goroutine of its own when it is loaded.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// site is a set of authorities made by Init, some of them serving.
type site struct {
	dir       string
	addresses map[identity.Role]authority.Address
	listeners map[string]net.Listener // by address, until Serve takes them
	log       syncBuffer
}

// newSite makes the authorities on addresses of this machine that are free.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{
		dir:       filepath.Join(t.TempDir(), "ca"),
		addresses: make(map[identity.Role]authority.Address),
		listeners: make(map[string]net.Listener),
	}
	for _, role := range authority.Roles {
		s.addresses[role] = authority.Address{HTTPS: s.listen(t), CRL: s.listen(t)}
	}
	err := authority.Init(authority.InitConfig{
		Dir: s.dir, TrustDomain: "lab.test", Addresses: s.addresses,
		KMENames: []string{"site-a.example", "192.0.2.0/24"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if text := s.log.String(); strings.Contains(text, "eyJ") {
			t.Errorf("the log holds a token:\n%s", text)
		}
	})
	return s
}

func (s *site) listen(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s.listeners[l.Addr().String()] = l
	return l.Addr().String()
}

// serve runs the CA of role until the test ends or the returned stop is called.
func (s *site) serve(t *testing.T, role identity.Role) (stop func()) {
	t.Helper()
	config := authority.ServeConfig{
		File: authority.SettingsFile(s.dir, role), Log: slog.New(slog.NewTextHandler(&s.log, nil)),
	}
	// Asked a second time, Serve opens the listeners by itself.
	if l := s.listeners[s.addresses[role].HTTPS]; l != nil {
		config.Listener, config.CRLListener = l, s.listeners[s.addresses[role].CRL]
		delete(s.listeners, s.addresses[role].HTTPS)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- authority.Serve(ctx, config) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve(%s): %v", role, err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (s *site) token(t *testing.T, role identity.Role, id string, names ...string) string {
	t.Helper()
	token, err := authority.Token(s.dir, role, id, time.Now(), names...)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// enrolment is that of id at the CA of role, with the given token.
func (s *site) enrolment(t *testing.T, role identity.Role, id, token string) pki.Enrolment {
	t.Helper()
	fingerprint, err := authority.Fingerprint(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	tokenFile := filepath.Join(dir, "token")
	if err := os.WriteFile(tokenFile, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return pki.Enrolment{
		CA: "https://" + s.addresses[role].HTTPS, RootFingerprint: fingerprint, TokenFile: tokenFile,
		Dir: filepath.Join(dir, "credential"), ID: id, Log: slog.New(slog.NewTextHandler(&s.log, nil)),
	}
}

// enrol gets id a credential and returns its directory.
func (s *site) enrol(t *testing.T, role identity.Role, id string) string {
	t.Helper()
	e := s.enrolment(t, role, id, s.token(t, role, id))
	if err := pki.Enrol(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	return e.Dir
}

// forge signs claims with the token key of role, as an operator with too much
// freedom could: what Token would put there stands unless claims say otherwise.
func (s *site) forge(t *testing.T, role identity.Role, claims map[string]any) string {
	t.Helper()
	key, err := jose.ReadKey(filepath.Join(s.dir, string(role), "token.key"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]any{
		"iss": "enrol-" + string(role), "sub": "alice", "aud": "https://" + s.addresses[role].HTTPS + "/1.0/sign",
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(), "jti": t.Name() + time.Now().String(),
	}
	kid := key.KeyID
	for name, value := range claims {
		if name == "kid" {
			kid = value.(string)
		} else {
			all[name] = value
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key.Key}, new(jose.SignerOptions).WithHeader("kid", kid))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jose.Signed(signer).Claims(all).CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// client speaks to the CAs, with a certificate if it is given one.
func (s *site) client(t *testing.T, credential string) *http.Client {
	t.Helper()
	roots, err := pki.LoadPool(filepath.Join(s.dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	config := pki.AnonymousTLS(roots)
	if credential != "" {
		c, err := pki.LoadCredential(credential)
		if err != nil {
			t.Fatal(err)
		}
		config = pki.ClientTLS(c, roots, nil)
	}
	transport := &http.Transport{TLSClientConfig: config}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// call returns the status and the body of one request; body is sent as JSON.
func (s *site) call(t *testing.T, c *http.Client, method string, role identity.Role, path string, body any) (int, []byte, error) {
	t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "https://"+s.addresses[role].HTTPS+path, bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

func leafIn(t *testing.T, dir string) *x509.Certificate {
	t.Helper()
	c, err := pki.LoadCredential(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf()
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
