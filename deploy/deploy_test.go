package deploy

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/qutemail/kme/internal/store"
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
				Expr        string            `yaml:"expr"`
				For         string            `yaml:"for"`
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
	atOnce := make(map[string]*regexp.Regexp) // which alarms an alert without "for" tells of
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			n++
			if about, is := strings.CutPrefix(r.Expr, `kme_alarm{about=~"`); is && r.For == "" {
				about, _, _ = strings.Cut(about, `"`)
				atOnce[r.Alert] = regexp.MustCompile("^(?:" + about + ")$") // as Prometheus anchors it
			}
			if !regexp.MustCompile("alertname: " + r.Alert + `\n        exp_alerts:( \[|\n +- )\{`).MatchString(tests) {
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

	// An alarm of what has happened ends by itself: an alert that waits would not come.
	incidents := alarms(t, "incident")
	if len(incidents) < 5 {
		t.Errorf("found %q in internal/kme", slices.Collect(maps.Keys(incidents)))
	}
	for name := range incidents {
		var told []string
		for alert, about := range atOnce {
			if about.MatchString(name) {
				told = append(told, alert)
			}
		}
		if len(told) != 1 {
			t.Errorf("the alarm %s, which ends by itself, is told of by %q: want one alert without \"for\"", name, told)
		}
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

// run runs a program that Debian has, and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestUnits: by systemd's own measure, what a service could do if somebody took it over
// is at most 2.0 of 10.
func TestUnits(t *testing.T) {
	t.Parallel()
	for _, unit := range []string{"systemd/kmed.service", "systemd/kmed-sequencer.service", "systemd/kme-ca@.service", "systemd/qlink.service"} {
		run(t, "systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit)
	}
	unit := read(t, "systemd/kmed.service")
	for _, line := range []string{"Type=notify", "WatchdogSec=", "LoadCredential=hsm.pin:", "SetCredential=hsm.pin:\\n\n", "LoadCredential=pgpass:", "RestartPreventExitStatus=78", "LimitCORE=0"} {
		if !strings.Contains(unit, "\n"+line) {
			t.Errorf("kmed.service has no %s", line)
		}
	}
	sequencer := read(t, "systemd/kmed-sequencer.service")
	for _, line := range []string{"User=kme-seq", "LoadCredential=hsm.pin:", "SetCredential=hsm.pin:\\n\n", "InaccessiblePaths=-/etc/kmed/kmed.yaml\n", "LoadCredential=pgpass:", "RestartPreventExitStatus=78", "LimitCORE=0"} {
		if !strings.Contains(sequencer, "\n"+line) {
			t.Errorf("kmed-sequencer.service has no %s", line)
		}
	}
	ca, users := read(t, "systemd/kme-ca@.service"), read(t, "systemd/sysusers.conf")
	for _, line := range []string{"User=kme-ca-%i", "Group=kme-ca-%i", "StateDirectory=kme-ca/%i"} {
		if !strings.Contains(ca, "\n"+line+"\n") {
			t.Errorf("kme-ca@.service has no %s", line)
		}
	}
	for _, role := range []string{"sae", "kme", "operator"} { // each CA is a user of its own
		if !strings.Contains(users, "\nu kme-ca-"+role+" ") {
			t.Errorf("there is no user of the CA of role %s", role)
		}
	}
}

// TestPatroniRoles: the recipe for a highly available database makes each role, lets it in
// and gives it a certificate.
func TestPatroniRoles(t *testing.T) {
	t.Parallel()
	for file, form := range map[string]string{
		"patroni/post_init.sh": "CREATE ROLE %s LOGIN;",
		"patroni/patroni.yml":  `hostssl kme .*\b%s\b.* cert`,
		"patroni/README.md":    `for role in .*\b%s\b.*; do`,
	} {
		text := read(t, file)
		for _, role := range store.Roles {
			if !regexp.MustCompile(fmt.Sprintf(form, role)).MatchString(text) {
				t.Errorf("%s does not have the role %s", file, role)
			}
		}
	}
	if want := "GRANT " + store.AppRole + " TO " + store.OwnerRole; !strings.Contains(read(t, "patroni/post_init.sh"), want) {
		t.Errorf("post_init.sh does not say %s, without which kmed migrate refuses", want)
	}
}

// TestPackage: the .deb is whole: its programs run, its units are well formed, and its
// scripts are shell.
func TestPackage(t *testing.T) {
	t.Parallel()
	bin, err := filepath.Abs("../bin")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(bin, "kmed")); err != nil {
		t.Fatalf("%v (make build)", err)
	}
	dir := t.TempDir()
	run(t, "deb/build.sh", bin, "0~test", dir, "none")
	debs, err := filepath.Glob(filepath.Join(dir, "kme_0~test_*.deb"))
	if err != nil || len(debs) != 1 {
		t.Fatal(debs, err)
	}
	root := filepath.Join(dir, "root")
	run(t, "dpkg-deb", "-R", debs[0], root)
	for _, file := range []string{
		"usr/share/kme/kmed.yaml", "usr/share/kme/kme-ca.yaml", "usr/share/kme/qlink.yaml", "usr/share/kme/openapi.json", "usr/share/kme/policies/default.cedar", "usr/share/kme/policies/schema.cedarschema",
		"usr/share/kme/runbooks/README.md", "usr/share/kme/clients/kme.py", "usr/share/kme/alerts/kme.rules.yml", "usr/share/kme/THREATMODEL.md", "usr/share/kme/AUDIT.md", "usr/share/kme/INSTALL.md", "usr/share/kme/postgres/pg_ident.conf", "usr/share/kme/hsm/README.md", "usr/share/kme/pki/README.md",
		"usr/share/doc/kme/copyright", "usr/share/doc/kme/licenses/github.com/jackc/pgx/v5/LICENSE", "usr/share/man/man8/kmed.8.gz", "usr/lib/sysusers.d/kme.conf", "usr/lib/tmpfiles.d/kme.conf",
	} {
		if info, err := os.Stat(filepath.Join(root, file)); err != nil || info.Size() == 0 || info.Mode().Perm() != 0o644 && file != "usr/share/kme/clients/kme.py" {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		run(t, "sh", "-n", filepath.Join(root, "DEBIAN", script))
	}
	run(t, "systemd-sysusers", "--dry-run", filepath.Join(root, "usr/lib/sysusers.d/kme.conf"))
	for program, text := range map[string]string{"kmed": KmedYAML, "kme-ca": KMECAYAML, "qlink": QlinkYAML} {
		if out := run(t, filepath.Join(root, "usr/bin", program), "config", "print-default"); out != text {
			t.Errorf("%[1]s of the package prints another configuration than deploy/%[1]s.yaml: make build?", program)
		}
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--root="+root, "--recursive-errors=no", "kmed.service", "kmed-sequencer.service", "kme-ca@sae.service", "qlink.service").CombinedOutput()
	for _, line := range strings.Split(string(out), "\n") {
		if (strings.Contains(line, "kmed.service") || strings.Contains(line, "kmed-sequencer") || strings.Contains(line, "kme-ca@") || strings.Contains(line, "qlink")) && !strings.Contains(line, "/bin/sh") { // which is not ours
			t.Errorf("systemd-analyze verify: %s (%v)", line, err)
		}
	}
}

// alarms are the names of those that are raised in internal/kme by one of the calls; a
// name that ends with - is followed by what it is about.
func alarms(t *testing.T, calls string) map[string]bool {
	t.Helper()
	raised := regexp.MustCompile(`(?:` + calls + `)\(ctx, "([a-z-]+)"`)
	names := make(map[string]bool)
	files, err := filepath.Glob("../internal/kme/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, m := range raised.FindAllStringSubmatch(read(t, file), -1) {
			names[m[1]] = true
		}
	}
	return names
}

// TestAlarms: every alarm has its row in DEGRADED.md, and its page for whoever is on call.
func TestAlarms(t *testing.T) {
	t.Parallel()
	names := alarms(t, "raise|suspect|incident|judgeStrays")
	if len(names) < 20 {
		t.Errorf("found %d alarms in internal/kme", len(names))
	}
	for _, file := range []string{"DEGRADED.md", "runbooks/alarms.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for name := range names {
			// One of a part is named with the part in capitals: link-LINK.
			if whole := regexp.MustCompile("`" + name + "[A-Z]*`"); !whole.Match(text) {
				t.Errorf("%s says nothing of the alarm %s", file, name)
			}
		}
	}
}
