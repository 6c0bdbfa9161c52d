package handover

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/qutemail/kme/internal/key"
)

// Sample asks the peer what bytes it has under one atom of the pool. The sender owns
// the atom and has burned its own copy; the receiver burns the other one before it
// answers, so that nothing that was ever compared is handed out.
type Sample struct {
	Link  string `json:"link"`
	Key   Key    `json:"key"`   // of one atom
	Nonce Digest `json:"nonce"` // random, of this question alone
}

// SampleAnswer answers a Sample.
type SampleAnswer struct {
	MAC     Digest `json:"mac,omitzero"`
	Lacking bool   `json:"lacking,omitempty"` // the receiver does not have the atom in its pool, or cannot open it
}

// MAC is what an end that has secret, the bytes of the atom, answers to s: HMAC-SHA-256
// over the question, keyed by them. Whoever does not know them learns nothing from it,
// and it tells the ends that they are equal, or not.
func (s Sample) MAC(secret []byte) Digest {
	h := hmac.New(sha256.New, secret)
	text := append([]byte("kme/sample/1"), s.Nonce[:]...)
	id := s.Key.ID()
	text = append(text, id[:]...)
	text = binary.BigEndian.AppendUint64(text, uint64(s.Key.Session))
	text = binary.BigEndian.AppendUint64(text, uint64(s.Key.Block))
	text = binary.BigEndian.AppendUint64(text, uint64(s.Key.First))
	h.Write(append(text, s.Link...))
	return Digest(h.Sum(nil))
}

// Equal compares two MACs in constant time.
func (d Digest) Equal(other Digest) bool { return hmac.Equal(d[:], other[:]) }

// Check says what is wrong with s, nil if nothing is.
func (s Sample) Check() error {
	if err := checkName("link", s.Link); err != nil {
		return fmt.Errorf("sample: %w", err)
	}
	if err := s.Key.check(key.AtomBits); err != nil {
		return fmt.Errorf("sample: %w", err)
	}
	if s.Nonce == (Digest{}) {
		return errors.New("sample: no nonce")
	}
	return nil
}

// Check says what is wrong with a, nil if nothing is.
func (a SampleAnswer) Check() error {
	if a.Lacking != (a.MAC == Digest{}) {
		return errors.New("answer to sample: a MAC of what is lacking, or neither")
	}
	return nil
}
