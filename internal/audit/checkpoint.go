package audit

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint says how a log stands: C2SP tlog-checkpoint without extension lines.
type Checkpoint struct {
	Origin string // the log's name, which its key bears too
	Size   int64  // leaves
	Root   tlog.Hash
}

// Text is the body of the note that is signed.
func (c Checkpoint) Text() string {
	return c.Origin + "\n" + strconv.FormatInt(c.Size, 10) + "\n" + c.Root.String() + "\n"
}

// ParseCheckpoint reads what Text writes, and nothing else.
func ParseCheckpoint(text string) (Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" || !validName(lines[0]) {
		return Checkpoint{}, errors.New("a checkpoint is three lines: origin, size and root")
	}
	c := Checkpoint{Origin: lines[0]}
	var err error
	if c.Size, err = strconv.ParseInt(lines[1], 10, 64); err != nil || c.Size < 0 || strconv.FormatInt(c.Size, 10) != lines[1] {
		return Checkpoint{}, fmt.Errorf("%.30q is no size of a log", lines[1])
	}
	if c.Root, err = tlog.ParseHash(lines[2]); err != nil || c.Root.String() != lines[2] {
		return Checkpoint{}, fmt.Errorf("%.60q is no root of a log", lines[2])
	}
	return c, nil
}

// validName says whether a log or witness may have this name: such as the note format
// takes, printable and not too long for a line.
func validName(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for _, r := range s {
		if r <= ' ' || r >= 0x7f || r == '+' {
			return false
		}
	}
	return true
}

// OpenCheckpoint reads a signed checkpoint. The log must have signed it. cosigned are
// the names of those witnesses that have, too; a witness whose signature is wrong is
// an error, one that has not signed is not.
func OpenCheckpoint(signed []byte, log note.Verifier, witnesses ...Witness) (c Checkpoint, cosigned []string, err error) {
	known := []note.Verifier{log}
	for _, w := range witnesses {
		known = append(known, w)
	}
	n, err := note.Open(signed, note.VerifierList(known...))
	if err != nil {
		return Checkpoint{}, nil, fmt.Errorf("opening a checkpoint: %w", err)
	}
	byLog := false
	for _, s := range n.Sigs {
		if s.Name == log.Name() && s.Hash == log.KeyHash() {
			byLog = true
		} else {
			cosigned = append(cosigned, s.Name)
		}
	}
	if !byLog {
		return Checkpoint{}, nil, fmt.Errorf("opening a checkpoint: %s has not signed it", log.Name())
	}
	if c, err = ParseCheckpoint(n.Text); err != nil {
		return Checkpoint{}, nil, fmt.Errorf("opening a checkpoint: %w", err)
	}
	if c.Origin != log.Name() {
		return Checkpoint{}, nil, fmt.Errorf("opening a checkpoint: it is of log %s, not of %s", c.Origin, log.Name())
	}
	return c, cosigned, nil
}

// Key is an Ed25519 key that signs for a log or a witness, wherever it lies: in a
// token, if it is a hsm.SigningKey.
type Key interface {
	Public() ed25519.PublicKey
	Sign(ctx context.Context, message []byte) ([]byte, error)
}

// Types of signatures in notes (C2SP signed-note).
const (
	algorithmEd25519     = 0x01
	algorithmCosignature = 0x04 // cosignature/v1
)

// signTime bounds a signature in the token.
const signTime = 5 * time.Second

// LogSigner signs as a log, or vouches as one.
type LogSigner struct {
	name string
	key  Key
}

// NewLogSigner returns a note.Signer of the name.
func NewLogSigner(name string, key Key) (*LogSigner, error) {
	if !validName(name) {
		return nil, fmt.Errorf("%q is no name for a log", name)
	}
	return &LogSigner{name, key}, nil
}

// Name implements note.Signer.
func (s *LogSigner) Name() string { return s.name }

// KeyHash implements note.Signer.
func (s *LogSigner) KeyHash() uint32 { return keyHash(s.name, algorithmEd25519, s.key.Public()) }

// Sign implements note.Signer.
func (s *LogSigner) Sign(message []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), signTime)
	defer cancel()
	return s.key.Sign(ctx, message)
}

// VerifierKey is the text by which others know the log: what note.NewVerifier reads.
func (s *LogSigner) VerifierKey() string {
	return verifierKey(s.name, algorithmEd25519, s.key.Public())
}

