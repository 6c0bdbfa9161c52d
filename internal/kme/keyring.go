package kme

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// keyring holds the KEKs that this node has opened: session copies in the HSM, one KEK
// per epoch that seals, and those that still open. It makes the epochs and their KEKs
// ahead of need, and lets go of what the site's register says is over: see follow.
type keyring struct {
	k    *KME
	busy chan struct{} // of one place, taken while a KEK is made or opened: rare, and never on the hot path

	snapshot sync.Map // kek id (int64) -> *hsm.KEK
	current  sync.Map // key.Epoch -> openKEK

	counted map[int64]int64 // wraps already in the register; owned by whoever calls count
}

// openKEK is a KEK ready for use and the id that rows know it by.
type openKEK struct {
	id  int64
	kek *hsm.KEK
}

func newKeyring(k *KME) *keyring {
	return &keyring{k: k, busy: make(chan struct{}, 1), counted: make(map[int64]int64)}
}

// enter waits until nobody else makes or opens a KEK, which may take as long as the HSM
// does: no longer than ctx. Whoever has entered leaves.
func (r *keyring) enter(ctx context.Context) error {
	select {
	case r.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for another KEK to be opened: %w", ctx.Err())
	}
}

func (r *keyring) leave() { <-r.busy }

// verify is nil if the token holds every KEK of the register that is in use, as it was
// made, and no two keys of one label: another token, a token from an old backup or one
// that somebody has changed is found out before anything is sealed or handed out.
func (r *keyring) verify(ctx context.Context) error {
	rows, err := r.k.Store.KEKs(ctx)
	if err != nil {
		return fmt.Errorf("listing KEKs: %w", err)
	}
	epochs, err := r.k.Store.Epochs(ctx)
	if err != nil {
		return fmt.Errorf("listing epochs: %w", err)
	}
	ending := make(map[key.Epoch]bool) // whose KEKs may be gone from the token, which a dead process has not recorded
	for _, e := range epochs {
		ending[e.Epoch] = e.State == store.EpochDraining
	}
	var keks []hsm.KEKInfo
	for _, row := range rows {
		if (row.State == store.KEKOpen || row.State == store.KEKSealed) && !ending[row.Epoch] && len(row.CheckValue) == 3 {
			keks = append(keks, hsm.KEKInfo{Label: row.Label, ID: row.PKCS11ID, CheckValue: [3]byte(row.CheckValue)})
		}
	}
	if err := r.k.Token.Verify(ctx, keks); err != nil {
		return fmt.Errorf("the token does not hold the keys that the database knows: %w", err)
	}
	return nil
}

// aheadOfNeed is how long before an epoch is needed, at least, it is opened and its KEK
// made.
const aheadOfNeed = 10 * time.Second

// prepare opens the epochs that blocks and the keys of default lifetimes will need next,
// so that no request waits for one. If a lifetime is many epochs, those in between are
// there from when they were needed for it.
func (r *keyring) prepare(ctx context.Context) error {
	needs := []time.Duration{0, r.k.DefaultTTL} // from now
	for _, l := range r.k.links {
		needs = append(needs, cmp.Or(l.TTL, r.k.DefaultTTL))
	}
	slices.Sort(needs)
	now := r.k.Now()
	for _, need := range slices.Compact(needs) {
		last := key.EpochAt(now.Add(need+aheadOfNeed), r.k.EpochLength) + 1
		for e := key.EpochAt(now.Add(need), r.k.EpochLength); e <= last; e++ {
			if _, err := r.forEpoch(ctx, e); err != nil && !errors.Is(err, store.ErrExpired) {
				return err
			}
		}
	}
	return nil
}

// forEpoch is the KEK under which what belongs to epoch e is sealed. It makes the
// epoch's partitions and KEK if they do not exist. With store.ErrExpired the epoch is
// sealed.
func (r *keyring) forEpoch(ctx context.Context, e key.Epoch) (openKEK, error) {
	if v, ok := r.current.Load(e); ok {
		return v.(openKEK), nil
	}
	if err := r.enter(ctx); err != nil {
		return openKEK{}, err
	}
	defer r.leave()
	if v, ok := r.current.Load(e); ok {
		return v.(openKEK), nil
	}
	if _, err := r.k.Store.EnsureEpoch(ctx, e); err != nil {
		return openKEK{}, fmt.Errorf("opening epoch %d: %w", e, err)
	}
	if !r.k.Store.Fillable(e) {
		return openKEK{}, fmt.Errorf("epoch %d: %w", e, store.ErrExpired)
	}
	row, ok, err := r.registered(ctx, e)
	if err == nil && !ok {
		row, err = r.make(ctx, e)
	}
	if err != nil {
		return openKEK{}, err
	}
	kek, err := r.open(ctx, row)
	if err != nil {
		return openKEK{}, err
	}
	o := openKEK{row.ID, kek}
	r.current.Store(e, o)
	return o, nil
}

