package policies

import (
	"bytes"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// place is where something stands in a file.
type place struct {
	file         string
	line, column int
}

// placeOf is the place of t, which may be nil when a decoder knows none.
func placeOf(file string, t *token.Token) place {
	if t == nil || t.Position == nil {
		return place{file, 1, 1}
	}
	return place{file, t.Position.Line, t.Position.Column}
}

// or is the place of w, or p if w is not in the file.
func (p place) or(w word) place {
	if w.at == nil {
		return p
	}
	return placeOf(p.file, w.at)
}

// errorf is an error at p: "file:line:column: ...".
func (p place) errorf(format string, args ...any) error {
	return fmt.Errorf("%s:%d:%d: %w", p.file, p.line, p.column, fmt.Errorf(format, args...))
}

// word is a YAML string and where it stands. Numbers, booleans and nulls are not
// strings here, although a decoder would make them such: an ID of digits wants
// quotes.
type word struct {
	text string
	at   *token.Token
}

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (w *word) UnmarshalYAML(n ast.Node) error {
	s, ok := n.(*ast.StringNode)
	if !ok {
		return &typeError{n.GetToken(), "a string"}
	}
	w.text, w.at = s.Value, s.GetToken()
	return nil
}

// version is the number of a file's format.
type version int

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (v *version) UnmarshalYAML(n ast.Node) error {
	i, ok := n.(*ast.IntegerNode)
	if !ok || i.GetToken().Value != "1" {
		return &typeError{n.GetToken(), "1, the only version there is"}
	}
	*v = 1
	return nil
}

// lifetime is a duration in Go's form, such as 168h.
type lifetime time.Duration

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (l *lifetime) UnmarshalYAML(n ast.Node) error {
	d, err := time.ParseDuration(n.GetToken().Value)
	if _, ok := n.(*ast.StringNode); !ok || err != nil || d <= 0 {
		return &typeError{n.GetToken(), "a duration such as 168h"}
	}
	*l = lifetime(d)
	return nil
}

// typeError says that a value is not what it should be.
type typeError struct {
	at   *token.Token
	want string
}

// Error is for whoever has no file name at hand.
func (e *typeError) Error() string { return fmt.Sprintf("%q is not %s", e.at.Value, e.want) }

// document is a YAML file that has been read: where its entries stand.
type document struct {
	file    string
	entries map[string][]place // of each top-level list, by its key
}

// entry is where an entry of a top-level list begins.
func (d document) entry(list string, i int) place { return d.entries[list][i] }

// decode reads text, which is one YAML document without anchors, aliases, merge
// keys, tags or nulls, into v. Unknown fields, keys used twice and wrong types are
// errors.
func decode(file string, text []byte, v any) (document, error) {
	doc := document{file: file, entries: make(map[string][]place)}
	start := place{file, 1, 1}
	if !utf8.Valid(text) {
		return doc, start.errorf("not UTF-8")
	}
	tokens := lexer.Tokenize(string(text))
	if err := checkDepth(file, tokens); err != nil {
		return doc, err
	}
	tree, err := parser.Parse(tokens, 0)
	if err != nil {
		return doc, positioned(file, err)
	}
	if len(tree.Docs) != 1 || tree.Docs[0].Body == nil {
		return doc, start.errorf("must be one YAML document")
	}
	plain := plainVisitor{file: file}
	ast.Walk(&plain, tree.Docs[0].Body)
	if plain.err != nil {
		return doc, plain.err
	}
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(v); err != nil {
		return doc, positioned(file, err)
	}
	if top, ok := tree.Docs[0].Body.(*ast.MappingNode); ok {
		for _, field := range top.Values {
			if list, ok := field.Value.(*ast.SequenceNode); ok {
				for _, n := range list.Values {
					doc.entries[field.Key.GetToken().Value] = append(doc.entries[field.Key.GetToken().Value], placeOf(file, firstToken(n)))
				}
			}
		}
	}
	return doc, nil
}

// maxDepth is how deep brackets may be nested, and twice how far a dash may be
// indented. Our files need 3. The parser's time and memory grow with the square of
// the depth, and worse: a file of brackets would take the machine down.
const maxDepth = 16

func checkDepth(file string, tokens token.Tokens) error {
	depth := 0
	for _, t := range tokens {
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		case token.SequenceEntryType, token.MappingKeyType:
			if t.Position.Column > 2*maxDepth {
				return placeOf(file, t).errorf("nested too deeply")
			}
		}
		if depth > maxDepth {
			return placeOf(file, t).errorf("nested too deeply")
		}
	}
	return nil
}

// firstToken is where a reader sees n begin: a mapping's own token is a colon.
func firstToken(n ast.Node) *token.Token {
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
		return m.Values[0].Key.GetToken()
	}
	return n.GetToken()
}

// positioned is err with the place that it knows.
func positioned(file string, err error) error {
	if e, ok := errors.AsType[*typeError](err); ok {
		return placeOf(file, e.at).errorf("%s", e.Error())
	}
	if e, ok := errors.AsType[yaml.Error](err); ok {
		return placeOf(file, e.GetToken()).errorf("%s", e.GetMessage())
	}
	return place{file, 1, 1}.errorf("%w", err)
}

// plainVisitor refuses what makes a YAML file mean something other than what a
// reader sees at that place.
type plainVisitor struct {
	file string
	err  error
}

// Visit implements ast.Visitor.
func (p *plainVisitor) Visit(n ast.Node) ast.Visitor {
	switch n := n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.TagNode, *ast.MergeKeyNode, *ast.DirectiveNode:
		p.refuse(n, "anchors, aliases, tags, merge keys and directives are not used in these files")
	case *ast.NullNode:
		p.refuse(n, "a value is missing")
	case *ast.MappingValueNode:
		if _, ok := n.Key.(*ast.StringNode); !ok {
			p.refuse(n.Key, "a key is a plain word")
		}
	}
	if p.err != nil {
		return nil
	}
	return p
}

func (p *plainVisitor) refuse(n ast.Node, why string) {
	if p.err == nil {
		p.err = placeOf(p.file, n.GetToken()).errorf("%s", why)
	}
}
