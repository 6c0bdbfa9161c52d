package lab

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/lab/freeport"
	"github.com/qutemail/kme/pki"
)

// renewed: while alice asks for keys without a rest, the running CAs give KM1 and her new
// certificates for new keys, and another CA of SAEs follows the one that there was. No
// request fails.
func renewed(t *testing.T, l *Lab) {
	hers, its := l.profileDir("sae", "alice"), l.KM1.Node.path("tls")
	l.due(t, "sae", "alice", hers)
	a := l.askers(t, hers)

	// Renewed, each by what renews it in an installation, in the middle of the load.
	renewal := pki.Renewal{Credential: a.credential, Enrolment: pki.Enrolment{
		CA: fmt.Sprintf("https://localhost:%d", l.Ports.ca("sae")), Dir: hers, ID: "alice", Log: l.Log,
	}}
	due := a.credential.Leaf()
	ctx, stop := context.WithCancel(t.Context())
	var renewing sync.WaitGroup
	renewing.Go(func() { _ = renewal.Run(ctx) })
	defer renewing.Wait()
	defer stop()
	eventually(t, "a new certificate of alice", func(context.Context) error { return renewedSince(due, a.credential.Leaf()) })
	a.move(t)
	first, err := l.leafAtDoor(t.Context(), a.credential)
	if err != nil {
		t.Fatal(err)
	}
	second := l.due(t, "kme", "km1", its)
	if err := l.KM1.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new certificate of KM1 at its door", func(ctx context.Context) error {
		leaf, err := l.leafAtDoor(ctx, a.credential)
		if err != nil {
			return err
		}
		return cmp.Or(renewedSince(first, leaf), renewedSince(second, leaf))
	})
	a.move(t)

	// Another CA: first both are trusted, then alice has a certificate of the second one,
	// then the first is gone.
	other := l.secondCA(t)
	ours, err := os.ReadFile(l.path("ca", "sae", "intermediate.pem"))
	if err != nil {
		t.Fatal(err)
	}
	l.trust(t, slices.Concat(ours, other.issuer), other.crl)
	next := l.path("alice-next")
	other.enrol(t, "alice", next)
	eventually(t, "the second CA is trusted", func(ctx context.Context) error { return l.letsIn(ctx, next) })
	for _, file := range []string{"key.pem", "cert.pem"} {
		if err := os.Rename(filepath.Join(next, file), filepath.Join(hers, file)); err != nil {
			t.Fatal(err)
		}
	}
	old := l.path("alice-old")
	l.due(t, "sae", "alice", old) // of the first CA, and good for some hours
	if err := a.credential.Reload(); err != nil {
		t.Fatal(err)
	}
	a.move(t)
	l.trust(t, other.issuer, other.crl)
	eventually(t, "the first CA is trusted no more", func(ctx context.Context) error {
		if l.letsIn(ctx, old) == nil {
			return errors.New("it is let in")
		}
		return nil
	})
	a.move(t)
	a.end(t)
}

// renewedSince is nil if a certificate has followed another one, with another key.
func renewedSince(before, now *x509.Certificate) error {
	if now.Equal(before) || now.PublicKey.(*ecdsa.PublicKey).Equal(before.PublicKey) {
		return errNotYet
	}
	return nil
}

