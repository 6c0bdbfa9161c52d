package pki_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

// rekeyer is an issuing CA that does nothing but rekey, over pipes: the real one is
// asked in pki/authority.
type rekeyer struct {
	t      testing.TB
	ca     string
	role   identity.Role
	life   time.Duration
	conns  chan net.Conn
	away   atomic.Bool
	status atomic.Int32 // instead of a certificate, if not 0
	edit   func(*x509.Certificate)
	asked  atomic.Int64
}

// Accept implements net.Listener.
func (k *rekeyer) Accept() (net.Conn, error) {
	c, ok := <-k.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (k *rekeyer) Close() error   { return nil }
func (k *rekeyer) Addr() net.Addr { return &net.TCPAddr{} }

func (k *rekeyer) dial(context.Context, string, string) (net.Conn, error) {
	k.asked.Add(1)
	if k.away.Load() {
		return nil, errors.New("nobody is there")
	}
	ours, theirs := net.Pipe()
	k.conns <- theirs
	return ours, nil
}

func (k *rekeyer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if status := k.status.Load(); status != 0 {
		http.Error(w, `{"message": "no"}`, int(status))
		return
	}
	var in struct{ CSR string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || r.URL.Path != "/1.0/rekey" {
		http.Error(w, "what?", http.StatusBadRequest)
		return
	}
	block, _ := pem.Decode([]byte(in.CSR))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s := signerOf(k.t, k.ca, k.role)
	template := leafTemplate(k.role, r.TLS.PeerCertificates[0].Subject.CommonName)
	template.SerialNumber, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(k.life)
	if k.edit != nil {
		k.edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.cert, csr.PublicKey, s.key)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
	var chain []string
	for _, raw := range [][]byte{der, s.cert.Raw} {
		chain = append(chain, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})))
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"certChain": chain})
}

func newRekeyer(t testing.TB, ca string, role identity.Role, life time.Duration) *rekeyer {
	k := &rekeyer{t: t, ca: ca, role: role, life: life, conns: make(chan net.Conn)}
	server := load(t, mint(t, ca, "kme", "ca", func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(1, 0, 0) }))
	s := &http.Server{
		Handler: k, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		TLSConfig: pki.ServerTLS(server, pool(t, filepath.Join(ca, string(role), "intermediate.pem")), tls.VersionTLS13),
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.ServeTLS(k, "", "") })
	t.Cleanup(func() {
		close(k.conns)
		_ = s.Close()
		serving.Wait()
	})
	return k
}

// renewal is that of id, whose certificate lasts as long as k's do.
func (k *rekeyer) renewal(id string) *pki.Renewal {
	k.t.Helper()
	dir := mint(k.t, k.ca, k.role, id, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(k.life) })
	if err := copyFile(k.ca, dir, "root.pem"); err != nil {
		k.t.Fatal(err)
	}
	e := pki.Enrolment{CA: "https://localhost:1", RootFingerprint: strings.Repeat("00", 32), Dir: dir, ID: id, TokenFile: filepath.Join(dir, "none"), Log: quiet}
	return &pki.Renewal{Enrolment: e.Over(k.dial), Credential: load(k.t, dir)}
}

