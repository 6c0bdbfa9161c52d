package kme

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// padEnd is one end of a link: what outlives a process, and what does not.
type padEnd struct {
	*link
	reserve *reserve                          // of the session; a crash makes another
	used    map[[distill.PadBytes]byte]string // the pads that a tag of this end has left with, and their names
	last    distill.PadName                   // of these
}

// spend commits the pad and has the tag leave.
func (e *padEnd) spend(t *rapid.T, pad distill.Pad) {
	if err := e.reserve.spend(t.Context(), pad.Name); err != nil {
		t.Fatalf("%s: spending %s: %v", e.End, pad.Name, err)
	}
	if name, twice := e.used[pad.Bits]; twice {
		t.Fatalf("%s has made a tag with pad %s, and one with %s, which is the same", e.End, name, pad.Name)
	}
	if pad.Name.Compare(e.last) <= 0 {
		t.Fatalf("%s spends pad %s after %s", e.End, pad.Name, e.last)
	}
	e.used[pad.Bits], e.last = pad.Name.String(), pad.Name
}

// Pads outlive the epoch in which they were sealed, for as long as the link rests; one that
// does not open keeps no epoch from its end.
func TestPadsOutliveTheirEpoch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	run(t, k)
	ctx := t.Context()
	l := &link{LinkConfig: LinkConfig{ID: "resting", Peer: kmeID(t, "km2"), End: handover.Alice, Provenance: key.Simulated}, k: k}
	if err := k.Store.EnsureLink(ctx, l.ID, l.Peer, l.End); err != nil {
		t.Fatal(err)
	}
	if err := k.Store.OpenSession(ctx, l.ID, 1, k.own(audit.LinkOpen)); err != nil {
		t.Fatal(err)
	}
	pads := make([]distill.Pad, 3)
	for i := range pads {
		pads[i].Name = distill.PadName{Session: 1, Block: 1, Index: i}
		_, _ = rand.Read(pads[i].Bits[:])
	}
	made := key.EpochAt(s.now(), time.Hour)
	b := qlink.Block{Provenance: key.Simulated, Outcome: distill.Outcome{
		Session: 1, Block: 1, Pads: slices.Clone(pads), Bits: make([]byte, key.AtomBytes), Length: key.AtomBits, Terms: distill.Terms{Epoch: int64(made), Owners: "a"},
	}}
	if err := l.intake(ctx, b); err != nil {
		t.Fatal(err)
	}
	ref := handover.BlockRef{Link: l.ID, Session: 1, Block: 1}
	if err := k.Store.HeardHeldAnswer(ctx, ref, handover.Equal, k.blockEvents(ref, 1)); err != nil {
		t.Fatal(err)
	}
	s.exec(s.name, "UPDATE kme.pad SET ct = set_bit(ct, 9, 1 - get_bit(ct, 9)) WHERE index = 0")
	for range 3 {
		s.step(time.Hour)
		k.expire(ctx)
	}
	eventually(t, "the epoch to be dropped", func() bool { _, ok := states(t, k)[made]; return !ok })
	r := &reserve{l: l, session: 1}
	var above distill.PadName
	for _, want := range pads[1:] {
		pad, err := r.next(ctx, above)
		if err != nil || pad != want {
			t.Errorf("pad %s: got %s, %v", want.Name, pad.Name, err)
		}
		above = want.Name
	}
	if at, err := k.Store.Reserve(ctx, l.ID); err != nil || at.Pads != 2 {
		t.Errorf("%d pads, %v", at.Pads, err)
	}
}

