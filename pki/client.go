package pki

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	caTimeout      = 30 * time.Second // of one request
	maxAnswerBytes = 1 << 20
)

// caClient speaks to one issuing CA, in the API of smallstep's step-ca.
type caClient struct {
	url  string
	dial func(ctx context.Context, network, address string) (net.Conn, error) // for tests; nil is the network
}

// root asks the CA for the root with the pinned fingerprint. Nothing vouches
// for this connection, and nothing has to: the answer must hash to the pin.
func (c caClient) root(ctx context.Context, fingerprint string) (*x509.Certificate, error) {
	pin := strings.ToLower(fingerprint)
	if raw, err := hex.DecodeString(pin); err != nil || len(raw) != sha256.Size {
		return nil, fmt.Errorf("the root's fingerprint %q is not a SHA-256 in hex", fingerprint)
	}
	var answer struct {
		CA string `json:"ca"`
	}
	unverified := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
	if err := c.call(ctx, unverified, http.MethodGet, "/root/"+pin, nil, &answer); err != nil {
		return nil, err
	}
	root, err := parseCertificate(answer.CA)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(root.Raw); hex.EncodeToString(sum[:]) != pin {
		return nil, fmt.Errorf("the CA's root has the fingerprint %x, not %s", sum, pin)
	}
	return root, nil
}

// sign sends the request and the token, over a connection verified against root.
func (c caClient) sign(ctx context.Context, root *x509.Certificate, id string, key *ecdsa.PrivateKey, token string) ([]*x509.Certificate, error) {
	csr, err := newRequest(id, key)
	if err != nil {
		return nil, err
	}
	request := struct {
		CSR   string `json:"csr"`
		Token string `json:"ott"`
	}{csr, token}
	var answer signed
	if err := c.call(ctx, AnonymousTLS(poolOf(root)), http.MethodPost, "/1.0/sign", request, &answer); err != nil {
		return nil, err
	}
	return answer.chain()
}

// rekey asks for a certificate that says what the one of cfg does, for another key.
func (c caClient) rekey(ctx context.Context, cfg *tls.Config, id string, key *ecdsa.PrivateKey) ([]*x509.Certificate, error) {
	csr, err := newRequest(id, key)
	if err != nil {
		return nil, err
	}
	request := struct {
		CSR string `json:"csr"`
	}{csr}
	var answer signed
	if err := c.call(ctx, cfg, http.MethodPost, "/1.0/rekey", request, &answer); err != nil {
		return nil, err
	}
	return answer.chain()
}

// newRequest is a certificate request in PEM. The CA takes nothing from it but its key.
func newRequest(id string, key *ecdsa.PrivateKey) (string, error) {
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: id}}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	return string(encodePEM("CERTIFICATE REQUEST", der)), err
}

// signed is the CA's answer to whoever gets a certificate.
type signed struct {
	Chain []string `json:"certChain"` // the leaf first
}

func (answer signed) chain() ([]*x509.Certificate, error) {
	if len(answer.Chain) == 0 {
		return nil, errors.New("the CA's answer holds no certificate")
	}
	var chain []*x509.Certificate
	for _, text := range answer.Chain {
		cert, err := parseCertificate(text)
		if err != nil {
			return nil, err
		}
		chain = append(chain, cert)
	}
	return chain, nil
}

// call makes one request on a connection of its own: no proxy, no redirect, a
// bounded answer.
func (c caClient) call(ctx context.Context, tlsConfig *tls.Config, method, path string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if method == http.MethodGet {
		body = nil
	}
	transport := &http.Transport{TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true, DialContext: c.dial}
	defer transport.CloseIdleConnections()
	client := http.Client{
		Transport:     transport,
		Timeout:       caTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.url, "/")+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return refusal(resp.StatusCode, text)
	}
	return json.Unmarshal(text, answer)
}

// refusedError is the CA's error, in its own words if it has any.
type refusedError struct {
	status  int
	message string
}

// Error says what the CA said.
func (e *refusedError) Error() string {
	return fmt.Sprintf("the CA refused: %d: %s", e.status, e.message)
}

func refusal(status int, body []byte) error {
	var problem struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &problem) != nil || problem.Message == "" {
		problem.Message = http.StatusText(status)
	}
	return &refusedError{status, problem.Message}
}
