package bb84

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func testSeed(first byte) *[SeedSize]byte {
	var s [SeedSize]byte
	for i := range s {
		s[i] = first + byte(i)
	}
	return &s
}

func choices(t testing.TB, p Params, seed byte) (alice, bob *Choices) {
	t.Helper()
	alice, err := AliceChoices(testSeed(seed), 1, 1, p)
	if err != nil {
		t.Fatal(err)
	}
	bob, err = BobChoices(testSeed(seed+100), 1, 1, p)
	if err != nil {
		t.Fatal(err)
	}
	return alice, bob
}

// tally counts the events of a block by everything that both ends know of one.
type tally struct {
	cells      [512]int // intensity, bases, Alice's bit, error, double, odd or even gate
	gaps       [40]int  // between clicks, in steps of a twentieth of the mean
	all        int
	double     int
	same       int // equal bases
	errors     int // of these, the wrong bit
	shares     [MaxIntensities]int
	sames      [MaxIntensities]int
	wrongs     [MaxIntensities]int
	lastGate   int64
	gapsPerBin float64
}

func newTally(r Rates) *tally { return &tally{lastGate: -1, gapsPerBin: 1 / (20 * r.Gain)} }

func (c *tally) add(e Event) {
	wrong := int(e.Sent.Bit ^ e.Bit)
	cell := int(e.Sent.Basis) | int(e.Basis)<<1 | int(e.Sent.Bit)<<2 | wrong<<3 | int(e.Gate&1)<<5 | int(e.Sent.Intensity)<<6
	if e.Double {
		cell |= 1 << 4
		c.double++
	}
	c.cells[cell]++
	bin := int(float64(e.Gate-c.lastGate) / max(1, c.gapsPerBin))
	c.gaps[min(bin, len(c.gaps)-1)]++
	c.lastGate = e.Gate
	c.all++
	c.shares[e.Sent.Intensity]++
	if e.Sent.Basis == e.Basis {
		c.same++
		c.errors += wrong
		c.sames[e.Sent.Intensity]++
		c.wrongs[e.Sent.Intensity] += wrong
	}
}

func sampled(t testing.TB, p Params, e Eve, gates int64, seed uint64) *tally {
	t.Helper()
	alice, bob := choices(t, p, byte(seed))
	s, err := NewSampler(p, e, gates, alice, bob, rand.NewPCG(seed, 1))
	if err != nil {
		t.Fatal(err)
	}
	c := newTally(p.Rates(e))
	for ev, ok := s.Next(); ok; ev, ok = s.Next() {
		if ev.Gate <= c.lastGate || ev.Gate >= gates {
			t.Fatalf("gate %d after %d in a block of %d", ev.Gate, c.lastGate, gates)
		}
		c.add(ev)
	}
	return c
}

// within fails if count of n lies more than 4 sigma from n p.
func within(t *testing.T, what string, count, n int, p float64) {
	t.Helper()
	mean, sigma := float64(n)*p, math.Sqrt(float64(n)*p*(1-p))
	if math.Abs(float64(count)-mean) > 4*sigma+1e-9 {
		t.Errorf("%s: %d of %d, want %.1f +- %.1f", what, count, n, mean, sigma)
	}
}

// agrees holds what was sampled against the closed form.
func (c *tally) agrees(t *testing.T, p Params, r Rates, gates int) {
	t.Helper()
	t.Logf("gain %.4e (%.4e), QBER %.5f (%.5f), double %.2e (%.2e), %d clicks",
		float64(c.all)/float64(gates), r.Gain, float64(c.errors)/float64(c.same), r.QBER,
		float64(c.double)/float64(c.all), r.Double, c.all)
	within(t, "gain", c.all, gates, r.Gain)
	within(t, "QBER", c.errors, c.same, r.QBER)
	within(t, "double clicks", c.double, c.all, r.Double)
	within(t, "equal bases", c.same, c.all, p.PX*p.PX+(1-p.PX)*(1-p.PX))
	for k := range p.Intensities {
		within(t, fmt.Sprintf("share of intensity %d", k), c.shares[k], c.all, r.Share[k])
		within(t, fmt.Sprintf("errors of intensity %d", k), c.wrongs[k], c.sames[k], r.Error[k])
	}
}

