package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"

	"github.com/qutemail/kme/policies"
)

// writePolicies puts the shipped policies into the lab, with its own ports. Files
// that are there are the operator's and stay, but for the nodes and links in network.yaml.
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
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			text, err = policies.Shipped.ReadFile(e.Name())
			text = []byte(l.replaceAddresses(string(text)))
		}
		if err != nil {
			return err
		}
		if e.Name() == policies.NetworkFile {
			text = nodeLine.ReplaceAllFunc(text, l.listNodes)
			text = linkLine.ReplaceAllFunc(text, l.listLinks)
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return fmt.Errorf("writing policies: %w", err)
		}
	}
	return nil
}

// nodeLine is a node in the shipped network.yaml, or in what the lab has made of it.
var nodeLine = regexp.MustCompile(`(?m)^ *- \{name: (km[12])-([a-z]),.*\n`)

// listNodes is the line of a site's first node with one for each other node that the
// lab has now. Those that it had before go.
func (l *Lab) listNodes(line []byte) []byte {
	m := nodeLine.FindSubmatch(line)
	if string(m[2]) != "a" {
		return nil
	}
	ports := l.Ports.of(string(m[1]))
	lines := string(line)
	for i := 1; i < l.Nodes; i++ {
		pairs := []string{nodeName(string(m[1]), 0), nodeName(string(m[1]), i)}
		for door, port := range ports[0] {
			pairs = append(pairs, fmt.Sprintf("localhost:%d", port), fmt.Sprintf("localhost:%d", ports[i][door]))
		}
		lines += strings.NewReplacer(pairs...).Replace(string(line))
	}
	return []byte(lines)
}

// linkLine is a link in the shipped network.yaml, or in what the lab has made of it.
var linkLine = regexp.MustCompile(`(?m)^ *- \{id: km1-km2(-[0-9]+)?,.*\n`)

// listLinks is the line of the first link with one for each other link that the lab has now.
func (l *Lab) listLinks(line []byte) []byte {
	if len(linkLine.FindSubmatch(line)[1]) > 0 {
		return nil
	}
	lines := string(line)
	for _, f := range l.Fibres[1:] {
		lines += strings.Replace(string(line), linkID, f.Link, 1)
	}
	return []byte(lines)
}

// kmedYAML is the configuration of a lab's kmed.
var kmedYAML = template.Must(template.New("kmed.yaml").Parse(`# Written by the lab at each start.
kme: {{.Name}}
node: {{.Node}}
data: data
policies: {{.Policies}}
database: "{{.Database}}"
hsm:
  module: {{.Module}}
  token: {{.Name}}
  pin_file: ../hsm/pin
certificates:
  dir: tls
  ca: https://localhost:{{.CA}}
  root_fingerprint: {{.Fingerprint}}
  token_file: enrolment-token
  names: [localhost, 127.0.0.1]
  crls:
    sae: ["http://localhost:{{.SAECRL}}/crl"]
    kme: ["http://localhost:{{.KMECRL}}/crl"]
    operator: ["http://localhost:{{.OperatorCRL}}/crl"]
  issuers:
    sae: ../../ca/sae/intermediate.pem
    kme: ../../ca/kme/intermediate.pem
    operator: ../../ca/operator/intermediate.pem
links:{{range .Fibres}}
  - id: {{.Link}}
    socket: {{.Sockets}}/{{$.End}}.sock
    secret_file: {{.BoxSecret $.End}}
    {{if eq $.End "bob"}}auth_in_hsm: true{{else}}auth_file: {{.SecretFile}}{{end}}
    interval: {{$.Interval}}{{if $.Filler}}
    filler: {{$.Filler}}{{end}}{{if $.KeyBits}}
    key_bits: {{$.KeyBits}}{{end}}{{if $.InFlight}}
    in_flight: {{$.InFlight}}{{end}}{{with $.Upstream}}
    upstream: {{.}}{{end}}{{end}}
epoch: {{.Epoch}}
audit:
  sequencer: "{{.Sequencer}}"
  reader: "{{.Reader}}"
pool_limit: {{.PoolLimit}}{{with .Limits}}{{if .Burst}}
limits: {atoms_per_second: {{.AtomsPerSecond}}, burst: {{.Burst}}, untaken: {{.Untaken}}}{{end}}{{end}}
`))

// writeConfig writes the node's kmed.yaml and, if it has no certificate that still
// holds, a one-time token to get one.
func (n *Node) writeConfig(ctx context.Context) error {
	s := n.site
	if err := s.lab.tokenUnlessEnrolled(ctx, "kme", s.Name, n.path("tls"), n.path("enrolment-token")); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := kmedYAML.Execute(&b, map[string]any{
		"Name": s.Name, "Node": n.Name, "Database": s.DSN("kme_app"), "Sequencer": s.DSN("kme_seq"), "Reader": s.DSN("kme_auditor"), "Module": cmp.Or(s.lab.Module[s.Name], softHSM), "CA": s.lab.Ports.KMECA, "Fingerprint": s.lab.pin,
		"Epoch": s.lab.Epoch, "Fibres": s.lab.Fibres, "End": s.End.String(), "Interval": s.lab.Interval, "PoolLimit": s.lab.PoolLimit, "Filler": s.lab.Filler, "Upstream": s.lab.Upstream[s.Name], "KeyBits": s.lab.KeyBits, "InFlight": s.lab.InFlight, "Limits": s.lab.Limits,
		"Policies": s.policies(), "SAECRL": s.lab.Ports.crl("sae"), "KMECRL": s.lab.Ports.crl("kme"), "OperatorCRL": s.lab.Ports.crl("operator"),
	}); err != nil {
		return err
	}
	b.WriteString(s.lab.Settings[s.Name])
	return os.WriteFile(n.path("kmed.yaml"), b.Bytes(), 0o600)
}
