package qlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

// BenchmarkLink distils blocks of the lab's link, of the lab's size, four and eight times
// as long: light, fibre and detectors behind their sockets, and both ends of distillation
// over a third. Nothing is wrapped or stored, and the classical channel is not encrypted;
// the benchmark of the same name in package lab has all of that.
//
// These are throughputs of the processing, not rates of a link: gates are simulated as
// fast as they can be, and sim/wall says how much faster than the link's clock that was;
// sim/cpu is the same for a second of one processor.
// Mbit/cpu-s is what a second of one processor makes, all parts of the link counted;
// light-cpu-ns is what simulated light, which hardware has for nothing, takes of cpu-ns.
// Three blocks are under way at a time, and garbage is collected as seldom as in kmed.
func BenchmarkLink(b *testing.B) {
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	params := bb84.Standard()
	for _, n := range []int{1 << 19, 1 << 21, 1 << 22} {
		b.Run(fmt.Sprintf("km=%v/clock=%vGHz/key=2^%d", params.Km, params.ClockHz/1e9, bits.Len(uint(n))-1), func(b *testing.B) {
			plan := StandardPlan()
			plan.KeyBits = n
			profile, err := plan.Profile(params)
			if err != nil {
				b.Fatal(err)
			}
			alice, bob := newSockets(b)
			l := newChannel(b, nil).linkOver(b, 1, alice, bob, profile, 3)
			for range warmUp {
				if _, _, errA, errB := l.next(b); errA != nil || errB != nil {
					b.Fatal(errA, errB)
				}
			}
			begun, sifted, detected := cpuTime(), 0, 0
			for b.Loop() {
				block, _, errA, errB := l.next(b)
				if err := errors.Join(errA, errB); err != nil {
					b.Fatal(err)
				}
				sifted += block.SiftedKey
				detected += block.Detected
			}
			worked := cpuTime() - begun
			distilled := float64(b.N*profile.KeyedBits()) / 1e6
			b.ReportMetric(distilled/b.Elapsed().Seconds(), "distilled-Mbit/s")
			b.ReportMetric(distilled/worked.Seconds(), "distilled-Mbit/cpu-s")
			b.ReportMetric(float64(sifted)/1e6/worked.Seconds(), "sifted-Mbit/cpu-s")
			b.ReportMetric(float64(worked.Nanoseconds())/float64(detected), "cpu-ns/detection")
			b.ReportMetric(float64(b.N)*params.Seconds(profile.Gates)/b.Elapsed().Seconds(), "sim/wall")
			b.ReportMetric(float64(b.N)*params.Seconds(profile.Gates)/worked.Seconds(), "sim/cpu")
			b.ReportMetric(light(b, l, profile), "light-cpu-ns/detection")
		})
	}
}

// light is what a detection costs without distillation: to be drawn, and to be told to both
// ends over their sockets.
func light(b *testing.B, l *link, profile distill.Params) float64 {
	const blocks = 5
	alice, bob, detected := l.alice.cfg.Box, l.bob.cfg.Box, 0
	l.alice.cfg.Channel.(socketEnd).Close() // what is under way ends with it
	l.alice.Close()
	l.bob.Close()
	begun := cpuTime()
	for block := range int64(blocks) {
		block += 1 << 40 // above all that were fired
		if err := alice.Fire(b.Context(), 1, block, profile.Gates); err != nil {
			b.Fatal(err)
		}
		list, err := bob.Detections(b.Context(), 1, block)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := alice.Sent(b.Context(), 1, block, list.Gates); err != nil {
			b.Fatal(err)
		}
		detected += list.Gates.Len()
	}
	return float64((cpuTime() - begun).Nanoseconds()) / float64(detected)
}

// warmUp is how many blocks are made before any is measured: until the garbage collector
// has been at work, all memory is the system's and new, which costs as much as the rest of a
// block. A link runs for longer than that.
const warmUp = 15

