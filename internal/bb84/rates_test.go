package bb84

import (
	"math"
	"testing"
)

// gys is the experiment of Gobby, Yuan and Shields (2004) in the model of Ma et al. (2005).
func gys(km float64) Channel {
	return Channel{Eta: .045 * math.Pow(10, -.21*km/10), Y0: 1.7e-6, EDet: .033}
}

const (
	gysF  = 1.22
	gysMu = .48
	gysNu = .05
)

// near says whether got agrees with a figure that was printed to so many digits.
func near(t *testing.T, what string, got, want float64, digits int) {
	t.Helper()
	scale := math.Pow(10, float64(digits)-1-math.Floor(math.Log10(math.Abs(want))))
	if math.Abs(got-want)*scale > .5001 {
		t.Errorf("%s: %.10g, want %.*g", what, got, digits, want)
	}
}

func TestGYS(t *testing.T) {
	for _, r := range []struct{ km, q, e, q1, e1, inf, qn, en, y1, e1u, vw float64 }{
		{0, 2.137009e-2, .033037, 1.336620e-2, .033018, 2.554577e-3, 2.249171e-3, .033353, 4.438483e-2, .035153, 2.414245e-3},
		{10, 1.323185e-2, .033060, 8.241728e-3, .033029, 1.567051e-3, 1.388077e-3, .033572, 2.736080e-2, .035189, 1.479197e-3},
		{20, 8.180164e-3, .033097, 5.082002e-3, .033046, 9.624483e-4, 8.567604e-4, .033927, 1.686837e-2, .035222, 9.077677e-4},
		{50, 1.924950e-3, .033412, 1.191724e-3, .033198, 2.225952e-4, 2.022114e-4, .036926, 3.954807e-3, .035398, 2.096250e-4},
		{60, 1.188004e-3, .033668, 7.350047e-4, .033321, 1.360685e-4, 1.253391e-4, .039334, 2.439103e-3, .035528, 1.280585e-4},
		{100, 1.732602e-4, .037582, 1.066724e-4, .035211, 1.718436e-5, 1.957223e-5, .073563, 3.539934e-4, .037492, 1.602005e-5},
		{120, 6.692883e-5, .044862, 4.086869e-5, .038770, 4.814530e-6, 8.494868e-6, .126456, 1.356329e-4, .041186, 4.368615e-6},
		{140, 2.649981e-5, .062959, 1.585080e-5, .047876, 2.464546e-7, 4.283342e-6, .218346, 5.261496e-5, .050633, 7.377906e-8},
	} {
		c := gys(r.km)
		y, e := c.VacuumWeak(gysMu, gysNu)
		near(t, "Q_mu", c.Gain(gysMu), r.q, 7)
		near(t, "E_mu", c.QBER(gysMu), r.e, 5)
		near(t, "Q1", c.Yield()*gysMu*math.Exp(-gysMu), r.q1, 7)
		near(t, "e1", c.Error(), r.e1, 5)
		near(t, "R", c.Asymptotic(gysMu, gysF), r.inf, 7)
		near(t, "Q_nu", c.Gain(gysNu), r.qn, 7)
		near(t, "E_nu", c.QBER(gysNu), r.en, 5)
		near(t, "Y1", y, r.y1, 7)
		near(t, "e1 upper", e, r.e1u, 5)
		near(t, "R vacuum+weak", c.Bounded(gysMu, gysF, y, e), r.vw, 7)
		if rate := c.Asymptotic(gysMu, gysF); rate >= PLOB(math.Pow(10, -.21*r.km/10)) && r.km > 0 {
			t.Errorf("%v km: %v bits a pulse, above PLOB", r.km, rate)
		}
	}
	if mu := SignalIntensity(.033, gysF); math.Abs(mu-.4788) > 2e-4 {
		t.Errorf("best signal: %v photons, want 0.4788", mu)
	}
	near(t, "gain at 122 km", gys(122).Gain(.1), 1.4037e-5, 5)
	near(t, "QBER at 122 km", gys(122).QBER(.1), .08956, 4)
}

