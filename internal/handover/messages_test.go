package handover

import (
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

func TestShare(t *testing.T) {
	for _, tc := range []struct {
		atoms, alice, bob int
		want              Owners
	}{
		{0, 0, 0, ""},
		{1, 0, 0, "a"},
		{64, 1, 0, "b"},
		{65, 0, 0, "ab"},
		{64 * 4, 0, 0, "abab"},
		{64 * 4, 1000, 0, "bbbb"},
		{64 * 4, 0, 1000, "aaaa"},
		{64 * 4, 128, 0, "bbab"},
	} {
		if got := Share(tc.atoms, tc.alice, tc.bob); got != tc.want {
			t.Errorf("Share(%d, %d, %d): %q, want %q", tc.atoms, tc.alice, tc.bob, got, tc.want)
		}
	}
}

// TestShareIsFair: every chunk has an owner, and the emptier end ends up as near
// to the other as whole chunks allow.
func TestShareIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 2000).Draw(t, "atoms")
		left := map[End]int{Alice: rapid.IntRange(0, 3000).Draw(t, "alice"), Bob: rapid.IntRange(0, 3000).Draw(t, "bob")}
		before := int(math.Abs(float64(left[Alice] - left[Bob])))
		o := Share(n, left[Alice], left[Bob])
		if !o.Valid(n) {
			t.Fatalf("%q does not fit %d atoms", o, n)
		}
		for i := range n {
			left[o.Of(i)]++
		}
		if after := int(math.Abs(float64(left[Alice] - left[Bob]))); after > max(before, key.ChunkAtoms) {
			t.Errorf("%d atoms apart before, %d after", before, after)
		}
	})
}

func TestOwnersValid(t *testing.T) {
	for _, tc := range []struct {
		o     Owners
		atoms int
		want  bool
	}{{"a", 1, true}, {"b", 64, true}, {"b", 65, false}, {"ba", 65, true}, {"bc", 65, false}, {"", 0, true}, {"a", 0, false}} {
		if got := tc.o.Valid(tc.atoms); got != tc.want {
			t.Errorf("%q for %d atoms: %v", tc.o, tc.atoms, got)
		}
	}
	if o := Owners("ab"); o.Of(0) != Alice || o.Of(63) != Alice || o.Of(64) != Bob || Alice.Other() != Bob || Bob.Other() != Alice {
		t.Error("owners by index are wrong")
	}
}

