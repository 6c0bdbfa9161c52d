package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/qutemail/kme/internal/yamlfile/yamltest"
)

const example = "../../deploy/kmed.yaml"

// TestExample: the shipped example is whole, loads, and what it says of defaults is so.
func TestExample(t *testing.T) {
	t.Parallel()
	text := read(t, example)
	got := yamltest.Example(t, text, func(text string) (Config, error) { return parseConfig(example, []byte(text), Environment{}) })
	want := Config{
		KME: "km1", Node: "km1-a", Data: "/var/lib/kmed", Policies: "/etc/kmed/policies",
		Database: "host=/run/postgresql user=kme_app dbname=kme",
		HSM:      HSMConfig{Module: softHSM, Token: "kme-km1", PINCredential: "hsm.pin"},
		Certificates: CertificatesConfig{
			Dir: "/var/lib/kmed/tls", CA: "https://ca.example.net:9442", RootFingerprint: strings.Repeat("0123456789abcdef", 4),
			Issuers: map[string]string{"sae": "/etc/kmed/ca/sae.pem", "kme": "/etc/kmed/ca/kme.pem", "operator": "/etc/kmed/ca/operator.pem"},
			CRLs: map[string][]string{
				"sae": {"http://ca.example.net:9451/crl"}, "kme": {"http://ca.example.net:9452/crl"}, "operator": {"http://ca.example.net:9453/crl"},
			},
			CRLAlarm: 15 * time.Minute,
		},
		Links: []LinkConfig{{ID: "km1-km2", Socket: "/run/qlink/alice.sock", SecretFile: "/etc/kmed/qlink.secret", AuthFile: "/etc/kmed/km1-km2.secret", Interval: time.Second, KeyBits: 1 << 19, InFlight: 1}},
		Epoch: time.Hour, MaxWraps: 1 << 30, TTL: time.Hour, MaxTTL: 24 * time.Hour, PoolTTL: 24 * time.Hour, PoolLimit: 50_000,
		Limits: LimitsConfig{
			AtomsPerSecond: 100_000, Burst: 200_000, Untaken: 100_000, Handshakes: 1024, HandshakesPerNetwork: 256, FailedHandshakesPerSecond: 10, FailedHandshakesBurst: 200, Connections: 1024,
		}, Legacy: LegacyConfig{Reread: "until-consumed"}, Audit: AuditConfig{Fork: "stop"},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{})); diff != "" { // its digest
		t.Errorf("the example (-want +got):\n%s", diff)
	}
	if defaults := yamltest.Default.FindAllString(text, -1); len(defaults) != 48 {
		t.Errorf("the example shows %d defaults: %q", len(defaults), defaults)
	}
}

// TestRelativePaths are relative to the file's folder, wherever kmed is started.
func TestRelativePaths(t *testing.T) {
	t.Parallel()
	path := write(t, strings.NewReplacer("/etc/kmed/", "", "/var/lib/kmed", "state", "/run/qlink/", "../run/", "/usr/lib/softhsm/", "lib/",
		"pin_credential: hsm.pin", "pin_file: hsm.pin").Replace(read(t, example))+`
audit:
  reader: host=/run/postgresql user=kme_auditor dbname=kme
  sinks:
    - {name: near, format: jsonl, to: "file:log/events"}
    - {name: there, format: jsonl, to: "file:/var/log/events"}
    - {name: far, format: syslog, to: "tls:soc:6514", ca: soc.pem}
`)
	c, err := LoadConfig(path, Environment{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(path)
	for got, want := range map[string]string{
		c.Data: "state", c.Policies: "policies", c.HSM.Module: "lib/libsofthsm2.so", c.HSM.PINFile: "hsm.pin", c.Certificates.Dir: "state/tls",
		c.Certificates.Issuers["sae"]: "ca/sae.pem", c.Links[0].Socket: "../run/alice.sock", c.Links[0].SecretFile: "qlink.secret",
		strings.TrimPrefix(c.Audit.Sinks[0].To, "file:"): "log/events", c.Audit.Sinks[2].CA: "soc.pem",
	} {
		if got != filepath.Join(dir, want) {
			t.Errorf("%s, want %s in the file's folder", got, want)
		}
	}
	if c.Audit.Sinks[1].To != "file:/var/log/events" || c.Audit.Sinks[2].To != "tls:soc:6514" {
		t.Errorf("sinks: %+v", c.Audit.Sinks)
	}
	if c.Certificates.TokenFile != "" || !strings.HasPrefix(c.Database, "host=") {
		t.Errorf("no token file: %q; the DSN: %q", c.Certificates.TokenFile, c.Database)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func write(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "kmed.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// FuzzConfig: a configuration that is accepted, written out, is the same again.
func FuzzConfig(f *testing.F) {
	text := read(f, example)
	f.Add(text)
	f.Add(yamltest.WithDefaults(text))
	f.Add("kme: &a [*a]\n")
	f.Add("kme: km1\nkme: km2\n---\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseConfig("/etc/kmed/kmed.yaml", []byte(text), Environment{})
		if err != nil {
			return
		}
		again, err := yaml.Marshal(c)
		if err != nil {
			t.Fatalf("accepted, but not written: %v", err)
		}
		got, err := parseConfig("/etc/kmed/kmed.yaml", again, Environment{})
		if err != nil {
			t.Fatalf("what was written is refused: %v\n%s", err, again)
		}
		if diff := cmp.Diff(c, got, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("it changed on the way (-first +second):\n%s", diff)
		}
	})
}