// keyHash is a key's ID in signature lines.
func keyHash(name string, algorithm byte, public ed25519.PublicKey) uint32 {
	h := sha256.New()
	h.Write([]byte(name))
	h.Write([]byte{'\n', algorithm})
	h.Write(public)
	return binary.BigEndian.Uint32(h.Sum(nil))
}

func verifierKey(name string, algorithm byte, public ed25519.PublicKey) string {
	return fmt.Sprintf("%s+%08x+%s", name, keyHash(name, algorithm, public), base64.StdEncoding.EncodeToString(append([]byte{algorithm}, public...)))
}

// publicOf is the key in a verifier key.
func publicOf(vkey string) (ed25519.PublicKey, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 {
		return nil, fmt.Errorf("%.80q is no verifier key", vkey)
	}
	raw, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(raw) != 1+ed25519.PublicKeySize || raw[0] != algorithmEd25519 {
		return nil, fmt.Errorf("%.80q is no verifier key of Ed25519", vkey)
	}
	return raw[1:], nil
}

// Cosigner signs checkpoints of other logs as a witness (C2SP tlog-cosignature). It
// says no more than that it has seen this log at this size and no contradiction.
type Cosigner struct {
	name string
	key  Key
}

// NewCosigner returns a cosigner of the name.
func NewCosigner(name string, key Key) (*Cosigner, error) {
	if !validName(name) {
		return nil, fmt.Errorf("%q is no name for a witness", name)
	}
	return &Cosigner{name, key}, nil
}

// VerifierKey is the text by which others know the witness: what NewWitness reads.
func (w *Cosigner) VerifierKey() string {
	return verifierKey(w.name, algorithmCosignature, w.key.Public())
}

// Cosign returns the signature line for a checkpoint whose consistency with all that
// was cosigned before has been proved.
func (w *Cosigner) Cosign(ctx context.Context, c Checkpoint, at time.Time) (string, error) {
	sig, err := w.key.Sign(ctx, cosigned(at.Unix(), c.Text()))
	if err != nil {
		return "", fmt.Errorf("cosigning a checkpoint of %s: %w", c.Origin, err)
	}
	payload := binary.BigEndian.AppendUint32(nil, keyHash(w.name, algorithmCosignature, w.key.Public()))
	payload = binary.BigEndian.AppendUint64(payload, uint64(at.Unix()))
	return "— " + w.name + " " + base64.StdEncoding.EncodeToString(append(payload, sig...)) + "\n", nil
}

// cosigned is the message that a witness signs.
func cosigned(at int64, text string) []byte {
	return []byte("cosignature/v1\ntime " + strconv.FormatInt(at, 10) + "\n" + text)
}

// Witness is the public key of a witness: a note.Verifier of its cosignatures.
type Witness struct {
	name   string
	hash   uint32
	public ed25519.PublicKey
}

// NewWitness reads the verifier key of a witness.
func NewWitness(vkey string) (Witness, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 || !validName(parts[0]) {
		return Witness{}, fmt.Errorf("%.80q is no verifier key of a witness", vkey)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(parts[2])
	if err != nil || len(raw) != 1+ed25519.PublicKeySize || raw[0] != algorithmCosignature {
		return Witness{}, fmt.Errorf("%.80q is no verifier key of a witness: it holds no cosignature/v1 key", vkey)
	}
	w := Witness{parts[0], keyHash(parts[0], algorithmCosignature, raw[1:]), raw[1:]}
	if vkey != verifierKey(w.name, algorithmCosignature, w.public) {
		return Witness{}, fmt.Errorf("%.80q is no verifier key of a witness: its hash is another's", vkey)
	}
	return w, nil
}

// CheckCosignature verifies the signature lines that a witness has answered for a
// signed checkpoint.
func CheckCosignature(signed, lines string, w Witness) (Checkpoint, error) {
	n, err := note.Open([]byte(signed+lines), note.VerifierList(w))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checking the cosignature of %s: %w", w.Name(), err)
	}
	return ParseCheckpoint(n.Text)
}

// Name implements note.Verifier.
func (w Witness) Name() string { return w.name }

// KeyHash implements note.Verifier.
func (w Witness) KeyHash() uint32 { return w.hash }

// Verify implements note.Verifier: sig is the time and the signature.
func (w Witness) Verify(message, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := binary.BigEndian.Uint64(sig)
	return at < 1<<62 && ed25519.Verify(w.public, cosigned(int64(at), string(message)), sig[8:])
}
