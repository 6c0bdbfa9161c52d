package qlink

import (
	"fmt"
	"math"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/key"
)

// Plan says what the blocks of a link are to be like.
type Plan struct {
	KeyBits   int     // n, a multiple of FrameBits
	FrameBits int     // reconciled as one
	EpsSec    float64 // of a block

	Gain   float64 // fraction by which a count of an intensity may be off
	Errors float64 // how many times the expected errors pass
	Leak   float64 // how many times the Shannon bound may leak, at the highest error rate that passes
	Pads   int     // that a block gives to the reserve; it spends one
}

// StandardPlan is that of the lab: blocks of 2^19 key bits in two frames. A secret is
// 1e-14 from ideal.
func StandardPlan() Plan {
	return Plan{KeyBits: 1 << 19, FrameBits: 1 << 18, EpsSec: 1e-14, Gain: .02, Errors: 1.3, Leak: 1.08, Pads: 2}
}

// Standard is the link of the lab and the profile of its blocks.
func Standard() (bb84.Params, distill.Params) {
	link := bb84.Standard()
	profile, err := StandardPlan().Profile(link)
	if err != nil {
		panic(err) // a constant, and tested
	}
	return link, profile
}

// sigmas is how far a count may lie from what is expected for its own statistics: an
// honest block fails for one count in 10^9.
const sigmas = 6

// Profile fixes a link's blocks in advance: how many gates, which counts pass, and the
// length of the secret at the worst corner of all that passes. An error says that such
// blocks make no key.
func (p Plan) Profile(link bb84.Params) (distill.Params, error) {
	if err := link.Validate(); err != nil {
		return distill.Params{}, fmt.Errorf("link parameters: %w", err)
	}
	rates := link.Rates(bb84.Eve{})
	keyRate, testRate := rates.Gain*link.PX*link.PX, rates.Gain*(1-link.PX)*(1-link.PX)
	if !(keyRate > 0) {
		return distill.Params{}, fmt.Errorf("nothing is detected over %v km", link.Km)
	}
	// So many gates that too few key bits are as rare as any count out of bounds, and as
	// many test bits as these give as surely.
	n := float64(p.KeyBits)
	gates := math.Ceil((1 + p.Gain) * (n + sigmas*math.Sqrt(n)) / keyRate)
	test := gates * testRate
	test = math.Floor((test - sigmas*math.Sqrt(test)) / (1 + p.Gain))
	profile := distill.Params{
		Gates: int64(gates), KeyBits: p.KeyBits, FrameBits: p.FrameBits, TestBits: int(test),
		PX: link.PX, Intensities: len(link.Intensities), EpsSec: p.EpsSec, Pads: p.Pads,
	}
	counts := bb84.Counts{KeyBits: n, TestBits: test}
	errors := 0.
	for k, in := range link.Intensities {
		profile.Chances[k] = in.P
		share := rates.Share[k]
		profile.Key[k], counts.Key[k] = limits(n*share, p.Gain)
		profile.Test[k], counts.Test[k] = limits(test*share, p.Gain)
		profile.TestErrors[k], counts.TestErrors[k] = upTo(p.Errors * test * share * rates.Error[k])
		profile.KeyErrors[k], counts.KeyErrors[k] = upTo(p.Errors * n * share * rates.Error[k])
		errors += p.Errors * n * share * rates.Error[k]
	}
	doubles := gates * rates.Gain * rates.Double
	profile.Doubles = distill.Limits{Min: int(max(0, doubles/5-sigmas*math.Sqrt(doubles))), Max: int(5*doubles + sigmas*math.Sqrt(doubles) + 10)}

	profile.LeakLimit = int(math.Ceil(p.Leak * n * bb84.Entropy(min(.5, (errors+sigmas*math.Sqrt(errors))/n))))
	bounds := counts.Bounds(link.Intensities, p.EpsSec)
	bounds.Vacuum = 0 // what Bob asks in reconciliation may give those bits away: see package distill
	profile.SecretBits = bounds.Length(float64(profile.LeakLimit), distill.TagBits, p.EpsSec)
	if atoms := profile.KeyedBits() / key.AtomBits; atoms > 0 { // no bit is left over
		profile.SecretBits -= profile.KeyedBits() - atoms*key.AtomBits
	}
	return profile, profile.Validate()
}

// limits of a count: its statistics, and what may be off besides.
func limits(expected, tolerance float64) (distill.Limits, bb84.Interval) {
	by := sigmas*math.Sqrt(expected) + tolerance*expected
	l := distill.Limits{Min: int(max(0, math.Floor(expected-by))), Max: int(math.Ceil(expected + by))}
	return l, bb84.Interval{Min: float64(l.Min), Max: float64(l.Max)}
}

// upTo are the limits of a count that is never too low.
func upTo(most float64) (distill.Limits, bb84.Interval) {
	l := distill.Limits{Max: int(math.Ceil(most + sigmas*math.Sqrt(most)))}
	return l, bb84.Interval{Max: float64(l.Max)}
}