// reach is the longest fibre in km on which rate is positive.
func reach(rate func(Channel) float64) float64 {
	low, high := 0., 300.
	for range 40 {
		if km := (low + high) / 2; rate(gys(km)) > 0 {
			low = km
		} else {
			high = km
		}
	}
	return low
}

func TestGYSDistances(t *testing.T) {
	vacuumWeak := func(nu float64) func(Channel) float64 {
		return func(c Channel) float64 {
			y, e := c.VacuumWeak(gysMu, nu)
			return c.Bounded(gysMu, gysF, y, e)
		}
	}
	weak := func(nu float64) func(Channel) float64 {
		return func(c Channel) float64 {
			y, e := c.WeakOnly(gysMu, nu)
			return c.Bounded(gysMu, gysF, y, e)
		}
	}
	for _, tc := range []struct {
		name      string
		rate      func(Channel) float64
		km        float64
		published float64 // by Ma et al.; 0: not
	}{
		{"endless decoys", func(c Channel) float64 { return c.Asymptotic(gysMu, gysF) }, 142.01, 142.05},
		{"endless decoys, best signal", func(c Channel) float64 { return c.Asymptotic(SignalIntensity(.033, gysF), gysF) }, 142.02, 142.05},
		{"vacuum+weak .01", vacuumWeak(.01), 141.74, 0},
		{"vacuum+weak .05", vacuumWeak(.05), 140.62, 140.55},
		{"vacuum+weak .10", vacuumWeak(.10), 139.10, 0},
		{"vacuum+weak .127", vacuumWeak(.127), 138.23, 0},
		{"weak alone .05", weak(.05), 103.8, 0},
		{"weak alone .10", weak(.10), 110.7, 0},
	} {
		km := reach(tc.rate)
		if math.Abs(km-tc.km) > .1 || tc.published != 0 && math.Abs(km-tc.published) > .2 {
			t.Errorf("%s: %.2f km, want %.2f (published %.2f)", tc.name, km, tc.km, tc.published)
		}
	}
	bare := reach(func(c Channel) float64 {
		best := 0.
		for mu := 1e-4; mu < .5; mu *= 1.05 {
			best = max(best, c.Undecoyed(mu, gysF))
		}
		return best
	})
	if bare < 25 || bare > 45 { // coarse in the literature: 30 to 35
		t.Errorf("without decoys: %.1f km", bare)
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

// Intercept-resend adds a quarter of its fraction to the QBER of a perfect link, and no
// gain; splitting photons leaves the signal's gain and its errors; blinding leaves the
// signal's gain and has no errors. Both show in the gain of the decoys.
func TestEveInClosedForm(t *testing.T) {
	p := Standard()
	p.Misalignment, p.DarkPerGate, p.Afterpulse = 0, 0, 0
	quiet := p.Rates(Eve{})
	if quiet.QBER > 1e-15 {
		t.Errorf("QBER of a perfect link: %v, want 0", quiet.QBER)
	}
	for _, xi := range []float64{.1, .25, .5, 1} {
		r := p.Rates(Eve{InterceptResend: xi})
		if math.Abs(r.QBER-xi/4) > 1e-12 || math.Abs(r.Gain/quiet.Gain-1) > 1e-12 {
			t.Errorf("fraction %v: QBER %v, gain %v; want %v, %v", xi, r.QBER, r.Gain, xi/4, quiet.Gain)
		}
	}
	p = Standard()
	p.Km = 50
	quiet = p.Rates(Eve{})
	for name, eve := range map[string]Eve{"split": {SplitPhotons: true}, "blind": {Blind: true}} {
		r := p.Rates(eve)
		if math.Abs(r.gain(p, 0)/quiet.gain(p, 0)-1) > .06 {
			t.Errorf("%s: the signal's gain is %v, not %v", name, r.gain(p, 0), quiet.gain(p, 0))
		}
		if math.Abs(r.gain(p, 1)/quiet.gain(p, 1)-1) < .1 {
			t.Errorf("%s: the decoy's gain is %v, as it was (%v)", name, r.gain(p, 1), quiet.gain(p, 1))
		}
		if r.QBER > quiet.QBER*1.25 {
			t.Errorf("%s: QBER %v instead of %v", name, r.QBER, quiet.QBER)
		}
	}
}
