package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml"
)

// Config is the daemon's one file. Unknown and repeated members are refused.
// Relative paths are relative to the file's folder.
type Config struct {
	// KME is the ID of this Key Management Entity, one of policies' network.yaml,
	// which also says where its doors listen and which links it has.
	KME string `yaml:"kme"`
	// Node is this process's name within the site. No two processes share one.
	Node string `yaml:"node"`
	// Data is the folder of the node's small files: run number, counts of an outage.
	Data string `yaml:"data"`
	// Policies is the folder with network.yaml, principals.yaml, the Cedar policies
	// and their schema.
	Policies string `yaml:"policies"`
	// Database is the Postgres DSN of the daemon's role (kme_app).
	Database string `yaml:"database"`

	HSM          HSMConfig          `yaml:"hsm"`
	Certificates CertificatesConfig `yaml:"certificates"`
	Links        []LinkConfig       `yaml:"links"`

	// Epoch is the length of an epoch: how long one KEK seals new keys. Both ends
	// of a link must have the same. Default 1h.
	Epoch time.Duration `yaml:"epoch"`
	// TTL is the lifetime of an assigned key that was not asked to live shorter or
	// longer; MaxTTL the longest that may be asked for. Defaults 1h and 24h.
	TTL    time.Duration `yaml:"ttl"`
	MaxTTL time.Duration `yaml:"max_ttl"`
	// PoolTTL is how long an unassigned key of the link stays useful. Default 24h.
	PoolTTL time.Duration `yaml:"pool_ttl"`
	// PoolLimit is how many 256-bit keys a link stores, those of both owners
	// together, before it rests. Default 50000.
	PoolLimit int `yaml:"pool_limit"`
	// Production refuses keys of a simulated link. Default false, which kmed says
	// loudly at start.
	Production bool `yaml:"production"`
}

// HSMConfig says which token of which PKCS#11 module holds the KEKs.
type HSMConfig struct {
	Module  string `yaml:"module"`   // path of the PKCS#11 library
	Token   string `yaml:"token"`    // label; exactly one token must have it
	PINFile string `yaml:"pin_file"` // readable by its owner only
}

// CertificatesConfig says where the node's own certificate comes from and which
// CAs its callers must come from.
type CertificatesConfig struct {
	Dir             string            `yaml:"dir"`              // key.pem, cert.pem, root.pem of this node
	CA              string            `yaml:"ca"`               // URL of the KME CA
	RootFingerprint string            `yaml:"root_fingerprint"` // SHA-256 of the root, hex
	TokenFile       string            `yaml:"token_file"`       // one-time token, needed when there is no certificate yet
	Names           []string          `yaml:"names"`            // DNS names and addresses the certificate must hold for
	Issuers         map[string]string `yaml:"issuers"`          // role (sae, kme, operator) -> file with the issuing CA
}

// LinkConfig is the local side of a link that network.yaml names.
type LinkConfig struct {
	ID string `yaml:"id"`
	// Socket and SecretFile open this end of the quantum channel.
	Socket     string `yaml:"socket"`
	SecretFile string `yaml:"secret_file"`
	// Interval is the least time from the start of a block to that of the next, at
	// Alice's end. Default 1s.
	Interval time.Duration `yaml:"interval"`
	// Filler, if not 0, makes blocks of so many random atoms instead of sending
	// light: for load tests. A production node refuses it. Both ends must have it.
	Filler int `yaml:"filler"`
}

// LoadConfig reads and checks a configuration file, the whole of it, before
// anything is opened.
func LoadConfig(path string) (Config, error) {
	c := Config{
		Epoch: time.Hour, TTL: time.Hour, MaxTTL: 24 * time.Hour, PoolTTL: 24 * time.Hour, PoolLimit: 50_000,
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("reading the configuration: %w", err)
	}
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict(), yaml.DisallowUnknownField()).Decode(&c); err != nil {
		return c, fmt.Errorf("reading %s:\n%s", path, yaml.FormatError(err, false, true))
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return c, err
	}
	for _, p := range c.paths() {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for role, file := range c.Certificates.Issuers {
		if !filepath.IsAbs(file) {
			c.Certificates.Issuers[role] = filepath.Join(dir, file)
		}
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// paths are the members that are files or folders.
func (c *Config) paths() []*string {
	ps := []*string{&c.Data, &c.Policies, &c.HSM.Module, &c.HSM.PINFile, &c.Certificates.Dir, &c.Certificates.TokenFile}
	for i := range c.Links {
		ps = append(ps, &c.Links[i].Socket, &c.Links[i].SecretFile)
	}
	return ps
}

// check names everything that is missing or out of bounds.
func (c *Config) check() error {
	var errs []error
	need := func(name, value string) {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s is missing", name))
		}
	}
	need("kme", c.KME)
	need("node", c.Node)
	need("data", c.Data)
	need("policies", c.Policies)
	need("database", c.Database)
	need("hsm.module", c.HSM.Module)
	need("hsm.token", c.HSM.Token)
	need("hsm.pin_file", c.HSM.PINFile)
	need("certificates.dir", c.Certificates.Dir)
	need("certificates.ca", c.Certificates.CA)
	need("certificates.root_fingerprint", c.Certificates.RootFingerprint)
	for _, role := range []string{"sae", "kme", "operator"} {
		need("certificates.issuers."+role, c.Certificates.Issuers[role])
	}
	for i, l := range c.Links {
		need(fmt.Sprintf("links[%d].id", i), l.ID)
		need(fmt.Sprintf("links[%d].socket", i), l.Socket)
		need(fmt.Sprintf("links[%d].secret_file", i), l.SecretFile)
		if l.Filler < 0 || l.Filler > 0 && c.Production {
			errs = append(errs, fmt.Errorf("links[%d].filler is for tests only", i))
		}
		if l.Interval < 0 {
			errs = append(errs, fmt.Errorf("links[%d].interval is negative", i))
		}
		if l.Interval == 0 {
			c.Links[i].Interval = time.Second
		}
	}
	if c.Epoch < time.Minute || c.TTL < time.Second || c.MaxTTL < c.TTL || c.PoolTTL < c.Epoch || c.PoolLimit < 1 {
		errs = append(errs, errors.New("epoch must be at least 1m, ttl at least 1s, max_ttl at least ttl, pool_ttl at least epoch, pool_limit at least 1"))
	}
	return errors.Join(errs...)
}
