package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/pki"
)

var errNotYet = errors.New("not yet")

// TestCertificates: what the CAs do to certificates while a KME serves.
func TestCertificates(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit, c.Interval = 4096, 20_000, 50*time.Millisecond })
	keysStored(t, l, 1000)
	t.Run("revoked", func(t *testing.T) { revoked(t, l) })
	t.Run("renewed", func(t *testing.T) { renewed(t, l) })
	t.Run("a site is shut out", func(t *testing.T) { siteShutOut(t, l) })
}

// siteShutOut: with a site that KM1 does not let in any more, because it was seized perhaps,
// KM1 makes and shares no key either: not over the connections that it has, and over no new
// one. Both go on when it is let in again.
func siteShutOut(t *testing.T, l *Lab) {
	alice, bob, op := sae(t, l, "alice"), sae(t, l, "bob"), operator(t, l.KM1)
	take(t, bob, alice, get(t, alice, bob, 1))
	file := l.path("policies", "principals.yaml")
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	put := func(text []byte) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := op.ReloadPolicies(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	}
	put(bytes.Replace(before, []byte("{role: kme, id: km2, enabled: true}"), []byte(`{role: kme, id: km2, enabled: false, reason: "seized"}`), 1))
	for range 3 { // at once, and while KM1 tries again
		if got, err := alice.Client.EncKeys(t.Context(), bob.ID, etsi014.KeyRequest{}); away(err) == nil {
			got.Wipe()
			t.Errorf("keys shared with a site that was shut out: %v, want 503", err)
		}
		untilAlarm(t, l.KM1, "peer-km2", true)
	}
	eventually(t, "the link makes no key", func(ctx context.Context) error { // if it is full it has made none
		now, err := link(ctx, op)
		if err == nil && now.State != "full" && (now.State == "open" || !strings.Contains(now.Why, "seized")) {
			err = fmt.Errorf("it is %s (%s)", now.State, now.Why)
		}
		return err
	})
	put(before)
	untilAlarm(t, l.KM1, "peer-km2", false)
	eventually(t, "alice is served again", func(ctx context.Context) error {
		got, err := alice.Client.EncKeys(ctx, bob.ID, etsi014.KeyRequest{})
		got.Wipe()
		return err
	})
}

// revoked: an SAE whose certificate the CA revokes is served no more on the
// connections that it has, of HTTP/1.1 and HTTP/2, and cannot open one, though policy
// lets it in; another is not disturbed; the audit says so.
func revoked(t *testing.T, l *Lab) {
	mallory := "alice@qutemail.example"
	serial := serialOf(t, l, mallory)

	// asking asks for keys without a pause until it is answered otherwise.
	asking := func(name, slave string, h2 bool) (asked *atomic.Int64, ended <-chan error) {
		p, err := l.SAE(name)
		if err != nil {
			t.Fatal(err)
		}
		tr := p.HTTP.Transport.(*http.Transport)
		tr.Protocols = new(http.Protocols)
		tr.Protocols.SetHTTP1(!h2)
		tr.Protocols.SetHTTP2(h2)
		t.Cleanup(tr.CloseIdleConnections)
		asked, done := new(atomic.Int64), make(chan error, 1)
		go func() {
			for t.Context().Err() == nil {
				if _, err := p.Client.Status(t.Context(), SAEID(slave)); err != nil {
					done <- err
					return
				}
				asked.Add(1)
			}
		}()
		return asked, done
	}
	old, oldEnded := asking(mallory, "bob@qutemail.example", false)
	young, youngEnded := asking(mallory, "bob@qutemail.example", true)
	alice, aliceEnded := asking("alice", "bob", false)
	eventually(t, "all are served", func(context.Context) error {
		if old.Load() < 5 || young.Load() < 5 || alice.Load() < 5 {
			return errNotYet
		}
		return nil
	})

	revokeAtCA(t, l, mallory)
	if err := l.KM1.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for protocol, ended := range map[string]<-chan error{"HTTP/1.1": oldEnded, "HTTP/2": youngEnded} {
		select {
		case err := <-ended:
			t.Logf("%s: %v", protocol, err)
		case <-time.After(time.Minute): // told, it looks every second
			t.Errorf("%s: served on", protocol)
		}
	}
	served := alice.Load()
	eventually(t, "alice is served on", func(context.Context) error {
		if alice.Load() < served+5 {
			return errNotYet
		}
		return nil
	})
	select {
	case err := <-aliceEnded:
		t.Errorf("alice was disturbed: %v", err)
	default:
	}
	log, err := os.ReadFile(l.KM1.Node.LogFile()) // a client does not say when it had to begin another connection
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "closing a connection") && !strings.Contains(line, "caller=sae/"+mallory+" ") {
			t.Errorf("somebody else was disturbed: %s", line)
		}
	}
	p, err := l.SAE(mallory)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Client.Status(t.Context(), SAEID("bob@qutemail.example")); err == nil {
		t.Error("a new connection is let in")
	}
	eventually(t, "the refusal is in the audit", func(ctx context.Context) error {
		conn, done, err := l.KM1.super(ctx)
		if err != nil {
			return err
		}
		defer done()
		var n int
		err = conn.QueryRow(ctx, `SELECT count(*) FROM kme.audit WHERE body LIKE '%"handshake"%revoked%' AND body LIKE '%' || $1 || '%'`, serial).Scan(&n)
		if err == nil && n == 0 {
			err = errNotYet
		}
		return err
	})
}

func serialOf(t *testing.T, l *Lab, sae string) string {
	t.Helper()
	c, err := pki.LoadCredential(l.profileDir("sae", sae))
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf().SerialNumber.String()
}

// revokeAtCA has an SAE revoke its own certificate, as step ca revoke does.
func revokeAtCA(t *testing.T, l *Lab, sae string) {
	t.Helper()
	c, err := pki.LoadCredential(l.profileDir("sae", sae))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := pki.LoadPool(filepath.Join(l.Dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{"serial": c.Leaf().SerialNumber.String(), "reasonCode": 1, "passive": true})
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: pki.ClientTLS(c, roots, nil)}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Post(fmt.Sprintf("https://localhost:%d/1.0/revoke", l.Ports.ca("sae")), "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatal("revoking: " + strings.TrimSpace(res.Status))
	}
}
