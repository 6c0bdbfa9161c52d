package qlink

import (
	"fmt"
	"math"
	"math/bits"
	"testing"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
)

// counts are those that pass a profile.
func counts(p distill.Params) bb84.Counts {
	c := bb84.Counts{KeyBits: float64(p.KeyBits), TestBits: float64(p.TestBits)}
	interval := func(l distill.Limits) bb84.Interval { return bb84.Interval{Min: float64(l.Min), Max: float64(l.Max)} }
	for k := range p.Intensities {
		c.Key[k], c.Test[k] = interval(p.Key[k]), interval(p.Test[k])
		c.TestErrors[k], c.KeyErrors[k] = interval(p.TestErrors[k]), interval(p.KeyErrors[k])
	}
	return c
}

// TestNoYieldsBeatTheLength looks for an Eve who stays unseen with fewer single photons
// than the length of the secret counts on. Whatever she does to light of random phases is,
// to the gains, a table of yields by the number of photons; the shares of the intensities
// that pass are a box. At its corners and on a grid in it, the fewest single photons are a
// problem of linear programming with three equations, so that they are found at a table
// with three yields that are not 0: all of these are tried.
func TestNoYieldsBeatTheLength(t *testing.T) {
	link, profile := Standard()
	bounds := counts(profile).Bounds(link.Intensities, profile.EpsSec)
	counted := bounds.Single / float64(profile.KeyBits)
	numbers := []int{0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20}
	var poisson [bb84.MaxIntensities][21]float64
	single := 0. // chance that a pulse has one photon
	for k, in := range link.Intensities {
		p := math.Exp(-in.Mu)
		for n := range poisson[k] {
			poisson[k][n] = p
			p *= in.Mu / float64(n+1)
		}
		single += in.P * poisson[k][1]
	}
	fewest := 1.
	const steps = 16
	for i := range steps + 1 {
		for j := range steps + 1 {
			at := func(k, i int) float64 {
				l := profile.Key[k]
				return (float64(l.Min) + float64(i)/steps*float64(l.Max-l.Min)) / float64(profile.KeyBits)
			}
			shares := [3]float64{at(0, i), at(1, j)}
			shares[2] = 1 - shares[0] - shares[1]
			if n := shares[2] * float64(profile.KeyBits); n < float64(profile.Key[2].Min) || n > float64(profile.Key[2].Max) {
				continue
			}
			for a, n1 := range numbers {
				for b, n2 := range numbers[:a] {
					for _, n3 := range numbers[:b] {
						yields, ok := solve(poisson, [3]int{n1, n2, n3}, shares, link.Intensities)
						if !ok {
							continue
						}
						singles := 0.
						for m, n := range []int{n1, n2, n3} {
							if n == 1 {
								singles = single * yields[m]
							}
						}
						fewest = min(fewest, singles)
					}
				}
			}
		}
	}
	t.Logf("the length counts %.4f of the key bits as single photons; an unseen Eve leaves %.4f at least", counted, fewest)
	if fewest < counted || fewest > 1.5*counted {
		t.Errorf("an unseen Eve leaves %.4f of the key bits to single photons, and the length counts %.4f", fewest, counted)
	}
}

// solve finds the yields of three photon numbers, up to a factor, that make the shares: of
// intensity k, p_k times the sum of its Poisson chances times them. It fails where one is
// negative.
func solve(poisson [bb84.MaxIntensities][21]float64, numbers [3]int, shares [3]float64, source []bb84.Intensity) (yields [3]float64, ok bool) {
	var m [3][4]float64
	for k := range m {
		for c, n := range numbers {
			m[k][c] = source[k].P * poisson[k][n]
		}
		m[k][3] = shares[k]
	}
	for c := range 3 { // Gauss and Jordan
		pivot := c
		for r := c; r < 3; r++ {
			if math.Abs(m[r][c]) > math.Abs(m[pivot][c]) {
				pivot = r
			}
		}
		m[c], m[pivot] = m[pivot], m[c]
		if m[c][c] == 0 {
			return yields, false
		}
		for r := range 3 {
			if r == c {
				continue
			}
			factor := m[r][c] / m[c][c]
			for i := c; i < 4; i++ {
				m[r][i] -= factor * m[c][i]
			}
		}
	}
	for c := range yields {
		if yields[c] = m[c][3] / m[c][c]; yields[c] < 0 {
			return yields, false
		}
	}
	return yields, true
}

