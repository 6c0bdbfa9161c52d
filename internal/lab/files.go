package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"text/template"

	"github.com/qutemail/kme/policies"
)

// writePolicies puts the shipped policies into the lab, with its own ports. Files
// that are there are the operator's and stay.
func (l *Lab) writePolicies() error {
	dir := l.path("policies")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	entries, err := policies.Shipped.ReadDir(".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if _, err := os.Stat(path); err == nil {
			continue
		}
		text, err := policies.Shipped.ReadFile(e.Name())
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(l.replaceAddresses(string(text))), 0o644); err != nil {
			return fmt.Errorf("writing policies: %w", err)
		}
	}
	return nil
}

// kmedYAML is the configuration of a lab's kmed.
var kmedYAML = template.Must(template.New("kmed.yaml").Parse(`# Written by the lab at each start.
kme: {{.Name}}
node: {{.Name}}-a
data: data
policies: ../policies
database: "{{.Database}}"
hsm:
  module: {{.Module}}
  token: {{.Name}}
  pin_file: hsm/pin
certificates:
  dir: tls
  ca: https://localhost:{{.CA}}
  root_fingerprint: {{.Fingerprint}}
  token_file: enrolment-token
  names: [localhost, 127.0.0.1]
  issuers:
    sae: ../ca/sae/intermediate.pem
    kme: ../ca/kme/intermediate.pem
    operator: ../ca/operator/intermediate.pem
links:
  - id: {{.Link}}
    socket: {{.Sockets}}/{{.End}}.sock
    secret_file: ../qlink/{{.End}}.secret
    interval: {{.Interval}}{{if .Filler}}
    filler: {{.Filler}}{{end}}
pool_limit: {{.PoolLimit}}
`))

// writeConfig writes the site's kmed.yaml and, if it has no certificate that still
// holds, a one-time token to get one.
func (s *Site) writeConfig(ctx context.Context) error {
	fingerprint, err := s.lab.fingerprint(ctx)
	if err != nil {
		return err
	}
	if err := s.lab.tokenUnlessEnrolled(ctx, "kme", s.Name, s.path("tls"), s.path("enrolment-token")); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := kmedYAML.Execute(&b, map[string]any{
		"Name": s.Name, "Database": s.DSN("kme_app"), "Module": softHSM, "CA": s.lab.Ports.KMECA, "Fingerprint": fingerprint,
		"Link": linkID, "Sockets": s.lab.sockets(), "End": s.End.String(), "Interval": s.lab.Interval, "PoolLimit": s.lab.PoolLimit, "Filler": s.lab.Filler,
	}); err != nil {
		return err
	}
	return os.WriteFile(s.path("kmed.yaml"), b.Bytes(), 0o600)
}
