package pki

import "context"

// Fetch asks every URL once, as Run does.
func (r *Revocations) Fetch(ctx context.Context) { r.fetch(ctx) }

// Flush has what was gathered recorded, as Run does.
func (q *Refusals) Flush(ctx context.Context) { q.flush(ctx) }

// Open is how many connections are open.
func (g *Gate) Open() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.open)
}

// Shaking is how many handshakes are under way.
func (g *Gate) Shaking() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shaking
}

// Good is how many connections are open whose certificate named a caller.
func (g *Gate) Good() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for c := range g.open {
		if c.good {
			n++
		}
	}
	return n
}
