package peer

import (
	"fmt"
	"testing"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// BenchmarkAnnounce says batches of one-key requests to a door that answers at
// once: what TLS, HTTP and JSON cost.
func BenchmarkAnnounce(b *testing.B) {
	ca := newAuthority(b)
	for _, n := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("requests=%d", n), func(b *testing.B) {
			a := anAnnounce(1)
			results := make([]handover.Result, n)
			a.Requests = nil
			for i := range n {
				r := anAnnounce(1).Requests[0]
				r.ID = fmt.Sprintf("request-%d", i)
				r.Slaves = []identity.SAE{mustSAE("bob")}
				r.Keys = []handover.Key{{Session: 2, Block: 7, First: i, Atoms: []key.ID{anID(byte(i))}}}
				a.Requests = append(a.Requests, r)
				results[i] = handover.Result{ID: r.ID, Accepted: true}
			}
			s := &site{answer: handover.AnnounceAnswer{Standing: handover.Fresh, Results: results}}
			addr := serveHTTP(b, ca.server(ca.issue(b, "kme", "km2")), Handler(s, identifyHTTP(b), quiet()))
			c := newClient(b, addr, ca.client(ca.issue(b, "kme", "km1")))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Announce(b.Context(), a); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
	}
}
