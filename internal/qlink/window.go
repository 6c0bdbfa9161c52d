package qlink

import (
	"math"
	"time"
)

// farAway is from which time there and back on questions are worth more than bits that they
// leak: see distill.BobConfig.Hurry.
const farAway = 2 * time.Millisecond

// window says how many blocks may be under way, so that base of them are at work on the
// average: those of which a message is travelling are not. Without it the ends of a
// link would do nothing for most of a block's life when they are far apart: a block takes
// some hundred questions, one after the other.
//
// More blocks under way are more light that is lost if an end dies. There are no more than
// the distance makes necessary.
type window struct {
	base  int
	share float64 // of a block's life, with its messages on their way
}

// most is how many blocks may be under way: base, if what travelling takes is less than the
// fifth of the throughput that may be lost, and otherwise so many that twice base are at work
// on the average. For they come in bursts: of one on the average there would be none for a
// third of the time.
func (w *window) most() int {
	if w.share <= 1./6 {
		return w.base
	}
	return int(min(math.Ceil(2*float64(w.base)/(1-w.share)), MaxInFlight))
}

// ended takes note of a block's life and of how long its messages were on their way.
func (w *window) ended(took, away time.Duration) {
	const most = .99
	if took > 0 {
		w.share = min(most, float64(away)/float64(took))
	}
}
