package qlink

import (
	"math"
	"time"
)

// window says how many blocks may be under way, so that base of them are at work on the
// average: those of which a message is travelling are not, nor those that wait for a slower
// one before them. Without it the ends of a link would do nothing for most of a block's life
// when they are far apart: a block takes some 25 questions, one after the other.
//
// More blocks under way are more light that is lost if an end dies. There are no more than
// the distance makes necessary.
type window struct {
	base int

	// Shares of a block's life, of the last ones on the average.
	away float64 // with its messages on their way; what it waited for others is not of its life
	idle float64 // so, or waiting for the block before it, which is
}

// most is how many blocks may be under way: base, if what travelling takes is less than the
// fifth of the throughput that may be lost, and otherwise so many that three times base are at
// work on the average. For they come in bursts: of one on the average there would be none for a
// third of the time. And on a busy machine some of what counts as work is waiting for a processor.
func (w *window) most() int {
	if w.away <= 1./6 {
		return w.base
	}
	return int(min(math.Ceil(3*float64(w.base)/(1-w.idle)), MaxInFlight))
}

// ended takes note of a block's life: how long it took without what it waited for others, how
// long its messages were on their way, and how long it waited for its turn to end.
func (w *window) ended(took, away, queued time.Duration) {
	if took <= 0 {
		return
	}
	note := func(share *float64, part, of time.Duration) {
		// If one odd block counted for all, the window would swing: few under way, all of them
		// fast, then many at once that are in each other's way.
		const most, blocks = .99, 8
		now := max(0, min(most, float64(part)/float64(of)))
		if *share == 0 {
			*share = now
		}
		*share += (now - *share) / blocks
	}
	note(&w.away, away, took)
	note(&w.idle, away+queued, took+queued)
}
