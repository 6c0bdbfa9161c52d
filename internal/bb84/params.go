// Package bb84 is the physics of a decoy-state BB84 link as pure computation: what
// the two ends choose, what the fibre and the detectors make of it, what an
// eavesdropper adds, and how long a secret key the counts allow.
//
// The source sends a phase-randomised weak coherent pulse in each gate: photons in
// a Poisson number whose mean is one of two (one decoy) or three (two decoys)
// intensities. The receiver chooses a basis and has a threshold detector for either
// bit. Modelled: loss in the fibre and the receiver, dark counts of each detector,
// misalignment, double clicks, a hold-off of both detectors after a click of either
// (so that a click counts only if both were live: a dead time of each alone would
// make neighbouring bits differ), afterpulses in the first live gate, bases of
// unequal probability; and of eavesdroppers intercept-resend on a fraction of the
// pulses, photon-number splitting, and blinded detectors. Not modelled: detectors of
// unequal efficiency, jitter, correlated pulses, light that leaks from the devices.
//
// # What decides the length of an accepted block
//
// Wiesemann, Krause, Tupkary, Luetkenhaus, Rusca and Walenta, "A consolidated and
// accessible security proof for finite-size decoy-state quantum key distribution"
// (arXiv 2405.16578v3): BB84 with one or two decoys, against coherent attacks, by the
// entropic uncertainty relation. It puts right how Lim et al. (Phys. Rev. A 89, 022307,
// 2014; two decoys) and Rusca et al. (Appl. Phys. Lett. 112, 171104, 2018; one decoy),
// whose bounds and constants OneDecoy and TwoDecoys use, treat a fixed length and the
// tests that a block must pass. Its conditions, and how they are met:
//
//   - The number of pulses is fixed before the first, and nothing about any of them is
//     announced before the last is measured. A block is a number of gates; qlink keeps
//     Bob's detections until the last gate, distill begins after it. What is said meanwhile
//     about another block was drawn without this one's light, and this one's without it.
//   - The counts that pass and the length are fixed in advance: Accept holds an interval
//     for every count, and the length is that of its worst corner. A block outside ends
//     as an abort. With one decoy the errors of the key basis, known only after
//     reconciliation, are among these counts, as the proof has it.
//   - Key and test bits are all that were sifted, or a uniformly random choice of fixed
//     numbers of them, made after the last measurement (distill.sift).
//   - Phases are random and intensities, bases and bits independent: they come from a
//     generator at Alice's end alone, a draw a pulse (Choices).
//   - The chance of detection does not depend on the basis: both detectors are alike,
//     are off together, and a double click becomes a random bit and is never dropped.
//   - What reconciliation says is counted in full, with the tag of verification. Bob's
//     questions are not counted: they follow from the error pattern. Package distill has
//     the argument, and its price: events of empty pulses count nothing (the term s_0 is
//     left out), since the pattern may give those bits away.
//   - Classical messages are authentic. They are authenticated late, by one tag in either
//     direction over all of them when everything else has been said. Proofs assume
//     authentication that is immediate and fails at both ends or at none; the reduction is
//     that of Tupkary, Nahar and Tan, "Authentication in Security Proofs for Quantum Key
//     Distribution" (arXiv 2601.17960). Its conditions: the protocol proper runs to its
//     end without using the key; then both ends authenticate all that was said and when; an
//     end whose check fails has no key, and accepts no key before it knows that the other
//     accepts. Here the last two messages are the tags, messages are numbered by their place
//     in the transcript and the ends speak by turns, so that order stands for time; and a
//     block enters the pool only when both ends say that they hold it (handover).
//
// What it promises beyond: the Sampler draws from the same distribution as a
// gate-by-gate simulation, while gates without a click cost nothing; and the choices
// that make the key (Choices) come from the seeds of the two ends, never from the
// generator that decides what the detectors do, because the gaps between clicks become
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

// MaxIntensities is the most intensities that a source may have.
const MaxIntensities = 3

// Intensity is one of the mean photon numbers of the source.
type Intensity struct {
	Mu float64 // photons in a pulse, on the average
	P  float64 // chance that a pulse has it
}

// Params describes a link. All probabilities are per gate.
type Params struct {
	Km           float64 // length of the fibre
	LossDBPerKm  float64 // of the fibre, dB/km
	EtaBob       float64 // chance that a photon at Bob's door makes a click
	DarkPerGate  float64 // chance of a dark count, per detector
	Misalignment float64 // chance that a photon measured in its own basis goes to the wrong detector
	PX           float64 // chance of basis X, at either end; used as a multiple of 2^-31
	DeadGates    int64   // gates for which both detectors are off after a click of either
	Afterpulse   float64 // chance of a further click of one of the detectors in the first live gate
	ClockHz      float64 // gates per second; only Seconds uses it

	// Intensities of the source, from the brightest (the signal) down: two with one
	// decoy, three with two. Chances are used as multiples of 2^-32.
	Intensities []Intensity
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
	return validIntensities(p.Intensities)
}

// validIntensities says what is wrong with the intensities of a source: the bounds
// of one and of two decoys need them in this order.
func validIntensities(list []Intensity) error {
	if len(list) != 2 && len(list) != MaxIntensities {
		return fmt.Errorf("%d intensities: want 2 (one decoy) or 3 (two decoys)", len(list))
	}
	sum, next := 0., math.Inf(1)
	for _, i := range list {
		if !(i.Mu >= 0 && i.Mu <= 10 && i.Mu < next) {
			return fmt.Errorf("intensity %v: want 0 to 10 photons, each less than the one before", i.Mu)
		}
		if !(i.P > 0 && i.P < 1) {
			return fmt.Errorf("probability %v of intensity %v: want more than 0 and less than 1", i.P, i.Mu)
		}
		sum, next = sum+i.P, i.Mu
	}
	switch last := list[len(list)-1].Mu; {
	case math.Abs(sum-1) > 1e-9:
		return fmt.Errorf("the probabilities of the intensities add up to %v, not to 1", sum)
	case len(list) == 2 && last == 0:
		return errors.New("one decoy of no light at all bounds nothing: want more than 0 photons")
	case len(list) == 3 && list[0].Mu <= list[1].Mu+last:
		return fmt.Errorf("signal of %v photons: want more than both decoys together, %v", list[0].Mu, list[1].Mu+last)
	}
	return nil
}

// EtaChannel is the transmittance of the fibre alone.
func (p Params) EtaChannel() float64 { return math.Pow(10, -p.LossDBPerKm*p.Km/10) }

// Eta is the chance that a photon sent is detected: fibre and receiver.
func (p Params) Eta() float64 { return p.EtaChannel() * p.EtaBob }

// Seconds is how long the link would need for that many gates.
func (p Params) Seconds(gates int64) float64 { return float64(gates) / p.ClockHz }

// Standard is the link of the lab: 10 km of standard fibre, detectors of 20 % with a
// dead time of 30 ns and 1 % of afterpulses at a clock of 1 GHz, two decoys, QBER near
// 1.5 %. Bases and intensities are for blocks of 2^19 to 2^22 key bits: for the shortest they
// make within 6 % of the most secret bits per gate, for the longest within 17 %. Among such they
// are those of which a detection makes the most: it is detections that cost time to process.
func Standard() Params {
	return Params{
		Km: 10, LossDBPerKm: .2, EtaBob: .2, DarkPerGate: 6e-7, Misalignment: .01,
		PX: .8, DeadGates: 30, Afterpulse: .01, ClockHz: 1e9,
		Intensities: []Intensity{{.48, .04}, {.11, .7}, {2e-4, .26}},
	}
}
