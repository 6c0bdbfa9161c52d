// Package yamltest holds the shipped example of a configuration file against the struct
// that it is read into.
package yamltest

import (
	"go/token"
	"reflect"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Default is a line of an example that shows a default.
var Default = regexp.MustCompile(`(?m)^( *)# ( *[a-z0-9_]+:( (\S+|\[.*\]))?)$`)

// WithDefaults is the text of an example with its defaults written out.
func WithDefaults(text string) string { return Default.ReplaceAllString(text, "$1$2") }

// Example holds an example against the configuration that load reads it into: it loads,
// shows every member there is, and what it says of defaults is so. It returns what was
// loaded.
func Example[T any](t *testing.T, text string, load func(text string) (T, error)) T {
	t.Helper()
	got, err := load(text)
	if err != nil {
		t.Fatal(err)
	}
	lookFor(t, text, reflect.TypeFor[T]())
	explicit, err := load(WithDefaults(text))
	if err != nil {
		t.Fatal(err)
	}
	unexported := cmp.FilterPath(func(p cmp.Path) bool {
		f, ok := p.Last().(cmp.StructField)
		return ok && !token.IsExported(f.Name())
	}, cmp.Ignore())
	if diff := cmp.Diff(got, explicit, unexported, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the example with its defaults written out (-as it is +written out):\n%s", diff)
	}
	return got
}

// lookFor looks for the members of a struct, and of those in it.
func lookFor(t *testing.T, text string, in reflect.Type) {
	t.Helper()
	for f := range in.Fields() {
		if !f.IsExported() {
			continue
		}
		name := f.Tag.Get("yaml")
		if !regexp.MustCompile(`(?m)^[ #{-]*` + name + `:|[{,] *` + name + `:`).MatchString(text) {
			t.Errorf("%s of %s is not in the example", name, in)
		}
		switch of := f.Type; {
		case of.Kind() == reflect.Struct:
			lookFor(t, text, of)
		case of.Kind() == reflect.Slice && of.Elem().Kind() == reflect.Struct:
			lookFor(t, text, of.Elem())
		}
	}
}
