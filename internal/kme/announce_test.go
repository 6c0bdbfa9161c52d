package kme

import (
	"testing"

	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// TestAnswerLost: an announce whose answer is lost, as when a node of the peer ends, is said
// again before its caller is told anything, and keys go out as ever. It is in doubt if the
// second copy is not judged either, whatever is said of that: the first may have been
// assigned. No key is delivered twice.
func TestAnswerLost(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.withToken(tokenDir(t)).Config
	c.Node, c.DataDir = "km1-a", t.TempDir()
	c.Store = s.connectAs(c.Node, c.DataDir)
	km2 := s.far(&KME{Config: c}, "km2", "fibre", "bob")
	c.linked(km2)
	k, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	stand(t, km2.k)
	run(t, k)
	km2.distilled(t, s, k)
	delivered := make(map[key.ID]int)
	km2.untilDelivered(t, k, delivered)
	doubts := func() int64 {
		return s.ask("SELECT count(*) FROM kme.audit WHERE body::json->>'action' = 'alarm' AND body LIKE '%is unanswered%'")
	}
	for _, test := range []struct {
		name          string
		lost          []loss
		served, doubt bool
	}{
		{"lost on its way there", []loss{lostBefore}, true, false},
		{"lost on its way back", []loss{lostAfter}, true, false},
		{"lost twice", []loss{lostBefore, lostAfter}, false, true},
		{"lost, and the second copy declined", []loss{lostAfter, declined}, false, true},
		{"lost, and the second copy refused", []loss{lostAfter, refused}, false, true},
		{"declined", []loss{declined}, false, false},
	} {
		before := doubts()
		for _, l := range test.lost {
			km2.lost <- l
		}
		err := km2.deliver(t, k, 1, delivered)
		if served := err == nil; served != test.served || !served && problem.KindOf(err) != problem.Unavailable {
			t.Errorf("%s: served %v, want %v: %v", test.name, served, test.served, err)
		}
		if test.doubt {
			eventually(t, "the alarm of an announce that was "+test.name, func() bool { return doubts() > before })
		}
		km2.untilDelivered(t, k, delivered) // what was in doubt is settled by itself
		if !test.doubt && doubts() != before {
			t.Errorf("%s: it was in doubt", test.name)
		}
	}
	eventually(t, "nothing to be parked", func() bool { return s.ask("SELECT count(*) FROM kme.parked") == 0 })
	for id, n := range delivered {
		if n != 1 {
			t.Errorf("key %s was delivered %d times", id, n)
		}
	}
}
