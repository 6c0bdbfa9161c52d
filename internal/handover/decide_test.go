package handover

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

func TestOnHeld(t *testing.T) {
	for _, tc := range []struct {
		mine         BlockState
		same, closed bool
		becomes      BlockState
		answer       HeldAnswer
	}{
		{Absent, false, false, Absent, NotYet},
		{Absent, false, true, Absent, Never},
		{BlockHeld, true, false, Ready, Equal},
		{BlockHeld, true, true, Ready, Equal}, // committed before its session was closed: it is held
		{BlockHeld, false, false, Lost, Different},
		{BlockHeld, false, true, Lost, Different},
		{Ready, true, false, Ready, Equal},
		{Ready, true, true, Ready, Equal},
		{Ready, false, false, Lost, Different},
		{Lost, true, false, Lost, Different}, // the keys are gone: equal digests do not bring them back
		{Lost, true, true, Lost, Different},
		{Lost, false, false, Lost, Different},
	} {
		if becomes, answer := OnHeld(tc.mine, tc.same, tc.closed); becomes != tc.becomes || answer != tc.answer {
			t.Errorf("OnHeld(%q, same %v, closed %v): %q, %q; want %q, %q", tc.mine, tc.same, tc.closed, becomes, answer, tc.becomes, tc.answer)
		}
	}
}

func TestOnHeldAnswer(t *testing.T) {
	want := map[BlockState]map[HeldAnswer]BlockState{
		Absent:    {Equal: Absent, Different: Absent, NotYet: Absent, Never: Absent},
		BlockHeld: {Equal: Ready, Different: Lost, NotYet: BlockHeld, Never: Lost},
		Ready:     {Equal: Ready, Different: Lost, NotYet: Ready, Never: Lost},
		Lost:      {Equal: Lost, Different: Lost, NotYet: Lost, Never: Lost},
	}
	for mine, answers := range want {
		for answer, becomes := range answers {
			if got := OnHeldAnswer(mine, answer); got != becomes {
				t.Errorf("OnHeldAnswer(%q, %q): %q, want %q", mine, answer, got, becomes)
			}
		}
	}
}

func TestJudge(t *testing.T) {
	p := PeerRun{Run: 5, Last: 7}
	for _, tc := range []struct {
		known      PeerRun
		run, batch int64
		want       Standing
	}{
		{p, 4, 8, Stale},
		{p, 4, 1, Stale},
		{p, 5, 8, Fresh},
		{p, 5, 7, Repeat},
		{p, 5, 1, Repeat},
		{p, 5, 9, Ahead},
		{p, 6, 1, Ahead}, // its run has not been told
		{p, 6, 8, Ahead},
		{PeerRun{}, 1, 1, Ahead},
		{PeerRun{Run: 1}, 1, 1, Fresh},
	} {
		if got := tc.known.Judge(tc.run, tc.batch); got != tc.want {
			t.Errorf("%+v: run %d, batch %d: %s, want %s", tc.known, tc.run, tc.batch, got, tc.want)
		}
	}
}

func TestHear(t *testing.T) {
	p := PeerRun{Run: 5, Last: 7}
	for _, tc := range []struct {
		run  int64
		want PeerRun
		ok   bool
	}{
		{4, p, false},
		{5, p, true}, // asked again: the same answer, and what was committed since stays
		{6, PeerRun{Run: 6}, true},
		{60, PeerRun{Run: 60}, true},
	} {
		if got, ok := p.Hear(tc.run); got != tc.want || ok != tc.ok {
			t.Errorf("run %d: %+v %v, want %+v %v", tc.run, got, ok, tc.want, tc.ok)
		}
	}
}

// atom is an ID for tables.
func atom(n byte) key.ID { return key.ID{0: 1, 6: 0x70, 8: 0x80, 15: n} }

func atoms(ns ...byte) []key.ID {
	var ids []key.ID
	for _, n := range ns {
		ids = append(ids, atom(n))
	}
	return ids
}

var alice, bob, carol = anSAE("alice"), anSAE("bob"), anSAE("carol")

// request is one of keys of the given atoms, each a list of its own.
func request(id string, keys ...[]key.ID) Request {
	r := Request{ID: id, Link: link, Master: alice, Slaves: []identity.SAE{bob}, Bits: 256 * len(keys[0]), TTL: 1000}
	for _, k := range keys {
		r.Keys = append(r.Keys, Key{Session: 1, Block: 1, First: int(k[0][15]), Atoms: k})
	}
	return r
}

