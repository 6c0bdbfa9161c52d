package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// promtool runs it in a folder.
func promtool(t *testing.T, dir string, args ...string) {
	t.Helper()
	program, err := exec.LookPath("promtool")
	if err != nil {
		if program, err = filepath.Abs("../bin/promtool"); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("promtool %v: %v (deploy/alerts/promtool.sh fetches it)\n%s", args, err, out)
	}
}

// TestAlerts: the rules do what their tests say, each has one, and each has a page.
func TestAlerts(t *testing.T) {
	t.Parallel()
	promtool(t, "alerts", "check", "rules", "kme.rules.yml")
	promtool(t, "alerts", "test", "rules", "kme.rules_test.yml")

	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert       string            `yaml:"alert"`
				Labels      map[string]string `yaml:"labels"`
				Annotations map[string]string `yaml:"annotations"`
			} `yaml:"rules"`
		} `yaml:"groups"`
	}
	if err := yaml.Unmarshal([]byte(read(t, "alerts/kme.rules.yml")), &rules); err != nil {
		t.Fatal(err)
	}
	tests, index := read(t, "alerts/kme.rules_test.yml"), read(t, "runbooks/README.md")
	n := 0
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			n++
			if !strings.Contains(tests, "alertname: "+r.Alert+"\n        exp_alerts: [{") {
				t.Errorf("%s is not seen to come in kme.rules_test.yml", r.Alert)
			}
			if s := r.Labels["severity"]; s != "page" && s != "ticket" {
				t.Errorf("%s has severity %q", r.Alert, s)
			}
			page, ok := strings.CutPrefix(r.Annotations["runbook_url"], "deploy/runbooks/")
			if !ok || !strings.HasPrefix(read(t, filepath.Join("runbooks", page)), "# ") {
				t.Errorf("%s has no page: %s", r.Alert, r.Annotations["runbook_url"])
			}
			if !strings.Contains(index, r.Alert) || !strings.Contains(index, "("+page+")") {
				t.Errorf("%s, or its page, is not in runbooks/README.md", r.Alert)
			}
		}
	}
	if n < 15 {
		t.Errorf("%d rules were found", n)
	}
}

// TestRunbooks: every page is in the list, and no link of one leads nowhere.
func TestRunbooks(t *testing.T) {
	t.Parallel()
	pages, err := filepath.Glob("runbooks/*.md")
	if err != nil || len(pages) < 15 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	index := read(t, "runbooks/README.md")
	for _, page := range pages {
		name := filepath.Base(page)
		if name != "README.md" && !strings.Contains(index, "("+name+")") {
			t.Errorf("%s is not in the list", name)
		}
		for _, part := range strings.Split(read(t, page), "](")[1:] {
			target, _, _ := strings.Cut(part, ")")
			if _, err := os.Stat(filepath.Join("runbooks", target)); err != nil {
				t.Errorf("%s leads to %s: %v", name, target, err)
			}
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
