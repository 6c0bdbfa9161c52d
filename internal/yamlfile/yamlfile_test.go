package yamlfile

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type config struct {
	Text  string        `yaml:"text"`
	Path  string        `yaml:"path"`
	Count int           `yaml:"count"`
	Ratio float64       `yaml:"ratio"`
	Yes   bool          `yaml:"yes"`
	Time  time.Duration `yaml:"time"`
	List  []struct {
		Ratio float64 `yaml:"ratio"`
	} `yaml:"list"`
}

// TestDecode: what is taken for each type of value, what is refused, and where.
func TestDecode(t *testing.T) {
	t.Parallel()
	var c config
	f, err := Decode("dir/c.yaml", []byte("text: \"12\"\npath: p\ncount: 0x10\nratio: 6e-07\nyes: true\ntime: 90m\nlist: [{ratio: 1e9}, {ratio: -2}, {ratio: 0.5}]\n"), &c)
	if err != nil {
		t.Fatal(err)
	}
	if c.Text != "12" || c.Count != 16 || c.Ratio != 6e-7 || !c.Yes || c.Time != 90*time.Minute || len(c.List) != 3 || c.List[0].Ratio != 1e9 || c.List[1].Ratio != -2 || c.List[2].Ratio != .5 {
		t.Errorf("got %+v", c)
	}
	absolute, empty := "/etc/x", ""
	if err := f.Resolve(&c.Path, &absolute, &empty); err != nil {
		t.Fatal(err)
	}
	if want, _ := filepath.Abs("dir/p"); c.Path != want || absolute != "/etc/x" || empty != "" {
		t.Errorf("paths: %q, %q, %q", c.Path, absolute, empty)
	}
	k := &Checker{File: f}
	k.Must(c.Yes, "yes", "is not said")
	k.Must(false, "list[1].ratio", "is %v", c.List[1].Ratio)
	k.Must(false, "list[1].other", "is missing")
	k.Must(!k.Has("nothing", ""), "nothing", "is there")
	const want = "dir/c.yaml:7:23: list[1].ratio is -2\ndir/c.yaml:7:1: list[1].other is missing\ndir/c.yaml: nothing is missing"
	if err := k.Err(); err == nil || err.Error() != want || !f.Names("list[2].ratio") || f.Names("list[3]") {
		t.Errorf("checked: %v", err)
	}

	for text, want := range map[string]string{
		"text: 12":              "c.yaml:1:1: text is not text: what looks like a number wants quotes",
		"count: 1.5":            "c.yaml:1:1: count is not a whole number",
		"ratio: inf":            "c.yaml:1:1: ratio is not a number",
		"ratio: '1e9'":          "c.yaml:1:1: ratio is not a number",
		"\nratio: much":         "c.yaml:2:1: ratio is not a number",
		"ratio: .inf":           "c.yaml:1:1: ratio is not a number",
		"ratio: .nan":           "c.yaml:1:1: ratio is not a number",
		"list: [{ratio: '1'}]":  "c.yaml:1:9: list[0].ratio is not a number",
		"yes: on":               "c.yaml:1:1: yes is not true or false",
		"time: 90":              "c.yaml:1:1: time is not a duration",
		"time:":                 "c.yaml:1:1: time has no value",
		"other: 1":              `c.yaml:1:1: unknown field "other"`,
		"yes: true\nyes: true":  `c.yaml:2:1: mapping key "yes" already defined`,
		"yes: true\n---\nno: 1": "c.yaml: must be one YAML document",
		"list: [":               "c.yaml:1:7: ",
		"list: {ratio: 1}":      "c.yaml:1:7: ",
	} {
		var c config
		if _, err := Decode("c.yaml", []byte(text), &c); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}