// ideal is the standard link with detectors that are never off.
func ideal(km float64) Params {
	p := Standard()
	p.Km, p.DeadGates, p.Afterpulse = km, 0, 0
	return p
}

// Gains, double clicks and QBER of a simulated link lie within 4 sigma of their
// closed forms.
func TestSamplerAgreesWithRates(t *testing.T) {
	for i, tc := range []struct {
		km    float64
		gates int64
		eve   Eve
	}{
		{10, 2e7, Eve{}},
		{50, 2e8, Eve{}},
		{100, 2e9, Eve{}},
		{200, 2e11, Eve{}},
		{10, 2e7, Eve{InterceptResend: .1}},
		{10, 2e7, Eve{InterceptResend: .5}},
		{10, 2e7, Eve{InterceptResend: 1}},
		{50, 2e8, Eve{InterceptResend: .25}},
		{10, 2e7, Eve{SplitPhotons: true}},
		{50, 2e8, Eve{SplitPhotons: true}},
		{10, 2e7, Eve{Blind: true}},
	} {
		t.Run(fmt.Sprintf("km=%v,eve=%v", tc.km, tc.eve), func(t *testing.T) {
			p := ideal(tc.km)
			sampled(t, p, tc.eve, tc.gates, uint64(i)).agrees(t, p, p.Rates(tc.eve), int(tc.gates))
		})
	}
	one := ideal(20)
	one.Intensities = []Intensity{{.4, .6}, {.15, .4}}
	sampled(t, one, Eve{}, 2e7, 30).agrees(t, one, one.Rates(Eve{}), 2e7)
}

// The same with the dead time and afterpulses of a real detector. The counts are
// then not binomial, but the bound is still wide enough: dead time narrows them.
func TestSamplerAgreesWithRatesOfRealDetectors(t *testing.T) {
	for _, km := range []float64{0, 10, 50} {
		p := Standard()
		p.Km, p.Afterpulse, p.DarkPerGate = km, .02, 1e-4
		sampled(t, p, Eve{}, 2e7, 2).agrees(t, p, p.Rates(Eve{}), 2e7)
	}
}

