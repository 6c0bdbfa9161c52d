package bb84

import "math/rand/v2"

// naive looks at every gate in turn and plays out photon, Eve and detectors one by
// one. It shares nothing with the Sampler but the choices of the two ends.
func naive(p Params, e Eve, gates int64, alice, bob *Choices, physics rand.Source, report func(Detection)) {
	rng := rand.New(physics)
	chance := func(p float64) bool { return rng.Float64() < p }
	eta := p.Eta()
	var dead int64
	pending := false
	for gate := range gates {
		if dead > 0 {
			dead--
			continue
		}
		basis, bit := alice.At(gate) // of the photon on its way
		if chance(e.InterceptResend) {
			if eve := Basis(rng.IntN(2)); eve != basis {
				basis, bit = eve, byte(rng.IntN(2))
			}
		}
		measured, coin := bob.At(gate)
		clicked := [2]bool{chance(p.DarkPerGate), chance(p.DarkPerGate)}
		if chance(eta) {
			switch {
			case basis != measured:
				bit = byte(rng.IntN(2))
			case chance(p.Misalignment):
				bit ^= 1
			}
			clicked[bit] = true
		}
		if pending && chance(p.Afterpulse) {
			clicked[rng.IntN(2)] = true
		}
		pending = false
		if !clicked[0] && !clicked[1] {
			continue
		}
		dead, pending = p.DeadGates, true
		d := Detection{Gate: gate, Basis: measured}
		switch {
		case clicked[0] && clicked[1]:
			d.Bit, d.Double = coin, true
		case clicked[1]:
			d.Bit = 1
		}
		report(d)
	}
}
