package kme

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// keyring holds the KEKs that this node has opened: session copies in the HSM,
// one KEK per epoch. It makes the epochs ahead of need.
type keyring struct {
	k  *KME
	mu sync.Mutex // held while a KEK is made or opened: rare, and never on the hot path

	snapshot sync.Map // kek id (int64) -> *hsm.KEK
	current  sync.Map // key.Epoch -> openKEK

	counted map[int64]int64 // wraps already in the register; owned by whoever calls count
}

// openKEK is a KEK ready for use and the id that rows know it by.
type openKEK struct {
	id  int64
	kek *hsm.KEK
}

func newKeyring(k *KME) *keyring { return &keyring{k: k, counted: make(map[int64]int64)} }

// verify is nil if the token holds every KEK of the register that is in use, as it was
// made, and no two keys of one label: another token, a token from an old backup or one
// that somebody has changed is found out before anything is sealed or handed out.
func (r *keyring) verify(ctx context.Context) error {
	rows, err := r.k.Store.KEKs(ctx)
	if err != nil {
		return fmt.Errorf("listing KEKs: %w", err)
	}
	var keks []hsm.KEKInfo
	for _, row := range rows {
		if row.State == "open" && len(row.CheckValue) == 3 {
			keks = append(keks, hsm.KEKInfo{Label: row.Label, ID: row.PKCS11ID, CheckValue: [3]byte(row.CheckValue)})
		}
	}
	if err := r.k.Token.Verify(ctx, keks); err != nil {
		return fmt.Errorf("the token does not hold the keys that the database knows: %w", err)
	}
	return nil
}

// prepare opens the epochs that the next hour needs, so that no request waits for one.
func (r *keyring) prepare(ctx context.Context) error {
	now := key.EpochAt(r.k.Now(), r.k.EpochLength)
	last := key.EpochAt(r.k.Now().Add(r.k.DefaultTTL), r.k.EpochLength) + 1
	for e := now; e <= last; e++ {
		if _, err := r.forEpoch(ctx, e); err != nil {
			return err
		}
	}
	return nil
}

