package kme

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/release"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// OperatorDoor is the Backend of the operator door. What only shows is logged by the
// door and not recorded in the audit; what acts is.
type OperatorDoor struct{ k *KME }

// OperatorDoor returns the Backend of the operator door.
func (k *KME) OperatorDoor() OperatorDoor { return OperatorDoor{k} }

// Node tells how this node stands.
func (d OperatorDoor) Node(context.Context, identity.Caller, string) (admin.Node, error) {
	k := d.k
	n := admin.Node{
		Suspended: k.suspended(),
		KME:       k.Self.String(), Node: k.Config.Node, Version: release.Version(), Run: k.run.Load(), Started: k.started,
		Uptime: k.Now().Sub(k.started).Seconds(), Production: k.Production, Policies: k.Policies().Digest,
		HSM: health(k.hsmWell()), Database: health(k.Store.Healthy()),
	}
	if info := k.Token.Info(); n.HSM.OK {
		n.HSM.Detail = fmt.Sprintf("%s %s, serial %s", info.Manufacturer, info.Model, info.Serial)
	}
	for id := range k.Peers {
		p := admin.Peer{KME: id.String(), Health: admin.Health{OK: true}}
		for _, a := range k.Alarms() {
			if a.Name == peerAlarm(id) {
				p.Health = admin.Health{Detail: a.Text}
			}
		}
		if at, ok := k.offsets.Load(id); ok {
			p.ClockOffset = at.(time.Duration).Seconds()
		}
		n.Peers = append(n.Peers, p)
	}
	for _, s := range k.watch.others(k.Config.Node) {
		n.Others = append(n.Others, admin.Other{Node: s.Node, Run: s.Run, Alive: s.alive, Since: time.Since(s.since).Seconds(), Settled: s.settled})
	}
	slices.SortFunc(n.Others, func(x, y admin.Other) int { return strings.Compare(x.Node, y.Node) })
	return n, nil
}

func health(err error) admin.Health {
	if err != nil {
		return admin.Health{Detail: err.Error()}
	}
	return admin.Health{OK: true}
}

// stages are those of a block, in order.
var stages = []string{distill.StageSift, distill.StageEstimate, distill.StageReconcile, distill.StageVerify, distill.StageAmplify}

// Links tells how the links stand at this end.
func (d OperatorDoor) Links(ctx context.Context, _ identity.Caller, _ string) ([]admin.Link, error) {
	var list []admin.Link
	for _, s := range d.k.LinkStates() {
		l := admin.Link{
			ID: s.ID, Peer: s.Peer.String(), End: s.End.String(), Provenance: string(d.k.links[s.ID].Provenance),
			State: s.State, Why: s.Why, Session: s.Session, Blocks: s.Blocks, Aborts: s.Aborts,
			Pads: s.Reserve.Pads, EpsSecrecy: s.EpsSecrecy, EpsCorrect: s.EpsCorrect, EpsLimit: yearlyEpsilon,
		}
		var err, errPeer error
		l.Stored, err = d.k.Store.Stored(ctx, s.ID) // without blocks that are only held: they cannot be had yet
		_, l.StoredPeer, errPeer = d.k.Store.Pool(ctx, s.ID)
		if err := errors.Join(err, errPeer); err != nil {
			return nil, fmt.Errorf("counting the pool: %w", err)
		}
		if step := slices.Index(stages, s.Stage); step >= 0 {
			l.Current = &admin.Progress{Stage: s.Stage, Step: step + 1, Steps: len(stages), Done: s.Done}
		}
		if !s.LastAt.IsZero() {
			o, profile := s.Last, d.k.links[s.ID].Profile
			l.Last = &admin.Block{
				Session: o.Session, Block: o.Block, At: s.LastAt, Took: s.LastTook.Seconds(), QBER: o.QBER, Efficiency: o.Efficiency,
				Length: o.Length, Gates: o.Gates, Detected: o.Detected, Aborted: s.LastWhy,
				KeyQBER: o.KeyQBER, Doubles: o.Doubles, SiftedKey: o.SiftedKey, SiftedTest: o.SiftedTest,
				Leak: o.Leak, LeakLimit: profile.LeakLimit, Rounds: o.Rounds,
			}
			for k := range profile.Intensities {
				l.Last.Gains = append(l.Last.Gains, o.Gain(profile, k))
			}
			if s.LastWhy != "" {
				l.Last.Length = 0
			}
		}
		list = append(list, l)
	}
	return list, nil
}

