package lab

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"
)

// refusal is how long it takes until alice is refused keys to share with another.
func refusal(l *Lab, alice *Person, other string) (time.Duration, error) {
	asked := time.Now()
	res, err := alice.HTTP.Get(l.KM1.URL() + "/api/v1/keys/" + other + "/enc_keys")
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	took := time.Since(asked)
	if err != nil || res.StatusCode != http.StatusUnauthorized {
		return 0, fmt.Errorf("with %s: %s, %w; want 401", other, res.Status, err)
	}
	return took, nil
}

// BenchmarkNoOracle is whether the time that a refusal takes tells why it is one: alice asks
// for keys to share with an SAE that nobody knows, one that policy forbids and one that is
// disabled, in threes of which the order is drawn, over mutual TLS from several connections
// at once. t-forbidden and t-disabled are Welch's t of how long these two took against the
// unknown one's; beyond 4.5 they would be told apart. They mean something of 100,000
// (-benchtime 100000x). A client can tell a 401 from the 400 of dec_keys: that is the
// standard's.
func BenchmarkNoOracle(b *testing.B) {
	l := start(b, func(c *Config) { c.Filler, c.PoolLimit = 4096, 8192 })
	keysStored(b, l, 1000)
	if err := operator(b, l.KM1).DisableSAE(b.Context(), "erin", "lost laptop"); err != nil {
		b.Fatal(err)
	}
	others := []string{"zoe", "carol", "erin"} // unknown, forbidden, disabled
	const connections = 8
	took := make([][3]moments, connections)
	var all sync.WaitGroup
	b.ResetTimer()
	for i := range took {
		alice := sae(b, l, "alice")
		all.Go(func() {
			for range b.N/(connections*len(others)) + 1 {
				for _, which := range rand.Perm(len(others)) {
					d, err := refusal(l, alice, others[which])
					if err != nil {
						b.Error(err)
						return
					}
					took[i][which].add(d)
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	var sums [3]moments
	for _, one := range took {
		for which, m := range one {
			sums[which].merge(m)
		}
	}
	b.ReportMetric(welch(sums[0], sums[1]), "t-forbidden")
	b.ReportMetric(welch(sums[0], sums[2]), "t-disabled")
	b.ReportMetric(sums[0].sum/sums[0].n*1e3, "mean-ms")
}

// moments sum up durations for a comparison of their means.
type moments struct{ n, sum, squares float64 }

func (m *moments) add(d time.Duration) {
	x := d.Seconds()
	m.n, m.sum, m.squares = m.n+1, m.sum+x, m.squares+x*x
}

func (m *moments) merge(o moments) {
	m.n, m.sum, m.squares = m.n+o.n, m.sum+o.sum, m.squares+o.squares
}

// welch is the size of Welch's t of two samples.
func welch(a, b moments) float64 {
	of := func(m moments) (mean, error2 float64) {
		mean = m.sum / m.n
		return mean, (m.squares - m.sum*mean) / (m.n - 1) / m.n
	}
	meanA, errorA := of(a)
	meanB, errorB := of(b)
	return math.Abs(meanA-meanB) / math.Sqrt(errorA+errorB)
}
