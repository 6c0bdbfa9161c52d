//go:build cgo

package hsm

import (
	"crypto/rand"
	"slices"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
)

// The benchmarks run ours and a bare loop over miekg/pkcs11 in turns of one slice
// each, on the same session copy of one KEK, so that both see the same machine.
// of-bare is the median over slices of our rate divided by the bare one; the rate
// itself is a median too.

const slice = 200 // calls

func BenchmarkWrap(b *testing.B) {
	_, token := newToken(b)
	k := newKEK(b, token, "bench")
	plain, aad := make([]byte, 32), make([]byte, 150)
	against(b, token, "wraps/s", func() error {
		_, _, err := k.Wrap(b.Context(), plain, aad)
		return err
	}, func(s pkcs11.SessionHandle) error {
		var iv [IVBytes]byte
		_, _ = rand.Read(iv[:])
		p := pkcs11.NewGCMParams(iv[:], aad, 8*TagBytes)
		defer p.Free()
		if err := token.m.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, k.copy); err != nil {
			return err
		}
		_, err := token.m.Encrypt(s, plain)
		return err
	})
}

func BenchmarkUnwrap(b *testing.B) {
	_, token := newToken(b)
	k := newKEK(b, token, "bench")
	aad := make([]byte, 150)
	iv, ct, err := k.Wrap(b.Context(), make([]byte, 32), aad)
	if err != nil {
		b.Fatal(err)
	}
	against(b, token, "unwraps/s", func() error {
		_, err := k.Unwrap(b.Context(), iv, ct, aad)
		return err
	}, func(s pkcs11.SessionHandle) error {
		p := pkcs11.NewGCMParams(iv[:], aad, 8*TagBytes)
		defer p.Free()
		if err := token.m.DecryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, k.copy); err != nil {
			return err
		}
		_, err := token.m.Decrypt(s, ct)
		return err
	})
}

// against times b.N calls of ours, with as many of bare in between.
func against(b *testing.B, token *Token, unit string, ours func() error, bare func(pkcs11.SessionHandle) error) {
	s, err := token.m.OpenSession(token.slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		b.Fatal(err)
	}
	run := func(n int, call func() error) time.Duration {
		start := time.Now()
		for range n {
			if err := call(); err != nil {
				b.Fatal(err)
			}
		}
		return time.Since(start)
	}
	var ratios, rates []float64
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= slice {
		n := min(left, slice)
		b.StopTimer()
		theirs := run(n, func() error { return bare(s) })
		b.StartTimer()
		d := run(n, ours)
		ratios = append(ratios, float64(theirs)/float64(d))
		rates = append(rates, float64(n)/d.Seconds())
	}
	b.StopTimer()
	b.ReportMetric(median(ratios), "of-bare")
	b.ReportMetric(median(rates), unit)
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
