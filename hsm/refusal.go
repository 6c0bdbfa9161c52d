//go:build cgo

package hsm

import (
	"bytes"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/miekg/pkcs11"
)

// A token locks after a few wrong PINs, some of them for ever. So whoever has a PIN
// refused leaves a note of that PIN, in the token itself as a public object, which
// every node of the site sees before it logs in, and in a file of its own, for tokens
// that take no object from somebody who is not logged in. A PIN with a note is never
// tried again; another one is, and if it is the right one all notes go.
//
// A note holds a salted hash that costs a tenth of a second and more for each guess. It
// is of a PIN that was wrong, but perhaps nearly right: the file is its owner's alone,
// and PINs should be random (kmed hsm init makes them so).

// refusalRounds of PBKDF2-HMAC-SHA256 are OWASP's advice of 2023. Tests have no time
// for them.
var refusalRounds = 600_000

const (
	refusalFormat = "refused-pin-v1 %d %x %x %s\n"
	refusalObject = "qkd kme refused PIN" // CKA_APPLICATION of the token's notes
)

// refusal is the note of one refused PIN.
type refusal struct {
	salt, hash []byte
	at         time.Time
	illegible  error // why it cannot be read, as one that a power cut has cut short: it may be of any PIN
}

func newRefusal(pin []byte) refusal {
	r := refusal{salt: make([]byte, 16), at: time.Now().UTC().Truncate(time.Second)}
	_, _ = rand.Read(r.salt) // never fails: it ends the process instead
	r.hash = slowHash(pin, r.salt)
	return r
}

// slowHash is PBKDF2 (RFC 8018) without the copy of the PIN in a string that the
// standard library's signature would ask for: the PIN's own hash goes in.
func slowHash(pin, salt []byte) []byte {
	sum := sha256.Sum256(pin)
	defer clear(sum[:])
	h, err := pbkdf2.Key(sha256.New, string(sum[:]), salt, refusalRounds, sha256.Size)
	if err != nil {
		panic(err) // only for lengths that FIPS 140 forbids
	}
	return h
}

func (r refusal) of(pin []byte) bool { return hmac.Equal(slowHash(pin, r.salt), r.hash) }

func (r refusal) text() []byte {
	return fmt.Appendf(nil, refusalFormat, refusalRounds, r.salt, r.hash, r.at.Format(time.RFC3339))
}

// parseRefusal reads what text has written.
func parseRefusal(text []byte) (r refusal, err error) {
	var rounds int
	var salt, hash, at string
	if _, err = fmt.Sscanf(string(text), "refused-pin-v1 %d %s %s %s\n", &rounds, &salt, &hash, &at); err != nil {
		return r, fmt.Errorf("note of a refused PIN: %w", err)
	}
	if rounds != refusalRounds {
		return r, fmt.Errorf("note of a refused PIN: %d rounds, want %d", rounds, refusalRounds)
	}
	var e1, e2, e3 error
	r.salt, e1 = hex.DecodeString(salt)
	r.hash, e2 = hex.DecodeString(hash)
	r.at, e3 = time.Parse(time.RFC3339, at)
	return r, errors.Join(e1, e2, e3)
}

// refusals reads every note, of the file and of the token.
func (t *Token) refusals(s pkcs11.SessionHandle) (all []refusal, err error) {
	var texts [][]byte
	if t.cfg.RefusalFile != "" {
		text, err := os.ReadFile(t.cfg.RefusalFile)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("notes of refused PINs: %w", err)
		}
		texts = bytes.SplitAfter(text, []byte("\n"))
	}
	objects, err := t.m.find(s, refusalNotes())
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		got, err := t.m.get(s, o, pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil))
		if err != nil {
			return nil, err
		}
		texts = append(texts, got[0].Value)
	}
	for _, text := range texts {
		if len(text) == 0 {
			continue
		}
		r, err := parseRefusal(text)
		if err != nil {
			r = refusal{illegible: err}
		}
		all = append(all, r)
	}
	return all, nil
}

// refusalNotes matches the token's notes.
func refusalNotes() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, refusalObject),
	}
}

// note leaves the note of a PIN that was refused. The process ends soon after: if it
// dies before the note is written, the PIN is tried once more; if while it is, no PIN is
// until somebody says so (RetryPIN), for the note may be cut short.
func (t *Token) note(pin []byte) error {
	r := newRefusal(pin)
	var inFile error
	if t.cfg.RefusalFile != "" {
		inFile = appendSynced(t.cfg.RefusalFile, r.text())
	}
	s, err := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err == nil {
		label := "refused " + r.at.Format(time.RFC3339)
		_, err = t.m.CreateObject(s, append(refusalNotes(), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_VALUE, r.text())))
		_ = t.m.CloseSession(s)
	}
	if err != nil && t.cfg.RefusalFile != "" && inFile == nil {
		t.log.Warn("the token takes no note of a refused PIN: only this node remembers it", "err", err)
		err = nil
	}
	if err = errors.Join(inFile, err); err != nil {
		return fmt.Errorf("noting the refused PIN: %w", err)
	}
	return nil
}

// appendSynced adds text to the file at path, which is its owner's alone.
func appendSynced(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// forget takes all notes away: the PIN at hand is the right one. What cannot be taken
// away does no harm, since it is of another.
func (t *Token) forget() error {
	var err error
	if t.cfg.RefusalFile != "" {
		if err = os.Remove(t.cfg.RefusalFile); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	s, e := t.m.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if e != nil {
		return errors.Join(err, fault("C_OpenSession", e))
	}
	defer t.m.CloseSession(s)
	objects, e := t.m.find(s, refusalNotes())
	for _, o := range objects {
		e = errors.Join(e, fault("C_DestroyObject", t.m.DestroyObject(s, o)))
	}
	return errors.Join(err, e)
}
