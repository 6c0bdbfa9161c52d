//go:build cgo

package hsm

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// counters count since the token was opened.
type counters struct {
	wraps, unwraps              outcomes
	abandoned, evicted, outages atomic.Int64
	mu                          sync.Mutex
	recoveries                  map[string]int64 // by the step of the ladder that helped
}

func (c *counters) recovered(how string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.recoveries == nil {
		c.recoveries = make(map[string]int64)
	}
	c.recoveries[how]++
}

// outcomes of one kind of call.
type outcomes struct{ done, tampered, noKEK, unavailable, refused atomic.Int64 }

func (o *outcomes) failed(err error) {
	switch {
	case errors.Is(err, ErrTampered):
		o.tampered.Add(1)
	case errors.Is(err, ErrNoKEK):
		o.noKEK.Add(1)
	case errors.Is(err, ErrUnavailable):
		o.unavailable.Add(1)
	default:
		o.refused.Add(1)
	}
}

// Metrics of a token, by their names on the wire.
var (
	stageDesc     = prometheus.NewDesc("kme_hsm_stage", "1 for the stage that the token is in: well, grace (away, its session keys are used on) or down.", []string{"stage"}, nil)
	callsDesc     = prometheus.NewDesc("kme_hsm_calls_total", "Keys sealed and opened in the HSM since the node started, by how it ended.", []string{"call", "outcome"}, nil)
	waitingDesc   = prometheus.NewDesc("kme_hsm_calls_waiting", "Calls that wait for a turn in the module.", nil, nil)
	stuckDesc     = prometheus.NewDesc("kme_hsm_calls_stuck", "Calls in the module that nobody waits for any more.", nil, nil)
	abandonedDesc = prometheus.NewDesc("kme_hsm_calls_abandoned_total", "Calls whose callers were answered before the module returned.", nil, nil)
	evictedDesc   = prometheus.NewDesc("kme_hsm_sessions_evicted_total", "Sessions closed because the module failed on them.", nil, nil)
	outagesDesc   = prometheus.NewDesc("kme_hsm_outages_total", "How often the token went away.", nil, nil)
	recoveryDesc  = prometheus.NewDesc("kme_hsm_recoveries_total", "How often it came back, by the step that helped.", []string{"step"}, nil)
)

// Describe implements prometheus.Collector.
func (t *Token) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{stageDesc, callsDesc, waitingDesc, stuckDesc, abandonedDesc, evictedDesc, outagesDesc, recoveryDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (t *Token) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, float64(v), labels...)
	}
	now := t.Health().Stage
	for _, s := range []Stage{Well, Grace, Down} {
		in := int64(0)
		if s == now {
			in = 1
		}
		send(stageDesc, prometheus.GaugeValue, in, string(s))
	}
	for call, o := range map[string]*outcomes{"wrap": &t.count.wraps, "unwrap": &t.count.unwraps} {
		for outcome, n := range map[string]*atomic.Int64{
			"done": &o.done, "tampered": &o.tampered, "no-kek": &o.noKEK, "unavailable": &o.unavailable, "refused": &o.refused,
		} {
			send(callsDesc, prometheus.CounterValue, n.Load(), call, outcome)
		}
	}
	send(waitingDesc, prometheus.GaugeValue, int64(t.gate.waiting()))
	send(stuckDesc, prometheus.GaugeValue, t.stuck.Load())
	send(abandonedDesc, prometheus.CounterValue, t.count.abandoned.Load())
	send(evictedDesc, prometheus.CounterValue, t.count.evicted.Load())
	send(outagesDesc, prometheus.CounterValue, t.count.outages.Load())
	t.count.mu.Lock()
	defer t.count.mu.Unlock()
	for _, s := range append(t.ladder(), step{name: "by itself"}) {
		send(recoveryDesc, prometheus.CounterValue, t.count.recoveries[s.name], s.name)
	}
}
