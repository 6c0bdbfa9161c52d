package bb84

import "math"

// Interval is what a count may be. Its ends are inclusive; a count that is known has
// both alike.
type Interval struct{ Min, Max float64 }

// Exactly is the interval of one number.
func Exactly(v float64) Interval { return Interval{v, v} }

// Holds says whether a count lies inside.
func (i Interval) Holds(count float64) bool { return i.Min <= count && count <= i.Max }

// Counts is what was counted of a block, or what may be: by intensity, the brightest
// first, as many of each as the source has intensities.
type Counts struct {
	KeyBits, TestBits float64 // n_X and n_Z: bits of the key basis X and of the test basis Z

	Key        [MaxIntensities]Interval // of the key bits, those of an intensity
	Test       [MaxIntensities]Interval // of the test bits
	TestErrors [MaxIntensities]Interval // wrong ones among these
	KeyErrors  [MaxIntensities]Interval // wrong ones among the key bits; with one decoy only
}

// Bounds is what the decoys tell of a block, but for a chance that eps_sec covers.
type Bounds struct {
	Vacuum  float64 // s_X0: key bits of pulses without a photon, at least
	Single  float64 // s_X1: key bits of single photons, at least
	Test    float64 // s_Z1: test bits of single photons, at least
	Errors  float64 // v_Z1: wrong ones among these, at most
	Phase   float64 // phi_X: phase error rate of the key's single photons, at most; NaN if none is known
	Penalty float64 // a of 6 log2(a/eps_sec): the number of chances taken
}

// The numbers of inequalities that may fail, which divide eps_sec. Those of different
// papers must not be mixed.
const (
	twoDecoyTerms = 21 // Lim et al. 2014
	oneDecoyTerms = 19 // Rusca et al. 2018
)

// decoys is a source with the statistics of one block.
type decoys struct {
	source []Intensity
	terms  float64
	eps    float64
}

// tau is the chance that a pulse has n photons.
func (d decoys) tau(n int) (sum float64) {
	for _, i := range d.source {
		t := i.P * math.Exp(-i.Mu)
		for k := 1; k <= n; k++ {
			t *= i.Mu / float64(k)
		}
		sum += t
	}
	return sum
}

// delta is Hoeffding's deviation of a part of n counts.
func (d decoys) delta(n float64) float64 { return math.Sqrt(n / 2 * math.Log(d.terms/d.eps)) }

// up and down are a count of intensity k, moved by so much and scaled to a source that
// sends nothing else. What is expected of a count is never below 0.
func (d decoys) up(k int, count Interval, by float64) float64 {
	return math.Exp(d.source[k].Mu) / d.source[k].P * (count.Max + by)
}

func (d decoys) down(k int, count Interval, by float64) float64 {
	return math.Exp(d.source[k].Mu) / d.source[k].P * max(0, count.Min-by)
}

// total is the most that the counts can add up to.
func (d decoys) total(counts [MaxIntensities]Interval) (sum float64) {
	for k := range d.source {
		sum += counts[k].Max
	}
	return sum
}

// Bounds gives the bounds for a source with one decoy (Rusca et al. 2018) or two (Lim
// et al. 2014) at the worst corner of the counts: each term at the end of its interval
// that is worse for it, even where two terms take different ends. For counts that are
// known it is the papers' formula.
func (c Counts) Bounds(source []Intensity, epsSec float64) Bounds {
	var b Bounds
	if len(source) == 2 {
		d := decoys{source, oneDecoyTerms, epsSec}
		b = Bounds{Penalty: oneDecoyTerms}
		b.Vacuum, b.Single = d.one(c.KeyBits, c.Key, c.KeyErrors)
		_, b.Test = d.one(c.TestBits, c.Test, c.TestErrors)
		by := d.delta(d.total(c.TestErrors))
		b.Errors = d.tau(1) / (source[0].Mu - source[1].Mu) * (d.up(0, c.TestErrors[0], by) - d.down(1, c.TestErrors[1], by))
	} else {
		d := decoys{source, twoDecoyTerms, epsSec}
		b = Bounds{Penalty: twoDecoyTerms}
		b.Vacuum, b.Single = d.two(c.KeyBits, c.Key)
		_, b.Test = d.two(c.TestBits, c.Test)
		by := d.delta(d.total(c.TestErrors))
		b.Errors = d.tau(1) / (source[1].Mu - source[2].Mu) * (d.up(1, c.TestErrors[1], by) - d.down(2, c.TestErrors[2], by))
	}
	b.Phase = math.NaN()
	if b.Single > 0 && b.Test > 0 {
		rate := max(b.Errors, 0) / b.Test
		b.Phase = rate + b.deviation(epsSec, rate)
	}
	return b
}

