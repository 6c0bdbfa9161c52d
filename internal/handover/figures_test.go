package handover

import (
	"strings"
	"testing"
)

func TestBehind(t *testing.T) {
	t.Parallel()
	site := func(origin int64, nodes ...NodeFigures) Figures { return Figures{Origin: origin, Nodes: nodes} }
	at := func(node string, run, seq int64, head byte) NodeFigures {
		return NodeFigures{Node: node, Run: run, Seq: seq, Head: Digest{head}}
	}
	known := site(2, at("a", 5, 100, 1), at("b", 3, 50, 2))
	for name, test := range map[string]struct {
		now  Figures
		want string // part of it; "" for not behind
	}{
		"the same":              {known, ""},
		"further":               {site(2, at("a", 6, 110, 3), at("b", 3, 50, 2)), ""},
		"another node more":     {site(2, at("a", 5, 100, 1), at("b", 3, 50, 2), at("c", 1, 1, 9)), ""},
		"recovered since":       {site(3, at("a", 6, 20, 3)), ""},
		"not read":              {Figures{}, ""},
		"before a recovery":     {site(1, at("a", 9, 900, 1), at("b", 9, 900, 2)), "origin 1, and was that of origin 2"},
		"an earlier run":        {site(2, at("a", 4, 100, 1), at("b", 3, 50, 2)), "run 4, and was in run 5"},
		"fewer events":          {site(2, at("a", 5, 99, 1), at("b", 3, 50, 2)), "99 events, and had 100"},
		"another last event":    {site(2, at("a", 5, 100, 1), at("b", 3, 50, 7)), "node b ends in another event 50"},
		"a node is unknown":     {site(2, at("a", 5, 100, 1)), "node b is in run 0"},
		"further, and one less": {site(2, at("a", 6, 120, 1), at("b", 3, 49, 2)), "node b has 49 events"},
	} {
		if got := test.now.Behind(known); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
	if why := known.Behind(Figures{}); why != "" {
		t.Errorf("behind nothing: %s", why)
	}
}

// A receiver that was told of a run, or has answered a batch of it, and knows less
// has forgotten it; a higher run, given by a takeover, outweighs all batches.
func TestPeerRunBehind(t *testing.T) {
	t.Parallel()
	known := PeerRun{Run: 4, Last: 10}
	for _, a := range []Acked{{"a", 4, 10}, {"a", 4, 0}, {"a", 3, 99}} {
		if why := known.Behind(a); why != "" {
			t.Errorf("%+v answered: %s", a, why)
		}
	}
	for _, a := range []Acked{{"a", 4, 11}, {"a", 5, 0}} {
		if known.Behind(a) == "" {
			t.Errorf("%+v answered: not behind", a)
		}
	}
}
