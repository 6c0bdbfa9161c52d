// Package approval is the word of an officer for an act that takes two of them: what
// kmectl makes with the private key of the officer's certificate, and how a KME sees
// that it holds. Whoever reads the audit later can check it again, with nothing but
// the certificate.
//
// An approval is for one act, at one node, until it ends, once: the node remembers
// its nonce. Who counts as an officer is not decided here.
package approval

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// MaxLife is the longest that an Approval may be good for.
const MaxLife = time.Hour

// nonceBytes is the length of a nonce.
const nonceBytes = 16

// Act is what is approved, in words that an officer reads before signing: its name and
// what it is done to, "compromise-key 01a2..." for example.
type Act string

// NewAct returns the Act of that name; on says, in the order that the act defines, what
// it is done to. What has a blank in it, as names of a foreign PKI may, stands in quotes.
func NewAct(name string, on ...string) (Act, error) {
	var said []string
	for _, w := range append([]string{name}, on...) {
		if w == "" || unprintable(w) {
			return "", fmt.Errorf("an act cannot be said with the word %q", w)
		}
		if strings.ContainsAny(w, " \"\\") {
			w = strconv.Quote(w)
		}
		said = append(said, w)
	}
	return Act(strings.Join(said, " ")), nil
}

// Words are the name of an act and what it is done to, as they were given to NewAct.
func (a Act) Words() (words []string) {
	for rest := string(a); rest != ""; rest = strings.TrimPrefix(rest, " ") {
		word, _, _ := strings.Cut(rest, " ")
		if said, err := strconv.QuotedPrefix(rest); err == nil {
			word = said
		}
		rest = rest[len(word):]
		if plain, err := strconv.Unquote(word); err == nil {
			word = plain
		}
		words = append(words, word)
	}
	return words
}

// ReadAct returns the Act that an officer was told to sign: text as NewAct says it.
func ReadAct(text string) (Act, error) {
	words := Act(strings.TrimSpace(text)).Words()
	if len(words) == 0 {
		return "", errors.New("an act has a name")
	}
	act, err := NewAct(words[0], words[1:]...)
	if err == nil && string(act) != strings.TrimSpace(text) {
		err = fmt.Errorf("an act is not said so: %q", text)
	}
	return act, err
}

func unprintable(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) })
}

// Approval is an officer's word.
type Approval struct {
	Act         Act       `json:"act"`
	Node        string    `json:"node"` // KME/node at which the act may be done
	Expires     time.Time `json:"expires"`
	Nonce       []byte    `json:"nonce"`       // base64
	Certificate []byte    `json:"certificate"` // the officer's, DER
	Signature   []byte    `json:"signature"`   // over the digest of the act, node, expiry and nonce
}

// message is what is signed. Its parts are prefixed by their lengths, so that no two
// approvals have the same.
func (a Approval) message() []byte {
	digest := sha256.Sum256([]byte(a.Act))
	m := []byte("kme/approval/1\x00")
	for _, part := range [][]byte{digest[:], []byte(a.Node), binary.BigEndian.AppendUint64(nil, uint64(a.Expires.UnixMilli())), a.Nonce} {
		m = binary.BigEndian.AppendUint32(m, uint32(len(part)))
		m = append(m, part...)
	}
	return m
}

// Sign approves an act at a node until expires, with the key of the officer's
// certificate: ECDSA over P-256 or P-384, or Ed25519.
func Sign(act Act, node string, expires time.Time, leaf *x509.Certificate, key crypto.Signer) (Approval, error) {
	a := Approval{Act: act, Node: node, Expires: expires.UTC().Truncate(time.Millisecond), Nonce: make([]byte, nonceBytes), Certificate: leaf.Raw}
	_, _ = rand.Read(a.Nonce) // never fails: it ends the process instead
	input, hash, err := input(leaf.PublicKey, a.message())
	if err != nil {
		return a, fmt.Errorf("approving: %w", err)
	}
	if a.Signature, err = key.Sign(rand.Reader, input, hash); err != nil {
		return a, fmt.Errorf("approving: %w", err)
	}
	return a, nil
}

// input is what a key of that kind signs of a message.
func input(public any, message []byte) ([]byte, crypto.Hash, error) {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize > 256 {
			sum := sha512.Sum384(message)
			return sum[:], crypto.SHA384, nil
		}
		sum := sha256.Sum256(message)
		return sum[:], crypto.SHA256, nil
	case ed25519.PublicKey:
		return message, 0, nil
	}
	return nil, 0, fmt.Errorf("a key of type %T signs no approvals", public)
}

// Verify returns the certificate of the officer who has approved act at node, if the
// signature holds and now is before its end, which is no further away than MaxLife.
// Whether the certificate is an officer's, and whether the nonce was seen before, is
// for the caller to find out.
func (a Approval) Verify(act Act, node string, now time.Time) (*x509.Certificate, error) {
	switch {
	case a.Act != act:
		return nil, fmt.Errorf("it approves %.100q, not %q", a.Act, act)
	case a.Node != node:
		return nil, fmt.Errorf("it is for the node %.100q, not %s", a.Node, node)
	case !now.Before(a.Expires):
		return nil, fmt.Errorf("it ended at %s", a.Expires.UTC().Format(time.RFC3339))
	case a.Expires.Sub(now) > MaxLife:
		return nil, fmt.Errorf("it is good for longer than %v", MaxLife)
	case len(a.Nonce) != nonceBytes:
		return nil, fmt.Errorf("its nonce is not %d bytes long", nonceBytes)
	}
	leaf, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return nil, fmt.Errorf("reading its certificate: %w", err)
	}
	input, _, err := input(leaf.PublicKey, a.message())
	if err != nil {
		return nil, err
	}
	good := false
	switch k := leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(k, input, a.Signature)
	case ed25519.PublicKey:
		good = ed25519.Verify(k, input, a.Signature)
	}
	if !good {
		return nil, errors.New("its signature does not hold")
	}
	return leaf, nil
}

// recorded is the longest between the moment when a node has verified approvals and the
// one at which it has the act on record.
const recorded = time.Minute

// Recheck returns the act that an event of the audit has the approvals of, and the
// certificates of both officers, if what they signed holds for that node and for the time
// at which the event was recorded. Whose the certificates are is for the caller to find out.
func Recheck(texts []string, node string, at time.Time) (act Act, officers []*x509.Certificate, err error) {
	if len(texts) != 2 {
		return "", nil, fmt.Errorf("there are %d approvals, not two", len(texts))
	}
	for i, text := range texts {
		var a Approval
		if err := json.Unmarshal([]byte(text), &a); err != nil {
			return "", nil, fmt.Errorf("reading an approval: %w", err)
		}
		if i == 0 {
			act = a.Act
		}
		verified := at // or, if it has ended meanwhile, shortly before
		if late := at.Sub(a.Expires); late >= 0 && late < recorded {
			verified = a.Expires.Add(-time.Millisecond)
		}
		leaf, err := a.Verify(act, node, verified)
		if err != nil {
			return act, nil, err
		}
		if at.Before(leaf.NotBefore) || at.Add(-recorded).After(leaf.NotAfter) {
			return act, nil, fmt.Errorf("the certificate of %s was not valid then", leaf.Subject)
		}
		officers = append(officers, leaf)
	}
	if bytes.Equal(officers[0].RawSubject, officers[1].RawSubject) {
		return act, nil, fmt.Errorf("both are of %s", officers[0].Subject)
	}
	return act, officers, nil
}
