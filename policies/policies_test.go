package policies

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

func sae(id string) identity.SAE {
	v, err := identity.ParseSAE(id)
	if err != nil {
		panic(err)
	}
	return v
}

func kme(id string) identity.KME {
	v, err := identity.ParseKME(id)
	if err != nil {
		panic(err)
	}
	return v
}

// shipped is a copy of the shipped files, to be changed.
func shipped(t testing.TB) fstest.MapFS {
	t.Helper()
	files := make(fstest.MapFS)
	names, err := fs.Glob(Shipped, "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(Shipped, name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = &fstest.MapFile{Data: text}
	}
	return files
}

// TestShipped reads the files that the product comes with, from the folder and
// from a copy such as a lab makes.
func TestShipped(t *testing.T) {
	s, err := Load(".")
	if err != nil {
		t.Fatal(err)
	}
	copied, err := load(Shipped)
	if err != nil || copied.Digest != s.Digest || len(s.Digest) != 64 {
		t.Errorf("the copy has digest %q, %v, want %q", copied.Digest, err, s.Digest)
	}
	want := NodeEntry{"km2-a", "localhost:9443", "localhost:9444", "localhost:9445", "localhost:9446"}
	if got, ok := s.KMEs[kme("km2")].Node("km2-a"); s.TrustDomain != "lab.test" || !ok || got != want {
		t.Errorf("km2-a of %s: got %+v, want %+v", s.TrustDomain, got, want)
	}
	for _, ends := range [][2]identity.KME{{kme("km1"), kme("km2")}, {kme("km2"), kme("km1")}} {
		if l := s.LinksBetween(ends[0], ends[1]); !slices.Equal(l, []Link{{ID: "km1-km2", Alice: kme("km1"), Bob: kme("km2")}}) {
			t.Errorf("LinksBetween(%v): got %+v", ends, l)
		}
	}
	if l := s.LinksBetween(kme("km1"), kme("km1")); l != nil {
		t.Errorf("LinksBetween(km1, km1): got %+v", l)
	}
}

func TestHomed(t *testing.T) {
	s, err := Load(".")
	if err != nil {
		t.Fatal(err)
	}
	if s.Homed(sae("alice"), kme("km2")) || !s.Homed(sae("alice"), kme("km1")) || s.Homed(sae("mallory"), kme("km1")) {
		t.Error("Homed: alice is at home at km1 only, dave nowhere")
	}
}

func TestDefaultPolicy(t *testing.T) {
	s, err := Load(".")
	if err != nil {
		t.Fatal(err)
	}
	group := Decision{Allow: true, Reason: Permitted, Policies: []string{"same-group"}}
	for _, tt := range []struct {
		caller, other string
		want          Decision
	}{
		{"alice", "bob", group},
		{"bob", "alice", group},
		{"alice@qutemail.example", "bob@qutemail.example", group},
		{"alice", "carol", Decision{Reason: NoPolicy}},
		{"carol", "alice", Decision{Reason: NoPolicy}},
		{"alice", "bob@qutemail.example", Decision{Reason: NoPolicy}},
		{"alice", "mallory", Decision{Reason: UnknownSAE}},
		{"mallory", "alice", Decision{Reason: UnknownSAE}},
		{"alice", "alice", Decision{Reason: Forbidden, Policies: []string{"not-with-oneself"}}},
	} {
		for _, action := range actions {
			q := Question{Action: action, Caller: sae(tt.caller), Other: sae(tt.other), Bits: 256, Number: 1, Provenance: key.Simulated}
			if diff := cmp.Diff(tt.want, s.Decide(q)); diff != "" {
				t.Errorf("Decide(%s %s %s) (-want +got):\n%s", tt.caller, action, tt.other, diff)
			}
		}
	}
	if d := s.Decide(Question{Action: "erase", Caller: sae("alice"), Other: sae("bob")}); d.Allow {
		t.Errorf("Decide of an unknown action: got %+v", d)
	}
}