func has(ids ...key.ID) func(key.ID) bool {
	return func(id key.ID) bool { return slices.Contains(ids, id) }
}

var words = cmp.Options{cmpopts.EquateEmpty(), cmpopts.IgnoreFields(Result{}, "Why")}

func TestDecideFresh(t *testing.T) {
	one, two := request("1", atoms(1)), request("2", atoms(2), atoms(3))
	large := request("L", atoms(4, 5))
	refuse := func(id string) func(Request) string {
		return func(r Request) string {
			if r.ID == id {
				return "policy"
			}
			return ""
		}
	}
	for _, tc := range []struct {
		name     string
		requests []Request
		admit    func(Request) string
		pool     []key.ID
		want     []Result
	}{
		{"all there", []Request{one, two, large}, refuse(""), atoms(1, 2, 3, 4, 5), []Result{{ID: "1", Accepted: true}, {ID: "2", Accepted: true}, {ID: "L", Accepted: true}}},
		{"one is not admitted", []Request{one, two}, refuse("1"), atoms(1, 2, 3), []Result{{ID: "1"}, {ID: "2", Accepted: true}}},
		{"a key is lacking", []Request{one, two}, refuse(""), atoms(1, 2), []Result{{ID: "1", Accepted: true}, {ID: "2", Lacking: atoms(3)}}},
		{"part of a large key is lacking", []Request{large}, refuse(""), atoms(4), []Result{{ID: "L", Lacking: atoms(5)}}},
		{"nothing is there", []Request{one, large}, refuse(""), nil, []Result{{ID: "1", Lacking: atoms(1)}, {ID: "L", Lacking: atoms(4, 5)}}},
		{"two requests, one key", []Request{one, request("1b", atoms(1))}, refuse(""), atoms(1), []Result{{ID: "1", Accepted: true}, {ID: "1b", Lacking: atoms(1)}}},
		{"two requests overlap in an atom", []Request{large, request("o", atoms(5, 6))}, refuse(""), atoms(4, 5, 6), []Result{{ID: "L", Accepted: true}, {ID: "o", Lacking: atoms(5)}}},
		{"the first of two is refused", []Request{request("x", atoms(1), atoms(9)), one}, refuse(""), atoms(1), []Result{{ID: "x", Lacking: atoms(9)}, {ID: "1", Accepted: true}}},
		{"one key twice in a request", []Request{request("d", atoms(1), atoms(1)), one}, refuse(""), atoms(1), []Result{{ID: "d"}, {ID: "1", Accepted: true}}},
		{"one atom twice in a key", []Request{request("d", atoms(1, 1))}, refuse(""), atoms(1), []Result{{ID: "d"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := DecideFresh(tc.requests, tc.admit, has(tc.pool...))
			if diff := cmp.Diff(tc.want, got, words); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			for _, r := range got {
				if r.Accepted == (r.Why != "") {
					t.Errorf("%+v: a refusal, and only a refusal, has a reason", r)
				}
			}
		})
	}
}

func TestDecideRepeat(t *testing.T) {
	a := Announce{Node: "a1", Run: 5, Batch: 7, Requests: []Request{request("1", atoms(1), atoms(2))}}
	row := func(n byte) DueRow {
		return DueRow{Key: atom(n), SAE: bob, Master: alice, Node: "a1", Run: 5, Batch: 7}
	}
	both := []DueRow{row(1), row(2)}
	edit := func(change func(*DueRow)) []DueRow {
		r := row(2)
		change(&r)
		return []DueRow{row(1), r}
	}
	multicast := a
	multicast.Requests = []Request{a.Requests[0]}
	multicast.Requests[0].Slaves = []identity.SAE{bob, carol}
	forCarol := func(n byte) DueRow {
		r := row(n)
		r.SAE = carol
		return r
	}
	twice := a
	twice.Requests = []Request{request("1", atoms(1), atoms(2)), request("1b", atoms(1))}

	yes, no := Result{ID: "1", Accepted: true}, Result{ID: "1"}
	for _, tc := range []struct {
		name string
		a    Announce
		rows []DueRow
		pool []key.ID
		want []Result
	}{
		{"assigned", a, both, nil, []Result{yes}},
		{"nothing assigned", a, nil, atoms(1, 2), []Result{no}},
		{"nothing assigned, and one atom gone since", a, nil, atoms(1), []Result{{ID: "1", Lacking: atoms(2)}}},
		{"one key of two", a, both[:1], atoms(2), []Result{{ID: "1", Lacking: atoms(1)}}},
		{"voided", a, edit(func(r *DueRow) { r.Voided = true }), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"by another node", a, edit(func(r *DueRow) { r.Node = "a2" }), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"by another run", a, edit(func(r *DueRow) { r.Run = 4 }), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"by another batch", a, edit(func(r *DueRow) { r.Batch = 6 }), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"for another master", a, edit(func(r *DueRow) { r.Master = carol }), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"to another slave", a, edit(func(r *DueRow) { r.SAE = carol }), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"to one slave more", a, append(both, forCarol(2)), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"to both slaves", multicast, append(both, forCarol(1), forCarol(2)), nil, []Result{yes}},
		{"to one slave of two", multicast, append(both, forCarol(1)), nil, []Result{{ID: "1", Lacking: atoms(1, 2)}}},
		{"two requests, one key", twice, both, nil, []Result{yes, {ID: "1b", Lacking: atoms(1)}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rows := func(id key.ID) []DueRow {
				return slices.DeleteFunc(slices.Clone(tc.rows), func(r DueRow) bool { return r.Key != id })
			}
			got := DecideRepeat(tc.a, rows, has(tc.pool...))
			if diff := cmp.Diff(tc.want, got, words); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestRepeatAnswersAsFresh: what a batch was answered when it was committed it is
// answered again, whatever it held, as long as its requests differ in their keys.
func TestRepeatAnswersAsFresh(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := Announce{Node: "a1", Run: 1, Batch: 1}
		pool := make(map[key.ID]bool)
		for i := range rapid.IntRange(1, 4).Draw(t, "requests") {
			n := byte(10 * i)
			keys := [][]key.ID{atoms(n, n+1), atoms(n+2, n+3)}[:rapid.IntRange(1, 2).Draw(t, "keys")]
			r := request(string(rune('a'+i)), keys...)
			if rapid.Bool().Draw(t, "multicast") {
				r.Slaves = []identity.SAE{bob, carol}
			}
			a.Requests = append(a.Requests, r)
			for id := range r.Atoms() {
				pool[id] = rapid.IntRange(0, 9).Draw(t, "pooled") > 0
			}
		}
		pooled := func(id key.ID) bool { return pool[id] }
		denied := rapid.StringMatching("[a-e]").Draw(t, "denied")
		fresh := DecideFresh(a.Requests, func(r Request) string {
			if r.ID == denied {
				return "policy"
			}
			return ""
		}, pooled)
		rows := make(map[key.ID][]DueRow)
		for i, res := range fresh {
			if !res.Accepted {
				continue
			}
			for _, k := range a.Requests[i].Keys {
				for _, s := range a.Requests[i].Slaves {
					rows[k.ID()] = append(rows[k.ID()], DueRow{Key: k.ID(), SAE: s, Master: alice, Node: "a1", Run: 1, Batch: 1})
				}
				for _, id := range k.Atoms {
					delete(pool, id)
				}
			}
		}
		again := DecideRepeat(a, func(id key.ID) []DueRow { return rows[id] }, pooled)
		for i := range fresh {
			if fresh[i].Accepted != again[i].Accepted {
				t.Errorf("request %s: first %+v, again %+v", fresh[i].ID, fresh[i], again[i])
			}
			for _, id := range fresh[i].Lacking {
				if !slices.Contains(again[i].Lacking, id) {
					t.Errorf("request %s: atom %s is not lacking any more", fresh[i].ID, id)
				}
			}
		}
	})
}

func TestVoids(t *testing.T) {
	v := Void{Node: "a1", Run: 5, Batch: 7, Keys: atoms(1, 2)}
	row := DueRow{Key: atom(2), Node: "a1", Run: 5, Batch: 7}
	if !v.Voids(row) {
		t.Error("its own key is not voided")
	}
	for name, change := range map[string]func(*DueRow){
		"key": func(r *DueRow) { r.Key = atom(3) }, "node": func(r *DueRow) { r.Node = "a2" },
		"run": func(r *DueRow) { r.Run = 6 }, "batch": func(r *DueRow) { r.Batch = 8 },
	} {
		other := row
		if change(&other); v.Voids(other) {
			t.Errorf("a row of another %s is voided", name)
		}
	}
}
