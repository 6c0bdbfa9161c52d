package handover

import (
	"fmt"
	"slices"

	"github.com/qutemail/kme/internal/key"
)

// giveable are the chunks of a link that the site may give away.
func (s *site) giveable(l string) []*chunkRow {
	var chunks []*chunkRow
	for _, b := range s.blocks {
		if b.Link != l {
			continue
		}
		for _, c := range b.chunks {
			leased := c.node != "" && !s.w.broken.grantLeased
			if c.MayGive(b.state, leased, s.left(c)) {
				chunks = append(chunks, c)
			}
		}
	}
	return chunks
}

// give is the giver's commit: the oldest chunk of a link that may be given is the other
// end's, which is to be told so.
func (s *site) give(l string) {
	chunks := s.giveable(l)
	if len(chunks) > 0 {
		c := chunks[0]
		c.Chunk = c.Give()
		s.grants = append(s.grants, &grantRow{Granted: Granted{c.ref, c.Grants}})
	}
	s.did(DoGive{l, min(len(chunks), 1)})
}

// hearGrant is the receiver's commit.
func (s *site) hearGrant(g Granted) {
	s.did(DoTakeGrant{g})
	b := s.block[g.BlockRef]
	if b == nil {
		return
	}
	for _, c := range b.chunks {
		if c.ref == g.ChunkRef {
			c.Chunk = c.OnGrant(g.Grants)
			if s.w.broken.grantUncounted {
				c.Mine = true
			}
		}
	}
}

func (s *site) ackGrant(g Granted) {
	s.did(DoAckGrant{g})
	for _, row := range s.grants {
		if row.Granted == g || s.w.broken.grantAckUnnamed && row.ChunkRef == g.ChunkRef {
			row.acked = true
		}
	}
}

// pendingGrants are those that have not been acknowledged.
func (s *site) pendingGrants() []*grantRow {
	return slices.DeleteFunc(slices.Clone(s.grants), func(g *grantRow) bool { return g.acked })
}

func (p *process) tellGrant(g *grantRow) {
	if p.w.broken.grantToldOnce {
		g.acked = true
	}
	p.sayGrant(g.Granted)
}

func (p *process) sayGrant(g Granted) {
	p.say(g.Link, "grant", func(r *process) {
		if p.w.broken.grantUsedEarly && r.lane(g.Link).ready {
			r.giveBack(r.site.pooled(r.site.block[g.BlockRef].chunks[g.First/key.ChunkAtoms]))
		}
		r.commit("HearGrant", job{act: func() { r.site.hearGrant(g) }, done: func() {
			r.reply(p, "grant-answer", func() { p.commit("AckGrant", job{act: func() { p.site.ackGrant(g) }}) })
		}})
	})
}

// give has a process give a chunk away, and not yet say so.
func (w *world) give() bool {
	given := false
	return w.with(able, func(p *process) {
		l := choose(w, p.readyLanes()).link
		chunks := p.site.giveable(l)
		if len(chunks) == 0 {
			return
		}
		given = true
		if c := chunks[0]; w.broken.grantUncommitted {
			p.sayGrant(Granted{c.ref, c.Grants + 1})
		}
		p.commit("Give", job{act: func() { p.site.give(l) }})
	}) && given
}

func (w *world) tellGrant() bool {
	told := false
	return w.with(func(*process) bool { return true }, func(p *process) {
		for _, g := range p.site.pendingGrants() {
			told = true
			p.tellGrant(g)
		}
	}) && told
}

// checkOwners: at no time do both ends believe that a chunk is theirs, and what is
// on its way is not nobody's for ever: once all grants are acknowledged, it is one's.
func (w *world) checkOwners(settled bool) {
	one := w.sites[0]
	for _, b := range one.blocks {
		other := one.over(b.Link).block[b.BlockRef]
		if other == nil || b.state == Lost || other.state == Lost || other.Digest != b.Digest {
			continue // what one end does not hold the other does not use: I7
		}
		for i, c := range b.chunks {
			d := other.chunks[i]
			if c.Mine && d.Mine {
				w.fail("I2: chunk %s is owned by both ends", c.ref)
			}
			if settled && !c.Mine && !d.Mine {
				w.fail("chunk %s is owned by neither end", c.ref)
			}
		}
	}
}

func (g *grantRow) String() string { return fmt.Sprintf("grant %d of chunk %s", g.Grants, g.ChunkRef) }
