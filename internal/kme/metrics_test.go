package kme

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/qutemail/kme/internal/pgdev"
)

// TestFigures: the figures that stand in the database are read by one at a time, whoever asks
// for them, since requests share the connections; and none is one for which tables of keys are
// looked through.
func TestFigures(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	collected := func() map[*prometheus.Desc]bool {
		seen, ch := make(map[*prometheus.Desc]bool), make(chan prometheus.Metric)
		go func() {
			defer close(ch)
			k.Collect(ch)
		}()
		for m := range ch {
			seen[m.Desc()] = true
		}
		return seen
	}
	conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE kme.key, kme.due IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	all := func() bool { return collected()[wrapsDesc] }
	eventually(t, "all figures, while nobody can look at keys", all)
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}

	k.collecting <- struct{}{}
	if got := collected(); got[wrapsDesc] || !got[dbDesc] {
		t.Errorf("while somebody else reads: %d figures, want those that are at hand", len(got))
	}
	<-k.collecting
	eventually(t, "all figures, when he has done", all)
}