// Alarms lists those that stand.
func (d OperatorDoor) Alarms(context.Context, identity.Caller, string) ([]admin.Alarm, error) {
	list := make([]admin.Alarm, 0)
	for _, a := range d.k.Alarms() {
		list = append(list, admin.Alarm(a))
	}
	return list, nil
}

// Epochs tells how the epochs stand.
func (d OperatorDoor) Epochs(ctx context.Context, _ identity.Caller, _ string) (admin.Epochs, error) {
	epochs, err := d.k.Store.Epochs(ctx)
	if err != nil {
		return admin.Epochs{}, err
	}
	held, err := d.k.Store.CountEpochs(ctx)
	if err != nil {
		return admin.Epochs{}, err
	}
	list := admin.Epochs{Length: d.k.EpochLength.Seconds(), WorstCase: d.k.unrecoverableAfter().Seconds(), Epochs: []admin.Epoch{}}
	for _, e := range epochs {
		a := admin.Epoch{
			Epoch: int64(e.Epoch), Starts: e.StartsAt.UTC(), Ends: e.EndsAt.UTC(), State: string(e.State),
			Stored: held[e.Epoch].Pool, Waiting: held[e.Epoch].Due,
		}
		for _, k := range e.KEKs {
			kek := admin.KEK{ID: k.ID, Label: k.Label, CheckValue: hex.EncodeToString(k.CheckValue), State: string(k.State), Wraps: k.Wraps}
			for _, c := range k.Copies {
				kek.Copies = append(kek.Copies, c.Node)
			}
			a.KEKs = append(a.KEKs, kek)
		}
		list.Epochs = append(list.Epochs, a)
	}
	return list, nil
}

// Cleanup ends what is overdue, now, and says how many keys that were.
func (d OperatorDoor) Cleanup(ctx context.Context, c identity.Caller, rid string, given []approval.Approval) (int, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	call := d.k.begin(c, rid, audit.Cleanup, identity.SAE{})
	if err := call.asSiteWants(ctx, c, given, policies.ActCleanup); err != nil {
		return 0, call.refuse(ctx, err)
	}
	n, err := d.k.expireDue(ctx)
	call.ev.Count = n
	if err == nil {
		done := call.ev
		done.Outcome = audit.Done
		err = d.k.Store.RecordLate(ctx, call.late, done)
		call.pending = errors.Is(err, store.ErrDoubt)
	}
	if err != nil {
		return 0, call.refuse(ctx, err)
	}
	return n, nil
}

// TrustLink lets a link go on that rests because tags of its peer were wrong.
func (d OperatorDoor) TrustLink(ctx context.Context, c identity.Caller, rid, link string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	call := d.k.begin(c, rid, audit.TrustLink, identity.SAE{})
	call.ev.Link = link
	l := d.k.links[link]
	if l == nil {
		return call.refuse(ctx, problem.Because(problem.Invalid, fmt.Errorf("no link %q ends here", link)))
	}
	done := call.ev
	done.Outcome = audit.Done
	if err := d.k.Store.TrustAgain(ctx, link, call.late, done); err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return call.refuse(ctx, err)
	}
	d.k.clear(ctx, "tag-"+link)
	return nil
}

// History is how a link did.
func (d OperatorDoor) History(ctx context.Context, _ identity.Caller, _, link string, from time.Time, each time.Duration) ([]admin.Span, error) {
	minutes, err := d.k.Store.History(ctx, link, from, each)
	if err != nil {
		return nil, d.k.classify(err)
	}
	list := make([]admin.Span, len(minutes))
	for i, m := range minutes {
		list[i] = admin.Span{At: m.At, Blocks: m.Blocks, Aborts: m.Aborts, Bits: m.Bits, Stored: m.Here, StoredPeer: m.There}
		if n := m.Blocks + m.Aborts - m.Unrated; n > 0 {
			list[i].QBER = m.QBER / float64(n)
		}
	}
	return list, nil
}

// Healthy is nil if this process does its work: it is not stuck. What it needs may be away.
func (d OperatorDoor) Healthy(context.Context) error { return d.k.Alive() }

// Ready is nil if this node can hand out keys: whatever the site's other nodes can. A
// peer that is away is no reason to turn SAEs away, who would fare no better elsewhere.
func (d OperatorDoor) Ready(context.Context) error {
	if err := d.k.able(); err != nil {
		return err
	}
	if !d.k.isReady() {
		return errors.New("the peers are still being asked what this node's earlier runs had announced")
	}
	return nil
}

// Refused records what the operator door turned away after TLS.
func (d OperatorDoor) Refused(ctx context.Context, c identity.Caller, rid, route string, err error) error {
	return d.k.Refused(ctx, c, rid, route, err)
}
