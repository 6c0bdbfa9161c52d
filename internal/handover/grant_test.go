package handover

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/key"
)

func TestOnGrant(t *testing.T) {
	for _, tc := range []struct {
		is     Chunk
		grants int
		want   Chunk
	}{
		{Chunk{false, 0}, 1, Chunk{true, 1}},
		{Chunk{false, 2}, 3, Chunk{true, 3}},
		{Chunk{false, 2}, 5, Chunk{true, 5}},
		{Chunk{true, 1}, 1, Chunk{true, 1}},   // heard before
		{Chunk{false, 2}, 1, Chunk{false, 2}}, // and given back since
		{Chunk{false, 2}, 2, Chunk{false, 2}}, // one's own, thrown back
		{Chunk{true, 1}, 3, Chunk{true, 3}},   // no honest end says so
	} {
		if got := tc.is.OnGrant(tc.grants); got != tc.want {
			t.Errorf("%+v hears grant %d: %+v, want %+v", tc.is, tc.grants, got, tc.want)
		}
	}
}

func TestMayGive(t *testing.T) {
	mine := Chunk{Mine: true, Grants: 4}
	for name, tc := range map[string]struct {
		c      Chunk
		block  BlockState
		leased bool
		left   int
		want   bool
	}{
		"free":         {mine, Ready, false, 1, true},
		"the other's":  {Chunk{Grants: 4}, Ready, false, 1, false},
		"held":         {mine, BlockHeld, false, 1, false},
		"lost":         {mine, Lost, false, 0, false},
		"leased":       {mine, Ready, true, 1, false},
		"empty":        {mine, Ready, false, 0, false},
		"counted full": {Chunk{true, MaxGrants}, Ready, false, 1, false},
	} {
		if got := tc.c.MayGive(tc.block, tc.leased, tc.left); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	if got := mine.Give(); got != (Chunk{false, 5}) {
		t.Errorf("given: %+v", got)
	}
}

// TestSurplus: nobody gives more than makes the ends equal, so that what was given
// does not come back by itself; and an end without anything gets something as long
// as the other has two chunks.
func TestSurplus(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		here, there := rapid.IntRange(0, 20_000).Draw(t, "here"), rapid.IntRange(0, 20_000).Draw(t, "there")
		n := Surplus(here, there)
		if n < 0 || n > 0 && 2*there > here {
			t.Fatalf("%d chunks", n)
		}
		given := n * key.ChunkAtoms
		if n > 0 && here-given < there+given {
			t.Errorf("%d chunks make the giver the poorer", n)
		}
		if back := Surplus(there+given, here-given); n > 0 && back > 0 {
			t.Errorf("of %d chunks, %d come back", n, back)
		}
		if there == 0 && here >= 2*key.ChunkAtoms && n == 0 {
			t.Errorf("an empty end gets nothing of %d atoms", here)
		}
	})
}

func aGrant(grants int, firsts ...int) Grant {
	var g Grant
	for _, first := range firsts {
		g.Chunks = append(g.Chunks, Granted{ChunkRef{BlockRef{"l1", 1, 0}, first}, grants})
	}
	return g
}

func TestAcked(t *testing.T) {
	told := aGrant(3, 0, 64, 128)
	answer := GrantAnswer{append(aGrant(3, 64).Chunks, append(aGrant(1, 0).Chunks, aGrant(3, 192).Chunks...)...)}
	if diff := cmp.Diff(aGrant(3, 64).Chunks, told.Acked(answer)); diff != "" {
		t.Errorf("acknowledged by an answer of another counter and another chunk (-want +got):\n%s", diff)
	}
}

func TestGrantCheck(t *testing.T) {
	twice := Grant{append(aGrant(1, 0).Chunks, aGrant(3, 0).Chunks...)} // an answer was lost, and the chunk has come back and gone again
	for name, tc := range map[string]struct {
		g  Grant
		ok bool
	}{
		"one":            {aGrant(1, 0), true},
		"two":            {aGrant(MaxGrants, 64, 128), true},
		"two of a chunk": {twice, true},
		"none":           {Grant{}, false},
		"no counter":     {aGrant(0, 0), false},
		"counter":        {aGrant(MaxGrants+1, 0), false},
		"no chunk":       {aGrant(1, 63), false},
		"negative":       {aGrant(1, -64), false},
		"beyond a block": {aGrant(1, MaxBlockAtoms), false},
		"twice":          {aGrant(1, 0, 0), false},
		"no session":     {Grant{[]Granted{{ChunkRef{BlockRef{"l1", 0, 0}, 0}, 1}}}, false},
		"too many":       {Grant{slices.Repeat(aGrant(1, 0).Chunks, MaxGranted+1)}, false},
	} {
		if err := tc.g.Check(); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err := GrantAnswer(tc.g).Check(); (err == nil) != (tc.ok || len(tc.g.Chunks) == 0) {
			t.Errorf("%s, as an answer: %v", name, err)
		}
	}
}
