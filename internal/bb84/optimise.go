package bb84

import (
	"cmp"
	"math"
	"slices"
)

// Optimise finds the probabilities and the intensities with which a link makes the most
// secret bits per pulse from blocks of so many key bits, beginning with those it has; it
// leaves the last of three intensities alone. The score of a candidate is objective(p),
// in any unit; planning uses secret bits over gates.
func (p Params) Optimise(objective func(Params) float64) (best Params, score float64) {
	score = math.Inf(-1)
	value := func(x []float64) float64 {
		candidate, ok := p.place(x)
		if !ok {
			return math.Inf(-1)
		}
		return objective(candidate)
	}
	for _, start := range p.starts(value) {
		at, s := climb(start, value)
		if candidate, ok := p.place(at); ok && s > score {
			best, score = candidate, s
		}
	}
	if score <= 0 && p.Km >= closer {
		// Where hardly any key is made there is none at all starts, and no way up. But what is
		// best a little closer makes some.
		near := p
		near.Km -= closer
		if near, s := near.Optimise(objective); s > 0 {
			at, s := climb(near.point(), value)
			if candidate, ok := p.place(at); ok && s > score {
				best, score = candidate, s
			}
		}
	}
	return best, score
}

// closer is how much, in km.
const closer = 5

// logit maps a probability to a number without bounds, sigmoid back.
func logit(v float64) float64   { return math.Log(v / (1 - v)) }
func sigmoid(v float64) float64 { return 1 / (1 + math.Exp(-v)) }

// place makes parameters of a point without bounds: P of X, the signal, the decoy as a
// part of the signal, the chance of the signal, and with two decoys that of the second
// intensity as a part of what is left.
func (p Params) place(x []float64) (Params, bool) {
	source := slices.Clone(p.Intensities)
	p.PX = sigmoid(x[0])
	source[0].Mu = 1.5 * sigmoid(x[1])
	source[1].Mu = source[0].Mu * sigmoid(x[2])
	source[0].P = sigmoid(x[3])
	rest := 1 - source[0].P
	source[1].P = rest
	if len(source) == 3 {
		source[1].P = rest * sigmoid(x[4])
		source[2].P = 1 - source[0].P - source[1].P
	}
	p.Intensities = source
	return p, p.Validate() == nil
}

// point is where place makes p of, if it can.
func (p Params) point() []float64 {
	i, part := p.Intensities, func(of, whole float64) float64 { return logit(max(.01, min(of/whole, .99))) }
	x := []float64{logit(p.PX), part(i[0].Mu, 1.5), part(i[1].Mu, i[0].Mu), logit(i[0].P)}
	if len(i) == 3 {
		x = append(x, part(i[1].P, 1-i[0].P))
	}
	return x
}

// starts are the points from which the search begins: the link's own, and the best of a
// coarse grid.
func (p Params) starts(score func([]float64) float64) [][]float64 {
	axes := [][]float64{{.35, .5, .7, .9, .97}, {.3, .4, .5}, {.2, .35, .5}, {.05, .15, .3, .6, .85}}
	if len(p.Intensities) == 3 {
		axes = append(axes, []float64{.5, .65, .8})
	}
	grid := []vertex{{}}
	for _, axis := range axes {
		var finer []vertex
		for _, v := range grid {
			for _, at := range axis {
				finer = append(finer, vertex{x: append(slices.Clone(v.x), logit(at))})
			}
		}
		grid = finer
	}
	for k := range grid {
		grid[k].v = score(grid[k].x)
	}
	slices.SortStableFunc(grid, func(a, b vertex) int { return cmp.Compare(b.v, a.v) })
	return [][]float64{p.point(), grid[0].x, grid[1].x, grid[2].x}
}

// climb is the downhill simplex of Nelder and Mead, upside down, begun anew from where
// it ends as long as that helps.
func climb(start []float64, f func([]float64) float64) (best []float64, value float64) {
	best, value = start, f(start)
	for _, step := range []float64{1, .5, .3, .1} {
		at, v := simplex(best, step, f)
		if v > value {
			best, value = at, v
		}
	}
	return best, value
}

type vertex struct {
	x []float64
	v float64
}

func simplex(start []float64, step float64, f func([]float64) float64) ([]float64, float64) {
	n := len(start)
	s := make([]vertex, n+1)
	for i := range s {
		x := slices.Clone(start)
		if i > 0 {
			x[i-1] += step
		}
		s[i] = vertex{x, f(x)}
	}
	for range 200 {
		slices.SortStableFunc(s, func(a, b vertex) int { return cmp.Compare(b.v, a.v) })
		worst := &s[n]
		try := func(t float64) vertex { // on the line from the worst through the middle of the rest
			x := make([]float64, n)
			for i := range x {
				for _, other := range s[:n] {
					x[i] += other.x[i] / float64(n)
				}
				x[i] += t * (x[i] - worst.x[i])
			}
			return vertex{x, f(x)}
		}
		reflected := try(1)
		switch {
		case reflected.v > s[0].v:
			if expanded := try(2); expanded.v > reflected.v {
				reflected = expanded
			}
			*worst = reflected
		case reflected.v > s[n-1].v:
			*worst = reflected
		default:
			if contracted := try(-.5); contracted.v > worst.v {
				*worst = contracted
				continue
			}
			for i := 1; i <= n; i++ { // towards the best
				for j := range s[i].x {
					s[i].x[j] = (s[i].x[j] + s[0].x[j]) / 2
				}
				s[i].v = f(s[i].x)
			}
		}
	}
	top := slices.MaxFunc(s, func(a, b vertex) int { return cmp.Compare(a.v, b.v) })
	return top.x, top.v
}
