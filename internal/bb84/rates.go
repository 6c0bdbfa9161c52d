package bb84

// Rates is what a long run of a link shows.
type Rates struct {
	Gain   float64 // clicks counted, per gate
	Double float64 // fraction of the clicks that both detectors made
	QBER   float64 // fraction of errors among clicks in equal bases; a double click counts half
}

// Rates gives the closed form for an endless run. A simulation agrees with it up
// to its own statistics and the edges of its blocks.
func (p Params) Rates(e Eve) Rates {
	c := p.outcomes(e.flip(p.Misalignment))
	click := c.click()
	if click == 0 {
		return Rates{}
	}
	// The clicks are a renewal process: a click, DeadGates gates, one gate in which
	// an afterpulse may come too, and if nothing came a geometric wait.
	first := click + p.Afterpulse - click*p.Afterpulse
	r := Rates{Gain: 1 / (1 + float64(p.DeadGates) + (1-first)/click)}

	// A fraction Afterpulse of all clicks has an afterpulse in it, alone or with a
	// click of the gate's own. A detector that clicks by it is the wrong one half
	// the time.
	own := 1 - p.Afterpulse
	r.Double = own*c.both/click + p.Afterpulse*(c.both+(c.right+c.wrong)/2)
	r.QBER = own*(c.wrong+c.both/2)/click +
		p.Afterpulse*((1-click)/2+c.right/4+c.wrong*3/4+c.both/2)
	return r
}

// outcomes holds the chances of what the two detectors do in one live gate: only
// that of the bit sent clicks, only the other, both.
type outcomes struct {
	right, wrong, both float64
}

// outcomes for a photon that goes to the wrong detector with chance flip. Between
// different bases flip is 1/2.
func (p Params) outcomes(flip float64) outcomes {
	eta, dark := p.Eta(), p.DarkPerGate
	alone := (1 - eta) * dark * (1 - dark) // no photon, one dark count
	return outcomes{
		right: eta*(1-flip)*(1-dark) + alone,
		wrong: eta*flip*(1-dark) + alone,
		both:  eta*dark + (1-eta)*dark*dark,
	}
}

// click is the chance of a click at all. It does not depend on flip, so neither
// bases nor bits decide whether a gate is detected.
func (o outcomes) click() float64 { return o.right + o.wrong + o.both }
