package bb84

import (
	"math"
	"math/rand/v2"
)

// guess is what Eve thinks of the bit that Alice sent in a gate: a bit, and whether she
// knows it.
type guess struct {
	bit  byte
	sure bool
}

// naive looks at every gate in turn and plays out photons, Eve and detectors one by
// one. It shares nothing with the Sampler but what the choices of an end look like.
func naive(p Params, e Eve, gates int64, alice, bob *Choices, physics rand.Source, report func(Event, guess)) {
	rng := rand.New(physics)
	chance := func(p float64) bool { return p > 0 && rng.Float64() < p }
	coin := func() byte { return byte(rng.Uint64() & 1) }
	one, more := p.blocked()
	throttle := p.forced(p.Intensities[0].Mu) / (-math.Expm1(-p.Intensities[0].Mu) / 2)
	var dead int64
	pending := false
	for gate := range gates {
		if dead > 0 {
			dead--
			continue
		}
		sent := alice.Sent()
		photons := poisson(rng, p.Intensities[sent.Intensity].Mu)
		basis, bit := sent.Basis, sent.Bit // of the light on its way
		measured, double := bob.choose(bob.draw())
		survival, dark := p.Eta(), p.DarkPerGate
		knows := guess{bit: coin()}
		forced := false
		switch {
		case e.SplitPhotons:
			survival = p.EtaBob
			switch {
			case photons <= 1 && chance(one), photons > 1 && chance(more):
				photons = 0
			case photons > 1:
				photons--
				knows = guess{sent.Bit, true}
			}
		case e.Blind:
			eve := Basis(coin())
			found := sent.Bit
			if eve != sent.Basis {
				found = coin()
			}
			if photons > 0 && eve == measured && chance(throttle) {
				forced, basis, bit = true, eve, found
			}
			knows = guess{found, eve == sent.Basis}
			photons, dark = 0, 0
		case photons > 0 && chance(e.InterceptResend):
			eve := Basis(coin())
			knows = guess{bit, true}
			if eve != basis {
				basis, bit = eve, coin()
				knows = guess{bit, false}
			}
		}
		clicked := [2]bool{chance(dark), chance(dark)}
		for range photons {
			if !chance(survival) {
				continue
			}
			at := bit
			switch {
			case basis != measured:
				at = coin()
			case chance(p.Misalignment):
				at ^= 1
			}
			clicked[at] = true
		}
		if forced {
			clicked[bit] = true
		}
		if pending && chance(p.Afterpulse) {
			clicked[coin()] = true
		}
		pending = false
		if !clicked[0] && !clicked[1] {
			continue
		}
		dead, pending = p.DeadGates, true
		d := Detection{Gate: gate, Basis: measured}
		switch {
		case clicked[0] && clicked[1]:
			d.Bit, d.Double = double, true
		case clicked[1]:
			d.Bit = 1
		}
		report(Event{d, sent}, knows)
	}
}

// poisson draws a small Poisson number.
func poisson(rng *rand.Rand, mean float64) int {
	n, product, limit := 0, rng.Float64(), math.Exp(-mean)
	for product > limit {
		n++
		product *= rng.Float64()
	}
	return n
}
