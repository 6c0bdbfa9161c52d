package bb84

import (
	"fmt"
	"math"
	"testing"
)

// lim is the link of the two-decoy reference values, with fixed parameters.
func lim(km float64) Params {
	return Params{
		Km: km, LossDBPerKm: .2, EtaBob: .1, DarkPerGate: 6e-7, Afterpulse: .04, Misalignment: .005, PX: .85, ClockHz: 1e9,
		Intensities: []Intensity{{.5, .6}, {.15, .3}, {2e-4, .1}},
	}
}

// rusca is that of the one-decoy values.
func rusca(km float64) Params {
	return Params{
		Km: km, LossDBPerKm: .2, EtaBob: .2, DarkPerGate: 1e-8, Misalignment: .01, PX: .9, ClockHz: 1e9,
		Intensities: []Intensity{{.5, .7}, {.15, .3}},
	}
}

const (
	forecastF = 1.16
	epsCor    = 1e-15
)

func TestTwoDecoyLength(t *testing.T) {
	const eps = 1e-10
	for _, r := range []struct {
		n                           int
		km, gates, qber, s1, z1, v1 float64
		phase, leak                 float64
		length                      int
		vacuum                      float64
	}{
		{1e7, 0, 3.945370e8, .024055, 5.929222e6, 1.352988e5, 7448.503, .061006, 1.898243e6, 2065610, 0},
		{1e7, 50, 3.864735e9, .024204, 5.772495e6, 1.304181e5, 7459.294, .063369, 1.907464e6, 1898214, 0},
		{1e7, 100, 3.844815e10, .025689, 5.738877e6, 1.293711e5, 8319.486, .070847, 1.998520e6, 1622002, 0},
		{1e9, 0, 3.945370e10, .024055, 6.234828e8, 1.892294e7, 5.843726e5, .031245, 1.898243e8, 308589029, 0},
		{1e9, 100, 3.844815e12, .025689, 6.048709e8, 1.833017e7, 6.335134e5, .034951, 1.998520e8, 274378500, 1.609738e6},
	} {
		t.Run(fmt.Sprintf("n=%v,km=%v", float64(r.n), r.km), func(t *testing.T) {
			p := lim(r.km)
			f := p.Forecast(r.n)
			b := f.Counts.Bounds(p.Intensities, eps)
			near(t, "gates", f.Gates, r.gates, 7)
			near(t, "QBER", f.QBER, r.qber, 5)
			near(t, "s_X1", b.Single, r.s1, 7)
			near(t, "s_Z1", b.Test, r.z1, 7)
			near(t, "v_Z1", b.Errors, r.v1, 7)
			near(t, "phi", b.Phase, r.phase, 5)
			near(t, "leak", forecastF*float64(r.n)*Entropy(f.QBER), r.leak, 7)
			if r.vacuum != 0 {
				near(t, "s_X0", b.Vacuum, r.vacuum, 7)
			} else if b.Vacuum != 0 {
				t.Errorf("s_X0: %v", b.Vacuum)
			}
			if l := f.Length(p.Intensities, forecastF, eps, epsCor); math.Abs(float64(l-r.length)) > max(2, 3e-8*float64(r.length)) {
				t.Errorf("length %d bits, want %d", l, r.length)
			}
		})
	}
	for _, n := range []int{1e5, 1e6} {
		if l := lim(0).Forecast(n).Length(lim(0).Intensities, forecastF, eps, epsCor); l != 0 {
			t.Errorf("%d key bits: length %d, want none", n, l)
		}
	}
}

func TestOneDecoyLength(t *testing.T) {
	const eps = 1e-9
	for _, r := range []struct {
		km, gates, qber, s1, z1, v1, phase float64
		length                             int
	}{
		{50, 1.569941e9, .010001, 5.705316e6, 5.128715e4, 1995.252, .046708, 3214516},
		{100, 1.563424e10, .010012, 5.674624e6, 5.090722e4, 1997.765, .047110, 3181426},
	} {
		p := rusca(r.km)
		f := p.Forecast(1e7)
		b := f.Counts.Bounds(p.Intensities, eps)
		near(t, "gates", f.Gates, r.gates, 7)
		near(t, "QBER", f.QBER, r.qber, 5)
		near(t, "s_1 of the key", b.Single, r.s1, 7)
		near(t, "s_1 of the test", b.Test, r.z1, 7)
		near(t, "v_1", b.Errors, r.v1, 7)
		near(t, "phi", b.Phase, r.phase, 5)
		if l := f.Length(p.Intensities, forecastF, eps, epsCor); math.Abs(float64(l-r.length)) > 2 {
			t.Errorf("%v km: length %d bits, want %d", r.km, l, r.length)
		}
	}
	if l := rusca(50).Forecast(1e6).Length(rusca(50).Intensities, forecastF, eps, epsCor); l != 0 {
		t.Errorf("10^6 key bits: length %d, want none", l)
	}
}

// perPulse is the secret rate of blocks of n key bits. With kappa, eps_sec is kappa
// times the length, which is found by repetition.
func perPulse(p Params, n int, eps, kappa float64) float64 {
	f := p.Forecast(n)
	if kappa == 0 {
		return float64(f.Length(p.Intensities, forecastF, eps, epsCor)) / f.Gates
	}
	l := float64(n) / 4
	for range 4 {
		if l = float64(f.Length(p.Intensities, forecastF, kappa*l, epsCor)); l == 0 {
			return 0
		}
	}
	return l / f.Gates
}

