package bb84

import (
	"errors"
	"math"
)

// Eve is an eavesdropper on the fibre. The zero Eve is absent. She does one thing at
// a time.
type Eve struct {
	// InterceptResend is the fraction of pulses that she measures in a basis tossed
	// with a fair coin and sends on, with as many photons, as she found them. It adds a
	// quarter of itself to a small QBER and leaves the gains as they were.
	InterceptResend float64

	// SplitPhotons: she counts the photons of every pulse, blocks as many of the single
	// ones (and then of the others) as keeps the gain of the signal what it was, keeps a
	// photon of each pulse that has more, and sends the rest on without loss. Errors stay as they were; the
	// decoys see it.
	SplitPhotons bool

	// Blind: she measures every pulse herself, in a basis tossed with a fair coin, and
	// makes Bob's blinded detectors click by bright light when she found something and he
	// chose her basis; as often as keeps the gain of the signal what it was. There are no
	// errors, no dark counts and no double clicks, and the gains of the decoys are off.
	Blind bool
}

// Validate refuses a fraction that is not one, and two attacks at a time.
func (e Eve) Validate() error {
	if !(e.InterceptResend >= 0 && e.InterceptResend <= 1) {
		return errors.New("fraction of intercepted pulses: want 0 to 1")
	}
	if (e.InterceptResend > 0 && (e.SplitPhotons || e.Blind)) || (e.SplitPhotons && e.Blind) {
		return errors.New("eve does one thing at a time: intercept, split or blind")
	}
	return nil
}

// outcomes holds the chances of what the two detectors do in one live gate: only
// that of the bit sent clicks, only the other, both.
type outcomes struct {
	right, wrong, both float64
}

// click is the chance of a click at all. It is the same in equal and in unequal
// bases, so neither bases nor bits decide whether a gate is detected.
func (o outcomes) click() float64 { return o.right + o.wrong + o.both }

// blend is the fraction x of b and the rest of a.
func blend(a, b outcomes, x float64) outcomes {
	return outcomes{(1-x)*a.right + x*b.right, (1-x)*a.wrong + x*b.wrong, (1-x)*a.both + x*b.both}
}

// even is o with its single clicks spread over both detectors: what is seen of a bit
// that says nothing about the one sent.
func (o outcomes) even() outcomes {
	half := (o.right + o.wrong) / 2
	return outcomes{half, half, o.both}
}

// dark is the chance of an outcome from the chances that light leaves the right
// detector, the wrong one, and both of them silent.
func (p Params) dark(right, wrong, none float64) outcomes {
	quiet := 1 - p.DarkPerGate
	right, wrong, none = quiet*right, quiet*wrong, quiet*quiet*none
	return outcomes{right: wrong - none, wrong: right - none, both: 1 - right - wrong + none}
}

// pulse is the outcome of a Poisson number of photons, mean at the detectors, each of
// which goes to the wrong one with chance flip. The two detectors see independent
// Poisson numbers.
func (p Params) pulse(mean, flip float64) outcomes {
	right, wrong := math.Exp(-mean*(1-flip)), math.Exp(-mean*flip)
	return p.dark(right, wrong, right*wrong)
}

// photons is the outcome of exactly n photons at Bob's door.
func (p Params) photons(n int, flip float64) outcomes {
	k := float64(n)
	return p.dark(math.Pow(1-p.EtaBob*(1-flip), k), math.Pow(1-p.EtaBob*flip, k), math.Pow(1-p.EtaBob, k))
}

// outcomes of a pulse of that intensity: where the bases are equal and where they are
// not.
func (p Params) outcomes(e Eve, mu float64) (same, mix outcomes) {
	switch {
	case e.SplitPhotons:
		one, more := p.blocked()
		return p.split(mu, p.Misalignment, one, more), p.split(mu, .5, one, more)
	case e.Blind:
		click := p.forced(mu)
		return outcomes{right: click}, outcomes{right: click / 2, wrong: click / 2}
	}
	same, mix = p.pulse(p.Eta()*mu, p.Misalignment), p.pulse(p.Eta()*mu, .5)
	// In half of what Eve measures her basis is not Alice's. If Bob's is not hers either he
	// sees a coin; if it is, he sees well a bit that says nothing about Alice's.
	x := e.InterceptResend / 2
	return blend(same, mix, x), blend(mix, same.even(), x)
}

// split is the outcome under photon-number splitting, when pulses of one photon and
// those of more are blocked with these chances.
func (p Params) split(mu, flip, one, more float64) (sum outcomes) {
	add := func(weight float64, n int) {
		o := p.photons(n, flip)
		sum.right += weight * o.right
		sum.wrong += weight * o.wrong
		sum.both += weight * o.both
	}
	chance, left := math.Exp(-mu), 1.
	for n := range 100 {
		blocked := more
		if n < 2 {
			blocked = one
		}
		add(chance*blocked, 0)
		add(chance*(1-blocked), max(0, min(n, max(1, n-1))))
		left -= chance
		chance *= mu / float64(n+1)
	}
	add(max(left, 0), 100)
	return sum
}

// blocked is the fraction of single photons, and of pulses with more, that Eve has to
// block so that the gain of the signal is what it would be without her. She blocks the
// others only when there is no single photon left to block.
func (p Params) blocked() (one, more float64) {
	mu := p.Intensities[0].Mu
	gain := func(one, more float64) float64 { return p.split(mu, .5, one, more).click() }
	want := p.pulse(p.Eta()*mu, .5).click()
	all, many, dark := gain(0, 0), gain(1, 0), gain(1, 1)
	switch {
	case all <= dark || want >= all:
		return 0, 0
	case want >= many:
		return (all - want) / (all - many), 0
	}
	return 1, min(1, (many-want)/(many-dark))
}

// forced is the chance that a blinded receiver is made to click.
func (p Params) forced(mu float64) float64 {
	found := func(mu float64) float64 { return -math.Expm1(-mu) / 2 } // a photon, and Bob in her basis
	signal := p.Intensities[0].Mu
	return found(mu) * min(1, p.pulse(p.Eta()*signal, .5).click()/found(signal))
}
