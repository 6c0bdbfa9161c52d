package bb84

import "math"

// Rates is what a long run of a link shows.
type Rates struct {
	Gain   float64 // clicks counted, per gate
	Double float64 // fraction of the clicks that both detectors made
	QBER   float64 // fraction of errors among clicks in equal bases; a double click counts half

	Share [MaxIntensities]float64 // of an intensity among the clicks
	Error [MaxIntensities]float64 // fraction of errors among its clicks in equal bases
}

// Rates gives the closed form for an endless run. A simulation agrees with it up
// to its own statistics and the edges of its blocks.
func (p Params) Rates(e Eve) Rates {
	var same, mix [MaxIntensities]outcomes
	click := 0.
	for k, in := range p.Intensities {
		same[k], mix[k] = p.outcomes(e, in.Mu)
		click += in.P * same[k].click()
	}
	if !(click > 0) {
		return Rates{}
	}
	// The clicks are a renewal process: a click, DeadGates gates, one gate in which
	// an afterpulse may come too, and if nothing came a geometric wait.
	first := click + p.Afterpulse - click*p.Afterpulse
	r := Rates{Gain: 1 / (1 + float64(p.DeadGates) + (1-first)/click)}

	// A fraction Afterpulse of all clicks has an afterpulse in it, alone or with a
	// click of the gate's own. A detector that clicks by it is the wrong one half
	// the time.
	own, after := 1-p.Afterpulse, p.Afterpulse
	equal := p.PX*p.PX + (1-p.PX)*(1-p.PX)
	for k, in := range p.Intensities {
		c := same[k]
		r.Share[k] = in.P * (own*c.click()/click + after)
		both := equal*c.both + (1-equal)*mix[k].both
		r.Double += in.P * (own*both/click + after*(both+(c.click()-both)/2))
		wrong := own*(c.wrong+c.both/2)/click + after*((1-c.click())/2+c.right/4+c.wrong*3/4+c.both/2)
		if r.Share[k] > 0 {
			r.Error[k] = in.P * wrong / r.Share[k]
		}
		r.QBER += in.P * wrong
	}
	return r
}

// gain is the chance that a gate of intensity k is counted as a click.
func (r Rates) gain(p Params, k int) float64 { return r.Gain * r.Share[k] / p.Intensities[k].P }

// Entropy is the binary entropy of p in bits. Outside of 0 to 1 it is NaN.
func Entropy(p float64) float64 {
	if p == 0 || p == 1 {
		return 0
	}
	return -p*math.Log2(p) - (1-p)*math.Log2(1-p)
}

// PLOB is the most secret bits per gate that any protocol without repeaters can
// make over a fibre of transmittance eta (Pirandola, Laurenza, Ottaviani and
// Banchi 2017).
func PLOB(eta float64) float64 { return -math.Log2(1 - eta) }

// Channel is a link as the asymptotic theory sees it (Ma, Qi, Zhao and Lo, Phys. Rev.
// A 72, 012326, 2005): a chance that a photon is detected, one of a click without
// light, and an error rate of what light makes click.
type Channel struct {
	Eta  float64 // fibre and receiver
	Y0   float64 // chance of a click without light, of either detector
	EDet float64 // error rate of photons that were detected
}

// Gain is the chance of a click of a pulse of that intensity.
func (c Channel) Gain(mu float64) float64 { return c.Y0 - math.Expm1(-c.Eta*mu) }

// QBER is the error rate of such clicks. Those without light are wrong half the time.
func (c Channel) QBER(mu float64) float64 {
	return (c.Y0/2 - c.EDet*math.Expm1(-c.Eta*mu)) / c.Gain(mu)
}

// Yield is the chance of a click of a single photon, and Error the error rate of such.
func (c Channel) Yield() float64 { return c.Y0 + c.Eta - c.Y0*c.Eta }

// Error is the error rate of the clicks of single photons.
func (c Channel) Error() float64 { return (c.Y0/2 + c.EDet*c.Eta) / c.Yield() }

// GLLP is the secret rate, in bits per pulse, of a signal of that gain and QBER, of
// which single photons make the gain q1 with the phase error rate e1, when
// reconciliation leaks f times the Shannon bound and half of the bases are equal
// (Gottesman, Lo, Luetkenhaus and Preskill 2004).
func GLLP(gain, qber, q1, e1, f float64) float64 {
	return .5 * (-gain*f*Entropy(qber) + q1*(1-Entropy(e1)))
}

// Asymptotic is the secret rate in bits per pulse for endless decoys: both figures of
// single photons are known.
func (c Channel) Asymptotic(mu, f float64) float64 {
	return GLLP(c.Gain(mu), c.QBER(mu), c.Yield()*mu*math.Exp(-mu), c.Error(), f)
}

// VacuumWeak bounds the single photons of a signal mu by the gains of a weak decoy nu
// and of no light: the least yield and the highest error rate.
func (c Channel) VacuumWeak(mu, nu float64) (yield, errorRate float64) {
	q, w := c.Gain(mu)*math.Exp(mu), c.Gain(nu)*math.Exp(nu)
	yield = mu / (mu*nu - nu*nu) * (w - q*nu*nu/(mu*mu) - (mu*mu-nu*nu)/(mu*mu)*c.Y0)
	return yield, (c.QBER(nu)*w - c.Y0/2) / (yield * nu)
}

// WeakOnly bounds them by the weak decoy alone: clicks without light are bounded by
// its errors, of which they make half their number.
func (c Channel) WeakOnly(mu, nu float64) (yield, errorRate float64) {
	q, w := c.Gain(mu)*math.Exp(mu), c.Gain(nu)*math.Exp(nu)
	y0 := 2 * c.QBER(nu) * w
	yield = mu / (mu*nu - nu*nu) * (w - q*nu*nu/(mu*mu) - (mu*mu-nu*nu)/(mu*mu)*y0)
	return yield, c.QBER(nu) * w / (yield * nu)
}

// Bounded is the secret rate in bits per pulse under such bounds.
func (c Channel) Bounded(mu, f, yield, errorRate float64) float64 {
	if !(yield > 0) || !(errorRate < .5) {
		return 0
	}
	return GLLP(c.Gain(mu), c.QBER(mu), yield*mu*math.Exp(-mu), errorRate, f)
}

// Undecoyed is the secret rate in bits per pulse without decoys: every pulse of
// several photons is taken to be Eve's, and to have been detected.
func (c Channel) Undecoyed(mu, f float64) float64 {
	many := 1 - math.Exp(-mu)*(1+mu)
	q1 := c.Gain(mu) - many
	if q1 <= 0 {
		return 0
	}
	e1 := c.QBER(mu) * c.Gain(mu) / q1
	if e1 >= .5 {
		return 0
	}
	return GLLP(c.Gain(mu), c.QBER(mu), q1, e1, f)
}

// SignalIntensity is the best mean photon number of the signal where dark counts are
// few: (1-mu) e^-mu = f h(e) / (1-h(e)).
func SignalIntensity(eDet, f float64) float64 {
	want := f * Entropy(eDet) / (1 - Entropy(eDet))
	low, high := 0., 1. // the left side falls from 1 to 0
	for range 60 {
		if mu := (low + high) / 2; (1-mu)*math.Exp(-mu) > want {
			low = mu
		} else {
			high = mu
		}
	}
	return (low + high) / 2
}
