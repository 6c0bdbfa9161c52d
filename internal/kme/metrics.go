package kme

import (
	"context"
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/release"
	"github.com/qutemail/kme/internal/store"
)

// The stages of a request whose times are measured.
const (
	StageIdentity = "identity" // who calls, in the door
	StagePolicy   = "policy"   // whether it may
	StageHSM      = "hsm"      // unwrapping, sealing and making keys
	StageAnnounce = "announce" // until the peer has assigned the keys, with the wait for its batch
	StageCommit   = "commit"   // until the database has committed, likewise
)

// metrics are those that the core counts as things happen. What can be read when
// somebody asks is read then: see Collect.
type metrics struct {
	requests *prometheus.CounterVec
	stages   *prometheus.HistogramVec
	// One observer a stage: no look-up on the way of a request.
	identity, policy, hsm, announce, commit prometheus.Observer
}

func newMetrics() *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kme_requests_total", Help: "Requests by what was asked, the class of the SAE (its first group) and the outcome.",
		}, []string{"action", "class", "outcome"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kme_stage_seconds", Help: "Time of a request in each of its stages.",
			Buckets: prometheus.ExponentialBuckets(0.00001, 4, 10), // 10 µs to 2.6 s
		}, []string{"stage"}),
	}
	m.identity, m.policy, m.hsm = m.stages.WithLabelValues(StageIdentity), m.stages.WithLabelValues(StagePolicy), m.stages.WithLabelValues(StageHSM)
	m.announce, m.commit = m.stages.WithLabelValues(StageAnnounce), m.stages.WithLabelValues(StageCommit)
	return m
}

// since observes how long a stage took that began then.
func since(o prometheus.Observer, began time.Time) { o.Observe(time.Since(began).Seconds()) }

// Identity is told how many seconds a door took to find out who calls.
func (k *KME) Identity() prometheus.Observer { return k.metrics.identity }

// counted counts a request that has come to its end.
func (k *KME) counted(c *call, err error) {
	outcome := audit.Done
	if err != nil {
		outcome = audit.Refused
		if kind := problem.KindOf(err); kind == problem.Unavailable || kind == problem.Internal {
			outcome = audit.Failed
		}
	}
	k.metrics.requests.WithLabelValues(string(c.ev.Action), k.class(c), string(outcome)).Inc()
}

// class is what kind of caller makes a request: as many as policies know groups, and
// no more, whoever calls.
func (k *KME) class(c *call) string {
	switch {
	case c.sae != identity.SAE{}:
		if groups := k.Policies().SAEs[c.sae].Groups; len(groups) > 0 {
			return groups[0]
		}
		return "none"
	case c.ev.Actor.Role != "":
		return c.ev.Actor.Role
	}
	return "stranger"
}

