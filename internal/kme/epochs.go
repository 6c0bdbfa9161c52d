package kme

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// An epoch ends in steps, each of them one transaction with its event:
//
//	open       keys come into it
//	sealed     its time is over, and the database takes no more rows for it
//	draining   nothing in it lives: it was handed out, expired, burned or voided, and the
//	           pads that were sealed in it are sealed under a later KEK. Each node destroys
//	           its session copies of the epoch's KEKs and records it; those of a dead node
//	           count as gone when its run is taken over
//	destroyed  the KEKs are destroyed in the token, which nobody can use any more
//	dropped    the partitions are gone
//
// One node of the site takes the steps. If it dies on the way, the next one finds in
// the database how far it came: each step can be begun again. If two do it for a
// moment, the database lets one of them be first.
//
// The steps that cannot be undone hang on the site's clock: see sure.

const (
	tendEvery  = time.Second // how often a node does as the register of KEKs says, and an epoch moves on
	checkEvery = time.Minute // how often all keys of the token are held against the register

	// sealSlack is how long after its end something may come into an epoch: a block
	// that was begun before it, and a request that is under way.
	sealSlack = epochSlack + requestTime
)

// MaxWraps is the most blobs that a KEK may be set to seal before another one takes its
// place: a quarter of what GCM with random IVs allows (NIST SP 800-38D, 8.3), since what
// the nodes seal until they see it, and while no other can be made, comes on top.
const MaxWraps = 1 << 30

// tendEpochs has this node do as the register of epochs and KEKs says, and makes the
// next ones.
func (k *KME) tendEpochs(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if k.Store.Healthy() != nil || k.suspended() != "" {
		return
	}
	k.keks.count(ctx)
	if k.hsmWell() != nil {
		return
	}
	epochs, err := k.Store.Epochs(ctx)
	if err != nil {
		return // the database is away; its own alarm stands
	}
	if err := k.keks.follow(ctx, epochs); err != nil {
		k.suspect(ctx, "keks", err.Error())
	} else {
		k.clear(ctx, "keks")
	}
	if err := k.keks.prepare(ctx); err != nil {
		k.suspect(ctx, "epochs", "the next epochs cannot be opened: "+err.Error())
	} else {
		k.clear(ctx, "epochs")
	}
}

