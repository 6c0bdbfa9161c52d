package bb84

import (
	"math"
	"testing"
)

func TestSinglePhotonLength(t *testing.T) {
	const epsSec, epsCor = 1e-10, 1e-15
	for _, tc := range []struct {
		n, k   int
		qTol   float64
		mu     float64
		leak   float64
		length int
	}{ // reference values for f = 1.1
		{1 << 16, 1 << 14, .02, .043158, 10196.4, 32949},
		{1 << 18, 1 << 16, .02, .021579, 40785.6, 155840},
		{1 << 18, 1 << 16, .05, .021579, 82585.0, 81980},
		{1 << 20, 1 << 18, .01, .010789, 93189.5, 802335},
		{1 << 20, 1 << 18, .08, .010789, 463887.0, 124143},
		{1 << 14, 1 << 12, .05, .086324, 5161.6, 1692},
	} {
		leak := 1.1 * float64(tc.n) * Entropy(tc.qTol)
		if math.Abs(leak-tc.leak) > .05+1e-6*tc.leak {
			t.Errorf("n=%d Q=%v: leak %.1f, want %.1f", tc.n, tc.qTol, leak, tc.leak)
		}
		if mu := samplingDeviation(tc.n, tc.k, epsSec); math.Abs(mu-tc.mu) > 6e-7 {
			t.Errorf("n=%d k=%d: mu %.6f, want %.6f", tc.n, tc.k, mu, tc.mu)
		}
		if l := SinglePhotonLength(tc.n, tc.k, tc.qTol, leak, -math.Log2(epsCor), epsSec); l != tc.length {
			t.Errorf("n=%d k=%d Q=%v: length %d bits, want %d", tc.n, tc.k, tc.qTol, l, tc.length)
		}
	}
}

// Where there is no key the length is 0, never negative and never NaN cast to int.
func TestSinglePhotonLengthOfNothing(t *testing.T) {
	for _, tc := range []struct {
		name               string
		n, k               int
		qTol, leak, epsSec float64
	}{
		{"no test bits", 1 << 18, 0, .02, 0, 1e-10},
		{"no key bits", 0, 1 << 16, .02, 0, 1e-10},
		{"errors of a half", 1 << 18, 1 << 16, .5, 0, 1e-10},
		{"eleven per cent", 1 << 30, 1 << 28, .11, 1 << 29, 1e-10},
		{"all of it leaked", 1 << 18, 1 << 16, .02, 1 << 18, 1e-10},
		{"NaN errors", 1 << 18, 1 << 16, math.NaN(), 0, 1e-10},
		{"NaN leak", 1 << 18, 1 << 16, .02, math.NaN(), 1e-10},
		{"no epsilon", 1 << 18, 1 << 16, .02, 0, 0},
	} {
		if l := SinglePhotonLength(tc.n, tc.k, tc.qTol, tc.leak, 128, tc.epsSec); l != 0 {
			t.Errorf("%s: length %d bits, want none", tc.name, l)
		}
	}
}

func TestPLOB(t *testing.T) {
	for km, want := range map[float64]float64{
		10: 1.438, 50: .15200, 100: .014500, 150: 1.4434e-3, 200: 1.4428e-4, 300: 1.44270e-6,
	} {
		got := PLOB(Params{Km: km, LossDBPerKm: .2}.EtaChannel())
		if math.Abs(got/want-1) > 4e-4 {
			t.Errorf("PLOB at %v km: %v bits per gate, want %v", km, got, want)
		}
	}
}

// The textbook profile makes key, and less of it than any protocol could.
func TestTextbookProfile(t *testing.T) {
	const gates, n, k, qTol = 5.2e6, 1 << 18, 1 << 16, .02
	p := Textbook()
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	r := p.Rates(Eve{})
	x, z := gates*r.Gain*p.PX*p.PX, gates*r.Gain*(1-p.PX)*(1-p.PX)
	if x < n+10*math.Sqrt(x) || z < k+10*math.Sqrt(z) {
		t.Errorf("%.0f key and %.0f test bits expected: too few for %d and %d", x, z, n, k)
	}
	if r.QBER > qTol*.75 {
		t.Errorf("QBER %.4f is too close to the limit %v", r.QBER, qTol)
	}
	l := SinglePhotonLength(n, k, qTol, 1.1*n*Entropy(qTol), 128, 1e-10)
	if rate := float64(l) / gates; l < 150_000 || rate >= PLOB(p.EtaChannel()) {
		t.Errorf("length %d bits, %v a gate; the bound is %v", l, rate, PLOB(p.EtaChannel()))
	}
}