// TestSplitPhotonsUnseen: over the lab's 10 km, and some more or less, Eve can split photon
// numbers so that all gains are as they should be. She then has the bits of the pulses of several photons, and no others:
// there are never fewer single photons than the length counts.
func TestSplitPhotonsUnseen(t *testing.T) {
	unseen := make(map[float64]bool)
	for km := 5.; km <= 20; km++ {
		link := bb84.Standard()
		link.Km = km
		profile, err := StandardPlan().Profile(link)
		if err != nil {
			t.Fatal(err)
		}
		rates, seen := link.Rates(bb84.Eve{SplitPhotons: true}), false
		for k := range link.Intensities {
			seen = seen || !holds(profile.Key[k], rates.Share[k]*float64(profile.KeyBits)) ||
				!holds(profile.Test[k], rates.Share[k]*float64(profile.TestBits))
		}
		if seen || rates.Gain*link.PX*link.PX*float64(profile.Gates) < float64(profile.KeyBits) {
			continue
		}
		unseen[km] = true
		counted := counts(profile).Bounds(link.Intensities, profile.EpsSec).Single
		if singles := splitSingles(link) * float64(profile.KeyBits); singles < counted {
			t.Errorf("%v km: %.0f of %d key bits are of single photons, the length counts %.0f", km, singles, profile.KeyBits, counted)
		} else {
			t.Logf("%v km: she is not seen, %.0f of %d key bits are of single photons, the length counts %.0f", km, singles, profile.KeyBits, counted)
		}
	}
	if !unseen[10] || unseen[5] || unseen[20] {
		t.Errorf("she is not seen over %v km", unseen)
	}
}

func holds(l distill.Limits, n float64) bool { return float64(l.Min) <= n && n <= float64(l.Max) }

// splitSingles is the share of single photons, as they were sent, among what Bob counts
// when Eve splits photon numbers, written anew from what she does: of pulses of one photon
// she blocks as many as keeps the gain of the signal, of others she sends on all but one
// photon, over no fibre at all.
func splitSingles(p bb84.Params) float64 {
	click := func(photons int) float64 {
		return 1 - (1-p.DarkPerGate)*(1-p.DarkPerGate)*math.Pow(1-p.EtaBob, float64(photons))
	}
	chance := func(mu float64, n int) float64 {
		g, _ := math.Lgamma(float64(n + 1))
		return math.Exp(-mu + float64(n)*math.Log(mu) - g)
	}
	others := func(mu float64) (sum float64) { // gain of all but single photons
		sum = chance(mu, 0) * click(0)
		for n := 2; n < 30; n++ {
			sum += chance(mu, n) * click(n-1)
		}
		return sum
	}
	signal := p.Intensities[0].Mu
	want := 1 - (1-p.DarkPerGate)*(1-p.DarkPerGate)*math.Exp(-p.Eta()*signal)
	single := max(click(0), (want-others(signal))/chance(signal, 1)) // yield of single photons
	var singles, all, sent float64
	for _, in := range p.Intensities {
		singles += in.P * chance(in.Mu, 1) * single
		all += in.P * (others(in.Mu) + chance(in.Mu, 1)*single)
		sent += in.P * chance(in.Mu, 1)
	}
	return (1-p.Afterpulse)*singles/all + p.Afterpulse*sent
}

// The lab's link is one for blocks of all lengths, and near the best for each.
func TestStandardIsNearTheBest(t *testing.T) {
	for _, tc := range []struct {
		keyBits int
		share   float64 // of the most secret bits per gate
	}{{1 << 19, .94}, {1 << 21, .89}, {1 << 22, .83}} {
		t.Run(fmt.Sprintf("2^%d", bits.Len(uint(tc.keyBits))-1), func(t *testing.T) {
			t.Parallel()
			perGate := func(link bb84.Params) float64 {
				plan := StandardPlan()
				plan.KeyBits = tc.keyBits
				profile, err := plan.Profile(link)
				if err != nil {
					return 0
				}
				return float64(profile.KeyedBits()) / float64(profile.Gates)
			}
			_, best := bb84.Standard().Optimise(perGate)
			if got := perGate(bb84.Standard()); got < tc.share*best {
				t.Errorf("%.3e secret bits per gate: %.3f of the best, %.3e", got, got/best, best)
			}
		})
	}
}
