package kme

import (
	"context"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/store"
)

const (
	historyEvery = 10 * time.Second // between two looks at a link's pool
	historyLooks = 30               // that a forecast is made from
)

// history is how a link did lately, as far as it is not in the database yet, and how
// its pool stood in the last minutes, of which a forecast is made.
type history struct {
	mu    sync.Mutex
	since store.LinkMinute // blocks since they were last added to the database
	looks []look           // oldest first
}

// look is how a pool stood, in 256-bit keys.
type look struct {
	at          time.Time
	here, there int
}

// block adds a block that gave so many bits, or was given up with none. rated says whether
// its error rate was found.
func (h *history) block(qber float64, rated bool, bits int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if bits > 0 {
		h.since.Blocks++
	} else {
		h.since.Aborts++
	}
	if rated {
		h.since.QBER += qber
	} else {
		h.since.Unrated++
	}
	h.since.Bits += int64(bits)
}

// saw notes how the pool stands, and returns what to add to the database.
func (h *history) saw(now look) store.LinkMinute {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.looks = append(h.looks, now)
	h.looks = h.looks[max(0, len(h.looks)-historyLooks):]
	m := h.since
	m.At, m.Here, m.There = now.at, now.here, now.there
	return m
}

// added takes off what the database has now.
func (h *history) added(m store.LinkMinute) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.since.Blocks -= m.Blocks
	h.since.Aborts -= m.Aborts
	h.since.Unrated -= m.Unrated
	h.since.QBER -= m.QBER
	h.since.Bits -= m.Bits
}

// empty is when one end's part of the pool will be used up if it goes on as in the last
// minutes: from now, and false while it does not shrink.
func (h *history) empty(now time.Time, here bool) (time.Duration, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.looks) < 2 {
		return 0, false
	}
	first, last := h.looks[0], h.looks[len(h.looks)-1]
	was, is := first.there, last.there
	if here {
		was, is = first.here, last.here
	}
	took := last.at.Sub(first.at)
	if is >= was || took <= 0 {
		return 0, false
	}
	left := time.Duration(float64(took) * float64(is) / float64(was-is))
	return max(0, left-now.Sub(last.at)), true
}

// chronicle adds how the links did to the database, as well as it can: it is for
// pictures, and nothing is decided by it.
func (k *KME) chronicle(ctx context.Context) {
	for id, l := range k.links {
		here, there, err := k.Store.Pool(ctx, id)
		if err != nil {
			return // the database is away: the alarms say so
		}
		m := l.history.saw(look{k.Now(), here, there})
		if err := k.Store.AddHistory(ctx, id, m); err != nil {
			k.Log.Debug("adding to the history of a link", "link", id, "err", err)
			return
		}
		l.history.added(m)
	}
}

// endHistory deletes the history that is too old.
func (k *KME) endHistory(ctx context.Context) {
	if err := k.Store.EndHistory(ctx); err != nil {
		k.Log.Debug("ending old history", "err", err)
	}
}
