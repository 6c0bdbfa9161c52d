// Package audittest has what tests sign an audit log with: a key in memory, where a node
// has one in its token. It is for tests.
package audittest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"testing"
)

// Key is the Ed25519 key of a log or a witness.
type Key struct{ ed25519.PrivateKey }

// NewKey makes one.
func NewKey(tb testing.TB) Key {
	tb.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return Key{private}
}

// KeyOf is the same key each time, one for each seed.
func KeyOf(seed byte) Key {
	return Key{ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))}
}

// Public returns the public half.
func (k Key) Public() ed25519.PublicKey { return k.PrivateKey.Public().(ed25519.PublicKey) }

// Sign signs a message.
func (k Key) Sign(_ context.Context, message []byte) ([]byte, error) {
	return ed25519.Sign(k.PrivateKey, message), nil
}
