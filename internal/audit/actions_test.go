package audit

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// Each action that has a name is written by somebody: an auditor who looks for one that
// nobody writes takes its absence for a sign that all was well. To compare with an
// action, or to tell actions apart in a switch, is not to write it.
func TestEveryActionIsWritten(t *testing.T) {
	t.Parallel()
	files := token.NewFileSet()
	written := make(map[string]bool)
	for _, package_ := range []string{"kme", "store"} { // those that record events
		dir := filepath.Join("..", package_)
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(files, path, nil, 0)
			if err == nil {
				ast.Inspect(file, func(n ast.Node) bool { return look(n, written) })
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	file, err := parser.ParseFile(files, "event.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	actions := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Action" {
			return false
		}
		for _, name := range spec.Names {
			if actions++; !written[name.Name] {
				t.Errorf("nobody writes an event of audit.%s", name.Name)
			}
		}
		return false
	})
	if actions < 40 {
		t.Errorf("event.go has %d actions: this test does not find them", actions)
	}
}

// look notes each audit.Name that is neither compared with nor a case.
func look(n ast.Node, written map[string]bool) bool {
	switch n := n.(type) {
	case *ast.BinaryExpr:
		return n.Op != token.EQL && n.Op != token.NEQ
	case *ast.CaseClause:
		for _, s := range n.Body {
			ast.Inspect(s, func(n ast.Node) bool { return look(n, written) })
		}
		return false
	case *ast.SelectorExpr:
		if x, ok := n.X.(*ast.Ident); ok && x.Name == "audit" {
			written[n.Sel.Name] = true
		}
	}
	return true
}