// TestNoPadIsSpentTwice plays the two ends of a link, each with its own rows, through
// blocks, several under way at a time, aborts, lost blocks, spoilt pads and crashes between
// any two steps of a block: no tag is ever made with a pad that made one before, at that end,
// and no block under way is ever left without the pad that it began with.
func TestNoPadIsSpentTwice(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	run(t, k)
	secret := func(context.Context) ([]byte, error) { return make([]byte, minAuthSecret), nil }
	rows, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name)+" search_path=kme")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rows.Close(context.Background()) })
	peer := kmeID(t, "km2")
	links := 0
	var fromBlocks, fromSecret, given int
	rapid.Check(t, func(t *rapid.T) {
		ctx := t.Context()
		links++
		newEnd := func(end handover.End) *padEnd {
			id := fmt.Sprintf("link%d-%s", links, end)
			if err := k.Store.EnsureLink(ctx, id, peer, end); err != nil {
				t.Fatal(err)
			}
			return &padEnd{
				link: &link{LinkConfig: LinkConfig{ID: id, Peer: peer, End: end, Provenance: key.Simulated, Secret: secret}, k: k},
				used: make(map[[distill.PadBytes]byte]string),
			}
		}
		alice, bob := newEnd(handover.Alice), newEnd(handover.Bob)
		session, block := int64(0), int64(0)

		// dies says whether the end's process, or its connection, does here.
		dies := func(where string) bool { return rapid.IntRange(0, 15).Draw(t, where) == 11 }
		type flight struct { // a block under way
			block       int64
			pad, theirs distill.Pad
			lost        bool // Bob does not have it
		}
		var flying []flight
		open := func() bool {
			session, block, flying = session+1, 0, nil
			var floors [2]store.PadName
			for i, e := range []*padEnd{alice, bob} {
				if err := k.Store.OpenSession(ctx, e.ID, session, k.own(audit.LinkOpen)); err != nil {
					t.Fatal(err)
				}
				e.reserve = &reserve{l: e.link, session: session}
				var err error
				if floors[i], err = e.floor(ctx, session); err != nil {
					t.Fatal(err)
				}
				if dies("opening") {
					return false
				}
			}
			for i, e := range []*padEnd{alice, bob} {
				if err := e.meetReserve(ctx, session, floors[1-i]); err != nil {
					t.Fatal(err)
				}
			}
			return true
		}
		// begin begins one more block; false ends the session.
		begin := func() bool {
			var above distill.PadName
			if n := len(flying); n > 0 {
				above = flying[n-1].pad.Name
			}
			pad, err := alice.reserve.next(ctx, above)
			if err != nil {
				return len(flying) > 0 // the reserve is used up: another session begins anew
			}
			block++
			if dies("begun") {
				return false
			}
			theirs, err := bob.reserve.find(ctx, pad.Name)
			lost := errors.Is(err, distill.ErrNoPad)
			if err != nil && !lost {
				t.Fatal(err)
			}
			flying = append(flying, flight{block, pad, theirs, lost})
			return true
		}
		// distil ends the block that was begun first; false ends the session.
		distil := func() bool {
			for range rapid.IntRange(1, 3).Draw(t, "in flight") - len(flying) {
				if !begin() {
					return false
				}
			}
			if len(flying) == 0 {
				return true
			}
			block, pad, theirs := flying[0].block, flying[0].pad, flying[0].theirs
			lost := flying[0].lost
			flying = flying[1:]
			if lost { // as those before it have ended: see qlink.Source
				if err := alice.reserve.lose(ctx, pad.Name); err != nil {
					t.Fatal(err)
				}
				given++
				return true
			}
			if rapid.IntRange(0, 15).Draw(t, "aborts") == 11 {
				return true
			}
			if bob.spend(t, theirs); dies("Bob's tag has left") {
				return false
			}
			alice.spend(t, pad)
			if pad.Name.Block == 0 {
				fromSecret++
			} else {
				fromBlocks++
			}
			if dies("Alice's tag has left") {
				return false
			}
			pads := make([]distill.Pad, 2)
			for i := range pads {
				pads[i].Name = distill.PadName{Session: session, Block: block, Index: i}
				_, _ = rand.Read(pads[i].Bits[:])
			}
			for _, e := range []*padEnd{alice, bob} {
				b := qlink.Block{Provenance: key.Simulated, Outcome: distill.Outcome{
					Session: session, Block: block, Pads: append([]distill.Pad(nil), pads...), Bits: make([]byte, key.AtomBytes), Length: key.AtomBits,
					Terms: distill.Terms{Epoch: int64(key.EpochAt(s.now(), time.Hour)), Owners: "a"},
				}}
				if err := e.intake(ctx, b); err != nil {
					t.Fatal(err)
				}
				if dies("holding") {
					return false
				}
			}
			return true
		}
		// heard is what an end learns of a block that it holds: that the other has it too, or not.
		heard := func(e *padEnd) {
			held, err := k.Store.HeldBlocks(ctx, e.ID)
			if err != nil || len(held) == 0 {
				return
			}
			answer := rapid.SampledFrom([]handover.HeldAnswer{handover.Equal, handover.Equal, handover.Equal, handover.Never}).Draw(t, "answer")
			ref := held[0].BlockRef
			if err := k.Store.HeardHeldAnswer(ctx, ref, answer, k.blockEvents(ref, held[0].Atoms)); err != nil {
				t.Fatal(err)
			}
		}
		up := open()
		for range 16 {
			switch rapid.SampledFrom([]string{"go on", "hear", "go on", "spoil", "crash"}).Draw(t, "act") {
			case "go on":
				if up {
					up = distil()
				} else {
					up = open()
				}
			case "hear":
				heard(alice)
				heard(bob)
			case "spoil":
				e := rapid.SampledFrom([]*padEnd{alice, bob}).Draw(t, "whose")
				if _, err := rows.Exec(ctx, "UPDATE pad SET ct = set_bit(ct, 9, 1 - get_bit(ct, 9)) WHERE link = $1 AND index = 0", e.ID); err != nil {
					t.Fatal(err)
				}
			case "crash":
				up = false
			}
		}
	})
	t.Logf("%d pads of blocks and %d of the secret were spent, %d given up", fromBlocks, fromSecret, given)
	if fromBlocks == 0 || fromSecret == 0 || given == 0 {
		t.Error("not every way was gone")
	}
}

// TestPadsOfALiar: an Alice who spends none of the pads that her blocks give is an alarm at
// Bob's end, until she does.
func TestPadsOfALiar(t *testing.T) {
	t.Parallel()
	l := newTestLink(t, handover.Bob)
	e := key.EpochAt(l.site.now(), time.Hour)
	if _, err := l.k.Store.EnsureEpoch(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	limit := store.ReserveLimit(handover.Bob, l.Profile.Pads)
	l.site.change("INSERT INTO block (link, session, id, epoch, atoms, owners, digest, provenance, state, held_at) VALUES ($1, 1, 1, $2, 1, '', $3, 'simulated', 'ready', now())",
		l.ID, int64(e), make([]byte, 32))
	l.site.change("INSERT INTO pad (link, session, block, index, kek, iv, ct) SELECT $1, 1, 1, n, 1, $2, '' FROM generate_series(1, $3::int) n", l.ID, make([]byte, 12), limit)
	for _, want := range []bool{true, false} {
		if l.account(t.Context()); l.k.stands("pads-"+l.ID) != want {
			t.Errorf("%d pads wait: alarms %v", l.now().Reserve.Pads, l.k.Alarms())
		}
		l.site.change("DELETE FROM pad WHERE index = (SELECT min(index) FROM pad)")
	}
}