// registered looks for the KEK that seals what belongs to the epoch.
func (r *keyring) registered(ctx context.Context, e key.Epoch) (row store.KEK, ok bool, err error) {
	rows, err := r.k.Store.KEKs(ctx)
	if err != nil {
		return row, false, err
	}
	for _, row := range rows {
		if row.Epoch == e && row.State == store.KEKOpen {
			return row, true, nil
		}
	}
	return row, false, nil
}

// tokenWriters is the lock for whoever changes the token (store.Alone). The nodes of a
// site share it, and SoftHSM, when two processes change a token at the same time, has
// one of them never see what the other has made.
const tokenWriters = "token"

// make creates the epoch's KEK, unless another node was first.
func (r *keyring) make(ctx context.Context, e key.Epoch) (row store.KEK, err error) {
	err = r.k.Store.Alone(ctx, tokenWriters, func(ctx context.Context) error {
		var ok bool
		var err error
		if row, ok, err = r.registered(ctx, e); ok || err != nil {
			return err
		}
		row, err = r.makeAlone(ctx, e, 0)
		return err
	})
	return row, err
}

// replace has another KEK seal what belongs to the epoch of one that has sealed enough.
// Until it is there the old one goes on, so that nobody waits.
func (r *keyring) replace(ctx context.Context, old store.KEK) error {
	return r.k.Store.Alone(ctx, tokenWriters, func(ctx context.Context) error {
		row, ok, err := r.registered(ctx, old.Epoch)
		if err != nil || !ok || row.ID != old.ID { // another node was first
			return err
		}
		_, err = r.makeAlone(ctx, old.Epoch, old.ID)
		return err
	})
}

// makeAlone creates a KEK in the token and registers it. It is written down before: if
// the process dies on the way, whoever writes to the token next finds the plan, and
// destroys what there is of it (sweep). Nothing was sealed under it.
func (r *keyring) makeAlone(ctx context.Context, e key.Epoch, replaces int64) (store.KEK, error) {
	var part [4]byte
	_, _ = rand.Read(part[:]) // never fails: it ends the process instead
	label := fmt.Sprintf("kek-%s-%s-%x", r.k.Self, e.Start(r.k.EpochLength).UTC().Format("20060102T150405"), part)
	id, err := r.k.Store.PlanKEK(ctx, e, label)
	if err != nil {
		return store.KEK{}, err
	}
	failpoint.Hit(failpoint.EpochKEKPlanned)
	info, err := r.k.Token.NewKEK(ctx, label)
	if err != nil {
		return store.KEK{}, fmt.Errorf("making the KEK of epoch %d: %w", e, err)
	}
	failpoint.Hit(failpoint.EpochKEKMade)
	ev := r.k.own(audit.KEKMade)
	ev.Reason = fmt.Sprintf("KEK %d of epoch %d: %s, check value %x", id, e, label, info.CheckValue)
	row, err := r.k.Store.OpenKEK(ctx, store.KEK{ID: id, Epoch: e, PKCS11ID: info.ID, CheckValue: info.CheckValue[:]}, replaces, ev)
	if err == nil && row.ID == id || errors.Is(err, store.ErrDoubt) {
		return row, err
	}
	giving, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
	defer cancel()
	if aerr := r.abandon(giving, id, info); aerr != nil {
		r.k.Log.Warn("giving up a KEK that is not needed", "label", label, "err", aerr)
	}
	return row, err
}

// abandon gives up a KEK that was planned, and made, and is not needed. The register is
// first: if the process dies in between, sweep does the rest.
func (r *keyring) abandon(ctx context.Context, id int64, info hsm.KEKInfo) error {
	given, err := r.k.Store.AbandonKEK(ctx, id)
	if err != nil || !given {
		return err
	}
	return r.discard(ctx, id, info)
}

// discard destroys in the token what was made for a plan that was given up.
func (r *keyring) discard(ctx context.Context, id int64, info hsm.KEKInfo) error {
	was, err := r.destroy(ctx, info)
	if err != nil || !was {
		return err
	}
	ev := r.k.own(audit.KEKGone)
	ev.Reason = fmt.Sprintf("KEK %d: %s, check value %x: it was never used", id, info.Label, info.CheckValue)
	return r.k.Store.Record(ctx, ev)
}

