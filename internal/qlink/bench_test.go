package qlink

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"path/filepath"
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
func BenchmarkLink(b *testing.B) {
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
			l := newChannel(b, nil).linkOver(b, 1, alice, bob, profile)
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

// socketEnd is one end of a classical channel over a local socket.
type socketEnd struct{ net.Conn }

func (e socketEnd) Send(kind byte, body []byte) error {
	return writeFrame(e.Conn, kind, bytes.Clone(body)) // which wipes what it has written
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
