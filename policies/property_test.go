package policies

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// The property below draws networks and policies from these names.
var (
	someKMEs   = []string{"km1", "km2", "km3"}
	someGroups = []string{"red", "green", "blue"}
	someSAEs   = []string{"a", "b", "c", "d", "e@x.example", "unbekannt é"}
)

// scope is who a drawn policy is about: everyone, one SAE or a group.
type scope struct{ sae, group string }

func (s scope) cedar(variable string) string {
	switch {
	case s.sae != "":
		return fmt.Sprintf("%s == SAE::%q", variable, s.sae)
	case s.group != "":
		return fmt.Sprintf("%s in Group::%q", variable, s.group)
	}
	return variable
}

func (s scope) holds(id string, groups []string) bool {
	return s == scope{} || s.sae == id || s.group != "" && slices.Contains(groups, s.group)
}

// policy is a drawn policy, which can be written in Cedar and, independently,
// evaluated here.
type policy struct {
	forbid    bool
	principal scope
	resource  scope
	action    string // "" for all
	maxBits   int    // 0 for no limit
	notFrom   key.Provenance
	otherKME  bool // only when not served by the same KME
	together  bool // only when they share a group
	link      string
	until     time.Time     // only before
	hybrid    bool          // only over a connection that is known to be so
	fresh     time.Duration // only over a connection that is known to be younger
}

func (p policy) cedar(id int) string {
	effect, action := "permit", "action"
	if p.forbid {
		effect = "forbid"
	}
	if p.action != "" {
		action = fmt.Sprintf("action == Action::%q", p.action)
	}
	text := fmt.Sprintf("@id(\"p%d\") %s (%s, %s, %s)", id, effect, p.principal.cedar("principal"), action, p.resource.cedar("resource"))
	if p.maxBits > 0 {
		text += fmt.Sprintf(" when { context.bits * context.number <= %d }", p.maxBits)
	}
	if p.notFrom != "" {
		text += fmt.Sprintf(" unless { context.provenance == %q }", p.notFrom)
	}
	if p.otherKME {
		text += " when { !context.same_kme }"
	}
	if p.together {
		text += " when { principal.groups.containsAny(resource.groups) }"
	}
	if p.link != "" {
		text += fmt.Sprintf(" when { context.link == %q }", p.link)
	}
	if !p.until.IsZero() {
		text += fmt.Sprintf(" when { context.time < datetime(%q) }", p.until.Format(time.RFC3339))
	}
	if p.hybrid {
		text += ` when { context has tls_group && context.tls_group like "*MLKEM*" }`
	}
	if p.fresh > 0 {
		text += fmt.Sprintf(" when { context has verdict_age && context.verdict_age < duration(%q) }", fmt.Sprintf("%ds", int(p.fresh.Seconds())))
	}
	return text + ";\n"
}

func (p policy) applies(q Question, groups map[string][]string) bool {
	caller, other := q.Caller.String(), q.Other.String()
	share := slices.ContainsFunc(groups[caller], func(g string) bool { return slices.Contains(groups[other], g) })
	return p.principal.holds(caller, groups[caller]) && p.resource.holds(other, groups[other]) &&
		(p.action == "" || p.action == q.Action) &&
		(p.maxBits == 0 || q.Bits*q.Number <= p.maxBits) &&
		(p.notFrom == "" || p.notFrom != q.Provenance) &&
		(!p.otherKME || !q.SameKME) &&
		(!p.together || share) &&
		(p.link == "" || p.link == q.Link) &&
		(p.until.IsZero() || q.Time.Truncate(time.Second).Before(p.until)) &&
		(!p.hybrid || q.Group == "X25519MLKEM768") &&
		(p.fresh == 0 || q.Group != "" && q.Age.Truncate(time.Second) < p.fresh)
}

func drawScope(t *rapid.T, label string) scope {
	switch rapid.IntRange(0, 3).Draw(t, label) {
	case 0:
		return scope{sae: rapid.SampledFrom(someSAEs).Draw(t, label+" SAE")}
	case 1:
		return scope{group: rapid.SampledFrom(someGroups).Draw(t, label+" group")}
	}
	return scope{}
}

