package store

import (
	"context"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/key"
)

// BenchmarkCommit is the measure for the others: transactions of one small row, one
// after the other. Each is a round trip and a wait for the disk.
func BenchmarkCommit(b *testing.B) {
	s := newSite(b)
	s.super(func(conn *pgx.Conn) error {
		ctx := context.Background()
		if _, err := conn.Exec(ctx, "CREATE TABLE null_commit (n bigint)"); err != nil {
			return err
		}
		for b.Loop() {
			if _, err := conn.Exec(ctx, "INSERT INTO null_commit VALUES (1)"); err != nil {
				return err
			}
		}
		return nil
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
}

// BenchmarkServe is 64 clients that ask for one key at a time.
func BenchmarkServe(b *testing.B) { benchmarkServe(b, 1) }

// BenchmarkServe16 asks for 16 keys at a time.
func BenchmarkServe16(b *testing.B) { benchmarkServe(b, 16) }

const clients = 64

func benchmarkServe(b *testing.B, number int) {
	s := newSite(b)
	db := s.open("n1")
	const most = 32768
	var atoms []Atom
	var blocks []Block
	for len(atoms) < b.N*number+most {
		blocks = append(blocks, s.fill(db, most, mine))
		atoms = append(atoms, blocks[len(blocks)-1].Atoms...)
	}
	var next atomic.Int64
	commits := ask[int64](s, "SELECT mark FROM node_run")
	b.ResetTimer()
	b.SetParallelism(clients / 2) // of two cores
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			i := int(next.Add(int64(number))) - number
			mine := atoms[i : i+number]
			ev := requestEvent(ids(mine))
			ev.Atoms = rangeOf(blocks[i/most].BlockRef, i%most, number)
			if err := db.Serve(context.Background(), ServeJob{Atoms: ids(mine), Events: []audit.Event{ev}}); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.StopTimer()
	commits = ask[int64](s, "SELECT mark FROM node_run") - commits
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
	b.ReportMetric(float64(b.N)/float64(commits), "req/commit")
}

// BenchmarkAuditStoreCost is what the audit adds to the store's part of a request: 64
// clients that ask for one key at a time, in turns with events, chained and signed, and
// without. of-unaudited is the rate with the audit against that without it. What it costs
// those who ask, whose requests are more than this, BenchmarkAuditCost in internal/lab says.
func BenchmarkAuditStoreCost(b *testing.B) {
	s := newSite(b)
	open := func(node string) *DB {
		cfg := s.config(node)
		cfg.Witness = witnessAt(b, filepath.Join(b.TempDir(), "witness"), node)
		cfg.Witness.Start(1)
		var err error
		if cfg.Key, err = audit.OpenNodeKey(filepath.Join(b.TempDir(), "key")); err != nil {
			b.Fatal(err)
		}
		return s.openWith(cfg)
	}
	const round = 2048 // requests in one turn
	db := open("n1")
	var took [2]time.Duration
	for b.Loop() {
		for i, events := range []func(Block, int) []audit.Event{eventOf, nil} {
			b.StopTimer()
			block := s.fill(db, round, mine)
			b.StartTimer()
			began := time.Now()
			serveBlock(b, db, block, events)
			took[i] += time.Since(began)
		}
	}
	b.ReportMetric(took[1].Seconds()/took[0].Seconds(), "of-unaudited")
	b.ReportMetric(float64(round*b.N)/took[0].Seconds(), "req/s")
}

// serveBlock asks for the atoms of a block one by one, for 64 clients, each with its
// events; nil: there are none.
func serveBlock(b *testing.B, db *DB, block Block, events func(Block, int) []audit.Event) {
	var next atomic.Int64
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(block.Atoms) {
					return
				}
				mine := block.Atoms[i : i+1]
				job := ServeJob{Atoms: ids(mine)}
				if events != nil {
					job.Events = events(block, i)
				}
				if err := db.Serve(context.Background(), job); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

// eventOf is the event of a request for one atom of a block.
func eventOf(block Block, i int) []audit.Event {
	ev := requestEvent(ids(block.Atoms[i : i+1]))
	ev.Atoms = rangeOf(block.BlockRef, i, 1)
	return []audit.Event{ev}
}

// requestEvent is the event of a request for keys.
func requestEvent(keys []key.ID) audit.Event {
	return audit.Event{
		Action: audit.EncKeys, Outcome: audit.Done, Request: "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11", Route: "POST /api/v1/keys/{slave}/enc_keys",
		Actor: audit.Actor{
			Role: "sae", ID: "alice", Rule: "lab-sae", Serial: "123456789012345678901234567890",
			Issuer:      "00112233445566778899aabbccddeeff00112233",
			Fingerprint: "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff", Remote: "127.0.0.1:40000",
		},
		Policy: []string{"alice-bob"}, Link: linkName, Master: "alice", Slaves: []string{"bob"}, Keys: keys, Bits: 256, Provenance: key.Simulated, Batch: 1,
	}
}

// BenchmarkTake is 64 clients that take one key at a time, looked for beforehand.
func BenchmarkTake(b *testing.B) {
	s := newSite(b)
	db := s.open("n1")
	rows := make([]Due, b.N)
	for i := range rows {
		rows[i] = s.due(key.NewLocalID(s.epoch().Start(hour)), "bob", "alice")
	}
	for i := 0; i < len(rows); i += 1000 {
		if err := db.Serve(b.Context(), ServeJob{Due: rows[i:min(i+1000, len(rows))]}); err != nil {
			b.Fatal(err)
		}
	}
	var next atomic.Int64
	b.ResetTimer()
	b.SetParallelism(clients / 2)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			d := rows[next.Add(1)-1]
			found, _, err := db.FindDue(context.Background(), d.SAE, []key.ID{d.Key})
			if err == nil && len(found) == 1 {
				err = db.Take(context.Background(), TakeJob{
					SAE: d.SAE, Rows: []DueRef{d.ref()}, How: GoneTaken, Events: []audit.Event{{Action: audit.DecKeys, Outcome: audit.Done, Keys: []key.ID{d.Key}}},
				})
			}
			if err != nil || len(found) != 1 {
				b.Errorf("%d rows, %v", len(found), err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}

// BenchmarkHoldBlock stores blocks of 8192 atoms.
func BenchmarkHoldBlock(b *testing.B) {
	s := newSite(b)
	db := s.open("n1")
	const atoms = 8192
	s.fill(db, 64, mine)
	for b.Loop() {
		b.StopTimer()
		block := s.block(1, atoms, mine)
		b.StartTimer()
		if err := db.HoldBlock(b.Context(), block, holdEvent(block)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(atoms*float64(b.N)/b.Elapsed().Seconds(), "atoms/s")
}
