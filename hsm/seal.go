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

	"github.com/qutemail/kme/internal/registers"
)

// Wrap seals plain (1 byte or more) and binds it to aad. It returns the fresh
// random IV and the blob: the ciphertext, as long as plain, then the tag. It keeps
// nothing of plain.
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
	all := make([]Sealed, len(plains))
	for turn := all; len(turn) > 0; {
		n := min(turnItems, len(turn))
		if err := k.wrapTurn(ctx, c, plains[:n], aads[:n], turn[:n]); err != nil {
			return nil, err
		}
		plains, aads, turn = plains[n:], aads[n:], turn[n:]
	}
	return all, nil
}

// wrapTurn seals what goes into one turn.
func (k *KEK) wrapTurn(ctx context.Context, c class, plains, aads [][]byte, sealed []Sealed) error {
	var ivs [turnItems * IVBytes]byte
	_, _ = rand.Read(ivs[:len(sealed)*IVBytes]) // never fails: it ends the process instead
	b := batches.Get().(*batch)
	for i, plain := range plains {
		sealed[i] = Sealed{IV: [IVBytes]byte(ivs[i*IVBytes:]), AAD: aads[i]}
		if err := b.forSealing(sealed[i].IV[:], aads[i], plain, len(plain)+TagBytes); err != nil {
			b.end()
			k.t.count.wraps.failed(err)
			return err
		}
	}
	b.results()
	registers.Clear() // they have what was laid out last, and the turn may be on another thread
	if err := k.turn(ctx, c, b, sealing); err != nil {
		return err
	}
	for i := range sealed {
		sealed[i].CT = b.result(i)
	}
	b.end()
	return nil
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
	for len(blobs) > 0 {
		n := min(turnItems, len(blobs))
		var err error
		if all, err = k.unwrapTurn(ctx, blobs[:n], all); err != nil {
			wipe(all)
			return nil, err
		}
		blobs = blobs[n:]
	}
	return all, nil
}

// unwrapTurn opens what goes into one turn, and appends it to all.
func (k *KEK) unwrapTurn(ctx context.Context, blobs []Sealed, all [][]byte) ([][]byte, error) {
	b := batches.Get().(*batch)
	for i := range blobs {
		if err := b.forOpening(blobs[i].IV[:], blobs[i].AAD, blobs[i].CT); err != nil {
			b.end()
			k.t.count.unwraps.failed(ErrTampered)
			return all, fmt.Errorf("%w: %w", ErrTampered, err)
		}
	}
	b.results()
	if err := k.turn(ctx, urgent, b, opening); err != nil {
		return all, err
	}
	for i := range blobs {
		all = append(all, b.result(i))
	}
	b.end()
	return all, nil
}

// open opens the blobs of a batch, and returns how many it did.
func (k *KEK) open(s pkcs11.SessionHandle, b *batch, left *atomic.Int32) (done int, err error) {
	vouched := -1
	for {
		done, err = k.t.m.unseal(s, k.copy, b, done, left)
		switch {
		case !errors.Is(err, errRefused):
			return done, err
		case done == vouched: // the token is well: it is the blob
			return done, fmt.Errorf("%w (%v)", ErrTampered, err)
		}
		if err := k.vouch(s, err); err != nil {
			return done, err
		}
		vouched = done // to be tried once more
	}
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

// turn has the module do what is in b, in a turn of its own, and counts it. If it fails, b
// is ended.
func (k *KEK) turn(ctx context.Context, c class, b *batch, way direction) error {
	b.kek, b.way = k, way
	count := k.count(way)
	if err := k.t.enter(ctx, c); err != nil {
		b.end()
		count.failed(err)
		return fmt.Errorf("%s under KEK %s: %w", way, k.info.Label, err)
	}
	err := k.t.perform(ctx, c, b)
	if err != nil { // and b is not ours any more
		err = judged(fmt.Sprintf("%s under KEK %s", way, k.info.Label), err)
		count.failed(err)
	}
	return err
}

// count is where what is done in that direction is counted.
func (k *KEK) count(way direction) *outcomes {
	if way == sealing {
		return &k.t.count.wraps
	}
	return &k.t.count.unwraps
}

// run seals or opens what is in the batch.
func (b *batch) run(left *atomic.Int32) error {
	k := b.kek
	if k.gone != nil {
		return k.gone
	}
	s, err := k.t.takeSession()
	if err != nil {
		return err
	}
	var done int
	if b.way == sealing {
		k.wraps.Add(int64(b.n)) // before the call: an attempt that fails may have used the key
		done, err = k.t.m.seal(s, k.copy, b, left)
	} else {
		done, err = k.open(s, b, left)
	}
	k.count(b.way).done.Add(int64(done))
	k.t.giveSession(s, err)
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
	return c, m.sealOne(s, key, c.iv[:], canaryPayload, canaryPayload, c.blob)
}

// check opens the canary with key, which is the one that sealed it or a copy.
func (c canary) check(m *module, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
	plain, err := m.unsealOne(s, key, c.iv[:], canaryPayload, c.blob)
	if err != nil {
		return err
	}
	if !bytes.Equal(plain, canaryPayload) {
		return errors.New("known good blob opened to something else")
	}
	return nil
}
