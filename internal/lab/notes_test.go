package lab

import (
	"fmt"
	"strings"
	"testing"
)

// TestNotes: what people were answered and what an audit tells of it are held against each
// other, and each way in which they can differ is found. (Runs of a lab show that they do not.)
func TestNotes(t *testing.T) {
	t.Parallel()
	ok := told{outcomes: 1, outcome: "done"}
	for name, test := range map[string]struct {
		answers map[string]int // status, by request
		told    map[string]told
		summed  int
		waiting int
		wrong   string // part of the one finding; "" if there is none
		unasked int    // requests that the audit tells of and nobody has noted an answer to
	}{
		"all as it should be": {
			map[string]int{"a": 200, "b": 400, "c": 503},
			map[string]told{"a": ok, "b": {outcomes: 1, outcome: "refused"}, "c": {outcomes: 1, outcome: "failed"}},
			0, 0, "", 0,
		},
		"an answer without an event":         {map[string]int{"a": 200}, nil, 0, 0, `request a with 200, and tells of it in 0`, 0},
		"a refusal without one":              {map[string]int{"a": 401}, nil, 1, 0, `request a with 401, and tells of it in 0`, 0},
		"an answer with two":                 {map[string]int{"a": 200}, map[string]told{"a": {outcomes: 2, outcome: "done"}}, 0, 0, `tells of it in 2`, 0},
		"a 503 with two":                     {map[string]int{"a": 503}, map[string]told{"a": {outcomes: 2, outcome: "failed"}}, 1, 0, `tells of it in 2`, 0},
		"keys that the audit has refused":    {map[string]int{"a": 200}, map[string]told{"a": {outcomes: 1, outcome: "refused"}}, 0, 0, `request a with 200`, 0},
		"a refusal of which it says done":    {map[string]int{"a": 400}, map[string]told{"a": ok}, 0, 0, `request a with 400`, 0},
		"a 503 of which nothing tells":       {map[string]int{"a": 503}, nil, 0, 0, `503 to 1 requests without an event`, 0},
		"a 503 in a summary":                 {map[string]int{"a": 503}, nil, 1, 0, "", 0},
		"a 503 that waits for its summary":   {map[string]int{"a": 503}, nil, 0, 1, "", 0},
		"two in a summary of one":            {map[string]int{"a": 503, "b": 503}, nil, 1, 0, `503 to 2 requests without an event`, 0},
		"a 503 that was done, untold":        {map[string]int{"a": 503}, map[string]told{"a": ok}, 0, 0, `503 to 1 requests without an event`, 0},
		"a 503 that was done, and told lost": {map[string]int{"a": 503}, map[string]told{"a": {outcomes: 1, outcome: "done", lost: true}}, 0, 0, "", 0},
		"an event that nobody asked for":     {nil, map[string]told{"a": ok}, 0, 0, "", 1},
	} {
		s := &Site{Name: "km1", lab: &Lab{Config: Config{Ports: ReadmePorts(1)}}}
		s.Nodes = []*Node{{site: s, Name: "km1-a"}}
		n := newNotes()
		host := strings.TrimPrefix(s.Nodes[0].URL(), "https://")
		for id, status := range test.answers {
			n.answers[id] = &answer{host: host, status: status}
		}
		trail := &trail{site: s, told: test.told, summed: test.summed, waiting: test.waiting}
		_, wrong := n.compare(trail)
		if got := fmt.Sprint(wrong); (len(wrong) == 0) != (test.wrong == "") || len(wrong) > 1 || !strings.Contains(got, test.wrong) {
			t.Errorf("%s: findings %q, want %q", name, wrong, test.wrong)
		}
		if _, told := n.unanswered(trail); told != test.unasked {
			t.Errorf("%s: %d requests that nobody made, want %d", name, told, test.unasked)
		}
	}
}