// due has the running CA of a role issue a certificate to id that is due for renewal,
// since it began almost a day ago, and puts it into dir.
func (l *Lab) due(t *testing.T, role, id, dir string) *x509.Certificate {
	t.Helper()
	token, err := l.kmeCA(t.Context(), "token", "--dir", l.path("ca"), role, id)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: id}}, key)
	if err != nil {
		t.Fatal(err)
	}
	question, err := json.Marshal(map[string]string{
		"csr": pemOf("CERTIFICATE REQUEST", csr), "ott": token, "notBefore": "-22h", "notAfter": "24h", // after its beginning
	})
	if err != nil {
		t.Fatal(err)
	}
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: pki.AnonymousTLS(roots)}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Post(fmt.Sprintf("https://localhost:%d/1.0/sign", l.Ports.ca(role)), "application/json", bytes.NewReader(question))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var answer struct{ CertChain []string }
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil || len(answer.CertChain) == 0 {
		t.Fatalf("asking the CA of %ss: %s: %v", role, res.Status, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.MkdirAll(dir, 0o700),
		os.WriteFile(filepath.Join(dir, "key.pem"), []byte(pemOf("PRIVATE KEY", der)), 0o600),
		os.WriteFile(filepath.Join(dir, "cert.pem"), []byte(strings.Join(answer.CertChain, "")), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(answer.CertChain[0]))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func pemOf(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// leafAtDoor is the certificate that KM1 shows to SAEs.
func (l *Lab) leafAtDoor(ctx context.Context, c *pki.Credential) (*x509.Certificate, error) {
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		return nil, err
	}
	d := tls.Dialer{Config: pki.ClientTLS(c, roots, nil)}
	conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(l.KM1.URL(), "https://"))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// letsIn is nil if KM1 serves alice with the certificate in dir.
func (l *Lab) letsIn(ctx context.Context, dir string) error {
	hc, err := l.httpClient(dir)
	if err != nil {
		return err
	}
	defer hc.CloseIdleConnections()
	_, err = etsi014.NewClient(l.KM1.URL(), hc).Status(ctx, SAEID("bob"))
	return err
}

// askers are several programs of alice, which ask for keys without a rest.
type askers struct {
	credential *pki.Credential // of all of them
	moves      atomic.Int64    // raised when they are to open new connections
	moved      []atomic.Int64  // the last that each has followed, after an answer over the new one
	stop       context.CancelFunc
	ended      sync.WaitGroup
	failed     chan error
}

const askersAtOnce = 3

func (l *Lab) askers(t *testing.T, dir string) *askers {
	t.Helper()
	c, err := pki.LoadCredential(dir)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := pki.LoadPool(l.path("root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	a := &askers{credential: c, moved: make([]atomic.Int64, askersAtOnce), stop: stop, failed: make(chan error, askersAtOnce)}
	for i := range a.moved {
		a.ended.Go(func() {
			tr := &http.Transport{TLSClientConfig: pki.ClientTLS(c, roots, nil)}
			defer tr.CloseIdleConnections()
			client := etsi014.NewClient(l.KM1.URL(), &http.Client{Transport: tr, Timeout: 10 * time.Second})
			tick := time.NewTicker(5 * time.Millisecond) // the pool must last
			defer tick.Stop()
			for ctx.Err() == nil {
				<-tick.C
				move := a.moves.Load()
				if move != a.moved[i].Load() {
					tr.CloseIdleConnections()
				}
				if err := discard(client.EncKeys(context.Background(), SAEID("bob"), etsi014.KeyRequest{})); err != nil {
					a.failed <- err
					return
				}
				a.moved[i].Store(move)
			}
		})
	}
	t.Cleanup(func() { stop(); a.ended.Wait() })
	a.move(t)
	return a
}

// move has them open new connections, and returns when each has been answered over one.
func (a *askers) move(t *testing.T) {
	t.Helper()
	to := a.moves.Add(1)
	eventually(t, "all have been answered over a new connection", func(context.Context) error {
		a.still(t)
		for i := range a.moved {
			if a.moved[i].Load() < to {
				return errNotYet
			}
		}
		return nil
	})
}

// still ends the test if a request has failed.
func (a *askers) still(t *testing.T) {
	t.Helper()
	select {
	case err := <-a.failed:
		t.Fatalf("a request failed: %v", err)
	default:
	}
}

func (a *askers) end(t *testing.T) {
	t.Helper()
	a.stop()
	a.ended.Wait()
	a.still(t)
}

// otherCA is a CA of SAEs under a root of its own, beside the lab's.
type otherCA struct {
	l      *Lab
	dir    string
	url    string
	crl    string // URL
	issuer []byte // PEM
}

func (l *Lab) secondCA(t *testing.T) otherCA {
	t.Helper()
	ca := otherCA{l: l, dir: l.path("ca-second")}
	args := []string{"init", "--dir", ca.dir, "--trust-domain", trustDomain}
	var addresses []string
	for _, role := range []string{"sae", "kme", "operator"} {
		for _, flag := range []string{"--address", "--crl-address"} {
			port, err := freeport.Find()
			if err != nil {
				t.Fatal(err)
			}
			address := fmt.Sprintf("localhost:%d", port)
			args, addresses = append(args, flag+"="+role+"="+address), append(addresses, address)
		}
	}
	if _, err := l.kmeCA(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
	ca.url, ca.crl = "https://"+addresses[0], "http://"+addresses[1]+"/crl"
	var err error
	if ca.issuer, err = os.ReadFile(filepath.Join(ca.dir, "sae", "intermediate.pem")); err != nil {
		t.Fatal(err)
	}
	p, err := l.nursery.start("second kme-ca sae", l.Dir, l.path("log", "ca-second"), nil, filepath.Join(l.Bin, "kme-ca"), "serve", "--config", filepath.Join(ca.dir, "sae", "ca.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the second CA", func(context.Context) error {
		conn, err := net.Dial("tcp", addresses[0])
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	return ca
}

// enrol gets a certificate for an SAE, as a program of it would.
func (ca otherCA) enrol(t *testing.T, id, dir string) {
	t.Helper()
	token, err := ca.l.kmeCA(t.Context(), "token", "--dir", ca.dir, "sae", id)
	if err != nil {
		t.Fatal(err)
	}
	fingerprint, err := ca.l.kmeCA(t.Context(), "fingerprint", "--dir", ca.dir)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(ca.dir, id+".token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := pki.Enrol(t.Context(), pki.Enrolment{CA: ca.url, RootFingerprint: fingerprint, TokenFile: file, Dir: dir, ID: id, Log: ca.l.Log}); err != nil {
		t.Fatal(err)
	}
}

// trust has KM1 take certificates of SAEs by these issuers, whose CRLs are the lab's and
// that at url, as pki/README.md says it is done.
func (l *Lab) trust(t *testing.T, issuers []byte, url string) {
	t.Helper()
	if err := os.WriteFile(l.path("ca", "sae", "intermediate.pem"), issuers, 0o644); err != nil {
		t.Fatal(err)
	}
	file := l.KM1.Node.path("kmed.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	ours := fmt.Sprintf("http://localhost:%d/crl", l.Ports.crl("sae"))
	both := strings.Replace(string(text), fmt.Sprintf("sae: [%q]", ours), fmt.Sprintf("sae: [%q, %q]", ours, url), 1)
	if !strings.Contains(both, url) {
		t.Fatalf("%s does not say where the CRL of SAEs is", file)
	}
	if err := os.WriteFile(file, []byte(both), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.KM1.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}
