package failpoint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestNames: Names lists every failpoint once, in the order of the constants, and
// each is hit somewhere in the product: a test that arms one which nothing hits
// would wait for ever, or pass.
func TestNames(t *testing.T) {
	t.Parallel()
	constants, values := declared(t)
	if !slices.Equal(values, Names) {
		t.Errorf("Names:\n%q\nwant the constants:\n%q", Names, values)
	}
	for i, name := range values {
		if slices.Index(values, name) != i {
			t.Errorf("two failpoints are called %s", name)
		}
	}
	sources := product(t)
	for _, c := range constants {
		if !strings.Contains(sources, "failpoint."+c) {
			t.Errorf("nothing hits %s", c)
		}
	}
}

// declared are the constants of names.go and their values, in order.
func declared(t *testing.T) (constants, values []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "names.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || spec.Names[0].Name == "Names" {
			return true
		}
		value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		constants, values = append(constants, spec.Names[0].Name), append(values, value)
		return true
	})
	return constants, values
}

// product is the text of all sources of the module but tests.
func product(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		b.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
