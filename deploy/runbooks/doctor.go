// Package runbooks lets tests hold what kmectl doctor says against the page about it.
package runbooks

import (
	_ "embed"
	"fmt"
	"regexp"
	"strings"
)

//go:embed doctor.md
var doctor string

// Sections of doctor.md: where a test provokes each row of one.
const (
	Way          = "The way to a node"
	Certificates = "Certificates"
	Node         = "What a node depends on"
)

// Complaint is what doctor.md says that kmectl doctor says of something that is not well.
type Complaint struct{ about, says, do *regexp.Regexp }

var row = regexp.MustCompile("(?m)^\\| (.+) \\| `(.+)`: (.+) \\| (.+) \\|$")

// Complaints are the rows of a section of doctor.md, by what is wrong.
func Complaints(section string) map[string]Complaint {
	_, text, _ := strings.Cut(doctor, "\n## "+section+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	all := make(map[string]Complaint)
	for _, m := range row.FindAllStringSubmatch(text, -1) {
		all[m[1]] = Complaint{pattern(m[2]), pattern(m[3]), pattern(m[4])}
	}
	return all
}

// pattern is s with anything at all in the place of each "…".
func pattern(s string) *regexp.Regexp {
	return regexp.MustCompile("(?s)^" + strings.ReplaceAll(regexp.QuoteMeta(s), "…", ".*") + "$")
}

// Is says whether something that was found is what the row is about, and why not.
func (c Complaint) Is(about, says, do string) error {
	for _, part := range []struct {
		got  string
		want *regexp.Regexp
	}{{about, c.about}, {says, c.says}, {do, c.do}} {
		if !part.want.MatchString(part.got) {
			return fmt.Errorf("%q, and doctor.md has %q", part.got, part.want)
		}
	}
	return nil
}