func drawPolicy(t *rapid.T) policy {
	return policy{
		forbid:    rapid.IntRange(0, 3).Draw(t, "forbid") == 0,
		principal: drawScope(t, "principal"),
		resource:  drawScope(t, "resource"),
		action:    rapid.SampledFrom([]string{"", EncKeys, DecKeys, Status}).Draw(t, "action"),
		maxBits:   rapid.SampledFrom([]int{0, 0, 256, 1024}).Draw(t, "max bits"),
		notFrom:   rapid.SampledFrom([]key.Provenance{"", "", key.Simulated, key.LocalRNG}).Draw(t, "not from"),
		otherKME:  rapid.Bool().Draw(t, "other KME"),
		together:  rapid.Bool().Draw(t, "together"),
		link:      rapid.SampledFrom([]string{"", "", "fibre"}).Draw(t, "link"),
		until:     rapid.SampledFrom([]time.Time{{}, {}, noon}).Draw(t, "until"),
		hybrid:    rapid.IntRange(0, 3).Draw(t, "hybrid") == 0,
		fresh:     rapid.SampledFrom([]time.Duration{0, 0, time.Minute}).Draw(t, "fresh"),
	}
}

func subset(t *rapid.T, of []string, atLeast int, label string) []string {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(of), atLeast, len(of), rapid.ID[string]).Draw(t, label)
}

// drawNetwork writes a network.yaml in which some of someSAEs are known, and
// returns their groups.
func drawNetwork(t *rapid.T) (yaml string, groups map[string][]string) {
	var b strings.Builder
	b.WriteString("version: 1\ntrust_domain: lab.test\nkmes:\n")
	for i, k := range someKMEs {
		fmt.Fprintf(&b, "  - {id: %[1]s, nodes: [{name: %[1]s-a, sae: \"h:%[2]d1\", assign: \"h:%[2]d2\", classical: \"h:%[2]d3\", operator: \"h:%[2]d4\"}]}\n", k, i+1)
	}
	groups = make(map[string][]string)
	b.WriteString("saes:\n")
	for _, id := range subset(t, someSAEs, 1, "SAEs") {
		groups[id] = subset(t, someGroups, 0, "groups of "+id)
		homes := subset(t, someKMEs, 1, "homes of "+id)
		fmt.Fprintf(&b, "  - {id: %q, homes: [%s], groups: [%s]}\n", id, strings.Join(homes, ", "), strings.Join(groups[id], ", "))
	}
	return b.String(), groups
}

// TestDecideAgrees: for any network and any policies, Decide says what an
// independent reading of the same policies says: default deny, forbid wins, and
// exactly the policies that apply are named.
func TestDecideAgrees(t *testing.T) {
	principals := "version: 1\nrequire: {keys: [ed25519], max_lifetime: 1h}\nrules: []\nprincipals: []\n"
	schema, err := Shipped.ReadFile(SchemaFile)
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		network, groups := drawNetwork(t)
		var drawn []policy
		var text strings.Builder
		for i := range rapid.IntRange(1, 6).Draw(t, "policies") {
			drawn = append(drawn, drawPolicy(t))
			text.WriteString(drawn[i].cedar(i))
		}
		s, err := load(fstest.MapFS{
			NetworkFile:    {Data: []byte(network)},
			PrincipalsFile: {Data: []byte(principals)},
			SchemaFile:     {Data: schema},
			"drawn.cedar":  {Data: []byte(text.String())},
		})
		if err != nil {
			t.Fatalf("load: %v\n%s\n%s", err, network, text.String())
		}
		for range 8 {
			q := Question{
				Action:     rapid.SampledFrom(actions).Draw(t, "action"),
				Caller:     sae(rapid.SampledFrom(someSAEs).Draw(t, "caller")),
				Other:      sae(rapid.SampledFrom(someSAEs).Draw(t, "other")),
				Bits:       rapid.SampledFrom([]int{0, 256, 512}).Draw(t, "bits"),
				Number:     rapid.IntRange(0, 4).Draw(t, "number"),
				Provenance: rapid.SampledFrom([]key.Provenance{key.QKD, key.Simulated, key.LocalRNG}).Draw(t, "provenance"),
				SameKME:    rapid.Bool().Draw(t, "same KME"),
				Link:       rapid.SampledFrom([]string{"", "fibre"}).Draw(t, "link"),
				Time:       noon.Add(time.Duration(rapid.IntRange(-1500, 1500).Draw(t, "time, ms")) * time.Millisecond),
				Group:      rapid.SampledFrom([]string{"", "X25519", "X25519MLKEM768"}).Draw(t, "group"),
				Age:        time.Minute + time.Duration(rapid.IntRange(-1500, 1500).Draw(t, "age, ms"))*time.Millisecond,
			}
			got, want := s.Decide(q), expected(drawn, q, groups)
			if got.Allow != want.Allow || got.Reason != want.Reason || !slices.Equal(got.Policies, want.Policies) {
				t.Fatalf("Decide(%+v): got %+v, want %+v\n%s\n%s", q, got, want, network, text.String())
			}
		}
	})
}

