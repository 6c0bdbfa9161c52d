package pki_test

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/qutemail/kme/pki"
)

// What the real CA does with Enrol is tested in pki/authority; these are CAs that lie.

// liar is a CA that answers what it is told to.
type liar struct {
	root, sign string // bodies
	status     int    // of sign
	asked      atomic.Int32
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/root/") {
		w.Write([]byte(l.root))
		return
	}
	l.asked.Add(1)
	w.Header().Set("Location", "https://127.0.0.1:1/")
	w.WriteHeader(l.status)
	w.Write([]byte(l.sign))
}

func pemText(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func toJSON(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestEnrolWithALiar(t *testing.T) {
	ca, other := newCAs(t), newCAs(t)
	root := pemText(t, filepath.Join(ca, "root.pem"))
	block, _ := pem.Decode([]byte(root))
	pin := sha256.Sum256(block.Bytes)
	// A certificate that the CA did issue, but for another key than Enrol's.
	stolen := []string{
		pemText(t, filepath.Join(mint(t, ca, "sae", "alice", nil), "cert.pem")),
		pemText(t, filepath.Join(ca, "sae/intermediate.pem")),
	}
	goodRoot := toJSON(t, map[string]string{"ca": root})
	ours, theirs := mint(t, ca, "kme", "km1", nil), mint(t, other, "kme", "km1", nil)

	for _, tt := range []struct {
		name   string
		server string // credential of the CA's listener
		liar   *liar
		want   string
		asked  int32 // how often it saw the token
	}{
		{"another root", ours, &liar{root: toJSON(t, map[string]string{"ca": pemText(t, filepath.Join(other, "root.pem"))})}, "has the fingerprint", 0},
		{"no root", ours, &liar{root: `{"ca": "none"}`}, "no PEM certificate", 0},
		{"an endless root", ours, &liar{root: strings.Repeat(" ", 2<<20) + goodRoot}, "unexpected end", 0},
		{"our root over their listener", theirs, &liar{root: goodRoot}, "unknown authority", 0},
		{"another key's certificate", ours, &liar{root: goodRoot, status: 201, sign: toJSON(t, map[string]any{"certChain": stolen})}, "another key", 1},
		{"no certificate", ours, &liar{root: goodRoot, status: 201, sign: `{}`}, "holds no certificate", 1},
		{"a refusal", ours, &liar{root: goodRoot, status: 403, sign: `{"status": 403, "message": "not you"}`}, "403: not you", 1},
		{"a fault", ours, &liar{root: goodRoot, status: 500, sign: `oops`}, "500: Internal Server Error", 1},
		{"a redirect", ours, &liar{root: goodRoot, status: 307, sign: `{}`}, "307", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := load(t, tt.server)
			s := httptest.NewUnstartedServer(tt.liar)
			s.TLS = pki.ServerTLS(server, nil, tls.VersionTLS13)
			s.TLS.ClientAuth = tls.NoClientCert
			s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
			s.StartTLS()
			defer s.Close()
			dir := t.TempDir()
			token := filepath.Join(dir, "token")
			if err := os.WriteFile(token, []byte("secret"), 0o600); err != nil {
				t.Fatal(err)
			}
			err := pki.Enrol(t.Context(), pki.Enrolment{
				CA: strings.Replace(s.URL, "127.0.0.1", "localhost", 1), RootFingerprint: hex.EncodeToString(pin[:]),
				TokenFile: token, Dir: filepath.Join(dir, "credential"), ID: "alice",
				Log: slog.New(slog.DiscardHandler),
			})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows the token: %v", err)
			}
			if got := tt.liar.asked.Load(); got != tt.asked {
				t.Errorf("the token was sent %d times, want %d", got, tt.asked)
			}
			if _, err := os.Stat(filepath.Join(dir, "credential")); !os.IsNotExist(err) {
				t.Errorf("something was stored (%v)", err)
			}
		})
	}
}

func TestEnrolWithoutToken(t *testing.T) {
	err := pki.Enrol(t.Context(), pki.Enrolment{
		CA: "https://localhost:1", RootFingerprint: strings.Repeat("00", 32), TokenFile: filepath.Join(t.TempDir(), "none"), Dir: t.TempDir(), ID: "alice",
		Log: slog.New(slog.DiscardHandler),
	})
	if err == nil || !strings.Contains(err.Error(), "reading the one-time token") {
		t.Errorf("got %v, want an error about the token", err)
	}
}
