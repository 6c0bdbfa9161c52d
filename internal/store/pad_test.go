package store

import (
	"context"
	"errors"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
)

// padded is a block with pads.
func (s *site) padded(session int64, pads int) Block {
	b := s.block(session, 1, mine)
	for i := range pads {
		b.Pads = append(b.Pads, Pad{PadName: PadName{session, b.Block, i}, KEK: 1, CT: make([]byte, 64)})
	}
	return b
}

// The reserve gives out its lowest pad, of a block that both ends hold, and none that is
// spent: whatever is asked for, in whatever session.
func TestReserve(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	if _, err := db.NextPad(ctx, linkName, PadName{}); !errors.Is(err, ErrNoPad) {
		t.Errorf("of an empty reserve: %v", err)
	}
	open := func(session int64) {
		t.Helper()
		if err := db.OpenSession(ctx, linkName, session, audit.Event{Action: audit.LinkOpen}); err != nil {
			t.Fatal(err)
		}
	}
	open(1)
	first, second := s.padded(1, 2), s.padded(1, 2)
	for _, b := range []Block{first, second} {
		if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := db.NextPad(ctx, linkName, PadName{}); !errors.Is(err, ErrNoPad) {
		t.Errorf("of blocks that the peer may not have: %v", err)
	}
	if p, err := db.Pad(ctx, linkName, first.Pads[1].PadName); err != nil || p.PadName != first.Pads[1].PadName {
		t.Errorf("by name, of a block held: %v, %v", p.PadName, err)
	}
	for _, b := range []Block{first, second} {
		if err := db.HeardHeldAnswer(ctx, b.BlockRef, handover.Equal, blockEvents(b.BlockRef)); err != nil {
			t.Fatal(err)
		}
	}
	want := []PadName{first.Pads[0].PadName, first.Pads[1].PadName, second.Pads[0].PadName, second.Pads[1].PadName}
	p, err := db.NextPad(ctx, linkName, PadName{})
	if err != nil || p.PadName != want[0] {
		t.Fatalf("the next pad: %v, %v; want %v", p.PadName, err, want[0])
	}
	if err := db.SpendPad(ctx, linkName, 2, want[0]); !errors.Is(err, ErrClosedSession) {
		t.Errorf("spending in another session: %v", err)
	}
	if err := db.SpendPad(ctx, linkName, 1, want[1]); err != nil {
		t.Fatal(err)
	}
	for _, spent := range want[:2] {
		if err := db.SpendPad(ctx, linkName, 1, spent); !errors.Is(err, ErrSpent) {
			t.Errorf("spending %v again: %v", spent, err)
		}
		if _, err := db.Pad(ctx, linkName, spent); !errors.Is(err, ErrNoPad) {
			t.Errorf("%v, which is spent: %v", spent, err)
		}
	}
	r, err := db.Reserve(ctx, linkName)
	if diff := cmp.Diff(Reserve{Pads: 2, Lowest: want[2], Spent: want[1]}, r); err != nil || diff != "" {
		t.Errorf("the reserve: %v %s", err, diff)
	}

	// A restart forgets nothing, and a later session goes on with what is left.
	db = s.open("n1")
	open(2)
	if err := db.SpendPad(ctx, linkName, 2, want[0]); !errors.Is(err, ErrSpent) {
		t.Errorf("spending again after a restart: %v", err)
	}
	if p, err := db.NextPad(ctx, linkName, PadName{}); err != nil || p.PadName != want[2] {
		t.Errorf("the next pad after a restart: %v, %v", p.PadName, err)
	}
	// A block that is lost takes its pads with it.
	lost := s.padded(2, 2)
	if err := db.HoldBlock(ctx, lost, holdEvent(lost)); err != nil {
		t.Fatal(err)
	}
	if err := db.HeardHeldAnswer(ctx, lost.BlockRef, handover.Never, blockEvents(lost.BlockRef)); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Pad(ctx, linkName, lost.Pads[0].PadName); !errors.Is(err, ErrNoPad) {
		t.Errorf("of a block that was lost: %v", err)
	}
	s.check()
}

// Alice's end keeps so many pads, without those of blocks that were lost; Bob's keeps more.
func TestReserveHasALimit(t *testing.T) {
	t.Parallel()
	for end, want := range map[handover.End]int{handover.Alice: maxReserve, handover.Bob: maxReserve + maxReserve/2} {
		s := newSite(t)
		db := s.open("n1")
		ctx := t.Context()
		if err := db.OpenSession(ctx, linkName, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			b := s.padded(1, maxReserve/2)
			b.Mine = end
			if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				if err := db.HeardHeldAnswer(ctx, b.BlockRef, handover.Never, blockEvents(b.BlockRef)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if r, err := db.Reserve(ctx, linkName); err != nil || r.Pads != want {
			t.Errorf("%s has %d pads, %v; want %d", end, r.Pads, err, want)
		}
	}
}

// Bob's end has every pad that an honest Alice names, who spends the lowest that she has kept,
// also when her reserve is full; of one who spends none it keeps no more than its limit.
func TestReserveOfBobs(t *testing.T) {
	t.Parallel()
	const each = 2
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	ends := map[handover.End]string{handover.Alice: linkName, handover.Bob: otherLink}
	s.openOther(db)
	for _, link := range ends {
		if err := db.OpenSession(ctx, link, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := db.EnsureEpoch(ctx, s.epoch()); err != nil {
		t.Fatal(err)
	}
	block := int64(0)
	give := func(blocks int, alice int) { // of which only the pads matter, and of them Alice's as many of each
		t.Helper()
		err := db.do(ctx, solo(func(_ context.Context, a *attempt) error {
			for range blocks {
				block++
				for end, link := range ends {
					b := Block{BlockRef: handover.BlockRef{Link: link, Session: 1, Block: block}, Mine: end}
					for i := range map[handover.End]int{handover.Alice: alice, handover.Bob: each}[end] {
						b.Pads = append(b.Pads, Pad{PadName: PadName{1, block, i}, KEK: 1, CT: make([]byte, 64)})
					}
					a.writes.Queue("INSERT INTO block (link, session, id, epoch, atoms, owners, digest, provenance, state, held_at) VALUES ($1, 1, $2, $3, 1, '', $4, 'simulated', 'ready', $5)",
						link, block, s.epoch(), make([]byte, 32), s.now())
					b.keep(a)
				}
			}
			return nil
		}), nil)
		if err != nil {
			t.Fatal(err)
		}
	}
	bobs := func() int {
		t.Helper()
		r, err := db.Reserve(ctx, otherLink)
		if err != nil {
			t.Fatal(err)
		}
		return r.Pads
	}
	give(maxReserve, 1) // as she has kept them if hers has been full for long
	for range 8 {
		give(1, each)
		named, err := db.NextPad(ctx, linkName, PadName{})
		if err == nil {
			_, err = db.Pad(ctx, otherLink, named.PadName)
		}
		for _, link := range ends {
			if err == nil {
				err = db.SpendPad(ctx, link, 1, named.PadName)
			}
		}
		if err != nil {
			t.Fatalf("pad %v, of %d that Bob has: %v", named.PadName, bobs(), err)
		}
	}
	if n := bobs(); n < maxReserve*each-each || n >= ReserveLimit(handover.Bob, each) {
		t.Errorf("Bob has %d pads of an honest Alice", n)
	}
	give(maxReserve, each)
	if n := bobs(); n != ReserveLimit(handover.Bob, each) {
		t.Errorf("Bob has %d pads of an Alice who spends none, want %d", n, ReserveLimit(handover.Bob, each))
	}
}

// What was sealed under a KEK that is destroyed is not in the reserve.
func TestReserveOfDestroyedKEKs(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	if err := db.OpenSession(ctx, linkName, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
		t.Fatal(err)
	}
	b := s.padded(1, 4)
	for i := range 2 {
		id, err := db.PlanKEK(ctx, s.epoch(), "kek "+string(rune('a'+i)))
		if err != nil {
			t.Fatal(err)
		}
		b.Pads[2*i].KEK, b.Pads[2*i+1].KEK = id, id
	}
	if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
		t.Fatal(err)
	}
	if err := db.HeardHeldAnswer(ctx, b.BlockRef, handover.Equal, blockEvents(b.BlockRef)); err != nil {
		t.Fatal(err)
	}
	if given, err := db.AbandonKEK(ctx, b.Pads[0].KEK); err != nil || !given {
		t.Fatal(given, err)
	}
	r, err := db.Reserve(ctx, linkName)
	if diff := cmp.Diff(Reserve{Pads: 2, Lowest: b.Pads[2].PadName}, r); err != nil || diff != "" {
		t.Errorf("the reserve: %v %s", err, diff)
	}
	if p, err := db.NextPad(ctx, linkName, PadName{}); err != nil || p.PadName != b.Pads[2].PadName {
		t.Errorf("the next pad: %v, %v", p.PadName, err)
	}
	if _, err := db.Pad(ctx, linkName, b.Pads[1].PadName); !errors.Is(err, ErrNoPad) {
		t.Errorf("by name: %v", err)
	}
}

// Whoever may know the keys of a block may know its pads: they are given up with the keys,
// where that was decided and where it is heard, and so are those below them. Those of later
// blocks stay.
func TestCompromisedPads(t *testing.T) {
	t.Parallel()
	for _, heard := range []bool{false, true} {
		s := newSite(t)
		db := s.open("n1")
		ctx := t.Context()
		if err := db.OpenSession(ctx, linkName, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
			t.Fatal(err)
		}
		var blocks []Block
		for i := range 3 {
			b := s.padded(1, 2)
			if i == 2 && !heard { // of another epoch
				if _, err := db.EnsureEpoch(ctx, s.epoch()+1); err != nil {
					t.Fatal(err)
				}
				pads := b.Pads
				b = s.blockOf(s.epoch()+1, 1, 1, mine)
				for _, p := range pads {
					p.Block = b.Block
					b.Pads = append(b.Pads, p)
				}
			}
			if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
				t.Fatal(err)
			}
			blocks = append(blocks, b)
		}
		event := audit.Event{Action: audit.Compromise, Outcome: audit.Done, Reason: "keys of today"}
		var err error
		if heard {
			m := handover.Compromise{Act: 1, Link: linkName, First: int64(s.epoch()), Last: int64(s.epoch()), Session: 1, Block: blocks[1].Block}
			for range 2 {
				_, err = db.HearCompromise(ctx, kme("KM2"), m, event)
			}
		} else {
			_, err = db.BeginCompromise(ctx, Compromise{First: s.epoch(), Last: s.epoch(), Why: "a test"}, nil, event)
		}
		if err != nil {
			t.Fatal(err)
		}
		r, err := db.Reserve(ctx, linkName)
		if diff := cmp.Diff(Reserve{Pads: 2, Lowest: blocks[2].Pads[0].PadName, Spent: blocks[1].Pads[1].PadName}, r); err != nil || diff != "" {
			t.Errorf("the reserve: %v %s", err, diff)
		}
		if err := db.SpendPad(ctx, linkName, 1, blocks[0].Pads[0].PadName); !errors.Is(err, ErrSpent) {
			t.Errorf("a block under way still spends one of them: %v", err)
		}
		if got := ask[string](s, "SELECT string_agg(body::json->>'reason', ' | ') FROM audit WHERE body::json->>'action' = 'compromise'"); got != "keys of today; 4 pads given up" {
			t.Errorf("recorded: %q", got)
		}
	}
}

// Wrong tags are counted, through restarts, until a block comes or an officer says so.
func TestTagFailures(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	failures := func(want int) {
		t.Helper()
		if r, err := db.Reserve(ctx, linkName); err != nil || r.Failures != want {
			t.Errorf("%d wrong tags, %v; want %d", r.Failures, err, want)
		}
	}
	failures(0)
	for range 2 {
		if err := db.TagFailed(ctx, linkName); err != nil {
			t.Fatal(err)
		}
	}
	db = s.open("n1")
	failures(2)
	s.fill(db, 1, mine)
	failures(0)
	if err := db.TagFailed(ctx, linkName); err != nil {
		t.Fatal(err)
	}
	if err := db.TrustAgain(ctx, linkName, nil, audit.Event{Action: audit.TrustLink, Outcome: audit.Done}); err != nil {
		t.Fatal(err)
	}
	failures(0)
}

// The figures of a block are kept once, and its epsilon counted once, in its year.
func TestDistilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	at := s.now().Truncate(time.Millisecond)
	good := Distilled{
		Session: 1, Block: 1, At: at, Took: 1500 * time.Millisecond, Gates: 7e7, Detected: 1e6, Doubles: 4000, SiftedKey: 530_000, SiftedTest: 73_000,
		Key: []int{188_000, 334_000, 1100}, Test: []int{25_000, 45_000, 150}, TestErrors: []int{300, 700, 70}, KeyErrors: []int{2000, 5000, 500},
		Rated: true, TestQBER: .0148, KeyQBER: .0149, Leak: 60_000, Efficiency: 1.031, Rounds: 300, SecretBits: 118_016, EpsSecrecy: 1e-14, EpsCorrect: 1e-33,
	}
	bad := Distilled{
		Session: 1, Block: 2, At: at.Add(time.Second), Aborted: "counts too low", // and so no error rate
		Gates: 7e7, Key: []int{}, Test: []int{}, TestErrors: []int{}, KeyErrors: []int{},
		EpsSecrecy: 1, // of a block that was given up: not counted
	}
	for _, d := range []Distilled{good, bad, good, bad} {
		if err := db.NoteDistilled(ctx, linkName, d); err != nil {
			t.Fatal(err)
		}
	}
	list, err := db.LastDistilled(ctx, linkName, 10)
	if err != nil {
		t.Fatal(err)
	}
	want := []Distilled{bad, good}
	for i := range want {
		want[i].EpsSecrecy, want[i].EpsCorrect = 0, 0
	}
	if diff := cmp.Diff(want, list); diff != "" {
		t.Errorf("figures (-want +got):\n%s", diff)
	}
	if !slices.IsSortedFunc(list, func(a, b Distilled) int { return b.At.Compare(a.At) }) {
		t.Error("not the newest first")
	}
	secrecy, correct, err := db.Epsilon(ctx, linkName, at)
	if err != nil || math.Abs(secrecy-1e-14) > 1e-28 || math.Abs(correct-1e-33) > 1e-47 {
		t.Errorf("the year's epsilon: %v and %v, %v", secrecy, correct, err)
	}
	if secrecy, _, err := db.Epsilon(ctx, linkName, at.AddDate(1, 0, 0)); err != nil || secrecy != 0 {
		t.Errorf("next year's: %v, %v", secrecy, err)
	}
}
