package kme

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// The reserve of pads that authenticate the blocks of a link (distill.Pad). Every block
// gives some and spends one. Alice names the lowest that she has; each end commits it as
// spent, with all below it, before a tag made with it leaves, and so no pad is ever used
// twice, whatever dies: at worst an end gives up pads that were never used.
//
// A pad outlives the KEK that it was sealed under: before that is destroyed it is sealed
// anew, since a link may rest for longer than an epoch.
//
// A link that has none (it is new, or its database was restored) begins again with the secret that both sites
// were given beforehand. Its pads are expanded from it by HKDF-SHA-256 for each session, by
// its number, what each end has drawn for it, and place, which is as good as SHA-256 and no
// better: a session's first block or two are authenticated computationally then, and
// kme_link_pads shows it. The reserve of the blocks that follow is used as soon as both ends
// hold them.

// maxTagFailures is how many wrong tags in a row stop a link until an officer acts.
const maxTagFailures = 3

// minAuthSecret is the least size in bytes of the secret that two sites share beforehand.
const minAuthSecret = 32

// reserve is the pads of a link as a session uses them.
type reserve struct {
	l       *link
	session int64
	nonce   []byte // of both ends
}

// next is the pad for Alice's next block. Those of the blocks under way are not above the
// one given. A pad that does not open is passed over: it goes when a higher one is spent,
// and not before, since blocks under way may have lower ones.
func (r *reserve) next(ctx context.Context, above distill.PadName) (distill.Pad, error) {
	for from := store.PadName(above); ; {
		p, err := r.l.k.Store.NextPad(ctx, r.l.ID, from)
		if errors.Is(err, store.ErrNoPad) {
			return r.fresh(ctx, above)
		}
		if err != nil {
			return distill.Pad{}, err
		}
		pad, err := r.l.k.openPad(ctx, store.LinkPad{Link: r.l.ID, Pad: p})
		if err == nil || !spoilt(err) {
			return pad, err
		}
		r.l.k.Log.Warn("a pad does not open", "link", r.l.ID, "err", err)
		from = p.PadName
	}
}

// find is the pad that Alice names, at Bob's end.
func (r *reserve) find(ctx context.Context, name distill.PadName) (distill.Pad, error) {
	if name.Session == r.session && name.Block == 0 {
		at, err := r.l.k.Store.Reserve(ctx, r.l.ID)
		if err == nil && name.Compare(padName(at.Spent)) <= 0 {
			err = fmt.Errorf("%w: %s is spent", distill.ErrNoPad, name)
		}
		if err != nil {
			return distill.Pad{}, err
		}
		return r.expand(ctx, name)
	}
	p, err := r.l.k.Store.Pad(ctx, r.l.ID, store.PadName(name))
	if err == nil {
		var pad distill.Pad
		if pad, err = r.l.k.openPad(ctx, store.LinkPad{Link: r.l.ID, Pad: p}); err == nil {
			return pad, nil
		}
	}
	if errors.Is(err, store.ErrNoPad) || spoilt(err) {
		return distill.Pad{}, fmt.Errorf("%w: %s: %w", distill.ErrNoPad, name, err)
	}
	return distill.Pad{}, err
}

// spend commits that a pad is spent.
func (r *reserve) spend(ctx context.Context, name distill.PadName) error {
	if err := r.l.k.Store.SpendPad(ctx, r.l.ID, r.session, store.PadName(name)); err != nil {
		return err
	}
	failpoint.Hit(failpoint.PadSpent)
	return nil
}

// lose gives up a pad that Bob does not have, and none above it: blocks under way have
// those, and he may. If he lacks many, each costs a block; when a session opens the ends
// tell each other below which they have none.
func (r *reserve) lose(ctx context.Context, name distill.PadName) error {
	r.l.k.Log.Warn("the other end does not have a pad", "link", r.l.ID, "pad", name.String())
	return r.l.k.Store.SpendPad(ctx, r.l.ID, r.session, store.PadName(name))
}