// TestEveryPair goes through all pairs of the shipped network, and somebody whom it
// does not have: who is in one group with another SAE may share keys with it and with
// nobody else, whatever is asked.
func TestEveryPair(t *testing.T) {
	s, err := Load(".")
	if err != nil {
		t.Fatal(err)
	}
	everybody := append(slices.Collect(maps.Keys(s.SAEs)), sae("mallory"))
	allowed := 0
	for _, a := range everybody {
		for _, b := range everybody {
			together := a != b && slices.ContainsFunc(s.SAEs[a].Groups, func(g string) bool { return slices.Contains(s.SAEs[b].Groups, g) })
			for _, action := range actions {
				for _, p := range []key.Provenance{key.QKD, key.Simulated, key.LocalRNG} {
					for _, n := range []int{1, 128} {
						q := Question{Action: action, Caller: a, Other: b, Bits: 256, Number: n, Provenance: p}
						if d := s.Decide(q); d.Allow != together {
							t.Errorf("Decide(%+v): got %+v, want %t", q, d, together)
						} else if d.Allow {
							allowed++
						}
					}
				}
			}
		}
	}
	if want := (4*3 + 2) * len(actions) * 3 * 2; allowed != want {
		t.Errorf("%d questions are allowed, want %d", allowed, want)
	}
}

// TestWithout: a caller that is switched off is refused as a caller and as the other,
// whatever was decided of it before; what the files switch off stays off.
func TestWithout(t *testing.T) {
	files := shipped(t)
	files[PrincipalsFile].Data = bytes.Replace(files[PrincipalsFile].Data, []byte("id: erin, enabled: true"), []byte(`id: erin, enabled: false, reason: "ticket 41"`), 1)
	whole, err := load(files)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(s *Set, a, b string) Reason {
		return s.Decide(Question{Action: EncKeys, Caller: sae(a), Other: sae(b), Bits: 256, Number: 1}).Reason
	}
	less := whole.Without(map[string]string{"sae/bob": "lost laptop", "sae/erin": "again", "sae/nobody": "x", "operator/root": "left"})
	for _, tt := range []struct {
		set  *Set
		a, b string
		want Reason
	}{
		{whole, "alice", "bob", Permitted},
		{whole, "alice", "erin", DisabledSAE},
		{whole, "erin", "alice", DisabledSAE},
		{less, "alice", "bob", DisabledSAE},
		{less, "bob", "alice", DisabledSAE},
		{less, "alice", "erin", DisabledSAE},
		{less, "alice", "dave", Permitted},
		{less.Without(nil), "alice", "bob", DisabledSAE},
		{whole.Without(nil), "alice", "bob", Permitted},
		{whole.Without(nil), "alice", "erin", DisabledSAE},
	} {
		if got := ask(tt.set, tt.a, tt.b); got != tt.want {
			t.Errorf("%s with %s: got %s, want %s", tt.a, tt.b, got, tt.want)
		}
	}
	if why, off := less.Disabled(sae("erin")); !off || why != "ticket 41" {
		t.Errorf("erin: got %q, %t: the file's reason stands", why, off)
	}
	client := x509.ExtKeyUsageClientAuth
	for _, tt := range []struct {
		pool, id string
		want     string
	}{{"sae", "bob", "disabled"}, {"sae", "erin", "disabled"}, {"sae", "alice", ""}, {"operator", "root", "disabled"}, {"operator", "olga", ""}} {
		leaf := certificate(t, tt.pool, strings.ToUpper(tt.pool), tt.id, client)
		_, err := less.Principals.Judge(tt.pool, leaf, time.Now())
		if denial, _ := errors.AsType[*identity.Denial](err); tt.want == "" && err != nil || tt.want != "" && (denial == nil || denial.Reason != tt.want) {
			t.Errorf("%s: got %v, want %q", tt.id, err, tt.want)
		}
	}
}

// A policy that cannot be evaluated is not skipped: it may be the one that forbids.
func TestPolicyErrorForbids(t *testing.T) {
	files := shipped(t)
	files["more.cedar"] = &fstest.MapFile{Data: []byte(`@id("overflow") forbid (principal, action, resource) when { context.bits * 4 > 4096 };`)}
	s, err := load(files)
	if err != nil {
		t.Fatal(err)
	}
	q := Question{Action: EncKeys, Caller: sae("alice"), Other: sae("bob"), Bits: 256, Number: 1}
	if d := s.Decide(q); !d.Allow {
		t.Errorf("Decide of 256 bits: got %+v", d)
	}
	q.Bits = 1 << 62
	want := Decision{Reason: PolicyError, Policies: []string{"overflow"}}
	if diff := cmp.Diff(want, s.Decide(q)); diff != "" {
		t.Errorf("Decide with an overflow (-want +got):\n%s", diff)
	}
}

func TestDigest(t *testing.T) {
	files := shipped(t)
	before, err := load(files)
	if err != nil {
		t.Fatal(err)
	}
	files["more.cedar"] = &fstest.MapFile{Data: []byte(`@id("x") forbid (principal, action, resource);`)}
	after, err := load(files)
	if err != nil || after.Digest == before.Digest {
		t.Errorf("one file more: digest %v, %v, want another than before", after.Digest, err)
	}
}