func TestDigest(t *testing.T) {
	d := DigestOf(atoms(1, 2), "a")
	for name, other := range map[string]Digest{
		"order": DigestOf(atoms(2, 1), "a"), "owner": DigestOf(atoms(1, 2), "b"), "fewer": DigestOf(atoms(1), "a"),
	} {
		if d == other {
			t.Errorf("the digest does not depend on %s", name)
		}
	}
	text, err := json.Marshal(d)
	if err != nil || len(text) != 66 || string(text) != strings.ToLower(string(text)) {
		t.Fatalf("%s, %v", text, err)
	}
	var again Digest
	if err := json.Unmarshal(text, &again); err != nil || again != d {
		t.Errorf("%v, %v", again, err)
	}
	for _, bad := range []string{`""`, `"00"`, `"` + strings.Repeat("g", 64) + `"`} {
		if err := json.Unmarshal([]byte(bad), &again); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
}

func TestAnnounceCheck(t *testing.T) {
	good := func() Announce {
		return Announce{Node: "a1", Run: 1, Batch: 1, Requests: []Request{request("1", atoms(1)), request("2", atoms(2, 3))}}
	}
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Announce){
		"no node":             func(a *Announce) { a.Node = "" },
		"node of spaces":      func(a *Announce) { a.Node = " " },
		"long node":           func(a *Announce) { a.Node = strings.Repeat("n", MaxNameBytes+1) },
		"run 0":               func(a *Announce) { a.Run = 0 },
		"batch 0":             func(a *Announce) { a.Batch = 0 },
		"no requests":         func(a *Announce) { a.Requests = nil },
		"too many requests":   func(a *Announce) { a.Requests = make([]Request, MaxRequests+1) },
		"no request ID":       func(a *Announce) { a.Requests[0].ID = "" },
		"long request ID":     func(a *Announce) { a.Requests[0].ID = strings.Repeat("r", MaxRequestID+1) },
		"request ID twice":    func(a *Announce) { a.Requests[1].ID = "1" },
		"no link":             func(a *Announce) { a.Requests[0].Link = "" },
		"no master":           func(a *Announce) { a.Requests[0].Master = identity.SAE{} },
		"no slaves":           func(a *Announce) { a.Requests[0].Slaves = nil },
		"slave nobody":        func(a *Announce) { a.Requests[0].Slaves = []identity.SAE{{}} },
		"slave twice":         func(a *Announce) { a.Requests[0].Slaves = []identity.SAE{bob, bob} },
		"too many slaves":     func(a *Announce) { a.Requests[0].Slaves = make([]identity.SAE, MaxSlaves+1) },
		"no bits":             func(a *Announce) { a.Requests[0].Bits = 0 },
		"odd bits":            func(a *Announce) { a.Requests[0].Bits = 255 },
		"too many bits":       func(a *Announce) { a.Requests[0].Bits = MaxBits + 8 },
		"no lifetime":         func(a *Announce) { a.Requests[0].TTL = 0 },
		"endless lifetime":    func(a *Announce) { a.Requests[0].TTL = math.MaxInt64 },
		"no keys":             func(a *Announce) { a.Requests[0].Keys = nil },
		"no atoms":            func(a *Announce) { a.Requests[0].Keys[0].Atoms = nil },
		"too few atoms":       func(a *Announce) { a.Requests[1].Keys[0].Atoms = atoms(2) },
		"too many atoms":      func(a *Announce) { a.Requests[0].Keys[0].Atoms = atoms(1, 2) },
		"session 0":           func(a *Announce) { a.Requests[0].Keys[0].Session = 0 },
		"negative block":      func(a *Announce) { a.Requests[0].Keys[0].Block = -1 },
		"negative first":      func(a *Announce) { a.Requests[0].Keys[0].First = -1 },
		"first beyond blocks": func(a *Announce) { a.Requests[0].Keys[0].First = MaxBlockAtoms },
		"across chunks":       func(a *Announce) { a.Requests[1].Keys[0].First = 63 },
		"too many atoms in all": func(a *Announce) {
			a.Requests[0].Keys = slices.Repeat(a.Requests[0].Keys, MaxAtoms)
		},
	} {
		a := good()
		spoil(&a)
		if a.Check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestOthersCheck: the other messages; the vectors of package peer have more.
func TestOthersCheck(t *testing.T) {
	kme, err := identity.ParseKME("km1")
	if err != nil {
		t.Fatal(err)
	}
	type checked interface{ Check() error }
	for name, tc := range map[string]struct {
		m  checked
		ok bool
	}{
		"hello":                  {Hello{KME: kme, Node: "a1", Run: 1, Links: []HelloLink{{Link: "l1"}}}, true},
		"hello of nobody":        {Hello{Node: "a1", Run: 1}, false},
		"hello, bad link":        {Hello{KME: kme, Node: "a1", Run: 1, Links: []HelloLink{{}}}, false},
		"hello, link twice":      {Hello{KME: kme, Node: "a1", Run: 1, Links: []HelloLink{{Link: "l1"}, {Link: "l1"}}}, false},
		"hello, too many links":  {Hello{KME: kme, Node: "a1", Run: 1, Links: make([]HelloLink, MaxLinks+1)}, false},
		"hello, negative pool":   {Hello{KME: kme, Node: "a1", Run: 1, Links: []HelloLink{{Link: "l1", Pool: -1}}}, false},
		"held":                   {Held{BlockRef: BlockRef{"l1", 1, 0}, Atoms: 1, Owners: "a"}, true},
		"held, too large":        {Held{BlockRef: BlockRef{"l1", 1, 0}, Atoms: MaxBlockAtoms + 1, Owners: Share(MaxBlockAtoms+1, 0, 0)}, false},
		"void":                   {Void{Node: "a1", Run: 1, Batch: 1, Keys: atoms(1)}, true},
		"void of too much":       {Void{Node: "a1", Run: 1, Batch: 1, Keys: make([]key.ID, MaxAtoms+1)}, false},
		"void of batch 0":        {Void{Node: "a1", Run: 1, Keys: atoms(1)}, false},
		"run":                    {RunStarted{Node: "a1", Run: 1}, true},
		"run 0":                  {RunStarted{Node: "a1"}, false},
		"the last run":           {RunStarted{Node: "a1", Run: MaxNumber}, true},
		"a run beyond it":        {RunStarted{Node: "a1", Run: MaxNumber + 1}, false},
		"a run without a next":   {RunStarted{Node: "a1", Run: math.MaxInt64}, false},
		"hello, no next run":     {Hello{KME: kme, Node: "a1", Run: 1, Yours: Figures{Origin: 1, Nodes: []NodeFigures{{Node: "a1", Run: math.MaxInt64}}}}, false},
		"hello, no next session": {Hello{KME: kme, Node: "a1", Run: 1, Links: []HelloLink{{Link: "l1", Session: math.MaxInt64}}}, false},
		"held, no next session":  {Held{BlockRef: BlockRef{"l1", math.MaxInt64, 0}, Atoms: 1, Owners: "a"}, false},
		"burned, a session":      {BurnedAnswer{[]LinkSession{{"l1", MaxNumber}}}, true},
		"burned, no next one":    {BurnedAnswer{[]LinkSession{{"l1", math.MaxInt64}}}, false},
		"assigned":               {Assigned{1, 1, atom(1), atoms(1, 2)}, true},
		"assigned, other first":  {Assigned{1, 1, atom(2), atoms(1, 2)}, false},
		"answer":                 {AnnounceAnswer{Standing: Fresh, Results: []Result{{ID: "1"}}}, true},
		"answer, too many":       {AnnounceAnswer{Standing: Fresh, Results: make([]Result, MaxRequests+1)}, false},
		"answer, too much lacks": {AnnounceAnswer{Standing: Fresh, Results: []Result{{Lacking: make([]key.ID, MaxAtoms+1)}}}, false},
		"answer to held":         {Equal, true},
		"no answer to held":      {HeldAnswer(""), false},
	} {
		if err := tc.m.Check(); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