// Metrics of the core, by their names on the wire, that are read when asked for.
var (
	buildDesc   = prometheus.NewDesc("kme_build_info", "1, with the version of this program.", []string{"version", "go", "kme", "node"}, nil)
	runDesc     = prometheus.NewDesc("kme_node_run", "The node's run number.", nil, nil)
	storedDesc  = prometheus.NewDesc("kme_pool_keys", "256-bit keys in the pool of a link, by the end that may assign them.", []string{"link", "owner"}, nil)
	limitDesc   = prometheus.NewDesc("kme_pool_limit_keys", "256-bit keys of both ends above which the link rests.", []string{"link"}, nil)
	emptyDesc   = prometheus.NewDesc("kme_pool_empty_seconds", "When the pool will be empty if it goes on as it did in the last minutes. Not there while it does not shrink.", []string{"link", "owner"}, nil)
	stateDesc   = prometheus.NewDesc("kme_link_state", "1 for the state in which the link is at this node.", []string{"link", "state"}, nil)
	blockDesc   = prometheus.NewDesc("kme_link_blocks_total", "Blocks of a link since the node started, by how they ended.", []string{"link", "outcome"}, nil)
	bitsDesc    = prometheus.NewDesc("kme_link_secret_bits_total", "Bits of secret that a link has given since the node started.", []string{"link"}, nil)
	lastDesc    = prometheus.NewDesc("kme_link_last_block_timestamp_seconds", "When the last block of a link came or was given up.", []string{"link"}, nil)
	givenDesc   = prometheus.NewDesc("kme_chunks_given_total", "Chunks of a link's pool given to the other end since the node started.", []string{"link"}, nil)
	takenDesc   = prometheus.NewDesc("kme_chunks_taken_total", "Chunks of a link's pool that the other end gave since the node started.", []string{"link"}, nil)
	qberDesc    = prometheus.NewDesc("kme_link_qber", "Error rate of the test basis in the last block, 0 to 1. Not there if the block was given up before it was found.", []string{"link"}, nil)
	fDesc       = prometheus.NewDesc("kme_link_efficiency", "Reconciliation efficiency f of the last block.", []string{"link"}, nil)
	keyQBERDesc = prometheus.NewDesc("kme_link_key_qber", "Error rate of the key basis in the last block, as reconciliation found it, 0 to 1.", []string{"link"}, nil)
	gainDesc    = prometheus.NewDesc("kme_link_gain", "Chance that a pulse of the last block was detected, by its intensity: 0 is the signal, the rest are decoys.", []string{"link", "intensity"}, nil)
	siftedDesc  = prometheus.NewDesc("kme_link_sifted_bits", "Sifted bits of the last block, by basis.", []string{"link", "basis"}, nil)
	gatesDesc   = prometheus.NewDesc("kme_link_gates", "Pulses of the last block.", []string{"link"}, nil)
	leakDesc    = prometheus.NewDesc("kme_link_leak_bits", "Bits that reconciliation of the last block revealed.", []string{"link"}, nil)
	lengthDesc  = prometheus.NewDesc("kme_link_secret_bits", "Bits of secret of the last block; 0 if it was given up.", []string{"link"}, nil)
	padsDesc    = prometheus.NewDesc("kme_link_pads", "Pads in the reserve of a link: each authenticates a block. At 0 the secret that both sites share does.", []string{"link"}, nil)
	epsilonDesc = prometheus.NewDesc("kme_link_epsilon", "What the blocks of a link add up to this year: the chance that a key is not secret, or not correct.", []string{"link", "of"}, nil)
	hsmDesc     = prometheus.NewDesc("kme_hsm_up", "1 while the HSM answers its heartbeat.", nil, nil)
	dbDesc      = prometheus.NewDesc("kme_database_up", "1 while the database answers.", nil, nil)
	readyDesc   = prometheus.NewDesc("kme_ready", "1 while this node can hand out keys.", nil, nil)
	suspendDesc = prometheus.NewDesc("kme_suspended", "1 while the site serves nothing until it is recovered.", nil, nil)
	peerDesc    = prometheus.NewDesc("kme_peer_up", "1 while the peer answers.", []string{"peer"}, nil)
	clockDesc   = prometheus.NewDesc("kme_peer_clock_offset_seconds", "The peer's clock ahead of ours.", []string{"peer"}, nil)
	wrapsDesc   = prometheus.NewDesc("kme_hsm_wraps_left", "Blobs that the KEK of an epoch may still seal before another one takes its place.", []string{"epoch"}, nil)
	lagDesc     = prometheus.NewDesc("kme_audit_lag_events", "Events that are not in the audit log's tree yet.", nil, nil)
	lagTimeDesc = prometheus.NewDesc("kme_audit_lag_seconds", "How long events have waited for a checkpoint of the tree; 0 while none do.", nil, nil)
	leavesDesc  = prometheus.NewDesc("kme_audit_leaves", "Leaves of the audit log's tree.", nil, nil)
	sinkLagDesc = prometheus.NewDesc("kme_audit_sink_lag_events", "Leaves that a sink of the audit log has not been sent, where this node sends.", []string{"sink"}, nil)
	alarmDesc   = prometheus.NewDesc("kme_alarm", "1 for each alarm that stands.", []string{"about"}, nil)
)

// Describe implements prometheus.Collector.
func (k *KME) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		buildDesc, runDesc, storedDesc, limitDesc, emptyDesc, stateDesc, blockDesc, bitsDesc, lastDesc, givenDesc, takenDesc, qberDesc, fDesc,
		keyQBERDesc, gainDesc, siftedDesc, gatesDesc, leakDesc, lengthDesc, padsDesc, epsilonDesc,
		hsmDesc, dbDesc, readyDesc, suspendDesc, peerDesc, clockDesc, wrapsDesc, lagDesc, lagTimeDesc, leavesDesc, sinkLagDesc, alarmDesc,
	} {
		ch <- d
	}
	k.metrics.requests.Describe(ch)
	k.metrics.stages.Describe(ch)
}

// Collect implements prometheus.Collector.
func (k *KME) Collect(ch chan<- prometheus.Metric) {
	k.metrics.requests.Collect(ch)
	k.metrics.stages.Collect(ch)
	m := reading{ch}
	m.gauge(buildDesc, 1, release.Version(), runtime.Version(), k.Self.String(), k.Node)
	m.gauge(runDesc, float64(k.run.Load()))
	m.is(hsmDesc, k.hsmWell() == nil)
	m.is(dbDesc, k.Store.Healthy() == nil)
	m.is(readyDesc, k.OperatorDoor().Ready(context.Background()) == nil)
	m.is(suspendDesc, k.suspended() != "")
	alarms := make(map[string]bool)
	for _, a := range k.Alarms() {
		alarms[a.Name] = true
		m.gauge(alarmDesc, 1, a.Name)
	}
	if lag := k.lag.Load(); lag != nil {
		m.gauge(leavesDesc, float64(lag.Folded))
	}
	for _, f := range k.sinks {
		m.gauge(sinkLagDesc, float64(f.Lag()), f.Name())
	}
	for id := range k.Peers {
		m.is(peerDesc, !alarms[peerAlarm(id)], id.String())
		if at, ok := k.offsets.Load(id); ok {
			m.gauge(clockDesc, at.(time.Duration).Seconds(), id.String())
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), collectTime)
	defer cancel()
	select { // requests share the connections to the database: one of them is enough for figures
	case k.collecting <- struct{}{}:
		defer func() { <-k.collecting }()
	case <-ctx.Done():
		return
	}
	k.collectRecord(ctx, m)
	for _, s := range k.LinkStates() {
		k.collectLink(ctx, m, s)
	}
}