// fresh is the next pad of those expanded from the shared secret. A session that has
// spent pads of its own blocks has none left: the next one has.
func (r *reserve) fresh(ctx context.Context, above distill.PadName) (distill.Pad, error) {
	at, err := r.l.k.Store.Reserve(ctx, r.l.ID)
	if err != nil {
		return distill.Pad{}, err
	}
	name := distill.PadName{Session: r.session, Index: 1}
	used := padName(at.Spent)
	if above.Compare(used) > 0 {
		used = above
	}
	if used.Session == r.session && used.Block == 0 {
		name.Index = used.Index + 1
	}
	if name.Compare(used) <= 0 || name.Index >= 1<<16 {
		return distill.Pad{}, fmt.Errorf("the reserve of session %d is used up: another session begins anew", r.session)
	}
	return r.expand(ctx, name)
}

// expand makes a pad from the secret that both sites share.
func (r *reserve) expand(ctx context.Context, name distill.PadName) (distill.Pad, error) {
	secret, err := r.l.Secret(ctx)
	if err != nil {
		return distill.Pad{}, fmt.Errorf("reading the secret that both sites share: %w", err)
	}
	defer clear(secret)
	if len(secret) < minAuthSecret {
		return distill.Pad{}, fmt.Errorf("the secret that both sites share has %d bytes: at least %d", len(secret), minAuthSecret)
	}
	bits, err := hkdf.Key(sha256.New, secret, r.nonce, fmt.Sprintf("kme/pad/2 %s %s", r.l.ID, name), distill.PadBytes)
	if err != nil {
		return distill.Pad{}, err
	}
	defer clear(bits)
	return distill.Pad{Name: name, Bits: [distill.PadBytes]byte(bits)}, nil
}

// openPad unwraps a pad.
func (k *KME) openPad(ctx context.Context, p store.LinkPad) (distill.Pad, error) {
	name := distill.PadName(p.PadName)
	aad := PadAAD(nil, k.Self, p.KEK, p.Link, name)
	plains, _, err := k.unseal(ctx, wrapped{hsm.Sealed{IV: p.IV, CT: p.CT, AAD: aad}, p.KEK})
	if err != nil {
		return distill.Pad{}, fmt.Errorf("unwrapping pad %s: %w", name, err)
	}
	bits := plains[0]
	defer clear(bits)
	if len(bits) != distill.PadBytes {
		return distill.Pad{}, fmt.Errorf("pad %s has %d bytes", name, len(bits))
	}
	return distill.Pad{Name: name, Bits: [distill.PadBytes]byte(bits)}, nil
}

// wrapPads seals what a block gives to the reserve, and wipes it.
func (l *link) wrapPads(ctx context.Context, b qlink.Block, kek openKEK) ([]store.Pad, error) {
	defer clear(b.Pads)
	plains, aads := make([][]byte, len(b.Pads)), make([][]byte, len(b.Pads))
	for i := range b.Pads {
		p := &b.Pads[i]
		plains[i], aads[i] = p.Bits[:], PadAAD(nil, l.k.Self, kek.id, l.ID, p.Name)
	}
	sealed, err := wrap(ctx, kek.kek.WrapAll, plains, aads)
	if err != nil {
		return nil, fmt.Errorf("wrapping %d pads: %w", len(plains), err)
	}
	list := make([]store.Pad, len(sealed))
	for i, s := range sealed {
		list[i] = store.Pad{PadName: store.PadName(b.Pads[i].Name), KEK: kek.id, IV: s.IV, CT: s.CT}
	}
	return list, nil
}

