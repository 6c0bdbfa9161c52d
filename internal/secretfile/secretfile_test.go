package secretfile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSource(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"good": 0o400, "written": 0o600, "group": 0o640, "all": 0o604, "writable": 0o602, "passed": 0o440, "shown": 0o444} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("secret\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	file := func(name string) Source { return Source{File: filepath.Join(dir, name)} }
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	for name, tc := range map[string]struct {
		from Source
		want string // of the error; empty: there is none
	}{
		"a file of its owner":        {file("good"), ""},
		"one that he can write":      {file("written"), ""},
		"one of the group":           {file("group"), "chmod 600"},
		"one of all":                 {file("all"), "chmod 600"},
		"one that others write":      {file("writable"), "chmod 600"},
		"a folder":                   {Source{File: dir}, "regular file"},
		"no file":                    {file("none"), "no such file"},
		"a credential":               {Source{Credential: "passed"}, ""},
		"one that all can read":      {Source{Credential: "shown"}, "chmod 600"},
		"one that was not passed":    {Source{Credential: "none"}, "no such file"},
		"a path instead of its name": {Source{Credential: "../passed"}, "is not the name of a systemd credential"},
		"nothing":                    {Source{}, "and not both"},
		"a file and a credential":    {Source{File: filepath.Join(dir, "good"), Credential: "passed"}, "and not both"},
	} {
		path, err := tc.from.Path()
		if ok := tc.want == ""; ok != (err == nil) || !ok && !strings.Contains(err.Error(), tc.want) || ok && filepath.Dir(path) != dir {
			t.Errorf("path of %s: %q, %v; want an error with %q", name, path, err, tc.want)
		}
		got, err := tc.from.Read(len("secret\n"))
		if ok := tc.want == ""; ok != (err == nil) || !ok && !strings.Contains(err.Error(), tc.want) || ok && string(got) != "secret\n" {
			t.Errorf("reading %s: %q, %v; want an error with %q", name, got, err, tc.want)
		}
	}
	if got, err := file("good").Read(len("secret")); err == nil || len(got) > 0 || !strings.Contains(err.Error(), "has more than 6 bytes") {
		t.Errorf("reading more than was allowed: %q, %v", got, err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := (Source{Credential: "passed"}).Path(); err == nil || !strings.Contains(err.Error(), "systemd has passed none") {
		t.Errorf("a credential without systemd: %v", err)
	}
}
