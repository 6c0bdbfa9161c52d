package handover

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

var settlements = cmp.Options{
	cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(Settlement{}),
	cmp.Comparer(func(a, b identity.SAE) bool { return a == b }),
}

func TestSenderNumbers(t *testing.T) {
	s := NewSender("a1", 5, 2)
	for want := int64(1); want <= 2; want++ {
		if !s.Free() {
			t.Fatalf("no place for batch %d", want)
		}
		if a := s.Next([]Request{request("r", atoms(1))}); a.Batch != want || a.Node != "a1" || a.Run != 5 {
			t.Errorf("batch %d is %+v", want, a)
		}
	}
	if s.Free() {
		t.Error("there is place for a third batch in a window of two")
	}
	if _, err := s.Answered(1, AnnounceAnswer{Standing: Fresh, Results: []Result{{ID: "r", Accepted: true}}}); err != nil {
		t.Error(err)
	}
	if !s.Free() {
		t.Error("an answered batch keeps its place")
	}
	if a := s.Next(nil); a.Batch != 3 {
		t.Errorf("batch 3 is %d", a.Batch)
	}
}

func TestUnsent(t *testing.T) {
	s := NewSender("a1", 5, 9)
	s.Next(nil)
	s.Next(nil)
	s.Next(nil)
	if s.Unsent(2) {
		t.Error("batch 2 was taken back from under batch 3")
	}
	if !s.Unsent(3) || s.Unsent(3) {
		t.Error("the newest batch is taken back once")
	}
	if a := s.Next(nil); a.Batch != 3 {
		t.Errorf("the number of a batch taken back is not used again: %d", a.Batch)
	}
	s.Doubt(3)
	if s.Unsent(3) {
		t.Error("a batch in doubt was taken back")
	}
	if s.Unsent(4) || s.Unsent(0) {
		t.Error("a batch that never was is taken back")
	}
}

func TestRepeats(t *testing.T) {
	s := NewSender("a1", 5, 9)
	var want []Announce
	for i := range byte(3) {
		a := s.Next([]Request{request("r", atoms(i))})
		if i != 1 {
			want = append(want, a)
		}
	}
	s.Doubt(3)
	s.Doubt(1)
	s.Doubt(99)
	if diff := cmp.Diff(want, s.Repeats(), settlements); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := s.Answered(1, AnnounceAnswer{Standing: Repeat, Results: []Result{{ID: "r"}}}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want[1:], s.Repeats(), settlements); diff != "" {
		t.Errorf("after an answer (-want +got):\n%s", diff)
	}
}

func TestAnswered(t *testing.T) {
	large := request("L", atoms(1, 2), atoms(3, 4))
	for _, tc := range []struct {
		name   string
		doubt  bool
		result Result
		want   Settlement
	}{
		{"assigned", false, Result{ID: "L", Accepted: true}, Settlement{Verb: Commit}},
		{"assigned, too late", true, Result{ID: "L", Accepted: true}, Settlement{Verb: Reclaim, Parked: true}},
		{"refused", false, Result{ID: "L", Why: "policy"}, Settlement{Verb: Return, Why: "policy"}},
		{"refused, too late", true, Result{ID: "L", Why: "policy"}, Settlement{Verb: Return, Why: "policy", Parked: true}},
		{"lacking", false, Result{ID: "L", Why: "pool", Lacking: atoms(2, 3)}, Settlement{Verb: Return, Why: "pool", Burn: atoms(2, 3)}},
		{"lacking what was not asked", false, Result{ID: "L", Lacking: atoms(9, 2, 8)}, Settlement{Verb: Return, Burn: atoms(2)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := NewSender("a1", 5, 1)
			s.Next([]Request{large})
			if tc.doubt {
				s.Doubt(1)
			}
			got, err := s.Answered(1, AnnounceAnswer{Standing: Fresh, Results: []Result{tc.result}})
			if err != nil {
				t.Fatal(err)
			}
			tc.want.Request, tc.want.Batch = large, 1
			if diff := cmp.Diff([]Settlement{tc.want}, got, settlements); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			want := Void{Node: "a1", Run: 5, Batch: 1, Keys: atoms(1, 3)}
			if diff := cmp.Diff(want, got[0].Void()); diff != "" {
				t.Errorf("its void (-want +got):\n%s", diff)
			}
			if got, err := s.Answered(1, AnnounceAnswer{Standing: Fresh, Results: []Result{tc.result}}); got != nil || err != nil {
				t.Errorf("answered again: %v, %v", got, err)
			}
		})
	}
}

