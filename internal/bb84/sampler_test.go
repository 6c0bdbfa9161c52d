package bb84

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

// tally counts the detections of a block by everything that both ends know of one.
type tally struct {
	cells      [64]int // bases, Alice's bit, error, double, odd or even gate
	gaps       [40]int // between clicks, in steps of a twentieth of the mean
	all        int
	double     int
	same       int // equal bases
	errors     int // of these, the wrong bit
	lastGate   int64
	gapsPerBin float64
}

func newTally(r Rates) *tally { return &tally{lastGate: -1, gapsPerBin: 1 / (20 * r.Gain)} }

func (c *tally) add(d Detection, alice *Choices) {
	basis, bit := alice.At(d.Gate)
	cell := int(basis) | int(d.Basis)<<1 | int(bit)<<2 | int(bit^d.Bit)<<3 | int(d.Gate&1)<<5
	if d.Double {
		cell |= 1 << 4
		c.double++
	}
	c.cells[cell]++
	bin := int(float64(d.Gate-c.lastGate) / max(1, c.gapsPerBin))
	c.gaps[min(bin, len(c.gaps)-1)]++
	c.lastGate = d.Gate
	c.all++
	if basis == d.Basis {
		c.same++
		c.errors += int(bit ^ d.Bit)
	}
}

func sampled(t testing.TB, p Params, e Eve, gates int64, seed uint64) *tally {
	t.Helper()
	alice, bob := choices(t, true, testSeed(byte(seed)), 1, 1, p.PX), choices(t, false, testSeed(byte(seed+100)), 1, 1, p.PX)
	s, err := NewSampler(p, e, gates, alice, bob, rand.NewPCG(seed, 1))
	if err != nil {
		t.Fatal(err)
	}
	sent := choices(t, true, testSeed(byte(seed)), 1, 1, p.PX)
	c := newTally(p.Rates(e))
	for d, ok := s.Next(); ok; d, ok = s.Next() {
		if d.Gate <= c.lastGate || d.Gate >= gates {
			t.Fatalf("gate %d after %d in a block of %d", d.Gate, c.lastGate, gates)
		}
		c.add(d, sent)
	}
	return c
}

// Gain, double clicks and QBER of a simulated link lie within 4 sigma of their
// closed forms.
func TestSamplerAgreesWithRates(t *testing.T) {
	for i, tc := range []struct {
		km    float64
		gates int64
		eve   float64
	}{
		{10, 4e6, 0},
		{50, 4e7, 0},
		{100, 4e8, 0},
		{200, 4e10, 0},
		{10, 4e6, .1},
		{10, 4e6, .5},
		{10, 4e6, 1},
		{50, 4e7, .25},
	} {
		t.Run(fmt.Sprintf("km=%v,eve=%v", tc.km, tc.eve), func(t *testing.T) {
			p, e := Textbook(), Eve{InterceptResend: tc.eve}
			p.Km = tc.km
			r := p.Rates(e)
			c := sampled(t, p, e, tc.gates, uint64(i))
			t.Logf("gain %.4e (%.4e), QBER %.5f (%.5f), double %.2e (%.2e), %d clicks",
				float64(c.all)/float64(tc.gates), r.Gain, float64(c.errors)/float64(c.same), r.QBER,
				float64(c.double)/float64(c.all), r.Double, c.all)
			within(t, "gain", c.all, int(tc.gates), r.Gain)
			within(t, "QBER", c.errors, c.same, r.QBER)
			within(t, "double clicks", c.double, c.all, r.Double)
			within(t, "equal bases", c.same, c.all, p.PX*p.PX+(1-p.PX)*(1-p.PX))
		})
	}
}

// The same with the dead time and afterpulses of a real detector. The counts are
// then not binomial, but the bound is still wide enough: dead time narrows them.
func TestSamplerAgreesWithRatesOfRealDetectors(t *testing.T) {
	for _, km := range []float64{0, 10, 50} {
		p := Textbook()
		p.Km, p.DeadGates, p.Afterpulse, p.DarkPerGate = km, 30, .02, 1e-4
		r := p.Rates(Eve{})
		const gates = 4e6
		c := sampled(t, p, Eve{}, gates, 2)
		within(t, "gain", c.all, gates, r.Gain)
		within(t, "QBER", c.errors, c.same, r.QBER)
		within(t, "double clicks", c.double, c.all, r.Double)
	}
}

// Intercept-resend on a fraction of the photons adds a quarter of the fraction to
// the QBER of a perfect link and leaves the gain alone.
func TestInterceptResend(t *testing.T) {
	p := Textbook()
	p.Misalignment, p.DarkPerGate = 0, 0
	quiet := p.Rates(Eve{})
	if quiet.QBER != 0 {
		t.Errorf("QBER of a perfect link: %v, want 0", quiet.QBER)
	}
	for _, fraction := range []float64{.1, .25, .5, 1} {
		e := Eve{InterceptResend: fraction}
		r := p.Rates(e)
		if math.Abs(r.QBER-fraction/4) > 1e-12 || r.Gain != quiet.Gain {
			t.Errorf("fraction %v: QBER %v, gain %v; want %v, %v", fraction, r.QBER, r.Gain, fraction/4, quiet.Gain)
		}
		c := sampled(t, p, e, 1e6, 3)
		within(t, "QBER", c.errors, c.same, fraction/4)
	}
}