// Skipping gates draws from the same distribution as looking at each: every cell of
// intensity, bases, bit, error and double click, and the gaps between clicks.
func TestSamplerAgreesWithNaive(t *testing.T) {
	bright := []Intensity{{.9, .3}, {.4, .5}, {2e-3, .2}}
	for _, km := range []float64{0, 10, 50} {
		for _, tc := range []struct {
			dead int64
			eve  Eve
		}{
			{0, Eve{InterceptResend: .2}},
			{12, Eve{}},
			{12, Eve{SplitPhotons: true}},
			{12, Eve{Blind: true}},
		} {
			t.Run(fmt.Sprintf("km=%v,dead=%d,eve=%v", km, tc.dead, tc.eve), func(t *testing.T) {
				t.Parallel()
				p := Standard()
				p.Km, p.DeadGates, p.Afterpulse, p.Intensities = km, tc.dead, 0, bright
				if tc.dead > 0 && !tc.eve.Blind {
					p.Afterpulse, p.DarkPerGate = .03, .002
				}
				gates := int64(1_000_000)
				if km == 50 {
					gates *= 2
				}
				fast := sampled(t, p, tc.eve, gates, 4)

				slow := newTally(p.Rates(tc.eve))
				alice, bob := choices(t, p, 5)
				naive(p, tc.eve, gates, alice, bob, rand.NewPCG(7, 7), func(e Event, _ guess) { slow.add(e) })

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

// The ziggurat draws from the exponential distribution: its upper parts are as likely as they
// should be, down into the tail that it draws apart.
func TestExponential(t *testing.T) {
	p, z := newPhysics(rand.NewPCG(8, 8)), newZiggurat()
	const n = 4_000_000
	var above [400]int // 0.025 apart
	sum := 0.
	for range n {
		x := p.exponential(z)
		sum += x
		for i := range min(len(above), int(x*40)+1) {
			above[i]++
		}
	}
	for i, count := range above {
		mean := n * math.Exp(-float64(i)/40)
		if sigma := math.Sqrt(mean * (1 - mean/n)); math.Abs(float64(count)-mean) > 4.5*sigma+1e-9 {
			t.Errorf("%d of %d above %v, want %.0f +- %.0f", count, n, float64(i)/40, mean, sigma)
		}
	}
	if mean := sum / n; math.Abs(mean-1) > 4.5/math.Sqrt(n) {
		t.Errorf("mean %v", mean)
	}
	for i := 2; i < 256; i++ { // every layer has the same area
		if area := z.width[i] * unit * (z.height[i-1] - z.height[i]); math.Abs(area/zigguratArea-1) > 1e-9 {
			t.Errorf("layer %d has area %v", i, area)
		}
	}
}

// Events are the same however many are read at a time.
func TestSamplerReads(t *testing.T) {
	p := Standard()
	p.Afterpulse, p.DarkPerGate = .03, .002
	const gates = 1_000_000
	sampler := func() *Sampler {
		alice, bob := choices(t, p, 6)
		s, err := NewSampler(p, Eve{}, gates, alice, bob, rand.NewPCG(6, 6))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	one, many := sampler(), sampler()
	random, all := rand.New(rand.NewPCG(7, 7)), 0
	for done := false; !done; {
		events := make([]Event, 1+random.IntN(1500))
		n := many.Read(events)
		done = n < len(events)
		for i, e := range events[:n] {
			if want, ok := one.Next(); !ok || e != want {
				t.Fatalf("event %d: %+v, want %+v", all+i, e, want)
			}
		}
		all += n
	}
	if e, ok := one.Next(); ok || many.Read(make([]Event, 3)) != 0 || all < 9000 {
		t.Fatalf("after %d events: %+v", all, e)
	}
}

// Links at the edge of what Validate lets through neither hang nor divide by zero.
func TestSamplerExtremes(t *testing.T) {
	bright := []Intensity{{10, .9}, {9.9, .1}}
	dark := Params{Km: 1e4, LossDBPerKm: 10, PX: .5, ClockHz: 1, Intensities: bright}
	dead := Params{EtaBob: 1, PX: .5, ClockHz: 1, Intensities: bright, DeadGates: 1 << 40, Afterpulse: .4}
	for _, tc := range []struct {
		name   string
		params Params
		gates  int64
		want   int
	}{
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
		"negative length":   func(p *Params) { p.Km = -1 },
		"NaN length":        func(p *Params) { p.Km = math.NaN() },
		"amplifier":         func(p *Params) { p.LossDBPerKm = -.2 },
		"efficiency":        func(p *Params) { p.EtaBob = 1.1 },
		"dark":              func(p *Params) { p.DarkPerGate = .5 },
		"misalignment":      func(p *Params) { p.Misalignment = .6 },
		"one basis":         func(p *Params) { p.PX = 1 },
		"negative dead":     func(p *Params) { p.DeadGates = -1 },
		"afterpulse":        func(p *Params) { p.Afterpulse = math.Inf(1) },
		"no clock":          func(p *Params) { p.ClockHz = 0 },
		"no intensities":    func(p *Params) { p.Intensities = nil },
		"rising intensity":  func(p *Params) { p.Intensities = []Intensity{{.1, .5}, {.2, .5}} },
		"half a source":     func(p *Params) { p.Intensities = []Intensity{{.4, .5}, {.2, .4}} },
		"an empty decoy":    func(p *Params) { p.Intensities = []Intensity{{.4, .5}, {0, .5}} },
		"too dim a signal":  func(p *Params) { p.Intensities = []Intensity{{.4, .5}, {.3, .3}, {.2, .2}} },
		"no such intensity": func(p *Params) { p.Intensities = []Intensity{{math.NaN(), .5}, {.2, .5}} },
	} {
		p := Standard()
		spoil(&p)
		if p.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := NewSampler(p, Eve{}, 1, nil, nil, rand.NewPCG(1, 1)); err == nil {
			t.Errorf("%s: sampled", name)
		}
	}
	for _, e := range []Eve{
		{InterceptResend: -.1},
		{InterceptResend: 1.1},
		{InterceptResend: math.NaN()},
		{InterceptResend: .1, Blind: true},
		{SplitPhotons: true, Blind: true},
	} {
		if e.Validate() == nil {
			t.Errorf("%+v: accepted", e)
		}
	}
	for _, gates := range []int64{0, -1, MaxGates + 1} {
		if _, err := NewSampler(Standard(), Eve{}, gates, nil, nil, rand.NewPCG(1, 1)); err == nil {
			t.Errorf("a block of %d gates: sampled", gates)
		}
	}
}

// The choices of an end are as likely as they should be, and differ by seed, end,
// session and block.
func TestChoices(t *testing.T) {
	p := Standard()
	alice, _ := choices(t, p, 1)
	const n = 200_000
	var x, ones int
	var intensities [MaxIntensities]int
	for range n {
		s := alice.Sent()
		x += int(1 - s.Basis)
		ones += int(s.Bit)
		intensities[s.Intensity]++
	}
	within(t, "basis X", x, n, p.PX)
	within(t, "bit 1", ones, n, .5)
	for k, in := range p.Intensities {
		within(t, "intensity", intensities[k], n, in.P)
	}
	first := func(f func(*[SeedSize]byte, int64, int64, Params) (*Choices, error), seed byte, session, block int64) uint64 {
		c, err := f(testSeed(seed), session, block, p)
		if err != nil {
			t.Fatal(err)
		}
		return c.draw()
	}
	seen := map[uint64]bool{
		first(AliceChoices, 1, 1, 1): true, first(BobChoices, 1, 1, 1): true, first(AliceChoices, 2, 1, 1): true,
		first(AliceChoices, 1, 2, 1): true, first(AliceChoices, 1, 1, 2): true,
	}
	if len(seen) != 5 {
		t.Error("two streams are alike")
	}
	if again := first(AliceChoices, 1, 1, 1); !seen[again] {
		t.Error("a seed gives another stream the second time")
	}
}

// BenchmarkSampler is one core's worth of pulses, choices of both ends included: two
// decoys, dead time and afterpulses.
func BenchmarkSampler(b *testing.B) {
	for _, km := range []float64{10, 50, 100} {
		b.Run(fmt.Sprintf("km=%v", km), func(b *testing.B) {
			p := Standard()
			p.Km = km
			gates := int64(2e5 / p.Rates(Eve{}).Gain)
			var clicks int64
			var events [512]Event
			for i := 0; b.Loop(); i++ {
				alice, bob := choices(b, p, byte(i))
				s, err := NewSampler(p, Eve{}, gates, alice, bob, rand.NewPCG(uint64(i), 1))
				if err != nil {
					b.Fatal(err)
				}
				for n := len(events); n == len(events); {
					n = s.Read(events[:])
					clicks += int64(n)
				}
			}
			b.ReportMetric(float64(gates)*float64(b.N)/b.Elapsed().Seconds(), "pulses/s")
			b.ReportMetric(float64(clicks)/b.Elapsed().Seconds(), "detections/s")
		})
	}
}
