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
	share float64 // of a block's life, with its messages on their way; of the last ones, on the average
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

// ended takes note of a block's life, without what it waited for others, and of how long its
// messages were on their way. If one odd block counted for all, the window would swing:
// few under way, all of them fast, then many at once that are in each other's way.
func (w *window) ended(took, away time.Duration) {
	const most, of = .99, 8
	if took <= 0 {
		return
	}
	share := max(0, min(most, float64(away)/float64(took)))
	if w.share == 0 {
		w.share = share
	}
	w.share += (share - w.share) / of
}
