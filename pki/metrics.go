package pki

import (
	"encoding/hex"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics shows how a node's gates, CRLs and certificate stand. It is a
// prometheus.Collector.
type Metrics struct {
	Gates       []*Gate
	Revocations []*Revocations
	Refusals    *Refusals
	Renewal     *Renewal
}

var (
	connectionsDesc = prometheus.NewDesc("kme_connections", "Connections that are open, by door.", []string{"door"}, nil)
	handshakesDesc  = prometheus.NewDesc("kme_handshakes_total", "TLS handshakes that were completed, by door.", []string{"door"}, nil)
	refusedDesc     = prometheus.NewDesc("kme_handshakes_refused_total", "TLS handshakes that were not, by door and reason.", []string{"door", "reason"}, nil)
	failingDesc     = prometheus.NewDesc("kme_failing_networks", "Networks (an address of IPv4, a /64 of IPv6) of which handshakes have failed of late, by door.", []string{"door"}, nil)
	crlAgeDesc      = prometheus.NewDesc("kme_crl_age_seconds", "Time since a CA (by its key identifier) signed the CRL that counts here.", []string{"role", "ca"}, nil)
	crlEndDesc      = prometheus.NewDesc("kme_crl_next_update_timestamp_seconds", "When nobody is let in any more whom that CA certified.", []string{"role", "ca"}, nil)
	crlSizeDesc     = prometheus.NewDesc("kme_crl_entries", "Certificates on that CRL.", []string{"role", "ca"}, nil)
	crlFailDesc     = prometheus.NewDesc("kme_crl_fetch_failures_total", "Fetches that brought no CRL that counts.", []string{"role"}, nil)
	renewalsDesc    = prometheus.NewDesc("kme_certificate_renewals_total", "Attempts to renew this node's own certificate.", []string{"outcome"}, nil)
)

// Describe implements prometheus.Collector.
func (m Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connectionsDesc, handshakesDesc, refusedDesc, failingDesc, crlAgeDesc, crlEndDesc, crlSizeDesc, crlFailDesc, renewalsDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m Metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	for _, g := range m.Gates {
		g.mu.Lock()
		open := len(g.open)
		g.mu.Unlock()
		gauge(connectionsDesc, float64(open), g.cfg.Door)
		count(handshakesDesc, g.accepted.Load(), g.cfg.Door)
		gauge(failingDesc, float64(g.failures.known(g.cfg.Now())), g.cfg.Door)
	}
	m.Refusals.mu.Lock()
	for k, n := range m.Refusals.total {
		count(refusedDesc, n, k.door, k.reason)
	}
	m.Refusals.mu.Unlock()
	for _, r := range m.Revocations {
		role := string(r.cfg.Role)
		for key, l := range r.current.Load().lists {
			ca := hex.EncodeToString([]byte(key)) // one that follows another has the same name
			gauge(crlAgeDesc, r.cfg.Now().Sub(l.thisUpdate).Seconds(), role, ca)
			gauge(crlEndDesc, float64(l.nextUpdate.Unix()), role, ca)
			gauge(crlSizeDesc, float64(len(l.serials)), role, ca)
		}
		count(crlFailDesc, r.failures.Load(), role)
	}
	m.Renewal.mu.Lock()
	defer m.Renewal.mu.Unlock()
	count(renewalsDesc, m.Renewal.renewed, "done")
	count(renewalsDesc, m.Renewal.failures, "failed")
}
