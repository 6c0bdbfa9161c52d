package lab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/qutemail/kme/pki"
)

// TestSAEDoor shows those rows of the 014 checklist that are about connections and
// not about what is said over them.
func TestSAEDoor(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 4096, 8192 })
	keysStored(t, l, 1000)
	t.Run("014-4-02 plain HTTP", func(t *testing.T) { plainHTTP(t, l) })
	t.Run("014-4-02 old TLS", func(t *testing.T) { oldTLS(t, l) })
	t.Run("014-5.1-01 certificates", func(t *testing.T) { doorCertificates(t, l) })
	t.Run("014-5.1-04 the KME's name", func(t *testing.T) { doorNamesKME(t, l) })
	t.Run("014-X-17 client leaves", func(t *testing.T) { clientLeaves(t, l) })
}

// address is that of a site's SAE door.
func address(s *Site) string { return strings.TrimPrefix(s.URL(), "https://") }

// plainHTTP: without TLS there is no answer of the API.
func plainHTTP(t *testing.T, l *Lab) {
	res, err := http.Get("http://" + address(l.KM1) + "/api/v1/keys/bob/status")
	if err != nil {
		return // hung up: as good
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusBadRequest || strings.Contains(string(body), "{") {
		t.Errorf("plain HTTP is answered %d %s, %v", res.StatusCode, body, err)
	}
}

// tlsOf is the TLS configuration of a profile, which hands its certificate to whoever asks.
func tlsOf(t *testing.T, l *Lab, role, name string) *tls.Config {
	t.Helper()
	c, err := pki.LoadCredential(l.profileDir(role, name))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := pki.ClientTLS(c, roots, nil)
	cfg.ServerName = "localhost"
	return cfg
}

// oldTLS: nothing below TLS 1.3, unless the configuration says tls12.
func oldTLS(t *testing.T, l *Lab) {
	for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: false, tls.VersionTLS13: true} {
		cfg := tlsOf(t, l, "sae", "alice")
		cfg.MinVersion, cfg.MaxVersion = version, version
		err := getStatus(l.KM1, cfg)
		if (err == nil) != ok || !ok && !strings.Contains(err.Error(), "protocol version") {
			t.Errorf("%s: %v, want success %v", tls.VersionName(version), err, ok)
		}
	}
}

// getStatus asks for alice's status over a connection of its own.
func getStatus(s *Site, cfg *tls.Config) error {
	transport := &http.Transport{TLSClientConfig: cfg}
	defer transport.CloseIdleConnections()
	res, err := (&http.Client{Transport: transport}).Get(s.URL() + "/api/v1/keys/bob/status")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	return nil
}

// doorCertificates: no certificate and one of another role's CA, under the same root,
// end in the handshake. (Expired ones, other roots and wrong key usages: pki,
// TestDoorLetsIn, which can issue such.)
func doorCertificates(t *testing.T, l *Lab) {
	none := tlsOf(t, l, "sae", "alice")
	none.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
	operator := tlsOf(t, l, "operator", "root")
	for name, cfg := range map[string]*tls.Config{"no certificate": none, "an operator's": operator} {
		err := getStatus(l.KM1, cfg)
		if alert := tls.AlertError(0); !errors.As(err, &alert) && (err == nil || !strings.Contains(err.Error(), "remote error: tls")) {
			t.Errorf("%s: %v, want a TLS alert", name, err)
		}
	}
}

// doorNamesKME: the certificate of a KME says which it is, as its status does.
func doorNamesKME(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	status, err := alice.Client.Status(t.Context(), bob.ID)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", address(l.KM1), tlsOf(t, l, "sae", "alice"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	leaf := conn.ConnectionState().PeerCertificates[0]
	if want := "qkd://kme." + trustDomain + "/" + status.SourceKME; leaf.Subject.CommonName != status.SourceKME || len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
		t.Errorf("the certificate is of %s, %v; the status says %s", leaf.Subject.CommonName, leaf.URIs, status.SourceKME)
	}
}

// clientLeaves: a client that leaves before its answer burns the keys that were
// committed for it, and the audit says so. Whether it left in time is luck.
func clientLeaves(t *testing.T, l *Lab) {
	const lost = `e->>'action' = 'answer-lost'`
	eventually(t, "an answer that found nobody", func(context.Context) error {
		conn, err := tls.Dial("tcp", address(l.KM1), tlsOf(t, l, "sae", "alice"))
		if err != nil {
			return err
		}
		_, err = io.WriteString(conn, "GET /api/v1/keys/bob/enc_keys?number=64 HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if tcp, ok := conn.NetConn().(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // a reset: nothing of an answer is taken for delivered
		}
		if err := errors.Join(err, conn.NetConn().Close()); err != nil {
			return err
		}
		if recorded(t, l.KM1, lost) == 0 {
			return errors.New("none is recorded")
		}
		return nil
	})
	done := `e->>'action' = 'enc_keys' AND e->>'outcome' = 'done' AND e->>'request' IN (SELECT body::json->>'request' FROM kme.audit WHERE body::json->>'action' = 'answer-lost')`
	if lost, served := recorded(t, l.KM1, lost), recorded(t, l.KM1, done); lost != served {
		t.Errorf("%d answers are lost, of %d requests that were served", lost, served)
	}
}
