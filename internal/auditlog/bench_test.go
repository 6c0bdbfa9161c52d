package auditlog

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit"
)

// filled is a site with so many events in the tree, in commits of 64.
func filled(b *testing.B, events int) (*site, *Sequencer) {
	b.Helper()
	s := newSite(b)
	a := s.node("a")
	for n := 1; n < events; n += 64 {
		a.requests(s, 64)
	}
	q := s.sequencer()
	s.step(q)
	return s, q
}

const benchEvents = 20_000

// BenchmarkAuditVerify is an auditor's pass over the whole log: each event with its
// leaf, its chain and the root.
func BenchmarkAuditVerify(b *testing.B) {
	s, _ := filled(b, benchEvents)
	r := s.reader()
	leaves := int64(0)
	for b.Loop() {
		report, err := s.verify(r, nil)
		if err != nil {
			b.Fatal(err)
		}
		leaves += report.Leaves
	}
	b.ReportMetric(float64(leaves)/b.Elapsed().Seconds(), "events/s")
}

// BenchmarkAuditSequence folds what two nodes write while it is folded, as fast as it
// comes.
func BenchmarkAuditSequence(b *testing.B) {
	s := newSite(b)
	nodes := []*node{s.node("a"), s.node("b")}
	q := s.sequencer()
	ctx, cancel := context.WithCancel(context.Background())
	var writers sync.WaitGroup
	events := make([]audit.Event, 64)
	for i := range events {
		events[i] = audit.Event{
			Action: audit.EncKeys, Outcome: audit.Done, Request: "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11", Route: "POST /api/v1/keys/{slave}/enc_keys",
			Actor: audit.Actor{Role: "sae", ID: "alice", Rule: "sae-uri", Serial: "1234567890", Fingerprint: "00112233445566778899aabbccddeeff", Remote: "127.0.0.1:4000"},
			Peer:  "bob", Master: "alice", Slaves: []string{"bob"}, Policy: []string{"same-group"}, Bits: 256, Provenance: "simulated",
		}
	}
	for _, n := range nodes {
		writers.Go(func() {
			mine := append([]audit.Event(nil), events...)
			for ctx.Err() == nil {
				if err := n.Record(context.Background(), mine...); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	folded := 0
	for b.Loop() {
		f, err := q.Step(ctx)
		if err != nil {
			b.Fatal(err)
		}
		folded += f.Events
	}
	b.ReportMetric(float64(folded)/b.Elapsed().Seconds(), "events/s")
	cancel()
	writers.Wait()
}

// BenchmarkAuditFold folds events that are there, in steps of 10,000: what the
// sequencer itself can do.
func BenchmarkAuditFold(b *testing.B) {
	s := newSite(b)
	a := s.node("a")
	q := s.sequencer()
	folded := 0
	for b.Loop() {
		b.StopTimer()
		for range 80 {
			a.requests(s, 64)
		}
		b.StartTimer()
		folded += s.step(q).Events
	}
	b.ReportMetric(float64(folded)/b.Elapsed().Seconds(), "events/s")
}

// BenchmarkAuditProof makes the proof of one leaf from the tiles in the database.
func BenchmarkAuditProof(b *testing.B) {
	s, _ := filled(b, benchEvents)
	r := s.reader()
	key := s.logKey()
	var worst time.Duration
	leaf := int64(0)
	for b.Loop() {
		began := time.Now()
		err := r.Snapshot(context.Background(), 0, func(l *Snapshot) error {
			leaf = (leaf + 7919) % l.Size
			p, err := l.Prove(context.Background(), leaf, key)
			if err != nil {
				return err
			}
			_, _, _, err = p.Verify(key)
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
		worst = max(worst, time.Since(began))
	}
	b.ReportMetric(float64(worst.Microseconds())/1e3, "worst-ms")
}
