package store

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
)

// BenchmarkStored is what a key costs with so many stored: leased, and served in
// requests of 64 by 8 clients. 10^7 keys take minutes to make: BENCH_LARGE=1 asks for
// them.
func BenchmarkStored(b *testing.B) {
	sizes := []int{10_000, 1_000_000}
	if os.Getenv("BENCH_LARGE") != "" {
		sizes = append(sizes, 10_000_000)
	}
	for _, stored := range sizes {
		s := newSite(b)
		db := s.open("n1")
		s.store(stored)
		p := new(supply)
		b.Run(fmt.Sprintf("keys=%d", stored), func(b *testing.B) { s.serveAll(b, db, p) })
	}
}

// storedSQL makes $3 blocks of link $1 in epoch $2, of 4096 atoms that nobody could open.
var storedSQL = []string{
	`INSERT INTO block (link, session, id, epoch, atoms, owners, digest, provenance, state, held_at)
		SELECT $1, 1, (SELECT coalesce(max(id), 0) FROM block) + b, $2, 4096, repeat('a', 64), sha256(''), 'simulated', 'ready', now()
		FROM generate_series(1, $3) AS b`,
	`INSERT INTO chunk (link, session, block, first, atoms, owner, remaining, epoch)
		SELECT link, session, id, c * 64, 64, 'here', 64, epoch FROM block, generate_series(0, 63) AS c
		WHERE link = $1 AND epoch = $2 ORDER BY id DESC LIMIT $3 * 64`,
	`INSERT INTO key (id, chunk, index, kek, iv, ct)
		SELECT (substr(epoch_floor($2)::text, 1, 14) || '7' || substr(md5(random()::text), 1, 3) || '-8' || substr(md5(random()::text), 1, 3)
			|| '-' || substr(md5(random()::text), 1, 12))::uuid, c.id, c.first + i, 1, substr(sha256(''), 1, 12), sha256('') || substr(sha256(''), 1, 16)
		FROM (SELECT id, first FROM chunk WHERE link = $1 ORDER BY id DESC LIMIT $3 * 64) AS c, generate_series(0, 63) AS i`,
}

const (
	perRequest   = 64
	storedBlock  = 4096 // atoms
	leasedChunks = 32

	// After so many atoms were leased, as many are stored. However many there are: requests
	// that come after a pause cost more.
	refill = 2 * storedBlock
)

// store puts atoms into the pool.
func (s *site) store(atoms int) {
	s.t.Helper()
	s.super(func(conn *pgx.Conn) error {
		for _, sql := range storedSQL {
			if _, err := conn.Exec(context.Background(), sql, linkName, int64(s.epoch()), (atoms+storedBlock-1)/storedBlock); err != nil {
				return err
			}
		}
		_, err := conn.Exec(context.Background(), "VACUUM ANALYZE")
		return err
	})
}

// supply is what leases have given so far.
type supply struct {
	mu     sync.Mutex
	leased []Atom
	gone   int // leased since atoms were stored
}

// take returns the atoms of one request, or nil on an error.
func (p *supply) take(b *testing.B, s *site, db *DB) []Atom {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.leased) < perRequest {
		if p.gone >= refill {
			b.StopTimer()
			s.store(refill)
			b.StartTimer()
			p.gone = 0
		}
		leases, err := db.Lease(context.Background(), linkName, leasedChunks)
		if err != nil || len(leases) == 0 {
			b.Errorf("%d leases, %v", len(leases), err)
			return nil
		}
		for _, l := range leases {
			p.leased = append(p.leased, l.Atoms...)
			p.gone += len(l.Atoms)
		}
	}
	atoms := p.leased[:perRequest]
	p.leased = p.leased[perRequest:]
	return atoms
}

// serveAll has clients serve what one lease after the other gives them.
func (s *site) serveAll(b *testing.B, db *DB, p *supply) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				atoms := p.take(b, s, db)
				if atoms == nil {
					return
				}
				ev := audit.Event{Action: audit.EncKeys, Outcome: audit.Done, Keys: ids(atoms), Bits: 256}
				if err := db.Serve(context.Background(), ServeJob{Atoms: ids(atoms), Places: places(atoms), Events: []audit.Event{ev}}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.ReportMetric(float64(b.N)*perRequest/b.Elapsed().Seconds(), "keys/s")
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*perRequest), "us/key")
}
