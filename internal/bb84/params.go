// Package bb84 is the physics of a textbook BB84 link (Bennett and Brassard 1984;
// Nielsen and Chuang, 12.6.3) as pure computation: what the two ends choose, what
// the fibre and the detectors make of it, what an eavesdropper adds, and how long
// a secret key the counts allow.
//
// The source sends one photon in each gate. The receiver chooses a basis and has a
// detector for either bit. Modelled: loss in the fibre and the receiver, dark
// counts, misalignment, double clicks, a hold-off common to both detectors after
// each click, afterpulses in the first live gate, and intercept-resend on a
// fraction of the gates. Not modelled: many-photon pulses (hence no decoys),
// detectors of unequal efficiency, jitter, drift.
//
// What it promises: the Sampler draws from the same distribution as a gate-by-gate
// simulation, while gates without a click cost nothing; and the choices that make
// the key (Choices) come from the seeds of the two ends, never from the generator
// that decides what the detectors do, because the gaps between clicks become
// public in sifting.
//
// It must never read a clock, open a socket or draw a random number of its own.
package bb84

import (
	"errors"
	"fmt"
	"math"
)

// Basis is the choice of either end in a gate.
type Basis byte

// The bases. X carries the key, Z the test.
const (
	X Basis = 0
	Z Basis = 1
)

// String is "X" or "Z".
func (b Basis) String() string {
	if b == X {
		return "X"
	}
	return "Z"
}

// Params describes a link. All probabilities are per gate.
type Params struct {
	Km           float64 // length of the fibre
	LossDBPerKm  float64 // of the fibre, dB/km
	EtaBob       float64 // chance that a photon at Bob's door makes a click
	DarkPerGate  float64 // chance of a dark count, per detector
	Misalignment float64 // chance that a photon measured in its own basis goes to the wrong detector
	PX           float64 // chance of basis X, at either end; used as a multiple of 2^-15
	DeadGates    int64   // gates for which both detectors are off after a click of either
	Afterpulse   float64 // chance of a further click of one of the detectors in the first live gate
	ClockHz      float64 // gates per second; only Seconds uses it
}

// Textbook is the profile of the textbook link: 10 km of standard fibre and a
// receiver of 20 %, QBER near 1 %.
func Textbook() Params {
	return Params{
		Km: 10, LossDBPerKm: .2, EtaBob: .2, DarkPerGate: 6e-7, Misalignment: .01,
		PX: 2. / 3, ClockHz: 1e9,
	}
}

// Validate names the first field that no link can have.
func (p Params) Validate() error {
	probability := func(v float64) bool { return v >= 0 && v <= 1 } // false for NaN too
	switch {
	case !(p.Km >= 0 && p.Km <= 1e4):
		return fmt.Errorf("fibre length %v km: want 0 to 10000", p.Km)
	case !(p.LossDBPerKm >= 0 && p.LossDBPerKm <= 10):
		return fmt.Errorf("fibre loss %v dB/km: want 0 to 10", p.LossDBPerKm)
	case !probability(p.EtaBob):
		return fmt.Errorf("receiver efficiency %v: want a probability", p.EtaBob)
	case !(p.DarkPerGate >= 0 && p.DarkPerGate < .5):
		return fmt.Errorf("dark count probability %v: want 0 to 0.5", p.DarkPerGate)
	case !(p.Misalignment >= 0 && p.Misalignment <= .5):
		return fmt.Errorf("misalignment %v: want 0 to 0.5", p.Misalignment)
	case !(p.PX > 0 && p.PX < 1):
		return fmt.Errorf("probability of basis X %v: want more than 0 and less than 1", p.PX)
	case p.DeadGates < 0 || p.DeadGates > 1<<40:
		return fmt.Errorf("dead time of %d gates: want 0 to 2^40", p.DeadGates)
	case !(p.Afterpulse >= 0 && p.Afterpulse < .5):
		return fmt.Errorf("afterpulse probability %v: want 0 to 0.5", p.Afterpulse)
	case !(p.ClockHz > 0 && p.ClockHz <= 1e12):
		return fmt.Errorf("clock of %v Hz: want more than 0, up to 1e12", p.ClockHz)
	}
	return nil
}

// EtaChannel is the transmittance of the fibre alone.
func (p Params) EtaChannel() float64 { return math.Pow(10, -p.LossDBPerKm*p.Km/10) }

// Eta is the chance that a photon sent is detected: fibre and receiver.
func (p Params) Eta() float64 { return p.EtaChannel() * p.EtaBob }

// Seconds is how long the link would need for that many gates.
func (p Params) Seconds(gates int64) float64 { return float64(gates) / p.ClockHz }

// Eve is an eavesdropper on the fibre. The zero Eve is absent.
type Eve struct {
	// InterceptResend is the fraction of photons that she measures in a basis
	// tossed with a fair coin and sends on as she found them. It adds a quarter of
	// itself to a small QBER and leaves the gain as it was.
	InterceptResend float64
}

// Validate refuses a fraction that is not one.
func (e Eve) Validate() error {
	if !(e.InterceptResend >= 0 && e.InterceptResend <= 1) {
		return errors.New("fraction of intercepted photons: want 0 to 1")
	}
	return nil
}

// flip is the chance that a detected photon whose sender and receiver used the
// same basis shows the wrong bit. In the wrong half of her bases Eve makes it 1/2.
func (e Eve) flip(misalignment float64) float64 {
	return (1-e.InterceptResend)*misalignment + e.InterceptResend*(misalignment/2+.25)
}