// endEpochs moves epochs towards their end, as long as this node is the one of its site
// that does so.
func (k *KME) endEpochs(ctx context.Context) error {
	e := newEnding(k)
	t := time.NewTicker(tendEvery)
	defer t.Stop()
	for {
		if k.Store.Healthy() == nil && k.suspended() == "" {
			switch err := e.advance(ctx); {
			case errors.Is(err, store.ErrFenced):
				return err
			case err != nil && ctx.Err() == nil:
				k.suspect(ctx, "epoch-end", err.Error())
			default:
				k.clear(ctx, "epoch-end")
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// ending is a node that has epochs come to their end.
type ending struct {
	k       *KME
	over    map[key.Epoch]int64     // open epochs whose time is over: how often the peers had been greeted when that was seen
	tried   map[key.Epoch]time.Time // sealed epochs that are late: when it was last tried to drain them
	checked time.Time               // when the token was last held against the register
}

func newEnding(k *KME) *ending {
	return &ending{k: k, over: make(map[key.Epoch]int64), tried: make(map[key.Epoch]time.Time)}
}

// advance takes all steps that can be taken now. An epoch that cannot be ended keeps none
// of the others from it, nor from the look at the token. The sealed ones are drained in
// order, so that not all of them are looked through each second, but for those that are
// late: one whose keys nobody can end must not keep those of all later ones.
func (n *ending) advance(ctx context.Context) error {
	failed := make(map[key.Epoch]bool)
	var errs, late []error
	for moved := true; moved; {
		epochs, err := n.k.Store.Epochs(ctx)
		if err != nil {
			return err
		}
		moved, late = false, nil
		full := false // an epoch that is older, and not late, still has keys
		for _, e := range epochs {
			var done bool
			var err error
			isLate := n.isLate(e)
			if isLate && e.State != store.EpochDestroyed {
				late = append(late, fmt.Errorf("epoch %d, of %s, should have ended, and is %s", e.Epoch, e.StartsAt.UTC().Format(time.RFC3339), e.State))
			}
			if failed[e.Epoch] {
				full = full || e.State == store.EpochSealed && !isLate
				continue
			}
			switch e.State {
			case store.EpochOpen:
				if n.sure(e) {
					done, err = n.seal(ctx, e)
				}
			case store.EpochSealed:
				switch {
				case isLate && time.Since(n.tried[e.Epoch]) > checkEvery:
					n.tried[e.Epoch] = time.Now()
					done, err = n.drain(ctx, e)
				case !isLate && !full:
					done, err = n.drain(ctx, e)
					full = !done
				}
			case store.EpochDraining:
				done, err = n.destroy(ctx, e)
			case store.EpochDestroyed:
				done, err = n.drop(ctx, e)
			}
			if errors.Is(err, store.ErrFenced) {
				return err
			}
			if err != nil {
				failed[e.Epoch] = true
				errs = append(errs, err)
			}
			moved = moved || done
		}
	}
	if n.k.hsmWell() == nil && time.Since(n.checked) > checkEvery {
		errs = append(errs, n.check(ctx))
	}
	return errors.Join(append(errs, late...)...)
}

// isLate says whether an epoch should have ended already.
func (n *ending) isLate(e store.Epoch) bool {
	return n.k.Now().After(e.StartsAt.Add(n.k.unrecoverableAfter()))
}

// sure says whether an epoch is over, and not only by a clock that is wrong: what ends
// early is lost. With peers, they have to be greeted once more since it was seen to be,
// all of them, and none that has answered may have a clock that is far from ours.
func (n *ending) sure(e store.Epoch) bool {
	if n.k.Now().Before(e.EndsAt.Add(sealSlack)) {
		delete(n.over, e.Epoch)
		return false
	}
	if len(n.k.Peers) == 0 {
		return true
	}
	greeted := n.k.greeted.Load()
	seen, ok := n.over[e.Epoch]
	if !ok {
		n.over[e.Epoch], seen = greeted, greeted
	}
	if greeted < seen+2 { // one may have been under way
		return false
	}
	agreed := true
	n.k.offsets.Range(func(_, ahead any) bool {
		agreed = ahead.(time.Duration).Abs() <= clockLimit
		return agreed
	})
	return agreed
}

func (n *ending) event(a audit.Action, e store.Epoch) audit.Event {
	ev := n.k.own(a)
	ev.Reason = fmt.Sprintf("epoch %d, from %s to %s", e.Epoch, e.StartsAt.UTC().Format(time.RFC3339), e.EndsAt.UTC().Format(time.RFC3339))
	return ev
}

func (n *ending) seal(ctx context.Context, e store.Epoch) (bool, error) {
	done, err := n.k.Store.SealEpoch(ctx, e.Epoch, n.event(audit.EpochSealed, e))
	if done {
		delete(n.over, e.Epoch)
		failpoint.Hit(failpoint.EpochSealed)
	}
	return done, err
}

func (n *ending) drain(ctx context.Context, e store.Epoch) (bool, error) {
	if err := n.k.resealPads(ctx, e.Epoch); err != nil {
		return false, err
	}
	done, err := n.k.Store.DrainEpoch(ctx, e.Epoch, n.event(audit.EpochDraining, e))
	if done {
		delete(n.tried, e.Epoch)
		failpoint.Hit(failpoint.EpochDraining)
	}
	return done, err
}

// destroy destroys the KEKs of a draining epoch in the token, once no run that lives
// has a copy. If the process dies on the way, a KEK that is not there any more is one
// that was destroyed.
func (n *ending) destroy(ctx context.Context, e store.Epoch) (bool, error) {
	k := n.k
	held := false
	for _, kek := range e.KEKs {
		for _, c := range kek.Copies {
			held = true
			if err := n.depose(ctx, c); err != nil {
				return false, err
			}
		}
	}
	if held || k.hsmWell() != nil || k.Token.Health().Stage != hsm.Well {
		return false, nil // the nodes see for themselves what they are to give up
	}
	err := k.Store.Alone(ctx, tokenWriters, func(ctx context.Context) error {
		var errs []error
		for _, kek := range e.KEKs {
			if kek.State != store.KEKDestroyed {
				errs = append(errs, n.destroyKEK(ctx, e, kek.KEK))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return false, err
	}
	done, err := k.Store.EndEpoch(ctx, e.Epoch)
	if done {
		failpoint.Hit(failpoint.EpochDestroyed)
		err = errors.Join(err, n.check(ctx))
	}
	return done, err
}

// destroyKEK destroys a KEK of a draining epoch and records that, whatever becomes of the
// epoch's others. If the process dies in between, it is recorded that it was not there any
// more. The caller is alone with the token.
func (n *ending) destroyKEK(ctx context.Context, e store.Epoch, kek store.KEK) error {
	info, err := infoOf(kek)
	if err != nil {
		return err
	}
	was, err := n.k.keks.destroy(ctx, info)
	if err != nil {
		return fmt.Errorf("destroying KEK %d: %w", kek.ID, err)
	}
	failpoint.Hit(failpoint.EpochKEKDestroyed)
	ev := n.event(audit.KEKGone, e)
	ev.Reason = fmt.Sprintf("KEK %d, %s, check value %x: the end of %s", kek.ID, info.Label, info.CheckValue, ev.Reason)
	if !was {
		ev.Reason += "; it was not in the token any more"
	}
	return n.k.Store.EndKEK(ctx, kek.ID, ev)
}

// depose takes over from a dead node whose copies are in the way: from then on they
// are of no use to it.
func (n *ending) depose(ctx context.Context, copies store.NodeRun) error {
	for _, s := range n.k.watch.others(n.k.Node) {
		if s.NodeRun != copies || s.alive || !s.quiet {
			continue
		}
		heir, err := n.k.depose(ctx, copies, "it has copies of KEKs that are to be destroyed")
		if err == nil {
			err = n.k.inherit(ctx, heir)
		}
		if err != nil && !errors.Is(err, store.ErrOvertaken) {
			return err
		}
	}
	return nil
}

func (n *ending) drop(ctx context.Context, e store.Epoch) (bool, error) {
	done, err := n.k.Store.DropEpoch(ctx, e.Epoch, n.event(audit.EpochDropped, e))
	if done {
		failpoint.Hit(failpoint.EpochDropped)
	}
	return done, err
}

// unrecoverableAfter is the longest that it takes from the moment a key is handed out
// until none of its blobs can be opened, while the site's parts are well: for one that
// is handed out as soon as it is there, since its epoch ends with the last key of it.
// It has been sealed under the KEK of the epoch in which it was made, whose keys are
// stored for PoolTTL after that epoch, and of the epoch in which it was to expire.
func (k *KME) unrecoverableAfter() time.Duration {
	longest := max(k.PoolTTL, k.MaxTTL+sealSlack)
	for id := range k.links {
		longest = max(longest, k.poolTTL(id))
	}
	return k.EpochLength + longest + endTime
}

// endTime is for the steps themselves: what expires is looked for every ten seconds,
// nodes look every second what they are to give up, and a dead one is taken over.
const endTime = time.Minute

// check holds all keys of the token against the register, alone with the token, and
// clears up what is nobody's: see sweep. What cannot be cleared up hides nothing else.
func (n *ending) check(ctx context.Context) error {
	k := n.k
	var found strays
	var unswept error
	err := k.Store.Alone(ctx, tokenWriters, func(ctx context.Context) error {
		for {
			rows, err := k.Store.KEKs(ctx)
			if err != nil {
				return err
			}
			inToken, err := k.Token.ListKEKs(ctx)
			if err != nil {
				return fmt.Errorf("listing the keys of the token: %w", err)
			}
			if err := k.keks.inSight(ctx); err != nil {
				return err
			}
			var swept bool
			if swept, unswept = k.keks.sweep(ctx, rows, inToken); swept {
				continue
			}
			if found = compare(rows, inToken); len(found.unknown) == 0 {
				return nil
			}
			values := make([][]byte, len(inToken))
			for i := range inToken {
				values[i] = inToken[i].CheckValue[:]
			}
			destroyed, err := k.Store.DestroyedKEKs(ctx, values)
			found = compare(append(rows, destroyed...), inToken) // which say what the unknown are
			return err
		}
	})
	if err != nil {
		return err
	}
	n.checked = time.Now()
	k.judgeStrays(ctx, "kek-unknown", "not in the register of KEKs, and yet in the token: ", found.unknown)
	k.judgeStrays(ctx, "kek-doubled", "more than once in the token: ", found.doubled)
	k.judgeStrays(ctx, "kek-missing", "in the register of KEKs, and not in the token: ", found.missing)
	return unswept
}

// strays are keys of the token that do not agree with the register.
type strays struct{ unknown, doubled, missing []string }

// compare says what does not agree. A copy of a KEK, under whatever label, is unknown:
// whoever makes one can open what is sealed under the KEK when that is destroyed.
func compare(rows []store.KEK, inToken []hsm.KeyStatus) (s strays) {
	seen := make(map[int64]int)
	for _, info := range inToken {
		what := info.String()
		if info.Err != nil {
			what += fmt.Sprintf(", of which not all can be read (%v)", info.Err)
		}
		known := false
		for _, row := range rows {
			same := bytes.Equal(row.CheckValue, info.CheckValue[:])
			switch {
			case same && row.Label == info.Label && bytes.Equal(row.PKCS11ID, info.ID) && row.State != store.KEKDestroyed:
				known = true
				seen[row.ID]++
			case info.Err != nil && row.Label == info.Label && bytes.Equal(row.PKCS11ID, info.ID):
				what += fmt.Sprintf(", which by its label and ID is KEK %d of epoch %d", row.ID, row.Epoch)
				seen[row.ID]++
			case same:
				what += fmt.Sprintf(", which has the check value of KEK %d of epoch %d", row.ID, row.Epoch)
			}
		}
		if !known {
			s.unknown = append(s.unknown, what)
		}
	}
	for _, row := range rows {
		name := fmt.Sprintf("KEK %d of epoch %d, %s", row.ID, row.Epoch, row.Label)
		switch live := row.State == store.KEKOpen || row.State == store.KEKSealed; {
		case seen[row.ID] > 1:
			s.doubled = append(s.doubled, name)
		case live && seen[row.ID] == 0:
			s.missing = append(s.missing, name)
		}
	}
	return s
}

// judgeStrays raises or clears an alarm about keys. One that stands and has others to
// say is recorded anew.
func (k *KME) judgeStrays(ctx context.Context, name, what string, keys []string) {
	if len(keys) == 0 {
		k.clear(ctx, name)
		return
	}
	text := what + strings.Join(keys, "; ")
	if i := slices.IndexFunc(k.Alarms(), func(a Alarm) bool { return a.Name == name && a.Text != text }); i >= 0 {
		k.clear(ctx, name)
	}
	k.raise(ctx, name, text)
}
