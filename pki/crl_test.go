package pki_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
)

// publisher serves a CRL that tests replace.
type publisher struct {
	t    testing.TB
	url  string
	body atomic.Pointer[[]byte] // nil: an error
	asks atomic.Int64
}

func newPublisher(t testing.TB) *publisher {
	p := &publisher{t: t}
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	p.url = s.URL
	return p
}

func (p *publisher) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	p.asks.Add(1)
	body := p.body.Load()
	if body == nil {
		http.Error(w, "no CRL", http.StatusInternalServerError)
		return
	}
	w.Write(*body)
}

func (p *publisher) publish(raw []byte) { p.body.Store(&raw) }

// signer is an issuing CA with its key.
type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func signerOf(t testing.TB, ca string, role identity.Role) signer {
	t.Helper()
	cert, err := x509.ParseCertificate(readPEM(t, ca, role, "intermediate.pem").Bytes)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(readPEM(t, ca, role, "intermediate.key").Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return signer{cert, key.(crypto.Signer)}
}

// crl signs a CRL of a day. edit makes it one that the CA itself would not sign.
func (s signer) crl(t testing.TB, number int64, edit func(*x509.RevocationList), revoked ...*x509.Certificate) []byte {
	t.Helper()
	list := &x509.RevocationList{
		Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Second), NextUpdate: time.Now().Add(24 * time.Hour),
	}
	for _, c := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: c.SerialNumber, RevocationTime: time.Now().Add(-time.Minute), ReasonCode: 4,
		})
	}
	if edit != nil {
		edit(list)
	}
	raw, err := x509.CreateRevocationList(rand.Reader, list, s.cert, s.key)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func issuers(t testing.TB, file string) *pki.Issuers {
	t.Helper()
	i, err := pki.LoadIssuers(file)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

var quiet = slog.New(slog.DiscardHandler)

// saeRevocations are those of the SAE CA in ca, whose CRLs p publishes, kept in dir.
func saeRevocations(t testing.TB, ca, dir string, p *publisher) *pki.Revocations {
	t.Helper()
	r, err := pki.OpenRevocations(t.Context(), pki.RevocationsConfig{
		Role: "sae", Issuers: issuers(t, filepath.Join(ca, "sae/intermediate.pem")), URLs: []string{p.url}, Dir: dir, Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRevocations(t *testing.T) {
	t.Parallel()
	ca, dir := newCAs(t), t.TempDir()
	sae, kme := signerOf(t, ca, "sae"), signerOf(t, ca, "kme")
	alice, bob := load(t, mint(t, ca, "sae", "alice", nil)).Leaf(), load(t, mint(t, ca, "sae", "bob", nil)).Leaf()
	p := newPublisher(t)
	now := time.Now

	r := saeRevocations(t, ca, dir, p)
	if got := reasonOf(r.Check(alice, now())); got != identity.NoCRL {
		t.Errorf("before a first CRL: got %q, want %s", got, identity.NoCRL)
	}
	if got := r.Trouble(now()); !strings.Contains(got, "there is no CRL") || !strings.Contains(got, "500") {
		t.Errorf("before a first CRL, trouble: %q", got)
	}

	p.publish(sae.crl(t, 7, nil, bob))
	r = saeRevocations(t, ca, dir, p)
	expect := func(name, ofAlice, ofBob string) {
		t.Helper()
		if got := reasonOf(r.Check(alice, now())); got != ofAlice {
			t.Errorf("%s: alice: got %q, want %q", name, got, ofAlice)
		}
		if got := reasonOf(r.Check(bob, now())); got != ofBob {
			t.Errorf("%s: bob: got %q, want %q", name, got, ofBob)
		}
	}
	expect("number 7", "", identity.Revoked)
	if got := r.Trouble(now()); got != "" {
		t.Errorf("all is well, trouble: %q", got)
	}
	if got := r.Trouble(now().Add(16 * time.Minute)); !strings.Contains(got, "16m") {
		t.Errorf("16 minutes old, trouble: %q", got)
	}
	if got := reasonOf(r.Check(alice, now().Add(25*time.Hour))); got != identity.NoCRL {
		t.Errorf("a day later: got %q, want %s", got, identity.NoCRL)
	}
	if got := reasonOf(r.Check(load(t, mint(t, ca, "kme", "km1", nil)).Leaf(), now())); got != identity.NoCRL {
		t.Errorf("another CA's certificate: got %q, want %s", got, identity.NoCRL)
	}

	// What does not count. Each would let bob in.
	critical := func(id asn1.ObjectIdentifier, value []byte) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) {
			l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: id, Critical: true, Value: value})
		}
	}
	point := func(tag byte) func(*x509.RevocationList) {
		return critical(asn1.ObjectIdentifier{2, 5, 29, 28}, []byte{0x30, 3, 0x80 | tag, 1, 0xff})
	}
	broken := sae.crl(t, 9, nil)
	broken[len(broken)-1] ^= 1
	impostor := signer{sae.cert, kme.key}
	for name, raw := range map[string][]byte{
		"a lower number":     sae.crl(t, 6, nil),
		"the number again":   sae.crl(t, 7, nil),
		"another CA's":       kme.crl(t, 9, nil),
		"a broken signature": broken,
		"another key's":      signedBy(t, impostor),
		"of the past": sae.crl(t, 9, func(l *x509.RevocationList) {
			l.ThisUpdate, l.NextUpdate = now().Add(-time.Hour), now().Add(-time.Second)
		}),
		"of the future":         sae.crl(t, 9, func(l *x509.RevocationList) { l.ThisUpdate = now().Add(time.Hour) }),
		"a delta":               sae.crl(t, 9, critical(asn1.ObjectIdentifier{2, 5, 29, 27}, []byte{2, 1, 7})),
		"of CAs only":           sae.crl(t, 9, point(2)),
		"of some reasons only":  sae.crl(t, 9, critical(asn1.ObjectIdentifier{2, 5, 29, 28}, []byte{0x30, 4, 0x83, 2, 6, 0x40})),
		"indirect":              sae.crl(t, 9, point(4)),
		"of attributes only":    sae.crl(t, 9, point(5)),
		"with a broken scope":   sae.crl(t, 9, critical(asn1.ObjectIdentifier{2, 5, 29, 28}, []byte{1})),
		"nothing":               {},
		"a web page":            []byte("<html>"),
		"more than anyone has":  make([]byte, 17<<20),
		"a certificate instead": alice.Raw,
	} {
		p.publish(raw)
		r.Fetch(t.Context())
		expect(name, "", identity.Revoked)
		if got := r.Trouble(now().Add(16 * time.Minute)); !strings.Contains(got, ";") {
			t.Errorf("%s: the alarm does not say why no CRL comes: %q", name, got)
		}
	}
	p.body.Store(nil)
	r.Fetch(t.Context())
	expect("an error", "", identity.Revoked)

	// What is kept counts after a restart, also while the CA is away, and so does its number.
	r = saeRevocations(t, ca, dir, p)
	expect("after a restart", "", identity.Revoked)
	p.publish(sae.crl(t, 6, nil))
	r.Fetch(t.Context())
	expect("set back after a restart", "", identity.Revoked)

	changed := r.Changed()
	p.publish(sae.crl(t, 8, point(1), alice))
	r.Fetch(t.Context())
	expect("number 8", identity.Revoked, "")
	select {
	case <-changed:
	default:
		t.Error("nobody was told of the change")
	}
	if r.Changed() == changed {
		t.Error("Changed gives the old channel again")
	}

	// A file that was spoilt is as good as none.
	p.body.Store(nil)
	files, err := filepath.Glob(filepath.Join(dir, "sae-*.crl"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files: %v, %v", files, err)
	}
	if err := os.WriteFile(files[0], broken, 0o600); err != nil {
		t.Fatal(err)
	}
	r = saeRevocations(t, ca, dir, p)
	expect("a spoilt file", identity.NoCRL, identity.NoCRL)
}

// signedBy is a CRL in the name of a CA by another key; CreateRevocationList would
// notice.
func signedBy(t testing.TB, s signer) []byte {
	t.Helper()
	cert := *s.cert
	cert.PublicKey = s.key.Public()
	return signer{&cert, s.key}.crl(t, 9, nil)
}

// TestRevocationsAreKept: a folder that takes no files is told of, and the CRL counts.
func TestRevocationsAreKept(t *testing.T) {
	t.Parallel()
	ca, dir := newCAs(t), filepath.Join(t.TempDir(), "crl")
	bob := load(t, mint(t, ca, "sae", "bob", nil)).Leaf()
	sae, p := signerOf(t, ca, "sae"), newPublisher(t)
	p.publish(sae.crl(t, 1, nil))
	r := saeRevocations(t, ca, dir, p)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	p.publish(sae.crl(t, 2, nil, bob))
	r.Fetch(t.Context())
	if got := reasonOf(r.Check(bob, time.Now())); got != identity.Revoked {
		t.Errorf("got %q, want %s", got, identity.Revoked)
	}
	if got := r.Trouble(time.Now()); !strings.Contains(got, "not kept on the disk") {
		t.Errorf("trouble: %q", got)
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	r.Fetch(t.Context())
	if got := r.Trouble(time.Now()); got != "" {
		t.Errorf("the folder is back, trouble: %q", got)
	}
	p.body.Store(nil)
	if got := reasonOf(saeRevocations(t, ca, dir, p).Check(bob, time.Now())); got != identity.Revoked {
		t.Errorf("after a restart: got %q, want %s", got, identity.Revoked)
	}
}

// TestExpect: whoever is told of a change asks at once.
func TestExpect(t *testing.T) {
	t.Parallel()
	ca := newCAs(t)
	bob := load(t, mint(t, ca, "sae", "bob", nil)).Leaf()
	sae, p := signerOf(t, ca, "sae"), newPublisher(t)
	p.publish(sae.crl(t, 1, nil))
	r := saeRevocations(t, ca, t.TempDir(), p)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	changed := r.Changed()
	p.publish(sae.crl(t, 2, nil, bob))
	r.Expect()
	<-changed
	if got := reasonOf(r.Check(bob, time.Now())); got != identity.Revoked {
		t.Errorf("got %q, want %s", got, identity.Revoked)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestWhenCRLsAreFetched: every half a minute; from when a change is expected, at once and
// every second for half a minute; then as before.
func TestWhenCRLsAreFetched(t *testing.T) {
	t.Parallel()
	nobody := &publisher{url: "http://127.0.0.1:1/crl"}
	ca := newCAs(t)
	synctest.Test(t, func(t *testing.T) {
		r := saeRevocations(t, ca, t.TempDir(), nobody)
		began := time.Now()
		var at []int // seconds
		r.Through(func(*http.Request) (*http.Response, error) {
			at = append(at, int(time.Since(began).Seconds()))
			return nil, http.ErrServerClosed
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		until := func(second int) (asked []int) {
			<-time.After(time.Until(began.Add(time.Duration(second)*time.Second + time.Millisecond)))
			synctest.Wait()
			asked, at = at, nil
			return asked
		}
		if got := until(70); !slices.Equal(got, []int{30, 60}) {
			t.Errorf("asked at %v, want every 30 s", got)
		}
		r.Expect()
		want := []int{70}
		for s := 71; s <= 100; s++ {
			want = append(want, s)
		}
		if got := until(102); !slices.Equal(got, want) {
			t.Errorf("told at 70 s, asked at %v, want every second for 30 s", got)
		}
		if got := until(161); !slices.Equal(got, []int{130, 160}) {
			t.Errorf("later, asked at %v, want every 30 s again", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestIssuersChange: a CA that follows another is read with it, and CRLs of one that is
// gone count no more.
func TestIssuersChange(t *testing.T) {
	t.Parallel()
	first, second := newCAs(t), newCAs(t)
	file := filepath.Join(t.TempDir(), "sae.pem")
	write := func(cas ...string) {
		var all string
		for _, ca := range cas {
			all += pemText(t, filepath.Join(ca, "sae/intermediate.pem"))
		}
		if err := os.WriteFile(file, []byte(all), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	old, next := newPublisher(t), newPublisher(t)
	old.publish(signerOf(t, first, "sae").crl(t, 1, nil))
	next.publish(signerOf(t, second, "sae").crl(t, 1, nil))
	alice, anna := load(t, mint(t, first, "sae", "alice", nil)).Leaf(), load(t, mint(t, second, "sae", "alice", nil)).Leaf()

	write(first)
	in := issuers(t, file)
	r, err := pki.OpenRevocations(t.Context(), pki.RevocationsConfig{
		Role: "sae", Issuers: in, URLs: []string{old.url, next.url}, Dir: t.TempDir(), Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct {
		cas               []string
		ofAlice, ofSecond string
	}{
		{[]string{first}, "", identity.NoCRL},
		{[]string{first, second}, "", ""},
		{[]string{second}, identity.NoCRL, ""},
	} {
		write(tt.cas...)
		if err := in.Reload(); err != nil {
			t.Fatal(err)
		}
		r.Reissued()
		r.Fetch(t.Context())
		if got := reasonOf(r.Check(alice, time.Now())); got != tt.ofAlice {
			t.Errorf("step %d: the first CA's: got %q, want %q", i, got, tt.ofAlice)
		}
		if got := reasonOf(r.Check(anna, time.Now())); got != tt.ofSecond {
			t.Errorf("step %d: the second CA's: got %q, want %q", i, got, tt.ofSecond)
		}
	}
	if err := os.WriteFile(file, []byte(pemText(t, filepath.Join(mint(t, first, "sae", "alice", nil), "key.pem"))), 0o600); err != nil {
		t.Fatal(err)
	}
	if in.Reload() == nil {
		t.Error("a key was taken for an issuing CA")
	}
}

func BenchmarkRevocationsCheck(b *testing.B) {
	ca := newCAs(b)
	alice := load(b, mint(b, ca, "sae", "alice", nil)).Leaf()
	revoked := make([]*x509.Certificate, 10_000)
	for i := range revoked {
		revoked[i] = &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1))}
	}
	p := newPublisher(b)
	p.publish(signerOf(b, ca, "sae").crl(b, 1, nil, revoked...))
	r := saeRevocations(b, ca, b.TempDir(), p)
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Check(alice, now); err != nil {
			b.Fatal(err)
		}
	}
}