// resealPads seals the pads that are under KEKs of an epoch, which ends, under that of the
// present one. If the HSM is away it is done later: until then the epoch does not end.
func (k *KME) resealPads(ctx context.Context, e key.Epoch) error {
	pads, err := k.Store.PadsUnder(ctx, e)
	if err != nil || len(pads) == 0 || k.hsmWell() != nil {
		return err
	}
	kek, err := k.keks.forEpoch(ctx, key.EpochAt(k.Now(), k.EpochLength))
	if err != nil {
		return err
	}
	var live, bad []store.LinkPad
	var plains, aads [][]byte
	defer func() { clearAll(plains) }()
	for _, p := range pads {
		pad, err := k.openPad(ctx, p)
		if spoilt(err) {
			k.Log.Warn("a pad does not open", "link", p.Link, "err", err)
			bad = append(bad, p)
			continue
		}
		if err != nil {
			return err
		}
		p.KEK = kek.id
		live, plains = append(live, p), append(plains, slices.Clone(pad.Bits[:]))
		aads = append(aads, PadAAD(nil, k.Self, kek.id, p.Link, pad.Name))
		clear(pad.Bits[:])
	}
	sealed, err := wrap(ctx, kek.kek.WrapAllInBackground, plains, aads)
	if err != nil {
		return fmt.Errorf("sealing %d pads anew: %w", len(plains), err)
	}
	for i, s := range sealed {
		live[i].IV, live[i].CT = s.IV, s.CT
	}
	return k.Store.ResealPads(ctx, live, bad)
}

// padFormat is that of PadAAD.
const padFormat = "kme/pad/1"

// PadAAD is the additional authenticated data of a pad.
func PadAAD(b []byte, site identity.KME, kek int64, link string, name distill.PadName) []byte {
	b = appendText(b, padFormat)
	b = appendText(b, site.String())
	b = appendNumber(b, kek)
	b = appendText(b, link)
	b = appendNumber(b, name.Session)
	b = appendNumber(b, name.Block)
	return appendNumber(b, int64(name.Index))
}

func padName(n store.PadName) distill.PadName { return distill.PadName(n) }

// floor is below which this end has no pad: what it has spent, or what lies before the
// lowest that it holds; all that was before the session, if it holds none.
func (l *link) floor(ctx context.Context, session int64) (store.PadName, error) {
	r, err := l.k.Store.Reserve(ctx, l.ID)
	if err != nil {
		return store.PadName{}, err
	}
	low := store.PadName{Session: session}
	if r.Pads > 0 {
		low = r.Lowest
		low.Index--
	}
	if padName(low).Compare(padName(r.Spent)) < 0 {
		low = r.Spent
	}
	return low, nil
}

// meetReserve gives up what the other end has not.
func (l *link) meetReserve(ctx context.Context, session int64, theirs store.PadName) error {
	r, err := l.k.Store.Reserve(ctx, l.ID)
	if err != nil {
		return err
	}
	if theirs.Session > session || theirs.Index < -1 || padName(theirs).Compare(padName(r.Spent)) <= 0 {
		return nil
	}
	return l.k.Store.SpendPad(ctx, l.ID, session, theirs)
}

// tagFailed counts a wrong tag, and says so.
func (l *link) tagFailed(ctx context.Context, err error) {
	if err := l.k.Store.TagFailed(ctx, l.ID); err != nil {
		l.k.Log.Warn("counting a wrong tag", "link", l.ID, "err", err)
	}
	l.k.incident(ctx, "tag-"+l.ID, fmt.Sprintf("link %s: %v", l.ID, err))
}

// trusted says why the link must not open a session, if it must not.
func (l *link) trusted(ctx context.Context) error {
	if l.Filler > 0 || l.Device != nil { // no tags, but those of TLS
		return nil
	}
	r, err := l.k.Store.Reserve(ctx, l.ID)
	if err != nil {
		return err
	}
	if r.Failures >= maxTagFailures {
		return fmt.Errorf("%d tags of the other end were wrong in a row: the link rests until an officer lets it go on", r.Failures)
	}
	return nil
}