// two bounds the events without a photon and with one, of n, by two decoys.
func (d decoys) two(n float64, counts [MaxIntensities]Interval) (vacuum, single float64) {
	mu1, mu2, mu3 := d.source[0].Mu, d.source[1].Mu, d.source[2].Mu
	by := d.delta(n)
	vacuum = max(0, d.tau(0)*(mu2*d.down(2, counts[2], by)-mu3*d.up(1, counts[1], by))/(mu2-mu3))
	single = d.tau(1) * mu1 / (mu1*(mu2-mu3) - mu2*mu2 + mu3*mu3) *
		(d.down(1, counts[1], by) - d.up(2, counts[2], by) -
			(mu2*mu2-mu3*mu3)/(mu1*mu1)*(d.up(0, counts[0], by)-vacuum/d.tau(0)))
	return vacuum, max(0, single)
}

// one bounds them by one decoy. The most events without a photon follow from the
// errors, of which they make half their number.
func (d decoys) one(n float64, counts, errors [MaxIntensities]Interval) (vacuum, single float64) {
	mu1, mu2 := d.source[0].Mu, d.source[1].Mu
	by, byErrors := d.delta(n), d.delta(d.total(errors))
	vacuum = max(0, d.tau(0)/(mu1-mu2)*(mu1*d.down(1, counts[1], by)-mu2*d.up(0, counts[0], by)))
	most := math.Inf(1)
	for k := range d.source {
		most = min(most, 2*(d.tau(0)*d.up(k, errors[k], byErrors)+by))
	}
	single = d.tau(1) * mu1 / (mu2 * (mu1 - mu2)) *
		(d.down(1, counts[1], by) - mu2*mu2/(mu1*mu1)*d.up(0, counts[0], by) -
			(mu1*mu1-mu2*mu2)/(mu1*mu1)*most/d.tau(0))
	return vacuum, max(0, single)
}

// deviation is how far the phase error rate of the key's single photons may lie above
// the error rate of the test's (gamma in the papers).
func (b Bounds) deviation(eps, rate float64) float64 {
	c, d := b.Test, b.Single
	rate = max(rate, 1/c) // the formula is about a rate that is not 0
	if rate >= 1 {
		return 1
	}
	spread := (1 - rate) * rate
	return math.Sqrt((c + d) * spread / (c * d * math.Ln2) *
		math.Log2((c+d)/(c*d*spread)*b.Penalty*b.Penalty/(eps*eps)))
}

// Length is the length in bits of an epsSec-secret key under these bounds, when
// reconciliation revealed leak bits and verification tag bits (log2(2/eps_cor)). It is
// 0 if there is no key to be had.
func (b Bounds) Length(leak, tag, epsSec float64) int {
	if !(b.Phase < .5) || !(leak >= 0) || !(tag >= 0) || !(epsSec > 0 && epsSec < 1) {
		return 0
	}
	l := math.Floor(b.Vacuum + b.Single*(1-Entropy(b.Phase)) - leak - 6*math.Log2(b.Penalty/epsSec) - tag)
	return int(max(l, 0))
}

// Forecast is what a link is expected to show of a block, in the approximation of the
// finite-key papers: no dead time, and an afterpulse as one more chance of a click.
type Forecast struct {
	Gates  float64 // for KeyBits to be sifted
	QBER   float64
	Counts Counts
}

// Forecast of a block of so many key bits. All sifted events are used.
func (p Params) Forecast(keyBits int) Forecast {
	var click, wrong [MaxIntensities]float64
	var all, errors float64
	for k, in := range p.Intensities {
		mean := p.Eta() * in.Mu
		d := 1 - (1-2*p.DarkPerGate)*math.Exp(-mean)
		click[k] = in.P * d * (1 + p.Afterpulse)
		wrong[k] = in.P * (p.DarkPerGate - p.Misalignment*math.Expm1(-mean) + p.Afterpulse*d/2)
		all, errors = all+click[k], errors+wrong[k]
	}
	key, test := p.PX*p.PX, (1-p.PX)*(1-p.PX)
	f := Forecast{Gates: float64(keyBits) / (key * all), QBER: errors / all}
	f.Counts = Counts{KeyBits: float64(keyBits), TestBits: f.Gates * test * all}
	for k := range p.Intensities {
		f.Counts.Key[k] = Exactly(f.Gates * key * click[k])
		f.Counts.KeyErrors[k] = Exactly(f.Gates * key * wrong[k])
		f.Counts.Test[k] = Exactly(f.Gates * test * click[k])
		f.Counts.TestErrors[k] = Exactly(f.Gates * test * wrong[k])
	}
	return f
}

// Length is the length in bits of the secret that a block of the forecast makes, when
// reconciliation leaks f times the Shannon bound.
func (f Forecast) Length(source []Intensity, efficiency, epsSec, epsCor float64) int {
	leak := efficiency * f.Counts.KeyBits * Entropy(f.QBER)
	return f.Counts.Bounds(source, epsSec).Length(leak, math.Log2(2/epsCor), epsSec)
}
