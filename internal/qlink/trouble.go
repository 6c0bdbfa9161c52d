package qlink

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/qutemail/kme/internal/bb84"
)

// trouble is how the link misbehaves on purpose. It is used under fibre.mu.
type trouble struct {
	drift   float64       // misalignment that every block adds
	drifted float64       // what has been added so far
	burst   float64       // factor on the dark counts, for one block; 0: none
	stall   time.Duration // before the first pulse of every block
}

// strike gives a block its part of it.
func (t *trouble) strike(s *shot, p bb84.Params) {
	t.drifted += t.drift
	p.Misalignment = min(p.Misalignment+t.drifted, .5)
	if t.burst > 0 {
		p.DarkPerGate = min(p.DarkPerGate*t.burst, .4)
		t.burst = 0
	}
	s.params, s.stall = p, t.stall
}

// set changes one kind of it.
func (t *trouble) set(kind, value string) error {
	if kind == "stall" {
		d, err := time.ParseDuration(value)
		if err != nil || d < 0 || d > time.Hour {
			return fmt.Errorf("stall %q: want a time, like 500ms", value)
		}
		t.stall = d
		return nil
	}
	v, err := strconv.ParseFloat(value, 64)
	if err != nil || !(v >= 0) {
		return fmt.Errorf("%s %q: want a number that is not negative", kind, value)
	}
	if kind == "burst" {
		t.burst = v
		return nil
	}
	t.drift = v
	if v == 0 {
		t.drifted = 0 // aligned anew
	}
	return nil
}

// waitOut passes a stall. A block that is stalled can still be cut or called off.
func (f *fibre) waitOut(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
