package main

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// document is a configuration file that was parsed. It says where things stand in
// it, and never shows its text: the DSN may hold a password.
type document struct {
	file    string
	members map[string]*token.Token // by full name, such as links[0].id
}

// decode reads text, one YAML document, into v. Unknown and repeated members,
// wrong types and values left out are errors that say where.
func decode(file string, text []byte, v any) (document, error) {
	d := document{file: file, members: make(map[string]*token.Token)}
	tree, err := parser.ParseBytes(text, 0)
	if err != nil {
		return d, d.explain(err)
	}
	if len(tree.Docs) != 1 || tree.Docs[0].Body == nil {
		return d, fmt.Errorf("%s: must be one YAML document, of member: value lines", file)
	}
	if err := d.add("", tree.Docs[0].Body, reflect.TypeOf(v).Elem()); err != nil {
		return d, err
	}
	if err := yaml.NodeToValue(tree.Docs[0].Body, v, yaml.Strict()); err != nil {
		return d, d.explain(err)
	}
	return d, nil
}

// add notes where a value stands that has this name, and those in it. A decoder
// would take 0x10 for the name 16 and the seconds in 3600 for nanoseconds: single
// values must be of the type that they are for. A nil type is that of a member that
// does not exist, which is left to the decoder.
func (d document) add(name string, n ast.Node, t reflect.Type) error {
	switch n := n.(type) {
	case *ast.MappingNode:
		for _, v := range n.Values {
			key := v.Key.GetToken()
			member := strings.TrimPrefix(name+"."+key.Value, ".")
			d.members[member] = key
			if err := d.add(member, v.Value, inside(t, key.Value)); err != nil {
				return err
			}
		}
	case *ast.SequenceNode:
		for i, v := range n.Values {
			if err := d.add(fmt.Sprintf("%s[%d]", name, i), v, inside(t, "")); err != nil {
				return err
			}
		}
	case *ast.NullNode:
		return d.errorf(name, "has no value")
	case ast.ScalarNode:
		if want, ok := wanted[t]; ok && !want.is(n) {
			return d.errorf(name, "is not %s", want.what)
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
	reflect.TypeFor[bool]():   {"true or false", func(n ast.ScalarNode) bool { _, ok := n.(*ast.BoolNode); return ok }},
	reflect.TypeFor[int]():    {"a whole number", func(n ast.ScalarNode) bool { _, ok := n.(*ast.IntegerNode); return ok }},
	reflect.TypeFor[string](): {"text: what looks like a number wants quotes", func(n ast.ScalarNode) bool { return n.Type() == ast.StringType || n.Type() == ast.LiteralType }},
}

// explain is a decoder's error, with its place and without the text around it.
func (d document) explain(err error) error {
	if e, ok := errors.AsType[yaml.Error](err); ok {
		return d.at(e.GetToken(), e.GetMessage())
	}
	return fmt.Errorf("%s: %w", d.file, err)
}

// errorf is an error about a member. If it is not in the file, the place is that of
// the nearest member around it that is.
func (d document) errorf(member, format string, args ...any) error {
	where := member
	for d.members[where] == nil && where != "" {
		where = where[:max(0, strings.LastIndexAny(where, ".["))]
	}
	return d.at(d.members[where], member+" "+fmt.Sprintf(format, args...))
}

// at is an error at t, which may be nil.
func (d document) at(t *token.Token, what string) error {
	if t == nil || t.Position == nil {
		return fmt.Errorf("%s: %s", d.file, what)
	}
	return fmt.Errorf("%s:%d:%d: %s", d.file, t.Position.Line, t.Position.Column, what)
}
