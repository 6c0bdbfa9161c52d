//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// turnItems is how many blobs are sealed or opened in one turn in the module: to get
// in costs about as much as one of them, and whoever waits for a turn waits for all.
const turnItems = 16

// Wrap seals plain (1 byte or more) and binds it to aad. It returns the fresh
// random IV and the blob: the ciphertext, as long as plain, then the tag. It keeps
// nothing of plain. After an error because ctx has ended, the module may still be
// reading plain and aad: they may be wiped, but not be used for something else.
func (k *KEK) Wrap(ctx context.Context, plain, aad []byte) (iv [IVBytes]byte, ct []byte, err error) {
	sealed, err := k.wrap(ctx, urgent, [][]byte{plain}, [][]byte{aad})
	if err != nil {
		return iv, nil, err
	}
	return sealed[0].IV, sealed[0].CT, nil
}

// WrapAll is Wrap of several, at little more than what the module takes for them. It
// seals all or none.
func (k *KEK) WrapAll(ctx context.Context, plains, aads [][]byte) ([]Sealed, error) {
	return k.wrap(ctx, urgent, plains, aads)
}

// WrapAllInBackground is WrapAll for what nobody waits for: every other call goes first.
func (k *KEK) WrapAllInBackground(ctx context.Context, plains, aads [][]byte) ([]Sealed, error) {
	return k.wrap(ctx, background, plains, aads)
}

func (k *KEK) wrap(ctx context.Context, c class, plains, aads [][]byte) ([]Sealed, error) {
	all := make([]Sealed, 0, len(plains))
	for len(all) < len(plains) {
		first := len(all)
		turn := make([]Sealed, min(turnItems, len(plains)-first))
		err := k.each(ctx, c, "wrapping", len(turn), &k.t.count.wraps, func(s pkcs11.SessionHandle, i int) error {
			plain, to := plains[first+i], &turn[i]
			to.AAD, to.CT = aads[first+i], make([]byte, len(plain)+TagBytes)
			_, _ = rand.Read(to.IV[:]) // never fails: it ends the process instead
			k.wraps.Add(1)             // before the call: an attempt that fails may have used the key
			return k.t.m.seal(s, k.copy, to.IV[:], to.AAD, plain, to.CT)
		}, nil)
		if err != nil {
			return nil, err
		}
		all = append(all, turn...)
	}
	return all, nil
}

// Unwrap opens what Wrap returned, given the same aad. The caller owns the plain
// bytes and wipes them. ErrTampered if anything about the blob was changed.
func (k *KEK) Unwrap(ctx context.Context, iv [IVBytes]byte, ct, aad []byte) ([]byte, error) {
	plains, err := k.UnwrapAll(ctx, []Sealed{{iv, ct, aad}})
	if err != nil {
		return nil, err
	}
	return plains[0], nil
}

// UnwrapAll is Unwrap of several, at little more than what the module takes for them.
// It opens all or none: who is told ErrTampered opens each alone to learn which.
func (k *KEK) UnwrapAll(ctx context.Context, blobs []Sealed) ([][]byte, error) {
	all := make([][]byte, 0, len(blobs))
	for len(all) < len(blobs) {
		first := len(all)
		turn := make([][]byte, min(turnItems, len(blobs)-first))
		err := k.each(ctx, urgent, "unwrapping", len(turn), &k.t.count.unwraps, func(s pkcs11.SessionHandle, i int) (err error) {
			turn[i], err = k.open(s, blobs[first+i])
			return err
		}, func() { wipe(turn) })
		if err != nil {
			wipe(all)
			return nil, err
		}
		all = append(all, turn...)
	}
	return all, nil
}

// open opens one blob.
func (k *KEK) open(s pkcs11.SessionHandle, blob Sealed) ([]byte, error) {
	if len(blob.CT) <= TagBytes {
		return nil, fmt.Errorf("%w: %d bytes", ErrTampered, len(blob.CT))
	}
	buf := make([]byte, len(blob.CT))
	n, err := k.t.m.unseal(s, k.copy, blob.IV[:], blob.AAD, blob.CT, buf)
	if errors.Is(err, errRefused) {
		if err := k.vouch(s, err); err != nil {
			return nil, err
		}
		// The token is well. If it refuses once more, it is the blob.
		if n, err = k.t.m.unseal(s, k.copy, blob.IV[:], blob.AAD, blob.CT, buf); errors.Is(err, errRefused) {
			return nil, fmt.Errorf("%w (%v)", ErrTampered, err)
		}
	}
	if err != nil {
		return nil, err
	}
	return buf[:n:n], nil
}

func wipe(plains [][]byte) {
	for _, plain := range plains {
		clear(plain)
	}
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

// each does n operations with the KEK in one turn, the next only after the one before,
// and counts them. Unless all succeed, discard, if it is not nil, is called when the
// module has let go of the last one.
func (k *KEK) each(ctx context.Context, c class, verb string, n int, count *outcomes, op func(pkcs11.SessionHandle, int) error, discard func()) error {
	if discard == nil {
		discard = func() {}
	}
	var done atomic.Int64
	err := k.t.call(ctx, c, verb+" under KEK "+k.info.Label, func() (err error) {
		if k.gone != nil {
			return k.gone
		}
		defer func() {
			if err != nil {
				discard()
			}
		}()
		return k.t.onSession(func(s pkcs11.SessionHandle) error {
			for i := range n {
				if i > 0 && ctx.Err() != nil { // nobody waits for the rest
					return fmt.Errorf("%w: %w", ErrUnavailable, context.Cause(ctx))
				}
				if err := op(s, i); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}, discard)
	count.done.Add(done.Load())
	if err != nil {
		count.failed(err)
	}
	return err
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
