package kme

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// The formats of the additional authenticated data that binds a blob to its row:
// whoever moves a blob to another key, taker, link, site or KEK gets a blob that
// does not open.
const (
	atomFormat = "kme/atom/1"
	dueFormat1 = "kme/due/1" // of keys assigned by an earlier release: without the link and the peer
	dueFormat  = "kme/due/2"
)

// dueVersion is the one of dueFormat, as it stands in a row. Whoever writes another one there
// gets a blob that does not open.
const dueVersion = 2

// AtomAAD is the additional authenticated data of a pool atom: each field as
// uvarint length and bytes, in this order.
func AtomAAD(b []byte, site identity.KME, kek int64, ref handover.BlockRef, index int, id key.ID, p key.Provenance) []byte {
	b = appendText(b, atomFormat)
	b = appendText(b, site.String())
	b = appendNumber(b, kek)
	b = appendText(b, ref.Link)
	b = appendNumber(b, ref.Session)
	b = appendNumber(b, ref.Block)
	b = appendNumber(b, int64(index))
	b = appendBytes(b, id[:])
	b = appendText(b, string(p))
	return appendNumber(b, key.AtomBits)
}

// DueAAD is the additional authenticated data of a key that waits for one SAE, as its row
// says which.
func DueAAD(b []byte, site identity.KME, d store.Due) []byte {
	format, reread := dueFormat, ""
	if d.Version == 1 {
		format = dueFormat1
	}
	if d.Reread {
		reread = "reread"
	}
	b = appendText(b, format)
	b = appendText(b, site.String())
	b = appendNumber(b, d.KEK)
	b = appendBytes(b, d.Key[:])
	b = appendText(b, d.Master.String())
	b = appendText(b, d.SAE.String())
	b = appendNumber(b, int64(d.Bits))
	b = appendText(b, string(d.Provenance))
	b = appendNumber(b, d.ExpiresAt.UnixMilli())
	b = appendText(b, reread)
	if format == dueFormat1 {
		return b
	}
	b = appendText(b, d.Link)
	return appendText(b, d.Peer.String())
}

// spoilt says that a blob will never open, though the HSM is well: it was changed,
// or its KEK is gone.
func spoilt(err error) bool { return errors.Is(err, hsm.ErrTampered) || errors.Is(err, hsm.ErrNoKEK) }

// wrap has a KEK seal plains by one of its ways to do that. It and unseal are the only
// uses of KEKs.
func wrap(ctx context.Context, way func(context.Context, [][]byte, [][]byte) ([]hsm.Sealed, error), plains, aads [][]byte) ([]hsm.Sealed, error) {
	for range plains {
		if err := hsmFault(ctx); err != nil {
			return nil, err
		}
	}
	return way(ctx, plains, aads)
}

// hsmFault is what a test says is wrong with the token.
func hsmFault(ctx context.Context) error {
	if err := failpoint.Fault(ctx, failpoint.HSM); err != nil {
		return fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	}
	return nil
}

// wrapped is something sealed, and the KEK that it is sealed under.
type wrapped struct {
	hsm.Sealed
	kek int64
}

// wrappedAtom is a pool atom as the token sees it.
func (k *KME) wrappedAtom(a store.Atom, l *store.Lease) wrapped {
	aad := AtomAAD(make([]byte, 0, aadRoom), k.Self, a.KEK, l.BlockRef, a.Index, a.ID, l.Provenance)
	return wrapped{hsm.Sealed{IV: a.IV, CT: a.CT, AAD: aad}, a.KEK}
}

// wrappedDue is a key that waits for one SAE.
func (k *KME) wrappedDue(d store.Due) wrapped {
	return wrapped{hsm.Sealed{IV: d.IV, CT: d.CT, AAD: k.dueAAD(d)}, d.KEK}
}

func (k *KME) dueAAD(d store.Due) []byte {
	return DueAAD(make([]byte, 0, aadRoom), k.Self, d)
}

const aadRoom = 192 // bytes that most AADs fit in

// unsealAtom opens a pool atom. The caller wipes what it gets.
func (k *KME) unsealAtom(ctx context.Context, a store.Atom, l *store.Lease) ([]byte, error) {
	plains, _, err := k.unseal(ctx, k.wrappedAtom(a, l))
	if err != nil {
		return nil, err
	}
	return plains[0], nil
}

// unseal opens blobs, all or none. The caller wipes what it gets. With an error comes
// the blob that did not open, if it is one blob's.
func (k *KME) unseal(ctx context.Context, blobs ...wrapped) (plains [][]byte, bad int, err error) {
	plains = make([][]byte, 0, len(blobs))
	defer func() {
		if err != nil {
			clearAll(plains)
			plains = nil
		}
	}()
	for len(plains) < len(blobs) {
		first := len(plains)
		sealed := sameKEK(blobs[first:])
		kek, err := k.keks.byID(ctx, blobs[first].kek)
		if err != nil {
			return plains, first, err
		}
		for range sealed {
			if err := hsmFault(ctx); err != nil {
				return plains, first, err
			}
		}
		opened, err := kek.UnwrapAll(ctx, sealed)
		if spoilt(err) && len(sealed) > 1 {
			bad, err := firstSpoilt(ctx, kek, sealed)
			return plains, first + bad, err
		}
		if err != nil {
			return plains, first, err
		}
		plains = append(plains, opened...)
	}
	return plains, 0, nil
}

// sameKEK are the first of some blobs, as many as are under one KEK.
func sameKEK(blobs []wrapped) (sealed []hsm.Sealed) {
	for _, b := range blobs {
		if b.kek != blobs[0].kek {
			break
		}
		sealed = append(sealed, b.Sealed)
	}
	return sealed
}

// firstSpoilt opens each of several blobs, which do not all open, until one does not.
func firstSpoilt(ctx context.Context, kek *hsm.KEK, sealed []hsm.Sealed) (int, error) {
	for i, s := range sealed {
		plain, err := kek.Unwrap(ctx, s.IV, s.CT, s.AAD)
		clear(plain)
		if err != nil {
			return i, err
		}
	}
	return 0, fmt.Errorf("%w: of %d blobs one did not open, and then each did", hsm.ErrUnavailable, len(sealed))
}

func clearAll(plains [][]byte) {
	for _, plain := range plains {
		clear(plain)
	}
}

// sealDue seals plains for the SAEs of due, each under the KEK of the epoch in which it
// expires, and completes due. It does not wipe plains.
func (k *KME) sealDue(ctx context.Context, due []store.Due, plains [][]byte) error {
	for i := range due {
		due[i].Version = dueVersion
	}
	for len(due) > 0 {
		o, err := k.keks.forExpiry(ctx, &due[0])
		if err != nil {
			return err
		}
		aads := [][]byte{k.dueAAD(due[0])}
		for i := 1; i < len(due); i++ { // as many as are for the same KEK
			if next, err := k.keks.forExpiry(ctx, &due[i]); err != nil || next != o {
				break
			}
			aads = append(aads, k.dueAAD(due[i]))
		}
		sealed, err := wrap(ctx, o.kek.WrapAll, plains[:len(aads)], aads)
		if err != nil {
			return err
		}
		for i, s := range sealed {
			due[i].IV, due[i].CT = s.IV, s.CT
		}
		due, plains = due[len(aads):], plains[len(aads):]
	}
	return nil
}

func appendText(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendBytes(b, s []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// appendNumber writes v as 8 bytes, big-endian, behind their length.
func appendNumber(b []byte, v int64) []byte {
	b = binary.AppendUvarint(b, 8)
	return binary.BigEndian.AppendUint64(b, uint64(v))
}