// Skipping gates draws from the same distribution as looking at each: every cell
// of bases, bit, error and double click, and the gaps between clicks.
func TestSamplerAgreesWithNaive(t *testing.T) {
	for _, km := range []float64{0, 10, 50} {
		for _, dead := range []int64{0, 12} {
			t.Run(fmt.Sprintf("km=%v,dead=%d", km, dead), func(t *testing.T) {
				p := Textbook()
				p.Km, p.DeadGates = km, dead
				if dead > 0 {
					p.Afterpulse, p.DarkPerGate = .03, .002
				}
				e := Eve{InterceptResend: .2}
				gates := int64(1_500_000)
				if km == 50 {
					gates *= 3
				}
				fast := sampled(t, p, e, gates, 4)

				alice, bob := choices(t, true, testSeed(5), 1, 1, p.PX), choices(t, false, testSeed(6), 1, 1, p.PX)
				slow := newTally(p.Rates(e))
				naive(p, e, gates, alice, bob, rand.NewPCG(7, 7), func(d Detection) { slow.add(d, alice) })

				for what, counts := range map[string][2][]int{
					"cells": {fast.cells[:], slow.cells[:]},
					"gaps":  {fast.gaps[:], slow.gaps[:]},
				} {
					chi2, freedom := twoSample(counts[0], counts[1])
					t.Logf("%s: chi^2 %.1f with %d degrees of freedom", what, chi2, freedom)
					if z := wilsonHilferty(chi2, freedom); z > 3.72 { // p < 1e-4
						t.Errorf("%s: chi^2 %.1f with %d degrees of freedom", what, chi2, freedom)
					}
				}
			})
		}
	}
}

// twoSample is the chi^2 of two sets of counts being of one distribution, taking
// the totals as part of it. Cells too thin for the approximation are pooled.
func twoSample(a, b []int) (chi2 float64, freedom int) {
	var restA, restB float64
	add := func(x, y float64) {
		chi2 += (x - y) * (x - y) / (x + y)
		freedom++
	}
	for i := range a {
		x, y := float64(a[i]), float64(b[i])
		if x+y < 20 {
			restA, restB = restA+x, restB+y
			continue
		}
		add(x, y)
	}
	if restA+restB >= 20 {
		add(restA, restB)
	}
	return chi2, freedom
}

// wilsonHilferty turns a chi^2 into a standard normal deviate.
func wilsonHilferty(chi2 float64, freedom int) float64 {
	k := 2 / (9 * float64(freedom))
	return (math.Cbrt(chi2/float64(freedom)) - (1 - k)) / math.Sqrt(k)
}

// Links at the edge of what Validate lets through neither hang nor divide by zero.
func TestSamplerExtremes(t *testing.T) {
	perfect := Params{EtaBob: 1, PX: .5, ClockHz: 1}
	dark := Params{Km: 1e4, LossDBPerKm: 10, PX: .5, ClockHz: 1}
	dead := perfect
	dead.DeadGates, dead.Afterpulse = 1<<40, .4
	for _, tc := range []struct {
		name   string
		params Params
		gates  int64
		want   int
	}{
		{"every gate clicks", perfect, 1000, 1000},
		{"no gate ever clicks", dark, MaxGates, 0},
		{"one click, then dead", dead, 1000, 1},
	} {
		if c := sampled(t, tc.params, Eve{}, tc.gates, 9); c.all != tc.want || c.errors != 0 {
			t.Errorf("%s: %d clicks, %d errors; want %d, 0", tc.name, c.all, c.errors, tc.want)
		}
	}
}

func TestValidate(t *testing.T) {
	for name, spoil := range map[string]func(*Params){
		"negative length": func(p *Params) { p.Km = -1 },
		"NaN length":      func(p *Params) { p.Km = math.NaN() },
		"amplifier":       func(p *Params) { p.LossDBPerKm = -.2 },
		"efficiency":      func(p *Params) { p.EtaBob = 1.1 },
		"dark":            func(p *Params) { p.DarkPerGate = .5 },
		"misalignment":    func(p *Params) { p.Misalignment = .6 },
		"one basis":       func(p *Params) { p.PX = 1 },
		"negative dead":   func(p *Params) { p.DeadGates = -1 },
		"afterpulse":      func(p *Params) { p.Afterpulse = math.Inf(1) },
		"no clock":        func(p *Params) { p.ClockHz = 0 },
	} {
		p := Textbook()
		spoil(&p)
		if p.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := NewSampler(p, Eve{}, 1, nil, nil, rand.NewPCG(1, 1)); err == nil {
			t.Errorf("%s: sampled", name)
		}
	}
	for _, fraction := range []float64{-.1, 1.1, math.NaN()} {
		if (Eve{InterceptResend: fraction}).Validate() == nil {
			t.Errorf("Eve on a fraction %v: accepted", fraction)
		}
	}
	for _, gates := range []int64{0, -1, MaxGates + 1} {
		if _, err := NewSampler(Textbook(), Eve{}, gates, nil, nil, rand.NewPCG(1, 1)); err == nil {
			t.Errorf("a block of %d gates: sampled", gates)
		}
	}
}

// BenchmarkSampler is one textbook block of 5.2e6 gates (longer where light is
// rarer), choices of both ends included.
func BenchmarkSampler(b *testing.B) {
	for _, km := range []float64{10, 50} {
		b.Run(fmt.Sprintf("km=%v", km), func(b *testing.B) {
			p := Textbook()
			p.Km = km
			const gates = 5_200_000
			var clicks int64
			for i := range b.N {
				alice, bob := choices(b, true, testSeed(1), 1, int64(i), p.PX), choices(b, false, testSeed(2), 1, int64(i), p.PX)
				s, err := NewSampler(p, Eve{}, gates, alice, bob, rand.NewPCG(uint64(i), 1))
				if err != nil {
					b.Fatal(err)
				}
				for _, ok := s.Next(); ok; _, ok = s.Next() {
					clicks++
				}
			}
			b.ReportMetric(gates*float64(b.N)/b.Elapsed().Seconds(), "pulses/s")
			b.ReportMetric(float64(clicks)/b.Elapsed().Seconds(), "detections/s")
		})
	}
}