// TestCAAwayForHalfADay: service goes on, the alarm stands well before the end, and the
// certificate is renewed soon after the CA is back.
func TestCAAwayForHalfADay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newRekeyer(t, newCAs(t), "kme", 24*time.Hour)
		r := k.renewal("km1")
		var record []string
		r.Record = func(_ context.Context, _ *x509.Certificate, err error) {
			if err != nil {
				record = append(record, "failed")
			} else {
				record = append(record, "renewed")
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		first := r.Credential.Leaf()
		at := func(hour float64) {
			time.Sleep(time.Until(first.NotBefore.Add(time.Duration(hour * float64(time.Hour)))))
			synctest.Wait()
		}
		at(10)
		k.away.Store(true)
		at(14)
		if n := k.asked.Load(); n != 0 {
			t.Errorf("asked %d times before two thirds of the life", n)
		}
		at(17.6) // two thirds, and a twentieth
		if !strings.Contains(strings.Join(record, " "), "failed") || r.Trouble(time.Now()) != "" {
			t.Errorf("with a quarter of the life left: %v, trouble %q", record, r.Trouble(time.Now()))
		}
		at(18.1)
		if got := r.Trouble(time.Now()); !strings.Contains(got, "is not renewed: asking") {
			t.Errorf("the alarm: %q", got)
		}
		at(22)
		if !r.Credential.Leaf().Equal(first) || time.Now().After(first.NotAfter) {
			t.Error("the certificate is not the one it was, or has ended")
		}
		if n := k.asked.Load(); n > 500 {
			t.Errorf("asked %d times", n)
		}
		k.away.Store(false)
		at(22.05)
		now := r.Credential.Leaf()
		if now.Equal(first) || now.PublicKey.(*ecdsa.PublicKey).Equal(first.PublicKey) {
			t.Error("no new certificate with a new key")
		}
		if got := r.Trouble(time.Now()); got != "" {
			t.Errorf("all is well, trouble: %q", got)
		}
		if onDisk := load(t, r.Enrolment.Dir).Leaf(); !onDisk.Equal(now) {
			t.Error("another one is on the disk")
		}
		if got := strings.Join(record, " "); got != "failed renewed" {
			t.Errorf("on record: %s", got)
		}
		at(22 + 24) // and goes on
		if second := r.Credential.Leaf(); second.Equal(now) {
			t.Error("not renewed a second time")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestRenewalRefused: what waiting does not heal is told of at once; what has ended
// wants a token; a certificate that is not ours is not taken.
func TestRenewalRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newRekeyer(t, newCAs(t), "kme", 24*time.Hour)
		for name, edit := range map[string]func(*x509.Certificate){
			"another ID":     func(c *x509.Certificate) { c.Subject.CommonName = "km2" },
			"another URI":    func(c *x509.Certificate) { c.URIs[0].Path = "/km2" },
			"no URI":         func(c *x509.Certificate) { c.URIs = nil },
			"ended":          func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
			"for nobody":     func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
			"unknown caveat": func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, unknownCritical) },
		} {
			k.edit = edit
			r := k.renewal("km1")
			before := r.Credential.Leaf()
			if err := r.Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "checking the new certificate") {
				t.Errorf("%s: %v", name, err)
			}
			if !load(t, r.Enrolment.Dir).Leaf().Equal(before) || !r.Credential.Leaf().Equal(before) {
				t.Errorf("%s: it was taken", name)
			}
		}
		k.edit = nil
		k.status.Store(http.StatusUnauthorized)
		r := k.renewal("km1")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(17*time.Hour + 50*time.Minute)
		synctest.Wait()
		if got := r.Trouble(time.Now()); !strings.Contains(got, "does not renew it: ") || !strings.Contains(got, "401") {
			t.Errorf("refused: trouble %q", got)
		}
		k.status.Store(http.StatusServiceUnavailable) // that heals
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := r.Trouble(time.Now()); got != "" {
			t.Errorf("a fault: trouble %q", got)
		}
		time.Sleep(8 * time.Hour)
		synctest.Wait()
		if got := r.Trouble(time.Now()); !strings.Contains(got, "ended at") || !strings.Contains(got, "token") {
			t.Errorf("ended: trouble %q", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestRenewalOfAnother: a certificate that somebody has put there, and that is due, is
// renewed as soon as it has been read.
func TestRenewalOfAnother(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newRekeyer(t, newCAs(t), "kme", 24*time.Hour)
		r := k.renewal("km1")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		synctest.Wait()
		began := time.Now()
		next := mint(t, k.ca, "kme", "km1", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = began.Add(-23*time.Hour), began.Add(time.Hour)
		})
		due := load(t, next).Leaf()
		for _, file := range []string{"key.pem", "cert.pem"} {
			if err := copyFile(next, r.Enrolment.Dir, file); err != nil {
				t.Fatal(err)
			}
		}
		if n := k.asked.Load(); n != 0 {
			t.Errorf("the CA was asked %d times before", n)
		}
		if err := r.Credential.Reload(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if now := r.Credential.Leaf(); now.Equal(due) || k.asked.Load() != 1 || !time.Now().Equal(began) {
			t.Errorf("after %v the CA was asked %d times, and the certificate that was put there is in use: %v", time.Since(began), k.asked.Load(), now.Equal(due))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestStoredAsOne: a process that dies between the two files leaves a pair: the old one
// if the key is the old one, else the new one.
func TestStoredAsOne(t *testing.T) {
	t.Parallel()
	ca := newCAs(t)
	next := mint(t, ca, "kme", "km1", nil)
	cert, key := []byte(pemText(t, filepath.Join(next, "cert.pem"))), []byte(pemText(t, filepath.Join(next, "key.pem")))
	for name, withKey := range map[string]bool{"before the key": false, "after it": true} {
		dir := mint(t, ca, "kme", "km1", nil)
		want := load(t, dir).Leaf()
		newKey := []byte(nil)
		if withKey {
			newKey, want = key, load(t, next).Leaf()
		}
		if err := pki.StoreHalf(dir, cert, newKey); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if got := load(t, dir).Leaf(); !got.Equal(want) {
				t.Errorf("%s: the wrong certificate", name)
			}
		}
	}
}

// TestRenewalUnderLoad: the door's certificate and alice's are renewed again and again,
// and the CA of SAEs is followed by another, while she asks without a pause: no request
// fails.
func TestRenewalUnderLoad(t *testing.T) {
	t.Parallel()
	d := newDoor(t, pki.Limits{})
	second := newCAs(t)
	crl := newPublisher(t)
	crl.publish(signerOf(t, second, "sae").crl(t, 1, nil))
	d.revoked.From([]string{d.crl.url, crl.url})

	saes, kmes := newRekeyer(t, d.ca, "sae", time.Hour), newRekeyer(t, d.ca, "kme", time.Hour)
	hers, its := saes.renewal("alice"), kmes.renewal("km1")
	roots := pool(t, filepath.Join(d.ca, "root.pem"))
	its.Credential = d.credential
	its.Enrolment.Dir = d.credentialDir
	if err := copyFile(d.ca, d.credentialDir, "root.pem"); err != nil {
		t.Fatal(err)
	}

	var asked atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for i := range 4 {
		load.Go(func() {
			c := d.clientOf(hers.Credential, roots)
			for n := 0; ctx.Err() == nil; n++ {
				if status, err := d.ask(c); err != nil || status != http.StatusOK {
					t.Errorf("a request failed: %d, %v", status, err)
					return
				}
				if i < 2 && n%5 == 0 { // two of them open new connections all the time
					c.CloseIdleConnections()
				}
				asked.Add(1)
			}
		})
	}
	more := func() {
		n := asked.Load()
		d.until("requests go on", func() bool { return asked.Load() > n+20 || t.Failed() })
	}
	for range 5 {
		if err := errors.Join(hers.Renew(ctx), its.Renew(ctx)); err != nil {
			t.Error(err)
		}
		more()
	}
	// Rollover: first both CAs are trusted, then her certificate is of the second one,
	// then the first is gone.
	d.trust(d.ca, second)
	more()
	next := mint(t, second, "sae", "alice", nil)
	for _, file := range []string{"key.pem", "cert.pem"} {
		if err := copyFile(next, hers.Enrolment.Dir, file); err != nil {
			t.Fatal(err)
		}
	}
	if err := hers.Credential.Reload(); err != nil {
		t.Fatal(err)
	}
	more()
	cancel()
	load.Wait()
	d.trust(second)
	if status, err := d.ask(d.clientOf(hers.Credential, roots)); err != nil || status != http.StatusOK {
		t.Errorf("with the second CA alone: %d, %v", status, err)
	}
	if status, _ := d.ask(d.client(d.alice())); status != 0 {
		t.Error("the first CA is trusted on")
	}
}

// TestRetire: a connection whose certificate is about to end is closed when its answer
// is through.
func TestRetire(t *testing.T) {
	t.Parallel()
	leaf := &x509.Certificate{NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	for name, tt := range map[string]struct {
		left time.Duration
		want string
	}{"long": {2 * time.Minute, ""}, "short": {30 * time.Second, "close"}, "over": {-time.Second, "close"}} {
		w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
		pki.Retire(okay, func() time.Time { return leaf.NotAfter.Add(-tt.left) }).ServeHTTP(w, r)
		if got := w.Header().Get("Connection"); got != tt.want {
			t.Errorf("%s: Connection: %q, want %q", name, got, tt.want)
		}
	}
}
