package hsm

import (
	"context"
	"slices"
	"sync"
)

// class says who goes first into the module.
type class int

const (
	alone      class = iota // with nobody else inside; keeps all others out as soon as it waits
	beat                    // the heartbeat
	urgent                  // somebody waits for the answer
	background              // intake: it never takes the last turn, so that an urgent call finds one
	classes
)

// gate lets calls into the module, at most width at a time: each is a thread while the
// module has it. Within a class, who came first goes first.
type gate struct {
	width int

	mu     sync.Mutex
	inside int // turns taken; width while somebody is alone
	behind int // those of them that are background's
	queues [classes][]*waiter
}

type waiter struct {
	class class
	let   chan struct{} // closed when the turn is this one's
}

func newGate(width int) *gate { return &gate{width: width} }

// enter waits for a turn, or for all of them if c is alone. Whoever is let in leaves.
func (g *gate) enter(ctx context.Context, c class) error {
	g.mu.Lock()
	if len(g.queues[c]) == 0 && g.open(c) {
		g.take(c)
		g.mu.Unlock()
		return nil
	}
	w := &waiter{class: c, let: make(chan struct{})}
	g.queues[c] = append(g.queues[c], w)
	g.mu.Unlock()
	select {
	case <-w.let:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.queues[c], w)
	if i < 0 { // let in at the same moment
		g.put(c)
	} else {
		g.queues[c] = slices.Delete(g.queues[c], i, i+1)
	}
	g.admit() // who stood behind may go now
	return context.Cause(ctx)
}

func (g *gate) leave(c class) {
	g.mu.Lock()
	g.put(c)
	g.admit()
	g.mu.Unlock()
}

// waiting is how many wait for a turn.
func (g *gate) waiting() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, q := range g.queues {
		n += len(q)
	}
	return n
}

// The rest is for holders of mu.

// open says whether one of c may go in, if none of its own class is before it.
func (g *gate) open(c class) bool {
	for before := range c {
		if len(g.queues[before]) > 0 {
			return false
		}
	}
	switch c {
	case alone:
		return g.inside == 0
	case background:
		return g.inside < g.width && g.behind < max(1, g.width-1)
	}
	return g.inside < g.width
}

func (g *gate) take(c class) {
	switch c {
	case alone:
		g.inside = g.width
		return
	case background:
		g.behind++
	}
	g.inside++
}

func (g *gate) put(c class) {
	switch c {
	case alone:
		g.inside = 0
		return
	case background:
		g.behind--
	}
	g.inside--
}

// admit lets in whoever may go.
func (g *gate) admit() {
	for c := range classes {
		for len(g.queues[c]) > 0 && g.open(c) {
			close(g.queues[c][0].let)
			g.queues[c] = slices.Delete(g.queues[c], 0, 1)
			g.take(c)
		}
	}
}