// TestLoadRefuses changes one thing in the shipped files each time. The error must
// say where.
func TestLoadRefuses(t *testing.T) {
	tests := []struct{ name, file, old, new, want string }{
		{"unknown field", NetworkFile, "trust_domain:", "trust: x\ntrust_domain:", `network.yaml:5:1: unknown field "trust"`},
		{"key twice", NetworkFile, "trust_domain:", "version: 1\ntrust_domain:", `network.yaml:5:1: mapping key "version" already defined`},
		{"no version", NetworkFile, "version: 1", "", "network.yaml:1:1: no version: 1"},
		{"version as text", NetworkFile, "version: 1", `version: "1"`, "network.yaml:4:10: "},
		{"next version", NetworkFile, "version: 1", "version: 2", "network.yaml:4:10: "},
		{"trust domain", NetworkFile, "lab.test", "Lab.test", "network.yaml:5:15: trust_domain"},
		{"KME twice", NetworkFile, "id: km2", "id: km1", `network.yaml:16:9: KME "km1" is there twice`},
		{"KME without a name", NetworkFile, "id: km2", `id: " "`, "network.yaml:16:9: KME ID is blank"},
		{"KME without nodes", NetworkFile, "- {name: km2-a, sae: \"localhost:9443\", assign: \"localhost:9444\", classical: \"localhost:9445\", operator: \"localhost:9446\"}", "[]", "network.yaml:16:9: KME km2 has no nodes"},
		{"node without a name", NetworkFile, "name: km2-a, ", "", "network.yaml:16:5: KME km2: node name \"\" is not"},
		{"node twice", NetworkFile, "- {name: km2-a,", "- {name: km2-a, sae: \"h:1\", assign: \"h:2\", classical: \"h:3\", operator: \"h:4\"}\n      - {name: km2-a,", "network.yaml:19:16: KME km2: node km2-a is there twice"},
		{"node without a door", NetworkFile, `, operator: "localhost:9446"`, "", "network.yaml:18:16: node km2-a: \"\" is not host:port"},
		{"no port", NetworkFile, `"localhost:9446"`, "localhost", "network.yaml:18:111: node km2-a: \"localhost\" is not host:port"},
		{"port 0", NetworkFile, `"localhost:9446"`, `"localhost:0"`, "network.yaml:18:111: "},
		{"port twice", NetworkFile, "localhost:9446", "localhost:8443", "network.yaml:18:111: the address localhost:8443 is used twice"},
		{"link to nobody", NetworkFile, "bob: km2", "bob: km3", `network.yaml:21:36: KME "km3" is not among kmes`},
		{"link to itself", NetworkFile, "bob: km2", "bob: km1", "network.yaml:21:36: link km1-km2 joins km1 to itself"},
		{"link twice", NetworkFile, "links:", "links:\n  - {id: km1-km2, alice: km1, bob: km2}", "network.yaml:22:10: link km1-km2 is there twice"},
		{"link's name", NetworkFile, "id: km1-km2", "id: KM1", "network.yaml:21:10: link id"},
		{"SAE twice", NetworkFile, "id: bob,", "id: alice,", `network.yaml:28:10: SAE "alice" is there twice`},
		{"SAE without a name", NetworkFile, "id: bob,", "", "network.yaml:28:7: SAE ID is empty"},
		{"SAE of digits", NetworkFile, "id: bob,", "id: 12,", `network.yaml:28:10: "12" is not a string`},
		{"home of nobody", NetworkFile, "homes: [km1], groups", "homes: [km1, km3], groups", "network.yaml:27:30: KME \"km3\""},
		{"home twice", NetworkFile, "homes: [km1], groups", "homes: [km1, km1], groups", "network.yaml:27:30: home km1 is there twice"},
		{"null home", NetworkFile, "homes: [km1], groups", "homes: [null], groups", "network.yaml:27:25: "},
		{"no homes", NetworkFile, "homes: [km1], groups", "homes: [], groups", `network.yaml:27:10: SAE "alice" has no homes`},
		{"homes are no list", NetworkFile, "homes: [km1], groups", "homes: km1, groups", "network.yaml:27:24: "},
		{"group twice", NetworkFile, "[demo]}", "[demo, demo]}", "network.yaml:27:46: group"},
		{"group in capitals", NetworkFile, "[demo]}", "[Demo]}", "network.yaml:27:40: group"},
		{"anchor", NetworkFile, "homes: [km1], groups", "homes: &h [km1], groups", "network.yaml:27:24: anchors"},
		{"tag", NetworkFile, "id: alice,", "id: !!str alice,", "network.yaml:27:10: anchors"},
		{"merge key", NetworkFile, "{id: alice,", "{<<: {id: alice},", "network.yaml:27:6: "},
		{"number as a key", NetworkFile, "{id: alice,", "{id: alice, 5: x,", "network.yaml:27:17: a key is a plain word"},
		{"second document", NetworkFile, "saes:", "---\nsaes:", "network.yaml:1:1: must be one YAML document"},
		{"syntax", NetworkFile, "saes:", "saes: [", "network.yaml:"},
		{"brackets", NetworkFile, "saes:", "saes: " + strings.Repeat("[", 100_000), "network.yaml:26:23: nested too deeply"},
		{"dashes", NetworkFile, "saes:", "saes:\n" + strings.Repeat("- ", 100_000), "network.yaml:27:33: nested too deeply"},
		{"quota on nobody", NetworkFile, "quotas: []", "quotas: [{sae: mallory, keys_per_day: 1}]", `network.yaml:39:16: SAE "mallory" is not among saes`},
		{"quota with nobody", NetworkFile, "quotas: []", "quotas: [{sae: alice, with: mallory, keys_per_day: 1}]", `network.yaml:39:29: SAE "mallory" is not among saes`},
		{"quota with oneself", NetworkFile, "quotas: []", "quotas: [{sae: alice, with: alice, keys_per_day: 1}]", "network.yaml:39:29: a quota on"},
		{"quota of nothing", NetworkFile, "quotas: []", "quotas: [{sae: alice}]", "network.yaml:39:16: a quota sets"},
		{"quota below nothing", NetworkFile, "quotas: []", "quotas: [{sae: alice, keys_per_day: 1, keys_per_second: -1}]", "network.yaml:39:16: a quota sets"},
		{"quota twice", NetworkFile, "quotas: []", "quotas: [{sae: alice, keys_per_day: 1}, {sae: alice, keys_per_second: 1}]", "network.yaml:39:47: a second quota"},
		{"bytes", NetworkFile, "saes:", "\xff", "network.yaml:1:1: not UTF-8"},

		{"unknown field", PrincipalsFile, "require:", "requires:", `principals.yaml:6:1: unknown field "requires"`},
		{"no lifetime", PrincipalsFile, "  max_lifetime: 169h", "", "principals.yaml:1:1: identity map: no longest lifetime"},
		{"lifetime in weeks", PrincipalsFile, "169h", "1w", `principals.yaml:8:17: "1w" is not a duration`},
		{"kind of key", PrincipalsFile, "ecdsa-p256,", "rsa,", `principals.yaml:1:1: identity map: unknown kind of key "rsa"`},
		{"rule twice", PrincipalsFile, "id: kme-uri", "id: sae-uri", `principals.yaml:13:10: rule "sae-uri": another rule has the same ID`},
		{"role of another host", PrincipalsFile, "qkd://kme.lab", "qkd://sae.lab", "principals.yaml:13:46: the uri of a rule"},
		{"two roles in a pool", PrincipalsFile, "pool: kme", "pool: sae", `principals.yaml:13:10: rule "kme-uri": pool sae serves`},
		{"fixed principal", PrincipalsFile, `principal: "{id}"`, `principal: root`, `principals.yaml:12:10: rule "sae-uri": uri ends in`},
		{"enabled as text", PrincipalsFile, "enabled: true", `enabled: "true"`, "principals.yaml:"},
		{"enabled left out", PrincipalsFile, ", enabled: true", "", "principals.yaml:19:21: principal sae/alice: enabled must be"},
		{"disabled without a reason", PrincipalsFile, "enabled: true", "enabled: false", "principals.yaml:19:21: principal sae/alice is disabled without"},
		{"principal twice", PrincipalsFile, "id: bob,", "id: alice,", "principals.yaml:20:21: principal sae/alice is there twice"},
		{"unknown SAE", PrincipalsFile, "id: bob,", "id: bbo,", `principals.yaml:20:21: SAE "bbo" is not in network.yaml`},
		{"unknown KME", PrincipalsFile, "id: km2", "id: km3", `principals.yaml:29:21: KME "km3" is not in network.yaml`},
		{"unknown role", PrincipalsFile, "role: operator, id", "role: admin, id", `principals.yaml:31:`},
		{"operator in capitals", PrincipalsFile, "id: root", "id: Root", `principals.yaml:31:26: operator "Root"`},
		{"an act that is none", PrincipalsFile, "two_officers: []", "two_officers: [cleanup, clean]", `principals.yaml:37:25: two_officers: "clean" is none of`},
		{"duty of an SAE", PrincipalsFile, "id: carol, enabled: true", "id: carol, enabled: true, duties: [viewer]", "principals.yaml:23:21: duties are for the role operator"},
		{"unknown duty", PrincipalsFile, "[security-officer]", "[officer]", `principals.yaml:32:26: duty "officer" is none of`},
		{"duty twice", PrincipalsFile, "[security-officer]", "[auditor, auditor]", "principals.yaml:32:26: duty auditor is there twice"},
		{"gateway that is an SAE", PrincipalsFile, "id: qutemail,", "id: carol,", `principals.yaml:27:21: the gateway "carol" is an SAE`},
		{"gateway of an operator", PrincipalsFile, "role: sae, id: qutemail", "role: operator, id: qutemail", "principals.yaml:27:26: gateway_for is for the role sae"},
		{"gateway for nobody", PrincipalsFile, "gateway_for: [alice@qutemail.example, bob@qutemail.example]", "gateway_for: []", `principals.yaml:27:21: gateway_for of "qutemail" lists nobody`},
		{"gateway for a stranger", PrincipalsFile, "[alice@qutemail.example,", "[mallory,", `SAE "mallory" is not in network.yaml`},
		{"gateway for one twice", PrincipalsFile, "[alice@qutemail.example,", "[bob@qutemail.example,", `lists "bob@qutemail.example" twice`},
		{"gateway by a pattern", PrincipalsFile, "[alice@qutemail.example,", "['*@qutemail.example',", `SAE "*@qutemail.example" is not in network.yaml`},

		{"lifetime of a link", NetworkFile, "bob: km2}", "bob: km2, ttl: 1h30}", `network.yaml:21:46: "1h30" is no lifetime`},
		{"no pool lifetime of a link", NetworkFile, "bob: km2}", "bob: km2, pool_ttl: 10ms}", `"10ms" is no lifetime`},

		{"policy without ID", "default.cedar", `@id("same-group")`, "", "default.cedar:"},
		{"policy ID twice", "default.cedar", "not-with-oneself", "same-group", "default.cedar:15:1: the policy ID same-group is used twice"},
		{"policy's syntax", "default.cedar", "permit (", "permits (", "default.cedar:7:9 "},
		{"unknown attribute", "default.cedar", "resource.groups", "resource.group", "default.cedar:6:1: "},
		{"unknown action", "default.cedar", `Action::"status"`, `Action::"statys"`, "default.cedar:6:1: "},
		{"wrong type", "default.cedar", "principal == resource", `principal == "alice"`, "default.cedar:15:1: "},
		{"no policy", "default.cedar", "", "// nothing", "no policy in any"},

		{"schema's syntax", SchemaFile, "entity Group;", "entity Group", SchemaFile + ":"},
		{"schema without a type", SchemaFile, "entity KME;", "", SchemaFile + ": "},
		{"schema promises more", SchemaFile, "  same_kme: Bool,", "  same_kme: Bool,\n  hour: Long,", SchemaFile + " does not describe"},
		{"schema promises less", SchemaFile, "  same_kme: Bool,", "", SchemaFile + " does not describe"},
		{"schema of another type", SchemaFile, "groups: Set<Group>", "groups: Set<String>", SchemaFile + " does not describe"},
		{"schema without an action", SchemaFile, "action status", "action other", SchemaFile + " does not describe"},
	}
	for _, tt := range tests {
		t.Run(tt.file+" "+tt.name, func(t *testing.T) {
			files := shipped(t)
			text := string(files[tt.file].Data)
			if !strings.Contains(text, tt.old) {
				t.Fatalf("%s has no %q", tt.file, tt.old)
			}
			changed := strings.Replace(text, tt.old, tt.new, 1)
			if tt.old == "" {
				changed = tt.new
			}
			files[tt.file] = &fstest.MapFile{Data: []byte(changed)}
			_, err := load(files)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("load: got %v, want %q", err, tt.want)
			}
		})
	}
	for _, name := range slices.Sorted(maps.Keys(shipped(t))) {
		files := shipped(t)
		delete(files, name)
		if _, err := load(files); err == nil {
			t.Errorf("load without %s: no error", name)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	s, err := Load(".")
	if err != nil {
		b.Fatal(err)
	}
	q := Question{Action: EncKeys, Caller: sae("alice"), Other: sae("bob"), Bits: 256, Number: 1, Provenance: key.Simulated}
	b.ReportAllocs()
	for b.Loop() {
		if d := s.Decide(q); !d.Allow {
			b.Fatal(d)
		}
	}
}
