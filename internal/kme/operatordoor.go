package kme

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/store"
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
		KME:       k.Self.String(), Node: k.Config.Node, Version: version(), Run: k.run.Load(), Started: k.started,
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

// version is that of the build.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
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
			o := s.Last
			l.Last = &admin.Block{
				Session: o.Session, Block: o.Block, At: s.LastAt, Took: s.LastTook.Seconds(), QBER: o.QBER, Efficiency: o.Efficiency,
				Length: o.Length, Gates: o.Gates, Detected: o.Detected, Aborted: s.LastWhy,
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

// Cleanup ends what is overdue, now, and says how many keys that were.
func (d OperatorDoor) Cleanup(ctx context.Context, c identity.Caller, rid string) (int, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	call := d.k.begin(c, rid, audit.Cleanup, identity.SAE{})
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

// Healthy is nil if this node can hand out keys.
func (d OperatorDoor) Healthy(context.Context) error {
	if err := d.k.able(); err != nil {
		return err
	}
	if !d.k.isReady() {
		return errors.New("the takeover of this node's earlier run is not finished")
	}
	return nil
}

// Refused records what the operator door turned away after TLS.
func (d OperatorDoor) Refused(ctx context.Context, c identity.Caller, rid, route string, err error) error {
	return d.k.Refused(ctx, c, rid, route, err)
}

// Metrics of the core, by their names on the wire.
var (
	storedDesc = prometheus.NewDesc("kme_pool_keys", "256-bit keys in the pool of a link, by the end that may assign them.", []string{"link", "owner"}, nil)
	blockDesc  = prometheus.NewDesc("kme_link_blocks_total", "Blocks of a link since the node started, by how they ended.", []string{"link", "outcome"}, nil)
	givenDesc  = prometheus.NewDesc("kme_chunks_given_total", "Chunks of a link's pool given to the other end since the node started.", []string{"link"}, nil)
	takenDesc  = prometheus.NewDesc("kme_chunks_taken_total", "Chunks of a link's pool that the other end gave since the node started.", []string{"link"}, nil)
	qberDesc   = prometheus.NewDesc("kme_link_qber", "Error rate of the test basis in the last block, 0 to 1.", []string{"link"}, nil)
	fDesc      = prometheus.NewDesc("kme_link_efficiency", "Reconciliation efficiency f of the last block.", []string{"link"}, nil)
	hsmDesc    = prometheus.NewDesc("kme_hsm_up", "1 while the HSM answers its heartbeat.", nil, nil)
	dbDesc     = prometheus.NewDesc("kme_database_up", "1 while the database answers.", nil, nil)
	alarmDesc  = prometheus.NewDesc("kme_alarm", "1 for each alarm that stands.", []string{"about"}, nil)
)

// Describe implements prometheus.Collector.
func (k *KME) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{storedDesc, blockDesc, givenDesc, takenDesc, qberDesc, fDesc, hsmDesc, dbDesc, alarmDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (k *KME) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	up := func(err error) float64 {
		if err != nil {
			return 0
		}
		return 1
	}
	gauge(hsmDesc, up(k.hsmWell()))
	gauge(dbDesc, up(k.Store.Healthy()))
	for _, a := range k.Alarms() {
		gauge(alarmDesc, 1, a.Name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, s := range k.LinkStates() {
		ch <- prometheus.MustNewConstMetric(blockDesc, prometheus.CounterValue, float64(s.Blocks), s.ID, string(audit.Done))
		ch <- prometheus.MustNewConstMetric(blockDesc, prometheus.CounterValue, float64(s.Aborts), s.ID, "aborted")
		b := &k.links[s.ID].balance
		ch <- prometheus.MustNewConstMetric(givenDesc, prometheus.CounterValue, float64(b.given.Load()), s.ID)
		ch <- prometheus.MustNewConstMetric(takenDesc, prometheus.CounterValue, float64(b.taken.Load()), s.ID)
		gauge(qberDesc, s.Last.QBER, s.ID)
		gauge(fDesc, s.Last.Efficiency, s.ID)
		if here, there, err := k.Store.Pool(ctx, s.ID); err == nil {
			gauge(storedDesc, float64(here), s.ID, s.End.String())
			gauge(storedDesc, float64(there), s.ID, s.End.Other().String())
		}
	}
}
