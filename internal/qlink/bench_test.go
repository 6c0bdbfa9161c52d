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
)

// BenchmarkLink distils blocks of the lab's link, of the lab's size and four times as
// long: light, fibre and detectors behind their sockets, and both ends of distillation
// over a third. Nothing is wrapped or stored, and the classical channel is not encrypted;
// the benchmark of the same name in package lab has all of that.
//
// These are throughputs of the processing, not rates of a link: gates are simulated as
// fast as they can be, and sim/wall says how much faster than the link's clock that was.
// Mbit/cpu-s is what a second of one processor makes, all parts of the link counted.
// Three blocks are under way at a time, and garbage is collected as seldom as in kmed.
func BenchmarkLink(b *testing.B) {
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	params := bb84.Standard()
	for _, n := range []int{1 << 19, 1 << 21} {
		b.Run(fmt.Sprintf("km=%v/clock=%vGHz/key=2^%d", params.Km, params.ClockHz/1e9, bits.Len(uint(n))-1), func(b *testing.B) {
			plan := StandardPlan()
			plan.KeyBits = n
			profile, err := plan.Profile(params)
			if err != nil {
				b.Fatal(err)
			}
			alice, bob := newSockets(b)
			l := newChannel(b, nil).linkOver(b, 1, alice, bob, profile, 3)
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
		})
	}
}

// BenchmarkLinkFar is BenchmarkLink when a message takes 5 ms to the other end, with as many
// blocks under way as there may be.
func BenchmarkLinkFar(b *testing.B) {
	params := bb84.Standard()
	plan := StandardPlan()
	plan.KeyBits = 1 << 21
	profile, err := plan.Profile(params)
	if err != nil {
		b.Fatal(err)
	}
	for _, delay := range []time.Duration{0, 5 * time.Millisecond} {
		b.Run(fmt.Sprintf("rtt=%v", 2*delay), func(b *testing.B) {
			alice, bob := newSockets(b)
			l := newChannel(b, nil).linkOver(b, 1, far(b, alice, delay), far(b, bob, delay), profile, MaxInFlight)
			blocks := func(n int) (rounds int) {
				for range n {
					block, _, errA, errB := l.next(b)
					if err := errors.Join(errA, errB); err != nil {
						b.Fatal(err)
					}
					rounds += block.Rounds
				}
				return rounds
			}
			blocks(MaxInFlight)
			b.ResetTimer()
			rounds := blocks(b.N)
			b.ReportMetric(float64(b.N*profile.KeyedBits())/1e6/b.Elapsed().Seconds(), "distilled-Mbit/s")
			b.ReportMetric(float64(rounds)/float64(b.N), "rounds")
		})
	}
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

func (f farEnd) Send(kind byte, body []byte) error {
	f.out <- sentAt{kind, bytes.Clone(body), time.Now()}
	return nil
}

// socketEnd is one end of a classical channel over a local socket.
type socketEnd struct{ net.Conn }

// Send writes a frame like writeFrame, and leaves body as it is: it is not secret.
func (e socketEnd) Send(kind byte, body []byte) error {
	head := append(binary.BigEndian.AppendUint32(nil, uint32(len(body)+1)), kind)
	_, err := (&net.Buffers{head, body}).WriteTo(e.Conn)
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
