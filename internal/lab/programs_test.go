package lab

import (
	"os"
	"os/exec"
	"regexp"
	"testing"
)

// clients: the clients of deploy/clients do what they promise, and the examples of the
// old service's README, with nothing changed but URL and certificate, what it says.
func clients(t *testing.T, l *Lab) {
	if err := l.enrol(t.Context(), "sae", "qutemail", l.KM1.URL()); err != nil {
		t.Fatal(err)
	}
	const python = "/usr/bin/python3" // Debian's, whose packages these are
	cmd := exec.CommandContext(t.Context(), python, "-W", "error::SyntaxWarning", "-B", "../../deploy/clients/test_clients.py", "-v")
	cmd.Env = append(os.Environ(), "KM1="+l.KM1.URL(), "KM2="+l.KM2.URL(), "PROFILES="+l.Dir, "PYTHONDONTWRITEBYTECODE=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v (deploy/prerequisites.sh installs what it needs)\n%s", err, out)
	}
	if !regexp.MustCompile(`(?m)^Ran 1[5-9] tests`).Match(out) {
		t.Errorf("%s", out)
	}
}
