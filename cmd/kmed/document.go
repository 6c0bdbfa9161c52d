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
	if err := d.add("", tree.Docs[0].Body); err != nil {
		return d, err
	}
	if err := yaml.NodeToValue(tree.Docs[0].Body, v, yaml.Strict()); err != nil {
		return d, d.explain(err)
	}
	return d, nil
}

// add notes where a value stands that has this name, and those in it.
func (d document) add(name string, n ast.Node) error {
	switch n := n.(type) {
	case *ast.MappingNode:
		for _, v := range n.Values {
			member := strings.TrimPrefix(name+"."+v.Key.GetToken().Value, ".")
			d.members[member] = v.Key.GetToken()
			if err := d.add(member, v.Value); err != nil {
				return err
			}
		}
	case *ast.SequenceNode:
		for i, v := range n.Values {
			if err := d.add(fmt.Sprintf("%s[%d]", name, i), v); err != nil {
				return err
			}
		}
	case *ast.NullNode:
		return d.errorf(name, "has no value")
	case *ast.StringNode:
		if _, err := time.ParseDuration(n.Value); err != nil && isDuration(name) {
			return d.errorf(name, "%q is not %s", n.Value, wanted[reflect.TypeFor[time.Duration]()])
		}
	}
	return nil
}

// isDuration says whether a member is one: a decoder's own error for these says
// neither which nor where.
func isDuration(member string) bool {
	switch member[strings.LastIndex(member, ".")+1:] {
	case "epoch", "ttl", "max_ttl", "pool_ttl", "interval":
		return true
	}
	return false
}

// wanted says in words what a value must be.
var wanted = map[reflect.Type]string{
	reflect.TypeFor[time.Duration](): "a duration with its unit, such as 90m or 24h",
	reflect.TypeFor[bool]():          "true or false",
	reflect.TypeFor[int]():           "a whole number",
	reflect.TypeFor[string]():        "text",
}

// explain is a decoder's error, with its place and without the text around it.
func (d document) explain(err error) error {
	if e, ok := errors.AsType[*yaml.TypeError](err); ok && wanted[e.DstType] != "" {
		return d.at(e.Token, fmt.Sprintf("%q is not %s", e.Token.Value, wanted[e.DstType]))
	}
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
