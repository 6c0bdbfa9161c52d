//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Wrap seals plain (1 byte or more) and binds it to aad. It returns the fresh
// random IV and the blob: the ciphertext, as long as plain, then the tag. It keeps
// nothing of plain. After an error because ctx has ended, the module may still be
// reading plain and aad: they may be wiped, but not be used for something else.
func (k *KEK) Wrap(ctx context.Context, plain, aad []byte) (iv [IVBytes]byte, ct []byte, err error) {
	return k.wrap(ctx, urgent, plain, aad)
}

// WrapInBackground is Wrap for what nobody waits for: every other call goes first.
func (k *KEK) WrapInBackground(ctx context.Context, plain, aad []byte) (iv [IVBytes]byte, ct []byte, err error) {
	return k.wrap(ctx, background, plain, aad)
}

func (k *KEK) wrap(ctx context.Context, c class, plain, aad []byte) (iv [IVBytes]byte, ct []byte, err error) {
	nonce := make([]byte, IVBytes+len(plain)+TagBytes)
	blob := nonce[IVBytes:]
	nonce = nonce[:IVBytes:IVBytes]
	_, _ = rand.Read(nonce) // never fails: it ends the process instead
	err = k.call(ctx, c, "wrapping", func(s pkcs11.SessionHandle) error {
		k.wraps.Add(1) // before the call: an attempt that fails may have used the key
		return k.t.m.seal(s, k.copy, nonce, aad, plain, blob)
	}, nil)
	k.t.count.wraps.add(err)
	if err != nil {
		return iv, nil, err
	}
	return [IVBytes]byte(nonce), blob, nil
}

// Unwrap opens what Wrap returned, given the same aad. The caller owns the plain
// bytes and wipes them. ErrTampered if anything about the blob was changed.
func (k *KEK) Unwrap(ctx context.Context, iv [IVBytes]byte, ct, aad []byte) ([]byte, error) {
	buf := make([]byte, len(ct))
	n := 0
	err := k.call(ctx, urgent, "unwrapping", func(s pkcs11.SessionHandle) (err error) {
		if len(ct) <= TagBytes {
			return fmt.Errorf("%w: %d bytes", ErrTampered, len(ct))
		}
		if n, err = k.t.m.unseal(s, k.copy, iv[:], aad, ct, buf); !errors.Is(err, errRefused) {
			return err
		}
		if err := k.vouch(s, err); err != nil {
			return err
		}
		// The token is well. If it refuses once more, it is the blob.
		if n, err = k.t.m.unseal(s, k.copy, iv[:], aad, ct, buf); errors.Is(err, errRefused) {
			return fmt.Errorf("%w (%v)", ErrTampered, err)
		}
		return err
	}, func() { clear(buf) })
	k.t.count.unwraps.add(err)
	if err != nil {
		return nil, err
	}
	return buf[:n:n], nil
}

// vouch is asked when the token refused a blob, which a broken token does too. It
// opens a blob that is known to be good on the same session. If even that fails, the
// token is down from here on, until a heartbeat finds it well.
func (k *KEK) vouch(s pkcs11.SessionHandle, refusal error) error {
	err := k.canary.check(k.t.m, s, k.copy)
	if err != nil {
		err = fmt.Errorf("%w; then known good blob: %w", refusal, err)
		k.t.goDown(err)
	}
	return err
}

func (k *KEK) call(ctx context.Context, c class, verb string, f func(pkcs11.SessionHandle) error, discard func()) error {
	return k.t.call(ctx, c, verb+" under KEK "+k.info.Label, func() error {
		if k.gone != nil {
			return k.gone
		}
		return k.t.onSession(f)
	}, discard)
}

// canary is a blob that is known to be good, to ask a key whether it works.
type canary struct {
	iv   [IVBytes]byte
	blob []byte
}

// canaryPayload is 17 bytes: SoftHSM's key wrapping gets lengths wrong that are not a
// multiple of 8, so our own must be seen to get them right.
var canaryPayload = []byte("qkd kme canary 17")

// newCanary seals a canary with key.
func newCanary(m *module, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) (canary, error) {
	c := canary{blob: make([]byte, len(canaryPayload)+TagBytes)}
	_, _ = rand.Read(c.iv[:])
	return c, m.seal(s, key, c.iv[:], canaryPayload, canaryPayload, c.blob)
}

// check opens the canary with key, which is the one that sealed it or a copy.
func (c canary) check(m *module, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
	plain := make([]byte, len(c.blob))
	n, err := m.unseal(s, key, c.iv[:], canaryPayload, c.blob, plain)
	if err != nil {
		return err
	}
	if !bytes.Equal(plain[:n], canaryPayload) {
		return errors.New("known good blob opened to something else")
	}
	return nil
}
