// Package vector reads the test vectors of the doors for SAEs and runs them
// against any pair of KMEs: the doors alone in their own tests, two real KMEs in
// the lab. It is for tests and labs; nothing that serves keys imports it.
//
// A vector is a text file, named after the row of the checklist that it shows
// (014-5.4-06-unknown-key.txt): a comment that says what and why, then exchanges.
//
//	> KM1 alice POST /api/v1/keys/bob/enc_keys
//	Content-Type: application/json
//
//	{"number": 2}
//
//	< 200 stored -2
//	Cache-Control: no-store
//
//	{"keys": "$keys 2 32 as k"}
//
// A request names the KME, the SAE whose certificate is presented, the method and
// the target. Headers follow, then a blank line and the body, if it has one.
// Instead of a header, "@quoted" says that the body is a Go string literal, for
// bytes that a text file had better not hold, and "@pad 70000" that it is filled
// up with blanks to so many bytes.
//
// An answer has the status. "stored same", or "stored" and a signed number, says by
// how much it changes alice's stored_key_count for bob. Headers listed must be
// there, and the body, if given, must be equal as JSON: no member more or less. A
// member whose expected name ends in "?" may be missing. Expected strings and
// headers may be patterns:
//
//	$any              anything at all
//	$absent           no such header
//	$string           a string that is not empty
//	$int              an integer that fits 32 bits
//	$uuid             a UUID of 36 characters in lower case
//	$uuid -alice as k the same with that end; ${k.id} is the UUID without it
//	$base64 N         N bytes in base64, standard alphabet, padded
//	$time             a time in ISO 8601 without a zone
//	$keys N B as k    the keys of a container: N of B bytes, all different
//
// "as k" after a pattern remembers what was found: ${k} stands for it from then on,
// in targets, headers, bodies and expectations. $keys remembers the i-th key as
// ${k.i} (its ID) and ${k.i.key} (as in the answer). ${k:upper} is ${k} in upper
// case. Where the vectors are run gives ${KM1} and ${KM2}, the IDs of the two KMEs. KM2
// is set to be strict.
package vector

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
)

// File is one vector.
type File struct {
	Name  string // of the file, without .txt
	Steps []Step
}

// Step is one request and what must come back.
type Step struct {
	Line int // of the request in the file, from 1

	KME, Caller    string
	Method, Target string
	Header         http.Header
	Body           []byte

	Status       int
	Stored       *int // change of stored_key_count; nil if it does not matter
	AnswerHeader map[string]string
	Answer       string // JSON with patterns; "" if the body does not matter
}

// Load reads every vector in a folder, in the order of names. It is an error if
// there is none.
func Load(folder fs.FS) ([]File, error) {
	names, err := fs.Glob(folder, "*.txt")
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("loading vectors: there are none")
	}
	slices.Sort(names)
	files := make([]File, len(names))
	for i, name := range names {
		text, err := fs.ReadFile(folder, name)
		if err != nil {
			return nil, err
		}
		if files[i], err = Parse(strings.TrimSuffix(path.Base(name), ".txt"), text); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// Parse reads one vector.
func Parse(name string, text []byte) (File, error) {
	p := parser{lines: strings.Split(strings.ReplaceAll(string(text), "\r\n", "\n"), "\n")}
	f := File{Name: name}
	for p.skipComments(); p.next < len(p.lines); p.skipComments() {
		s, err := p.step()
		if err != nil {
			return File{}, fmt.Errorf("%s.txt:%d: %w", name, p.next, err)
		}
		f.Steps = append(f.Steps, s)
	}
	if len(f.Steps) == 0 {
		return File{}, fmt.Errorf("%s.txt: no request", name)
	}
	return f, nil
}

type parser struct {
	lines []string
	next  int // index of the line to read next
}

func (p *parser) skipComments() {
	for p.next < len(p.lines) && (p.lines[p.next] == "" || strings.HasPrefix(p.lines[p.next], "#")) {
		p.next++
	}
}

func (p *parser) line() string {
	if p.next == len(p.lines) {
		return ""
	}
	p.next++
	return p.lines[p.next-1]
}

func (p *parser) step() (Step, error) {
	words := strings.Fields(p.line())
	if len(words) != 5 || words[0] != ">" {
		return Step{}, fmt.Errorf("want > KME CALLER METHOD TARGET")
	}
	s := Step{Line: p.next, KME: words[1], Caller: words[2], Method: words[3], Target: words[4], Header: http.Header{}}
	var quoted bool
	var pad int
	for _, l := range p.paragraph() {
		switch name, value, ok := strings.Cut(l, ": "); {
		case l == "@quoted":
			quoted = true
		case strings.HasPrefix(l, "@pad "):
			pad, _ = strconv.Atoi(l[len("@pad "):])
		case ok:
			s.Header.Add(name, value)
		default:
			return s, fmt.Errorf("%q is no header", l)
		}
	}
	body := p.body()
	if quoted {
		var err error
		if body, err = strconv.Unquote(body); err != nil {
			return s, fmt.Errorf("the body is no Go string literal: %w", err)
		}
	}
	s.Body = []byte(body)
	s.Body = append(s.Body, bytes.Repeat([]byte(" "), max(0, pad-len(s.Body)))...)
	return s, p.answer(&s)
}

func (p *parser) answer(s *Step) error {
	words := strings.Fields(p.line())
	if len(words) < 2 || words[0] != "<" {
		return fmt.Errorf("want < STATUS")
	}
	var err error
	if s.Status, err = strconv.Atoi(words[1]); err != nil {
		return fmt.Errorf("status: %w", err)
	}
	switch {
	case len(words) == 2:
	case len(words) == 4 && words[2] == "stored":
		change := 0
		if words[3] != "same" {
			if change, err = strconv.Atoi(words[3]); err != nil {
				return fmt.Errorf("stored: %w", err)
			}
		}
		s.Stored = &change
	default:
		return fmt.Errorf("want < STATUS stored CHANGE")
	}
	s.AnswerHeader = make(map[string]string)
	for _, l := range p.paragraph() {
		name, value, ok := strings.Cut(l, ": ")
		if !ok {
			return fmt.Errorf("%q is no header", l)
		}
		s.AnswerHeader[name] = value
	}
	s.Answer = p.body()
	return nil
}

// paragraph returns the lines up to the next empty one.
func (p *parser) paragraph() []string {
	first := p.next
	for p.next < len(p.lines) && p.lines[p.next] != "" && !p.atStep() {
		p.next++
	}
	return p.lines[first:p.next]
}

// body returns what stands before the next request, answer or comment.
func (p *parser) body() string {
	first := p.next
	for p.next < len(p.lines) && !p.atStep() && !strings.HasPrefix(p.lines[p.next], "#") {
		p.next++
	}
	return strings.TrimSpace(strings.Join(p.lines[first:p.next], "\n"))
}

func (p *parser) atStep() bool {
	return strings.HasPrefix(p.lines[p.next], "> ") || strings.HasPrefix(p.lines[p.next], "< ")
}
