package bb84

import (
	"math"
	"math/rand/v2"
	"sync"
)

// physics is the generator that decides what fibre and detectors do: a source of random
// words, some of which are drawn at a time.
type physics struct {
	source rand.Source
	words  [128]uint64 // what is before at is used up
	at     int
}

func newPhysics(source rand.Source) *physics {
	return &physics{source: source, at: len(physics{}.words)}
}

// word is the next one.
func (p *physics) word() uint64 {
	if p.at == len(p.words) {
		p.refill()
	}
	w := p.words[p.at]
	p.at++
	return w
}

func (p *physics) refill() {
	p.at = 0
	if pcg, ok := p.source.(*rand.PCG); ok { // as in the product: nothing is looked up for each
		for i := range p.words {
			p.words[i] = pcg.Uint64()
		}
		return
	}
	for i := range p.words {
		p.words[i] = p.source.Uint64()
	}
}

// unit is how many values the upper bits of a word have that become a float64.
const unit = 1 << 53

// exponential draws from the exponential distribution of mean 1, with the 53 bits of
// precision that gaps of up to MaxGates need (the standard library's has 32).
func (p *physics) exponential(z *ziggurat) float64 {
	u := p.word()
	layer, at := byte(u), u>>11
	if at < z.within[layer] {
		return float64(at) * z.width[layer]
	}
	return p.edge(z, layer, at)
}

// edge ends a draw that the layer alone does not decide, one in a hundred.
func (p *physics) edge(z *ziggurat, layer byte, at uint64) float64 {
	for {
		x := float64(at) * z.width[layer]
		switch {
		case at < z.within[layer]:
			return x
		case layer == 0: // the tail is the distribution again
			return zigguratTail + p.exponential(z)
		case z.height[layer]+float64(p.word()>>11)/unit*(z.height[layer-1]-z.height[layer]) < math.Exp(-x):
			return x
		}
		u := p.word()
		layer, at = byte(u), u>>11
	}
}

// ziggurat covers the exponential density with layers of one area each (Marsaglia and
// Tsang, J. Stat. Softw. 5, 2000, where zigguratTail and zigguratArea are from). Layer 0 is
// the base, with the tail.
type ziggurat struct {
	within [256]uint64  // below it a draw lies under the density, whatever its height
	width  [256]float64 // of the layer, over unit
	height [256]float64 // of the density where the layer ends
}

const (
	zigguratTail = 7.69711747013104972
	zigguratArea = 3.949659822581572e-3
)

var newZiggurat = sync.OnceValue(func() *ziggurat {
	z := new(ziggurat)
	x := zigguratTail
	base := zigguratArea / math.Exp(-x)
	z.within[0] = uint64(x / base * unit)
	z.width[0], z.height[0] = base/unit, 1
	z.width[255], z.height[255] = x/unit, math.Exp(-x)
	for i := 254; i > 0; i-- {
		narrower := -math.Log(zigguratArea/x + math.Exp(-x))
		z.within[i+1] = uint64(narrower / x * unit)
		x = narrower
		z.width[i], z.height[i] = x/unit, math.Exp(-x)
	}
	return z // within[1] is 0: the top layer has no part that is under the density for sure
})