// BenchmarkLinkFar says what distance costs: of-near is the rate of blocks when a message
// takes 5 ms to the other end, as a share of that when it takes none, by turns in one run.
// Both links are set up as by default: there are as many blocks under way as there is a
// use for.
func BenchmarkLinkFar(b *testing.B) {
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	params := bb84.Standard()
	for _, n := range []int{1 << 19, 1 << 21} {
		b.Run(fmt.Sprintf("rtt=10ms/key=2^%d", bits.Len(uint(n))-1), func(b *testing.B) {
			plan := StandardPlan()
			plan.KeyBits = n
			profile, err := plan.Profile(params)
			if err != nil {
				b.Fatal(err)
			}
			var took [2]time.Duration
			var rounds, under [2]int
			for i, delay := range []time.Duration{0, 5 * time.Millisecond} {
				took[i], rounds[i], under[i] = farBlocks(b, profile, delay)
			}
			mbit := float64(b.N*profile.KeyedBits()) / 1e6
			b.ReportMetric(mbit/took[0].Seconds(), "near-Mbit/s")
			b.ReportMetric(mbit/took[1].Seconds(), "far-Mbit/s")
			b.ReportMetric(took[0].Seconds()/took[1].Seconds(), "of-near")
			b.ReportMetric(float64(rounds[0])/float64(b.N), "near-rounds")
			b.ReportMetric(float64(rounds[1])/float64(b.N), "far-rounds")
			b.ReportMetric(float64(under[0]), "near-under-way")
			b.ReportMetric(float64(under[1]), "far-under-way")
		})
	}
}

// farBlocks makes b.N blocks over a channel on which a message takes a while, once there
// are as many under way as there are to be.
func farBlocks(b *testing.B, profile distill.Params, delay time.Duration) (took time.Duration, rounds, under int) {
	alice, bob := newSockets(b)
	c := newChannel(b, nil)
	l := c.linkOver(b, 1, far(b, alice, delay), far(b, bob, delay), profile, 0)
	next := func() Block {
		block, _, errA, errB := l.next(b)
		if err := errors.Join(errA, errB); err != nil {
			b.Fatal(err)
		}
		return block
	}
	for range MaxInFlight + 2 {
		next()
	}
	begun := time.Now()
	for range b.N {
		rounds += next().Rounds
		under = max(under, l.alice.Pending()+1)
	}
	took = time.Since(begun)
	_, _ = alice.Close(), bob.Close() // what is under way ends with it
	l.alice.Close()
	l.bob.Close()
	return took, rounds, under
}

// farEnd is one end of a channel on which messages take their time.
type farEnd struct {
	socketEnd
	out chan sentAt
}

type sentAt struct {
	kind byte
	body []byte
	at   time.Time
}

func far(b *testing.B, e socketEnd, delay time.Duration) farEnd {
	f := farEnd{e, make(chan sentAt, 4*MaxInFlight)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for m := range f.out {
			time.Sleep(time.Until(m.at.Add(delay)))
			_ = f.socketEnd.Send(m.kind, m.body) // whoever waits for it sees the error
		}
	}()
	b.Cleanup(func() { close(f.out); <-done })
	return f
}

func (f farEnd) Send(kind byte, body ...[]byte) error {
	f.out <- sentAt{kind, bytes.Join(body, nil), time.Now()}
	return nil
}

// socketEnd is one end of a classical channel over a local socket.
type socketEnd struct{ net.Conn }

// Send writes a frame like writeFrame, and leaves body as it is: it is not secret.
func (e socketEnd) Send(kind byte, body ...[]byte) error {
	size := 1
	for _, part := range body {
		size += len(part)
	}
	head := append(binary.BigEndian.AppendUint32(nil, uint32(size)), kind)
	parts := append(net.Buffers{head}, body...)
	_, err := parts.WriteTo(e.Conn)
	return err
}

func (e socketEnd) Recv() (kind byte, body []byte, err error) { return readFrame(e.Conn, maxFrame) }

func newSockets(b *testing.B) (alice, bob socketEnd) {
	b.Helper()
	l, err := net.Listen("unix", filepath.Join(shortDir(b), "classical"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = dialled.Close(); _ = accepted.Close() })
	return socketEnd{dialled}, socketEnd{accepted}
}

// cpuTime is what this process has used of all processors: what is left to measure on a
// machine that others use too.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
