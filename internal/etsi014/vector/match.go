package vector

import (
	"encoding/base64"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
)

// found is what the patterns of a file have remembered, by name.
type found map[string]string

var reference = regexp.MustCompile(`\$\{([A-Za-z0-9_.]+)(:upper)?\}`)

// expand puts what was found for each ${name} of s.
func (f found) expand(s string) (string, error) {
	var err error
	s = reference.ReplaceAllStringFunc(s, func(ref string) string {
		m := reference.FindStringSubmatch(ref)
		v, ok := f[m[1]]
		if !ok {
			err = fmt.Errorf("%s was not found before", ref)
		}
		if m[2] != "" {
			return strings.ToUpper(v)
		}
		return v
	})
	return s, err
}

// matchJSON compares a body with the expectation, both JSON texts.
func (f found) matchJSON(want string, got []byte) error {
	want, err := f.expand(want)
	if err != nil {
		return err
	}
	var w, g any
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		return fmt.Errorf("the expected body: %w", err)
	}
	if err := json.Unmarshal(got, &g); err != nil {
		return fmt.Errorf("the body: %w", err)
	}
	return f.match("", w, g)
}

func (f found) match(at string, want, got any) error {
	switch w := want.(type) {
	case map[string]any:
		return f.matchObject(at, w, got)
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			return fmt.Errorf("%s: got %v, want %d elements", at, got, len(w))
		}
		for i := range w {
			if err := f.match(fmt.Sprintf("%s/%d", at, i), w[i], g[i]); err != nil {
				return err
			}
		}
		return nil
	case string:
		if strings.HasPrefix(w, "$") {
			return f.matchPattern(at, w, got)
		}
	}
	if want != got {
		return fmt.Errorf("%s: got %v, want %v", at, got, want)
	}
	return nil
}

func (f found) matchObject(at string, want map[string]any, got any) error {
	g, ok := got.(map[string]any)
	if !ok {
		return fmt.Errorf("%s: got %v, want an object", at, got)
	}
	known := make(map[string]bool)
	for name, w := range want {
		name, optional := strings.CutSuffix(name, "?")
		known[name] = true
		v, ok := g[name]
		if !ok && optional {
			continue
		}
		if !ok {
			return fmt.Errorf("%s/%s is missing", at, name)
		}
		if err := f.match(at+"/"+name, w, v); err != nil {
			return err
		}
	}
	for name := range g {
		if !known[name] {
			return fmt.Errorf("%s/%s is not expected", at, name)
		}
	}
	return nil
}

var (
	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	timeForm = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?$`)
)

func (f found) matchPattern(at, pattern string, got any) error {
	pattern, name, _ := strings.Cut(pattern, " as ")
	words := strings.Fields(pattern)
	text, isText := got.(string)
	var ok bool
	switch words[0] {
	case "$any":
		ok = true
	case "$string":
		ok = text != ""
	case "$int":
		n, isNumber := got.(float64)
		ok = isNumber && n == math.Trunc(n) && math.Abs(n) <= math.MaxInt32
	case "$uuid":
		id := text
		if len(words) > 1 {
			id = strings.TrimSuffix(text, words[1])
		}
		if ok = uuidForm.MatchString(id) && text == id+strings.Join(words[1:], ""); ok && name != "" {
			f[name+".id"] = id
		}
	case "$time":
		ok = timeForm.MatchString(text)
	case "$base64":
		ok = isBase64(text, argument(words, 1))
	case "$keys":
		return f.matchKeys(at, got, argument(words, 1), argument(words, 2), name)
	}
	if !ok {
		return fmt.Errorf("%s: got %v, want %s", at, got, pattern)
	}
	if name != "" && isText {
		f[name] = text
	}
	return nil
}

// matchKeys checks the array of a Key container (clause 6.3) of 014.
func (f found) matchKeys(at string, got any, number, bytes int, name string) error {
	keys, ok := got.([]any)
	if !ok || len(keys) != number {
		return fmt.Errorf("%s: got %d keys, want %d", at, len(keys), number)
	}
	seen := make(map[string]bool)
	for i, k := range keys {
		at := fmt.Sprintf("%s/%d", at, i)
		one := found{}
		if err := one.match(at, map[string]any{
			"key_ID": "$uuid as id", "key": fmt.Sprintf("$base64 %d as key", bytes),
			"key_ID_extension?": map[string]any{}, "key_extension?": map[string]any{"qkm_provenance": "$string"},
		}, k); err != nil {
			return err
		}
		if seen[one["id"]] || seen[one["key"]] {
			return fmt.Errorf("%s: the same ID or key twice", at)
		}
		seen[one["id"]], seen[one["key"]] = true, true
		if name != "" {
			f[fmt.Sprintf("%s.%d", name, i)], f[fmt.Sprintf("%s.%d.key", name, i)] = one["id"], one["key"]
		}
	}
	return nil
}

func isBase64(s string, bytes int) bool {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	return err == nil && len(b) == bytes && !strings.ContainsAny(s, "\r\n")
}

// argument is the i-th word of a pattern as a number; -1, which nothing matches, if
// it is none.
func argument(words []string, i int) int {
	if i < len(words) {
		if n, err := strconv.Atoi(words[i]); err == nil {
			return n
		}
	}
	return -1
}
