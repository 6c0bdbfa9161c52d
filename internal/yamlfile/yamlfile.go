// Package yamlfile reads the daemons' configuration files: strictly, so that what an
// operator has mistyped is refused rather than passed over, and with the place of every
// value, so that whatever is found wrong later names its line too.
//
// It never shows the text of a file: the DSN in it may hold a password.
package yamlfile

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// File is a configuration file that was decoded. It says where things stand in it.
type File struct {
	path    string
	members map[string]*token.Token // by full name, such as links[0].id
}

// Decode reads text, the one YAML document of the file at path, into the struct that v
// points to, whose members have tags "yaml". Unknown and repeated members, wrong types and
// values left out are errors that say where. What the file does not name stays as it was.
func Decode(path string, text []byte, v any) (File, error) {
	f := File{path: path, members: make(map[string]*token.Token)}
	tree, err := parser.ParseBytes(text, 0)
	if err != nil {
		return f, f.explain(err)
	}
	if len(tree.Docs) != 1 || tree.Docs[0].Body == nil {
		return f, fmt.Errorf("%s: must be one YAML document, of member: value lines", path)
	}
	if err := f.add("", tree.Docs[0].Body, reflect.TypeOf(v).Elem()); err != nil {
		return f, err
	}
	if err := yaml.NodeToValue(tree.Docs[0].Body, v, yaml.Strict()); err != nil {
		return f, f.explain(err)
	}
	return f, nil
}

// Names says whether a member, such as links[0].id, is in the file.
func (f File) Names(member string) bool { return f.members[member] != nil }

// Errorf is an error about a member. If it is not in the file, the place is that of
// the nearest member around it that is.
func (f File) Errorf(member, format string, args ...any) error {
	where := member
	for f.members[where] == nil && where != "" {
		where = where[:max(0, strings.LastIndexAny(where, ".["))]
	}
	return f.at(f.members[where], member+" "+fmt.Sprintf(format, args...))
}

// Resolve makes paths that are relative to the file's folder absolute. Empty ones stay empty.
func (f File) Resolve(paths ...*string) error {
	dir, err := filepath.Abs(filepath.Dir(f.path))
	if err != nil {
		return err
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	return nil
}

// Checker gathers what is wrong with the values of a file.
type Checker struct {
	File
	errs []error
}

// Must notes that member is wrong unless it is ok.
func (k *Checker) Must(ok bool, member, format string, args ...any) {
	if !ok {
		k.errs = append(k.errs, k.Errorf(member, format, args...))
	}
}

// Has notes that member is missing if its value is empty, and says whether it is there.
func (k *Checker) Has(member, value string) bool {
	k.Must(value != "", member, "is missing")
	return value != ""
}

// Err is all that was noted, a line each, or nil.
func (k *Checker) Err() error { return errors.Join(k.errs...) }

// add notes where a value stands that has this name, and those in it. A decoder
// would take 0x10 for the name 16 and the seconds in 3600 for nanoseconds: single
// values must be of the type that they are for. A nil type is that of a member that
// does not exist, which is left to the decoder.
func (f File) add(name string, n ast.Node, t reflect.Type) error {
	switch n := n.(type) {
	case *ast.MappingNode:
		for _, v := range n.Values {
			key := v.Key.GetToken()
			member := strings.TrimPrefix(name+"."+key.Value, ".")
			f.members[member] = key
			if err := f.add(member, v.Value, inside(t, key.Value)); err != nil {
				return err
			}
		}
	case *ast.SequenceNode:
		for i, v := range n.Values {
			if err := f.add(fmt.Sprintf("%s[%d]", name, i), v, inside(t, "")); err != nil {
				return err
			}
		}
	case *ast.NullNode:
		return f.Errorf(name, "has no value")
	case ast.ScalarNode:
		if want, ok := wanted[t]; ok && !want.is(n) {
			return f.Errorf(name, "is not %s", want.what)
		}
	}
	return nil
}

// inside is the type of what a member of a value of type t is for: nil if nothing.
func inside(t reflect.Type, member string) reflect.Type {
	switch {
	case t == nil:
		return nil
	case t.Kind() == reflect.Slice || t.Kind() == reflect.Map:
		return t.Elem()
	case t.Kind() == reflect.Struct:
		for f := range t.Fields() {
			if f.Tag.Get("yaml") == member {
				return f.Type
			}
		}
	}
	return nil
}

// wanted says, for each type of a single value, how it is written.
var wanted = map[reflect.Type]struct {
	what string
	is   func(ast.ScalarNode) bool
}{
	reflect.TypeFor[time.Duration](): {"a duration with its unit, such as 90m or 24h", func(n ast.ScalarNode) bool {
		s, ok := n.(*ast.StringNode)
		if !ok {
			return false
		}
		_, err := time.ParseDuration(s.Value)
		return err == nil
	}},
	reflect.TypeFor[bool]():    {"true or false", func(n ast.ScalarNode) bool { return n.Type() == ast.BoolType }},
	reflect.TypeFor[int]():     {"a whole number", func(n ast.ScalarNode) bool { return n.Type() == ast.IntegerType }},
	reflect.TypeFor[float64](): {"a number", isNumber},
	reflect.TypeFor[string]():  {"text: what looks like a number wants quotes", func(n ast.ScalarNode) bool { return n.Type() == ast.StringType || n.Type() == ast.LiteralType }},
}

// isNumber says whether n is a finite number. The parser takes one without a point, such as
// 1e9, for text; the decoder does not.
func isNumber(n ast.ScalarNode) bool {
	if s, ok := n.(*ast.StringNode); ok && s.GetToken().Type == token.StringType { // without quotes
		v, err := strconv.ParseFloat(s.Value, 64)
		return err == nil && !math.IsInf(v, 0) && !math.IsNaN(v)
	}
	return n.Type() == ast.FloatType || n.Type() == ast.IntegerType
}

// explain is a decoder's error, with its place and without the text around it.
func (f File) explain(err error) error {
	if e, ok := errors.AsType[yaml.Error](err); ok {
		return f.at(e.GetToken(), e.GetMessage())
	}
	return fmt.Errorf("%s: %w", f.path, err)
}

// at is an error at t, which may be nil.
func (f File) at(t *token.Token, what string) error {
	if t == nil || t.Position == nil {
		return fmt.Errorf("%s: %s", f.path, what)
	}
	return fmt.Errorf("%s:%d:%d: %s", f.path, t.Position.Line, t.Position.Column, what)
}
