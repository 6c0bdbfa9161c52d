package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/qutemail/kme/internal/lab"
	"github.com/qutemail/kme/internal/lab/binaries"
)

// TestScripts runs the scripts of testdata against labs of their own, with the
// product's programs, the stock step CLI and curl.
func TestScripts(t *testing.T) {
	bin, err := binaries.Build("noyubikey", "kmelab", "kmed", "kme-ca", "qlink", "kmectl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(bin) })
	step, err := binaries.Step()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", strings.Join([]string{bin, step, env.Getenv("PATH")}, string(os.PathListSeparator)))
			// Not in $WORK, which Postgres, as a user of its own, may not enter.
			dir, err := os.MkdirTemp("", "kme-lab-")
			if err != nil {
				return err
			}
			env.Defer(func() { _ = os.RemoveAll(dir) })
			env.Setenv("LAB", dir)
			env.Setenv("KMECTL_PROFILES", dir)
			env.Setenv("STEPPATH", filepath.Join(env.WorkDir, "step"))
			return os.Chmod(dir, 0o711)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"await":    await,
			"labenv":   labEnv,
			"setfirst": setFirst,
			"setjson":  setJSON,
		},
	})
}

// await FILE PATTERN: until a line of FILE matches.
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await FILE PATTERN")
	}
	pattern, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); <-tick.C {
		if text, err := os.ReadFile(ts.MkAbs(args[0])); err == nil && pattern.Match(text) {
			return
		}
	}
	text, _ := os.ReadFile(ts.MkAbs(args[0]))
	ts.Fatalf("no line of %s matches %s:\n%s", args[0], args[1], text)
}

// labEnv sets KM1, KM1_OPERATOR, KM2 and SAE_CA to the URLs of the lab in $LAB.
func labEnv(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: labenv")
	}
	var known struct{ Ports lab.Ports }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(filepath.Join(ts.Getenv("LAB"), "lab.json"))), &known))
	for name, port := range map[string]int{
		"KM1": known.Ports.KM1[0][0], "KM1_OPERATOR": known.Ports.KM1[0][3], "KM2": known.Ports.KM2[0][0], "SAE_CA": known.Ports.SAECA,
	} {
		ts.Setenv(name, fmt.Sprintf("https://localhost:%d", port))
	}
}

// setfirst NAME FILE: set NAME to the first word of FILE.
func setFirst(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: setfirst NAME FILE")
	}
	words := strings.Fields(ts.ReadFile(args[1]))
	if len(words) == 0 {
		ts.Fatalf("%s is empty", args[1])
	}
	ts.Setenv(args[0], words[0])
}

// setjson NAME FILE MEMBER: set NAME to the text that MEMBER of the JSON object in
// FILE has.
func setJSON(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: setjson NAME FILE MEMBER")
	}
	var object map[string]any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1])), &object))
	text, ok := object[args[2]].(string)
	if !ok {
		ts.Fatalf("%s has no text %s: %v", args[1], args[2], object)
	}
	ts.Setenv(args[0], text)
}
