package etsi014

import (
	"net/http"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts what passes through the door.
type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

func newMetrics() metrics {
	return metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kme_sae_requests_total", Help: "Requests of SAEs, by route and HTTP status.",
		}, []string{"route", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kme_sae_request_seconds", Help: "Time from a request's headers to its answer.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"route"}),
	}
}

// Describe implements prometheus.Collector.
func (d *Door) Describe(ch chan<- *prometheus.Desc) {
	d.metrics.requests.Describe(ch)
	d.metrics.seconds.Describe(ch)
}

// Collect implements prometheus.Collector.
func (d *Door) Collect(ch chan<- prometheus.Metric) {
	d.metrics.requests.Collect(ch)
	d.metrics.seconds.Collect(ch)
}

// measure observes every request of a router.
func (m metrics) measure(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		s := &statusWriter{ResponseWriter: w}
		next.ServeHTTP(s, r)
		route := unrouted
		if pattern := chi.RouteContext(r.Context()).RoutePattern(); pattern != "" && s.status != http.StatusMethodNotAllowed {
			route = r.Method + " " + pattern
		}
		m.seconds.WithLabelValues(route).Observe(time.Since(began).Seconds())
		m.requests.WithLabelValues(route, strconv.Itoa(s.status)).Inc()
	})
}

// statusWriter remembers the status of an answer. It has no Flush of its own:
// http.ResponseController finds the one within, which tells of errors.
type statusWriter struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements http.ResponseWriter.
func (s *statusWriter) WriteHeader(status int) {
	s.status = status
	s.ResponseWriter.WriteHeader(status)
}

// Unwrap serves http.ResponseController.
func (s *statusWriter) Unwrap() http.ResponseWriter { return s.ResponseWriter }