// The optimiser reaches 98 % of the reference values or more, and never PLOB.
func TestOptimise(t *testing.T) {
	kms := []float64{0, 20, 40, 60, 80, 100, 120, 140, 160}
	for _, r := range []struct {
		n    int
		want []float64 // by distance; 0 is no key
	}{
		{1e4, []float64{2.65e-4, 1.01e-4, 3.88e-5, 1.43e-5, 4.70e-6, 1.07e-6, 7.8e-8, 0, 0}},
		{1e5, []float64{1.58e-3, 6.11e-4, 2.39e-4, 9.25e-5, 3.47e-5, 1.19e-5, 3.11e-6, 5.28e-7, 0}},
		{1e6, []float64{3.70e-3, 1.43e-3, 5.62e-4, 2.20e-4, 8.44e-5, 3.07e-5, 9.56e-6, 2.58e-6, 3.11e-7}},
		{1e7, []float64{5.99e-3, 2.33e-3, 9.15e-4, 3.59e-4, 1.39e-4, 5.16e-5, 1.73e-5, 5.36e-6, 1.04e-6}},
		{1e8, []float64{8.11e-3, 3.16e-3, 1.24e-3, 4.88e-4, 1.90e-4, 7.10e-5, 2.50e-5, 8.24e-6, 1.92e-6}},
		{1e9, []float64{9.93e-3, 3.87e-3, 1.53e-3, 6.00e-4, 2.33e-4, 8.80e-5, 3.20e-5, 1.09e-5, 2.79e-6}},
	} {
		t.Run(fmt.Sprintf("two decoys, %v bits", float64(r.n)), func(t *testing.T) {
			t.Parallel()
			for i, km := range kms {
				_, got := lim(km).Optimise(func(p Params) float64 { return perPulse(p, r.n, 0, 1e-15) })
				if want := r.want[i]; got < .98*want || got > max(1.1*want, 5e-9) {
					t.Errorf("%v km: %.3e bits a pulse, want %.3e", km, got, want)
				}
				if got >= PLOB(lim(km).EtaChannel()) {
					t.Errorf("%v km: %v bits a pulse, above PLOB", km, got)
				}
			}
		})
	}
	two := rusca(50)
	two.Intensities = []Intensity{{.5, .6}, {.15, .3}, {1e-4, .1}}
	for _, r := range []struct {
		n             int
		one, twoDecoy float64
	}{{1e5, 6.461e-4, 6.568e-4}, {1e6, 1.365e-3, 1.315e-3}, {1e7, 2.063e-3, 1.987e-3}, {1e8, 2.654e-3, 2.586e-3}} {
		objective := func(p Params) float64 { return perPulse(p, r.n, 1e-9, 0) }
		_, one := rusca(50).Optimise(objective)
		_, other := two.Optimise(objective)
		if one < .98*r.one || one > 1.02*r.one || other < .98*r.twoDecoy || other > 1.02*r.twoDecoy {
			t.Errorf("%v bits: one decoy %.4e, two %.4e; want %.4e and %.4e", float64(r.n), one, other, r.one, r.twoDecoy)
		}
	}
}

// Where there is no key the length is 0, never negative and never NaN cast to int; and
// the worst corner of intervals is never better than any count inside.
func TestWorstCorner(t *testing.T) {
	for _, p := range []Params{rusca(20), lim(20)} {
		f := p.Forecast(1e7)
		inside := f.Counts.Bounds(p.Intensities, 1e-10)
		wide := f.Counts
		for k := range p.Intensities {
			for _, c := range []*Interval{&wide.Key[k], &wide.Test[k], &wide.TestErrors[k], &wide.KeyErrors[k]} {
				*c = Interval{.98 * c.Min, 1.02 * c.Max}
			}
		}
		worst := wide.Bounds(p.Intensities, 1e-10)
		if worst.Single >= inside.Single || worst.Test >= inside.Test || worst.Errors <= inside.Errors || worst.Phase <= inside.Phase || worst.Vacuum > inside.Vacuum {
			t.Errorf("worst corner %+v, inside %+v", worst, inside)
		}
		for i := range 200 { // corners chosen at random
			corner := wide
			bit := i * 2654435761
			for k := range p.Intensities {
				for _, c := range []*Interval{&corner.Key[k], &corner.Test[k], &corner.TestErrors[k], &corner.KeyErrors[k]} {
					if bit&1 == 0 {
						c.Max = c.Min
					} else {
						c.Min = c.Max
					}
					bit >>= 1
				}
			}
			if at := corner.Bounds(p.Intensities, 1e-10); at.Length(1e5, 128, 1e-10) < worst.Length(1e5, 128, 1e-10) {
				t.Fatalf("corner %d makes less than the worst: %+v, %+v", i, at, worst)
			}
		}
		for name, l := range map[string]int{
			"leak":    inside.Length(1e7, 128, 1e-10),
			"NaN":     inside.Length(math.NaN(), 128, 1e-10),
			"epsilon": inside.Length(0, 128, 0),
			"nothing": (Counts{}).Bounds(p.Intensities, 1e-10).Length(0, 128, 1e-10),
		} {
			if l != 0 {
				t.Errorf("%s: length %d bits, want none", name, l)
			}
		}
	}
}