func TestAnswersThatDoNotFit(t *testing.T) {
	good := []Result{{ID: "1", Accepted: true}, {ID: "2", Accepted: true}}
	for _, tc := range []struct {
		name   string
		answer AnnounceAnswer
		is     error
	}{
		{"ahead", AnnounceAnswer{Standing: Ahead}, ErrAhead},
		{"stale", AnnounceAnswer{Standing: Stale}, ErrStale},
		{"declined", AnnounceAnswer{Standing: Declined}, ErrDeclined},
		{"unknown standing", AnnounceAnswer{Standing: "sure", Results: good}, nil},
		{"too few", AnnounceAnswer{Standing: Fresh, Results: good[:1]}, nil},
		{"too many", AnnounceAnswer{Standing: Repeat, Results: append(good[:2:2], Result{ID: "3"})}, nil},
		{"in another order", AnnounceAnswer{Standing: Fresh, Results: []Result{good[1], good[0]}}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := NewSender("a1", 5, 1)
			s.Next([]Request{request("1", atoms(1)), request("2", atoms(2))})
			got, err := s.Answered(1, tc.answer)
			if got != nil || err == nil || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("got %v, %v", got, err)
			}
			if s.Free() {
				t.Error("the batch is not in flight any more")
			}
			if _, err := s.Answered(1, AnnounceAnswer{Standing: Fresh, Results: good}); err != nil || !s.Free() {
				t.Errorf("a good answer afterwards: %v", err)
			}
		})
	}
}

func TestOrphans(t *testing.T) {
	started := RunStarted{Node: "a1", Run: 5}
	assigned := []Assigned{
		{Run: 4, Batch: 2, Key: atom(1), Atoms: atoms(1)},
		{Run: 3, Batch: 9, Key: atom(2), Atoms: atoms(2, 3)}, // a large key: all of it
		{Run: 4, Batch: 1, Key: atom(4), Atoms: atoms(4)},    // served: nothing of it is here
		{Run: 4, Batch: 2, Key: atom(5), Atoms: atoms(5, 6)}, // part of it has expired here
		{Run: 5, Batch: 1, Key: atom(7), Atoms: atoms(7)},    // not of a lower run
		{Run: 4, Batch: 3, Key: atom(8)},                     // no atoms
		{Run: 3, Batch: 9, Key: atom(10), Atoms: atoms(10)},  // the same batch again
	}
	got := Orphans(started, assigned, has(atoms(1, 2, 3, 6, 7, 8, 10)...))
	want := []Orphan{
		{Void{Node: "a1", Run: 3, Batch: 9, Keys: atoms(2, 10)}, atoms(2, 3, 10)},
		{Void{Node: "a1", Run: 4, Batch: 2, Keys: atoms(1, 5)}, atoms(1, 6)},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := Orphans(started, assigned, func(key.ID) bool { return false }); len(got) != 0 {
		t.Errorf("with an empty pool: %v", got)
	}
}

// TestFullIsPassedOn: a refusal that is no disagreement comes out as one, and its
// atoms go back.
func TestFullIsPassedOn(t *testing.T) {
	s := NewSender("a1", 5, 1)
	s.Next([]Request{request("r", atoms(1))})
	got, err := s.Answered(1, AnnounceAnswer{Standing: Fresh, Results: []Result{{ID: "r", Why: "too many", Full: true}}})
	if err != nil || len(got) != 1 || got[0].Verb != Return || !got[0].Full || len(got[0].Burn) != 0 {
		t.Errorf("settled as %+v, %v", got, err)
	}
}