// forEpoch is the KEK under which what belongs to epoch e is sealed. It makes the
// epoch's partitions and KEK if they do not exist.
func (r *keyring) forEpoch(ctx context.Context, e key.Epoch) (openKEK, error) {
	if v, ok := r.current.Load(e); ok {
		return v.(openKEK), nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if v, ok := r.current.Load(e); ok {
		return v.(openKEK), nil
	}
	if _, err := r.k.Store.EnsureEpoch(ctx, e); err != nil {
		return openKEK{}, fmt.Errorf("opening epoch %d: %w", e, err)
	}
	if o, ok, err := r.registered(ctx, e); ok || err != nil {
		return o, err
	}
	return r.make(ctx, e)
}

// registered opens the epoch's KEK if there is one.
func (r *keyring) registered(ctx context.Context, e key.Epoch) (o openKEK, ok bool, err error) {
	rows, err := r.k.Store.KEKs(ctx)
	if err != nil {
		return openKEK{}, false, fmt.Errorf("listing KEKs: %w", err)
	}
	for _, row := range rows {
		if row.Epoch == e && row.State == "open" {
			o, err := r.open(ctx, row)
			return o, true, err
		}
	}
	return openKEK{}, false, nil
}

// tokenWriters is the lock for whoever changes the token (store.Alone). The nodes of a
// site share it, and SoftHSM, when two processes change a token at the same time, has
// one of them never see what the other has made.
const tokenWriters = "token"

// make creates the epoch's KEK, unless another node was first.
func (r *keyring) make(ctx context.Context, e key.Epoch) (o openKEK, err error) {
	err = r.k.Store.Alone(ctx, tokenWriters, func(ctx context.Context) error {
		var ok bool
		var err error
		if o, ok, err = r.registered(ctx, e); ok || err != nil {
			return err
		}
		o, err = r.makeAlone(ctx, e)
		return err
	})
	return o, err
}

// makeAlone creates a KEK in the token and registers it. If the process dies between
// the two, the token object is left without a row: nothing was sealed under it, and
// since labels end in a random part it is in nobody's way.
func (r *keyring) makeAlone(ctx context.Context, e key.Epoch) (openKEK, error) {
	var part [4]byte
	_, _ = rand.Read(part[:]) // never fails: it ends the process instead
	label := fmt.Sprintf("kek-%s-%s-%x", r.k.Self, e.Start(r.k.EpochLength).UTC().Format("20060102T150405"), part)
	info, err := r.k.Token.NewKEK(ctx, label)
	if err != nil {
		return openKEK{}, fmt.Errorf("making the KEK of epoch %d: %w", e, err)
	}
	ev := r.k.own(audit.KEKMade)
	ev.Reason = fmt.Sprintf("%s, check value %x", label, info.CheckValue)
	row, err := r.k.Store.AddKEK(ctx, store.KEK{Epoch: e, Label: info.Label, PKCS11ID: info.ID, CheckValue: info.CheckValue[:], State: "open"}, ev)
	if err == nil && string(row.PKCS11ID) == string(info.ID) {
		return r.open(ctx, row)
	}
	if !errors.Is(err, store.ErrDoubt) { // refused, or another node was first: nothing is sealed under ours
		if err := r.k.Token.DestroyKEK(context.WithoutCancel(ctx), info); err != nil {
			r.k.Log.Warn("destroying a KEK that is not needed", "label", label, "err", err)
		}
	}
	if err != nil {
		return openKEK{}, fmt.Errorf("registering the KEK of epoch %d: %w", e, err)
	}
	return r.open(ctx, row)
}

func (r *keyring) open(ctx context.Context, row store.KEK) (openKEK, error) {
	if v, ok := r.snapshot.Load(row.ID); ok {
		o := openKEK{row.ID, v.(*hsm.KEK)}
		r.current.Store(row.Epoch, o)
		return o, nil
	}
	if len(row.CheckValue) != 3 {
		return openKEK{}, fmt.Errorf("KEK %d has a check value of %d bytes, want 3", row.ID, len(row.CheckValue))
	}
	kek, err := r.k.Token.OpenKEK(ctx, hsm.KEKInfo{Label: row.Label, ID: row.PKCS11ID, CheckValue: [3]byte(row.CheckValue)})
	if err != nil {
		return openKEK{}, fmt.Errorf("opening KEK %d of epoch %d: %w", row.ID, row.Epoch, err)
	}
	r.snapshot.Store(row.ID, kek)
	o := openKEK{row.ID, kek}
	if row.State == "open" {
		r.current.Store(row.Epoch, o)
	}
	return o, nil
}

// byID is the KEK that a row names.
func (r *keyring) byID(ctx context.Context, id int64) (*hsm.KEK, error) {
	if v, ok := r.snapshot.Load(id); ok {
		return v.(*hsm.KEK), nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	rows, err := r.k.Store.KEKs(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing KEKs: %w", err)
	}
	for _, row := range rows {
		if row.ID == id {
			o, err := r.open(ctx, row)
			return o.kek, err
		}
	}
	return nil, fmt.Errorf("KEK %d is not registered: %w", id, hsm.ErrNoKEK)
}

// count adds the wraps made since the last call to the register, KEK by KEK.
func (r *keyring) count(ctx context.Context) {
	wraps := make(map[int64]int64)
	r.snapshot.Range(func(id, kek any) bool {
		if n := kek.(*hsm.KEK).Wraps(); n > r.counted[id.(int64)] {
			wraps[id.(int64)] = n - r.counted[id.(int64)]
		}
		return true
	})
	if len(wraps) == 0 {
		return
	}
	if err := r.k.Store.AddWraps(ctx, wraps); err != nil {
		r.k.Log.Warn("counting wraps", "err", err)
		return
	}
	for id, n := range wraps {
		r.counted[id] += n
	}
}

func (r *keyring) close() {
	r.snapshot.Range(func(_, kek any) bool {
		if err := kek.(*hsm.KEK).Close(); err != nil && !errors.Is(err, hsm.ErrUnavailable) {
			r.k.Log.Warn("giving up a KEK's session copy", "err", err)
		}
		return true
	})
}

// spoilt says that a blob will never open, though the HSM is well: it was changed,
// or its KEK is gone.
func spoilt(err error) bool { return errors.Is(err, hsm.ErrTampered) || errors.Is(err, hsm.ErrNoKEK) }

// wrap and unwrap are the only uses of KEKs.
func wrap(ctx context.Context, kek *hsm.KEK, plain, aad []byte) (iv [12]byte, ct []byte, err error) {
	if err := hsmFault(ctx); err != nil {
		return iv, nil, err
	}
	return kek.Wrap(ctx, plain, aad)
}

func unwrap(ctx context.Context, kek *hsm.KEK, iv [12]byte, ct, aad []byte) ([]byte, error) {
	if err := hsmFault(ctx); err != nil {
		return nil, err
	}
	return kek.Unwrap(ctx, iv, ct, aad)
}

// hsmFault is what a test says is wrong with the token.
func hsmFault(ctx context.Context) error {
	if err := failpoint.Fault(ctx, failpoint.HSM); err != nil {
		return fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	}
	return nil
}

// unsealAtom opens a pool atom. The caller wipes what it gets.
func (k *KME) unsealAtom(ctx context.Context, a store.Atom, l store.Lease) ([]byte, error) {
	kek, err := k.keks.byID(ctx, a.KEK)
	if err != nil {
		return nil, err
	}
	var buf [256]byte
	return unwrap(ctx, kek, a.IV, a.CT, AtomAAD(buf[:0], k.Self, a.KEK, l.BlockRef, a.Index, a.ID, l.Provenance))
}

// unsealDue opens a key that waits for one SAE. The caller wipes what it gets.
func (k *KME) unsealDue(ctx context.Context, d store.Due) ([]byte, error) {
	kek, err := k.keks.byID(ctx, d.KEK)
	if err != nil {
		return nil, err
	}
	var buf [512]byte
	return unwrap(ctx, kek, d.IV, d.CT, DueAAD(buf[:0], k.Self, d.KEK, d.Key, d.Master, d.SAE, d.Bits, d.Provenance, d.ExpiresAt, d.Reread))
}

// sealDue seals plain for d.SAE under the KEK of the epoch in which d expires,
// and completes d. It does not wipe plain.
func (k *KME) sealDue(ctx context.Context, d *store.Due, plain []byte) error {
	d.ExpiryEpoch = key.EpochAt(d.ExpiresAt, k.EpochLength)
	o, err := k.keks.forEpoch(ctx, d.ExpiryEpoch)
	if err != nil {
		return err
	}
	d.KEK = o.id
	var buf [512]byte
	d.IV, d.CT, err = wrap(ctx, o.kek, plain, DueAAD(buf[:0], k.Self, d.KEK, d.Key, d.Master, d.SAE, d.Bits, d.Provenance, d.ExpiresAt, d.Reread))
	return err
}

// expiry is when a key that lives for ttl from now ends, in the audit's precision.
func (k *KME) expiry(ttl time.Duration) time.Time {
	return k.Now().Add(ttl).Truncate(audit.Clock)
}