// collectTime bounds how long the database is asked for figures. What it does not say by then
// is missing.
const collectTime = 2 * time.Second

// reading is where metrics go that are read when asked for.
type reading struct{ ch chan<- prometheus.Metric }

func (m reading) gauge(d *prometheus.Desc, v float64, labels ...string) {
	m.ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (m reading) counter(d *prometheus.Desc, v float64, labels ...string) {
	m.ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func (m reading) is(d *prometheus.Desc, true bool, labels ...string) {
	v := 0.
	if true {
		v = 1
	}
	m.gauge(d, v, labels...)
}

// lastBlock is what the last block of a link showed.
func (m reading) lastBlock(l *link, s LinkState) {
	o := s.Last
	m.gauge(keyQBERDesc, o.KeyQBER, s.ID)
	for k := range l.Profile.Intensities {
		m.gauge(gainDesc, o.Gain(l.Profile, k), s.ID, strconv.Itoa(k))
	}
	m.gauge(siftedDesc, float64(o.SiftedKey), s.ID, "key")
	m.gauge(siftedDesc, float64(o.SiftedTest), s.ID, "test")
	m.gauge(gatesDesc, float64(o.Gates), s.ID)
	m.gauge(leakDesc, float64(o.Leak), s.ID)
	length := o.Length
	if s.LastWhy != "" {
		length = 0
	}
	m.gauge(lengthDesc, float64(length), s.ID)
}

// collectRecord is about what the HSM and the audit log have in hand.
func (k *KME) collectRecord(ctx context.Context, m reading) {
	if lag := k.lag.Load(); lag != nil {
		m.gauge(lagDesc, float64(lag.Events))
		late := 0.
		if lag.Events > 0 {
			late = max(0, k.Now().Sub(lag.folded).Seconds())
		}
		m.gauge(lagTimeDesc, late)
	}
	epochs, err := k.Store.Epochs(ctx)
	if err != nil {
		return // kme_database_up says so
	}
	for _, e := range epochs {
		for _, kek := range e.KEKs {
			if e.State == store.EpochOpen && kek.State == store.KEKOpen {
				m.gauge(wrapsDesc, float64(max(0, k.MaxWraps-kek.Wraps)), strconv.FormatInt(int64(e.Epoch), 10))
			}
		}
	}
}

func (k *KME) collectLink(ctx context.Context, m reading, s LinkState) {
	l := k.links[s.ID]
	m.gauge(stateDesc, 1, s.ID, s.State)
	m.gauge(limitDesc, float64(k.PoolLimit), s.ID)
	m.counter(blockDesc, float64(s.Blocks), s.ID, string(audit.Done))
	m.counter(blockDesc, float64(s.Aborts), s.ID, "aborted")
	m.counter(bitsDesc, float64(s.Bits), s.ID)
	m.counter(givenDesc, float64(l.balance.given.Load()), s.ID)
	m.counter(takenDesc, float64(l.balance.taken.Load()), s.ID)
	if !s.LastAt.IsZero() {
		if s.Rated {
			m.gauge(qberDesc, s.Last.QBER, s.ID)
		}
		m.gauge(fDesc, s.Last.Efficiency, s.ID)
		m.gauge(lastDesc, float64(s.LastAt.UnixMilli())/1000, s.ID)
		m.lastBlock(l, s)
	}
	m.gauge(padsDesc, float64(s.Reserve.Pads), s.ID)
	m.gauge(epsilonDesc, s.EpsSecrecy, s.ID, "secrecy")
	m.gauge(epsilonDesc, s.EpsCorrect, s.ID, "correctness")
	here, there, err := k.Store.Pool(ctx, s.ID)
	if err != nil {
		return // kme_database_up says so
	}
	for owner, keys := range map[handover.End]int{s.End: here, s.End.Other(): there} {
		m.gauge(storedDesc, float64(keys), s.ID, owner.String())
		if left, ok := l.history.empty(k.Now(), owner == s.End); ok {
			m.gauge(emptyDesc, left.Seconds(), s.ID, owner.String())
		}
	}
}