// destroy destroys a KEK in the token, and says whether it was there. That it was not is
// believed only of a token that is in sight.
func (r *keyring) destroy(ctx context.Context, info hsm.KEKInfo) (was bool, err error) {
	err = r.k.Token.DestroyKEK(ctx, info)
	if errors.Is(err, hsm.ErrNoKEK) {
		return false, r.inSight(ctx)
	}
	return true, err
}

// inSight is nil if the token shows what is known to be in it: the number of this node's
// run. To a process that a module does not take for logged in, for which it may have no
// error, an HSM seems to be empty.
func (r *keyring) inSight(ctx context.Context) error {
	run, err := r.k.Token.Counter(ctx, runCounter(r.k.Node))
	if err == nil && run < max(1, r.k.run.Load()) {
		err = fmt.Errorf("it shows run %d of this node, which is in run %d: what else it does not show may be in it", run, r.k.run.Load())
	}
	if err != nil {
		return fmt.Errorf("looking whether the token shows what is in it: %w", err)
	}
	return nil
}

// sweep gives up the plans of processes that have died over them, and destroys in the token
// what was made for plans that were given up, also long after: the module may have come back
// from a call when nobody waited for it any more, or the process may have died. The caller is
// alone with the token, so that hardly anybody is at work on a plan; whoever is, since the
// lock was lost, finds that the register decides: what is given up there is never registered
// and seals nothing, and what was registered before stays. One that cannot be destroyed keeps
// none of the others. It says whether anything has changed.
func (r *keyring) sweep(ctx context.Context, rows []store.KEK, inToken []hsm.KeyStatus) (swept bool, err error) {
	for _, row := range rows {
		if row.State != store.KEKPlanned {
			continue
		}
		given, failed := r.k.Store.AbandonKEK(ctx, row.ID)
		swept = swept || given
		err = errors.Join(err, failed)
	}
	var unknown []string
	for _, info := range inToken {
		if info.Err == nil && !registeredAs(rows, info.KEKInfo) {
			unknown = append(unknown, info.Label)
		}
	}
	if len(unknown) == 0 {
		return swept, err
	}
	givenUp, failed := r.k.Store.AbandonedKEKs(ctx, unknown)
	err = errors.Join(err, failed)
	for _, row := range givenUp {
		for _, info := range inToken {
			if info.Label != row.Label || info.Err != nil || registeredAs(rows, info.KEKInfo) {
				continue
			}
			if failed := r.discard(ctx, row.ID, info.KEKInfo); failed != nil {
				err = errors.Join(err, fmt.Errorf("clearing up after KEK %d, which was planned: %w", row.ID, failed))
			} else {
				swept = true
			}
		}
	}
	return swept, err
}

// registeredAs says whether a KEK of the register that is in use has the label or the check
// value: a copy of one, whatever its label says, is for an operator to see.
func registeredAs(rows []store.KEK, info hsm.KEKInfo) bool {
	return slices.ContainsFunc(rows, func(row store.KEK) bool {
		return row.State != store.KEKPlanned && (row.Label == info.Label || bytes.Equal(row.CheckValue, info.CheckValue[:]))
	})
}

// open opens a KEK that is in the token. That this run has a copy of it is written down
// before: until it is given up, or the run is taken over, the KEK is not destroyed. The
// caller has entered.
func (r *keyring) open(ctx context.Context, row store.KEK) (*hsm.KEK, error) {
	if v, ok := r.snapshot.Load(row.ID); ok {
		return v.(*hsm.KEK), nil
	}
	info, err := infoOf(row)
	if err != nil {
		return nil, err
	}
	err = r.k.Store.HoldKEK(ctx, row.ID)
	if errors.Is(err, store.ErrExpired) {
		return nil, fmt.Errorf("%w: the epoch of KEK %d is over: %w", hsm.ErrNoKEK, row.ID, err)
	}
	if err != nil {
		return nil, err
	}
	kek, err := r.k.Token.OpenKEK(ctx, info)
	if err != nil {
		return nil, fmt.Errorf("opening KEK %d of epoch %d: %w", row.ID, row.Epoch, err)
	}
	r.snapshot.Store(row.ID, kek)
	return kek, nil
}