func expected(drawn []policy, q Question, groups map[string][]string) Decision {
	for _, id := range []string{q.Caller.String(), q.Other.String()} {
		if _, ok := groups[id]; !ok {
			return Decision{Reason: UnknownSAE}
		}
	}
	var permits, forbids []string
	for i, p := range drawn {
		if !p.applies(q, groups) {
			continue
		}
		if p.forbid {
			forbids = append(forbids, fmt.Sprintf("p%d", i))
		} else {
			permits = append(permits, fmt.Sprintf("p%d", i))
		}
	}
	switch {
	case len(forbids) > 0:
		return Decision{Reason: Forbidden, Policies: forbids}
	case len(permits) > 0:
		return Decision{Allow: true, Reason: Permitted, Policies: permits}
	}
	return Decision{Reason: NoPolicy}
}

func fuzzFile(f *testing.F, name string, check func(*testing.T, *Set)) {
	text, err := os.ReadFile(name)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(text))
	f.Add("")
	f.Add("version: 1\n")
	f.Add("- &a [*a]\n")
	f.Fuzz(func(t *testing.T, text string) {
		files := shipped(t)
		files[name] = &fstest.MapFile{Data: []byte(text)}
		s, err := load(files)
		if err != nil {
			return
		}
		check(t, s)
	})
}

// Whatever is accepted hangs together.
func FuzzNetwork(f *testing.F) {
	fuzzFile(f, NetworkFile, func(t *testing.T, s *Set) {
		for id, entry := range s.SAEs {
			if _, err := identity.ParseSAE(id.String()); err != nil || len(entry.Homes) == 0 {
				t.Errorf("SAE %q: %v, homes %v", id, err, entry.Homes)
			}
			for _, h := range entry.Homes {
				if _, ok := s.KMEs[h]; !ok {
					t.Errorf("SAE %q is at home at %q, which is not there", id, h)
				}
			}
		}
		for _, l := range s.Links {
			_, alice := s.KMEs[l.Alice]
			_, bob := s.KMEs[l.Bob]
			if !alice || !bob || l.Alice == l.Bob || l.ID == "" {
				t.Errorf("link %+v", l)
			}
		}
	})
}

// Whatever is accepted lets nobody in without a certificate.
func FuzzPrincipals(f *testing.F) {
	fuzzFile(f, PrincipalsFile, func(t *testing.T, s *Set) {
		if s.Principals == nil {
			t.Error("no principals and no error")
		}
	})
}

// Whatever is accepted, nobody unknown gets anything.
func FuzzPolicy(f *testing.F) {
	fuzzFile(f, "default.cedar", func(t *testing.T, s *Set) {
		for _, action := range actions {
			q := Question{Action: action, Caller: sae("mallory"), Other: sae("alice"), Bits: 256, Number: 1, Provenance: key.QKD}
			if d := s.Decide(q); d.Allow {
				t.Errorf("Decide(%+v): got %+v", q, d)
			}
		}
	})
}