// infoOf is how the token knows a KEK.
func infoOf(row store.KEK) (hsm.KEKInfo, error) {
	if len(row.CheckValue) != 3 {
		return hsm.KEKInfo{}, fmt.Errorf("KEK %d has a check value of %d bytes, want 3", row.ID, len(row.CheckValue))
	}
	return hsm.KEKInfo{Label: row.Label, ID: row.PKCS11ID, CheckValue: [3]byte(row.CheckValue)}, nil
}

// byID is the KEK that a row names.
func (r *keyring) byID(ctx context.Context, id int64) (*hsm.KEK, error) {
	if v, ok := r.snapshot.Load(id); ok {
		return v.(*hsm.KEK), nil
	}
	if err := r.enter(ctx); err != nil {
		return nil, err
	}
	defer r.leave()
	rows, err := r.k.Store.KEKs(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing KEKs: %w", err)
	}
	for _, row := range rows {
		if row.ID == id {
			return r.open(ctx, row)
		}
	}
	return nil, fmt.Errorf("KEK %d is not registered, or destroyed: %w", id, hsm.ErrNoKEK)
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

// follow has this node do as the register says: seal under the KEKs that are to seal,
// replace one that has sealed enough, and give up its copies of those whose epoch is
// over. One with which that cannot be done keeps none of the others.
func (r *keyring) follow(ctx context.Context, epochs []store.Epoch) (err error) {
	me := store.NodeRun{Node: r.k.Node, Run: r.k.run.Load()}
	for _, e := range epochs {
		seals := int64(0)
		for _, kek := range e.KEKs {
			if e.State == store.EpochOpen && kek.State == store.KEKOpen {
				seals = kek.ID
			}
			if e.State == store.EpochDraining && slices.Contains(kek.Copies, me) {
				err = errors.Join(err, r.giveUp(ctx, kek.KEK))
			}
			if seals == kek.ID && kek.Wraps >= r.k.MaxWraps {
				if e := r.replace(ctx, kek.KEK); e != nil {
					err = errors.Join(err, fmt.Errorf("replacing KEK %d, which has sealed %d times: %w", kek.ID, kek.Wraps, e))
				} else {
					seals = 0
				}
			}
		}
		if v, ok := r.current.Load(e.Epoch); ok && v.(openKEK).id != seals {
			r.current.Delete(e.Epoch)
		}
	}
	return err
}

// giveUp destroys this node's session copies of a KEK whose epoch is draining, also one
// that an opening has left which failed, and records it. If the process dies in between,
// its run, and with it the copy, is over.
func (r *keyring) giveUp(ctx context.Context, row store.KEK) error {
	if err := r.enter(ctx); err != nil { // nobody is opening it
		return err
	}
	defer r.leave()
	info, err := infoOf(row)
	if err != nil {
		return err
	}
	if err := r.k.Token.CloseKEK(ctx, info); err != nil {
		return fmt.Errorf("giving up the copy of KEK %d: %w", row.ID, err)
	}
	r.snapshot.Delete(row.ID)
	failpoint.Hit(failpoint.EpochCopyClosed)
	ev := r.k.own(audit.CopyClosed)
	ev.Reason = fmt.Sprintf("KEK %d of epoch %d: %s, check value %x", row.ID, row.Epoch, row.Label, row.CheckValue)
	return r.k.Store.GiveUpKEK(ctx, row.ID, ev)
}

// closeTime is how long a node that gives up everything waits for the HSM.
const closeTime = 5 * time.Second

// close gives up all copies, and says whether it did.
func (r *keyring) close() bool {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	if err := r.k.Token.CloseKEKs(ctx); err != nil {
		r.k.Log.Warn("giving up the session copies of KEKs", "err", err)
		return false
	}
	return true
}

// forExpiry chooses the KEK for d by its expiry, and notes it in d. An epoch that is
// sealed already, since our clock is behind the one by which that was done, is passed
// over: the key dies with a later one.
func (r *keyring) forExpiry(ctx context.Context, d *store.Due) (openKEK, error) {
	d.ExpiryEpoch = key.EpochAt(d.ExpiresAt, r.k.EpochLength)
	o, err := r.forEpoch(ctx, d.ExpiryEpoch)
	for range 100 {
		if !errors.Is(err, store.ErrExpired) {
			break
		}
		d.ExpiryEpoch++
		o, err = r.forEpoch(ctx, d.ExpiryEpoch)
	}
	d.KEK = o.id
	return o, err
}

// expiry is when a key that lives for ttl from now ends, in the audit's precision.
func (k *KME) expiry(ttl time.Duration) time.Time {
	return k.Now().Add(ttl).Truncate(audit.Clock)
}
