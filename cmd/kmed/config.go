package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/kme"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/internal/yamlfile"
	"github.com/qutemail/kme/pki"
)

// Config is the daemon's one file. Unknown and repeated members are refused.
// Relative paths are relative to the file's folder.
type Config struct {
	// KME is the ID of this Key Management Entity, one of policies' network.yaml,
	// which also says where its doors listen and which links it has.
	KME string `yaml:"kme"`
	// Node is this process's name within the site. No two processes share one.
	Node string `yaml:"node"`
	// Data is the folder of the node's small files: run number, witness of the audit
	// chain, counts of an outage.
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
	// MaxWraps is how many blobs one KEK seals, about, before another one takes its
	// place within the epoch. Default and most 2^30.
	MaxWraps int `yaml:"max_wraps"`
	// TTL is the lifetime of an assigned key that was not asked to live shorter or
	// longer; MaxTTL the longest that may be asked for. Defaults 1h and 24h.
	TTL    time.Duration `yaml:"ttl"`
	MaxTTL time.Duration `yaml:"max_ttl"`
	// PoolTTL is how long an unassigned key of the link stays useful. Default 24h.
	PoolTTL time.Duration `yaml:"pool_ttl"`
	// PoolLimit is how many 256-bit keys a link stores, those of both owners
	// together, before it rests. Default 50000.
	PoolLimit int `yaml:"pool_limit"`
	// Limits bound what one SAE may have of what all share.
	Limits LimitsConfig `yaml:"limits"`
	// Strict refuses, with 400, requests of 014 that are otherwise read with goodwill: a
	// null for what may be left out, and an empty additional_slave_SAE_IDs. Default false.
	Strict bool `yaml:"strict"`

	// TLS12 lets SAEs in that do not speak TLS 1.3. Default false.
	TLS12 bool `yaml:"tls12"`

	Audit AuditConfig `yaml:"audit"`

	Legacy LegacyConfig `yaml:"legacy"`

	// Production refuses keys of a simulated link. Default false, which kmed says
	// loudly at start.
	Production bool `yaml:"production"`

	digest [sha256.Size]byte // of the file's text
}

// AuditConfig says how the audit log is kept. See deploy/AUDIT.md.
type AuditConfig struct {
	// Sequencer is the Postgres DSN of the role kme_seq: with it this node folds the
	// site's events into the log's tree when no other node does. Without it, kmed
	// sequencer must run somewhere.
	Sequencer string `yaml:"sequencer"`
	// Reader is the Postgres DSN of the role kme_auditor, with which the operator door
	// answers kmectl audit. Without it that door has no audit routes.
	Reader string `yaml:"reader"`
	// Fork says what follows when the log was forged, forked or rewound: stop (nothing is
	// delivered any more, or not with that peer; the default) or alarm.
	Fork string `yaml:"fork"`
	// PeerKeys are the verifier keys of the logs of other KMEs, by their IDs. Of one that
	// is not there the first key that is seen is kept.
	PeerKeys map[string]string `yaml:"peer_keys"`
	// Sinks are where the log is sent to, all of it, in order. They need Reader.
	Sinks []SinkConfig `yaml:"sinks"`
	// Keep is how long events stay in the database, at least 168h; 0 (the default) keeps
	// them for ever. Older ones are in bundles in the folder Archive. It needs Reader.
	Keep    time.Duration `yaml:"keep"`
	Archive string        `yaml:"archive"`
	// Witnesses are those beside the other KMEs that checkpoints are submitted to.
	Witnesses []WitnessConfig `yaml:"witnesses"`
}

// WitnessConfig is a witness of the audit log that speaks C2SP tlog-witness.
type WitnessConfig struct {
	URL string `yaml:"url"` // of add-checkpoint
	Key string `yaml:"key"` // its verifier key
}

// SinkConfig is a place that the audit log is sent to.
type SinkConfig struct {
	Name   string `yaml:"name"`   // unique: where the sink has got to is kept under it
	Format string `yaml:"format"` // jsonl, syslog (RFC 5424) or ocsf
	To     string `yaml:"to"`     // file:PATH (a line each), tls:HOST:PORT (syslog: RFC 5425) or tcp:HOST:PORT
	CA     string `yaml:"ca"`     // of tls: the root that the sink's certificate must chain to, a PEM file
}

// The values of AuditConfig.Fork.
const (
	forkStops = "stop"
	forkAlarm = "alarm"
)

// LegacyConfig is about the QuteMail routes.
type LegacyConfig struct {
	// Reread is how often a key that was asked for there can be read: until-consumed
	// (or expired; the default) or once, as a key of 014.
	Reread string `yaml:"reread"`
}

// The values of LegacyConfig.Reread.
const (
	untilConsumed = "until-consumed"
	once          = "once"
)

// HSMConfig says which token of which PKCS#11 module holds the KEKs.
type HSMConfig struct {
	Module string `yaml:"module"` // path of the PKCS#11 library
	Token  string `yaml:"token"`  // label; with serial, exactly one token must have both
	// Serial is the token's serial number. A production node must have it; otherwise any
	// token of that label is taken.
	Serial string `yaml:"serial"`
	// PINFile is readable by its owner only. Instead, PINCredential is the name of a
	// credential that systemd passes (LoadCredential=).
	PINFile       string `yaml:"pin_file"`
	PINCredential string `yaml:"pin_credential"`
	// ModuleArgs is what the library is initialised with, if it wants something.
	ModuleArgs string `yaml:"module_args"`
	// WeakAttributes accepts a library that cannot restrict what a key is used for. A
	// production node refuses it. Default false.
	WeakAttributes bool `yaml:"weak_attributes"`
	// Grace is how long, when the token is away but its session keys still work, they are
	// used on. Default 0: not at all.
	Grace time.Duration `yaml:"grace"`
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
	// CRLs are, for each role, the URLs of the CRLs of its issuing CAs. Nobody is let in
	// whose CA has no CRL that still holds.
	CRLs map[string][]string `yaml:"crls"`
	// CRLAlarm is how old a CRL gets, counted from when its CA signed it, before that is an
	// alarm. Default 15m. It is used until its nextUpdate, and not beyond, whatever this is.
	CRLAlarm time.Duration `yaml:"crl_alarm"`
}

// LimitsConfig bounds each SAE. What is beyond is answered 503 with a Retry-After.
type LimitsConfig struct {
	// AtomsPerSecond is how many 256-bit keys a second an SAE may ask for and take,
	// in the long run; larger keys count as several. Default 100000.
	AtomsPerSecond int `yaml:"atoms_per_second"`
	// Burst is how many it may after a pause. Default 200000, at least 2048, which is
	// the largest request.
	Burst int `yaml:"burst"`
	// Untaken is how many keys of one master may wait here for one slave. Default 100000.
	Untaken int `yaml:"untaken"`
	// Handshakes is how many may be under way at one door, HandshakesPerNetwork how
	// many of them from one network (/24 of IPv4, /48 of IPv6). Defaults 1024 and 256.
	Handshakes           int `yaml:"handshakes"`
	HandshakesPerNetwork int `yaml:"handshakes_per_network"`
	// HandshakesAtWork is how many of those under way may compute at the same time, at one
	// door: the others wait. 0 (the default): half as many as there are processors, at least 1.
	HandshakesAtWork int `yaml:"handshakes_at_work"`
	// FailedHandshakesPerSecond is how many handshakes from one address of IPv4 or /64 of
	// IPv6 may fail at one door, in the long run, and FailedHandshakesBurst after a pause. For
	// as long as there were more, new connections from there are closed before TLS; a
	// handshake that succeeds counts nothing. Defaults 10 and 200; 0 a second: no bound, for
	// a door behind something that has all connections come from one address.
	FailedHandshakesPerSecond int `yaml:"failed_handshakes_per_second"`
	FailedHandshakesBurst     int `yaml:"failed_handshakes_burst"`
	// Connections is how many one caller may have open at one door. Default 1024.
	Connections int `yaml:"connections"`
}

// LinkConfig is the local side of a link that network.yaml names.
type LinkConfig struct {
	ID string `yaml:"id"`
	// Socket and SecretFile open this end of the quantum channel.
	Socket     string `yaml:"socket"`
	SecretFile string `yaml:"secret_file"`
	// AuthFile holds a secret of 32 bytes or more that both ends share, and nobody else:
	// it authenticates the first block of a link. Instead, AuthInHSM says that the token
	// has it (kmed hsm auth-secret). One of the two, and with a filler neither.
	AuthFile  string `yaml:"auth_file"`
	AuthInHSM bool   `yaml:"auth_in_hsm"`
	// Interval is the least time from the start of a block to that of the next, at
	// Alice's end. Default 1s.
	Interval time.Duration `yaml:"interval"`
	// KeyBits is how many sifted bits a block is made of, a multiple of 262144 (2^18). A
	// longer block makes more key of the same light, and takes more time and memory. Both
	// ends must have the same. Default 524288, at most 4194304.
	KeyBits int `yaml:"key_bits"`
	// InFlight is how many blocks may be at work at a time, at Alice's end. Those whose
	// messages are on their way to the other end or back do not count: for a peer that is far
	// away more are begun by themselves, up to 31 in all. Each takes memory at both ends, and
	// what is under way is lost when an end dies. Default 1, at most 31 (qlink.MaxInFlight).
	InFlight int `yaml:"in_flight"`
	// Filler, if not 0, makes blocks of so many random atoms instead of sending
	// light: for load tests. A production node refuses it. Both ends must have it.
	Filler int `yaml:"filler"`
	// Upstream, if it has a URL, takes the keys of a device beside this end instead of
	// sending light: QKD hardware or another KME, which hands them out by ETSI GS QKD 014.
	// Socket, SecretFile and AuthFile are not needed then. Both ends must have one.
	Upstream UpstreamConfig `yaml:"upstream"`
}

// UpstreamConfig says how a device is reached, to which this KME is an SAE.
type UpstreamConfig struct {
	URL []string `yaml:"url"` // https://HOST:PORT of the device, or of each of its nodes
	// TLS is a folder with the SAE's key.pem and cert.pem, and root.pem, which verifies the
	// device. It is read again at SIGHUP.
	TLS  string `yaml:"tls"`
	Peer string `yaml:"peer"` // the SAE that the other end is to its device
	// Keys is how many keys of 256 bits make a block, at Alice's end. 0 is 64; at most 128:
	// so many are drawn at once, or none.
	Keys int `yaml:"keys"`
}

// LoadConfig reads and checks a configuration file, the whole of it, before
// anything is opened. Its error has a line for each thing that is wrong, and says
// where it stands.
func LoadConfig(path string, env Environment) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("reading the configuration: %w", err)
	}
	return parseConfig(path, text, env)
}

// parseConfig is LoadConfig of a file with that text.
func parseConfig(path string, text []byte, env Environment) (Config, error) {
	c := Config{
		Epoch: time.Hour, MaxWraps: kme.MaxWraps, TTL: time.Hour, MaxTTL: 24 * time.Hour, PoolTTL: 24 * time.Hour, PoolLimit: 50_000,
		Certificates: CertificatesConfig{CRLAlarm: pki.DefaultCRLAlarm},
		Audit:        AuditConfig{Fork: forkStops},
		Legacy:       LegacyConfig{Reread: untilConsumed},
		Limits: LimitsConfig{
			AtomsPerSecond: 100_000, Burst: 200_000, Untaken: 100_000,
			Handshakes: pki.DefaultLimits.Handshakes, HandshakesPerNetwork: pki.DefaultLimits.HandshakesPerNetwork, HandshakesAtWork: pki.DefaultLimits.HandshakesAtWork,
			FailedHandshakesPerSecond: pki.DefaultLimits.Failures, FailedHandshakesBurst: pki.DefaultLimits.FailureBurst, Connections: pki.DefaultLimits.Connections,
		},
	}
	file, err := yamlfile.Decode(path, text, &c)
	if err != nil {
		return c, err
	}
	for i := range c.Links {
		if !file.Names(fmt.Sprintf("links[%d].interval", i)) {
			c.Links[i].Interval = time.Second
		}
		if !file.Names(fmt.Sprintf("links[%d].key_bits", i)) {
			c.Links[i].KeyBits = qlink.StandardPlan().KeyBits
		}
		if !file.Names(fmt.Sprintf("links[%d].in_flight", i)) {
			c.Links[i].InFlight = 1
		}
		if u := &c.Links[i].Upstream; len(u.URL) > 0 && u.Keys == 0 {
			u.Keys = key.ChunkAtoms
		}
	}
	if env.Database != "" {
		c.Database = env.Database
	}
	if err := c.check(file); err != nil {
		return c, err
	}
	if err := c.Audit.resolveSinks(file); err != nil {
		return c, err
	}
	c.digest = sha256.Sum256(text)
	for role, issuer := range c.Certificates.Issuers {
		if err := file.Resolve(&issuer); err != nil {
			return c, err
		}
		c.Certificates.Issuers[role] = issuer
	}
	return c, file.Resolve(c.paths()...)
}

// resolveSinks has the files of sinks lie where they are relative to the file's folder.
func (c *AuditConfig) resolveSinks(file yamlfile.File) error {
	for i, s := range c.Sinks {
		if path, is := strings.CutPrefix(s.To, "file:"); is {
			if err := file.Resolve(&path); err != nil {
				return err
			}
			c.Sinks[i].To = "file:" + path
		}
	}
	return nil
}

// paths are the members that are files or folders.
func (c *Config) paths() []*string {
	ps := []*string{&c.Audit.Archive, &c.Data, &c.Policies, &c.HSM.Module, &c.HSM.PINFile, &c.Certificates.Dir, &c.Certificates.TokenFile}
	for i := range c.Links {
		ps = append(ps, &c.Links[i].Socket, &c.Links[i].SecretFile, &c.Links[i].AuthFile, &c.Links[i].Upstream.TLS)
	}
	for i := range c.Audit.Sinks {
		ps = append(ps, &c.Audit.Sinks[i].CA)
	}
	return ps
}

// minCRLAlarm is twice the time between two fetches of a CRL: below, every one is old.
const minCRLAlarm = time.Minute

// maxGrace is as long as a token may be away and its keys be used.
const maxGrace = time.Hour

// roles are those whose callers come to a door, and so need an issuing CA.
var roles = []identity.Role{identity.RoleSAE, identity.RoleKME, identity.RoleOperator}

// check names everything that is missing or out of bounds.
func (c *Config) check(file yamlfile.File) error {
	k := &yamlfile.Checker{File: file}
	if k.Has("kme", c.KME) {
		_, err := identity.ParseKME(c.KME)
		k.Must(err == nil, "kme", "is not the ID of one: %v", err)
	}
	if k.Has("node", c.Node) {
		err := handover.RunStarted{Node: c.Node, Run: 1}.Check() // its peers judge it by this
		k.Must(err == nil, "node", "is not the name of one: %v", err)
	}
	k.Has("data", c.Data)
	k.Has("policies", c.Policies)
	k.Has("database", c.Database)
	k.Has("hsm.module", c.HSM.Module)
	k.Has("hsm.token", c.HSM.Token)
	if c.HSM.PINCredential == "" {
		k.Has("hsm.pin_file", c.HSM.PINFile)
	}
	k.Must(c.HSM.PINFile == "" || c.HSM.PINCredential == "", "hsm.pin_credential", "is there beside pin_file: one of them")
	k.Must(!c.Production || c.HSM.Serial != "", "hsm.serial", "is missing, and this node is set to production: kmed hsm status shows it")
	k.Must(!c.Production || !c.HSM.WeakAttributes, "hsm.weak_attributes", "is for tests only: this node is set to production")
	k.Must(c.HSM.Grace >= 0 && c.HSM.Grace <= maxGrace, "hsm.grace", "is %v: at least 0, at most %v", c.HSM.Grace, maxGrace)
	c.Certificates.check(k)
	k.Must(c.Epoch >= time.Second && c.Epoch%time.Millisecond == 0, "epoch", "is %v: at least 1s, in whole milliseconds", c.Epoch)
	k.Must(!c.Production || c.Epoch >= time.Minute, "epoch", "is %v, and this node is set to production: at least 1m", c.Epoch)
	k.Must(c.MaxWraps >= 1 && c.MaxWraps <= kme.MaxWraps, "max_wraps", "is %d: at least 1, at most %d", c.MaxWraps, kme.MaxWraps)
	k.Must(c.TTL >= time.Second, "ttl", "is %v: at least 1s", c.TTL)
	k.Must(c.MaxTTL >= c.TTL && c.MaxTTL <= handover.MaxTTL, "max_ttl", "is %v: at least ttl (%v), at most %v", c.MaxTTL, c.TTL, handover.MaxTTL)
	k.Must(c.PoolTTL >= max(c.Epoch, kme.MinPoolTTL), "pool_ttl", "is %v: at least epoch (%v) and %v", c.PoolTTL, c.Epoch, kme.MinPoolTTL)
	k.Must(c.PoolLimit >= 1, "pool_limit", "is %d: at least 1", c.PoolLimit)
	k.Must(c.Limits.AtomsPerSecond >= 1, "limits.atoms_per_second", "is %d: at least 1", c.Limits.AtomsPerSecond)
	k.Must(c.Limits.Burst >= kme.MinBurst, "limits.burst", "is %d: at least %d, the largest request", c.Limits.Burst, kme.MinBurst)
	k.Must(c.Limits.Handshakes >= 1, "limits.handshakes", "is %d: at least 1", c.Limits.Handshakes)
	k.Must(c.Limits.HandshakesPerNetwork >= 1, "limits.handshakes_per_network", "is %d: at least 1", c.Limits.HandshakesPerNetwork)
	k.Must(c.Limits.HandshakesAtWork >= 0, "limits.handshakes_at_work", "is %d: at least 1, or 0 for half of the processors", c.Limits.HandshakesAtWork)
	k.Must(c.Limits.FailedHandshakesPerSecond >= 0, "limits.failed_handshakes_per_second", "is %d: at least 1, or 0 for no bound", c.Limits.FailedHandshakesPerSecond)
	k.Must(c.Limits.FailedHandshakesBurst >= 1, "limits.failed_handshakes_burst", "is %d: at least 1", c.Limits.FailedHandshakesBurst)
	k.Must(c.Limits.Connections >= 1, "limits.connections", "is %d: at least 1", c.Limits.Connections)
	k.Must(c.Limits.Untaken >= 1, "limits.untaken", "is %d: at least 1", c.Limits.Untaken)
	k.Must(c.Legacy.Reread == untilConsumed || c.Legacy.Reread == once, "legacy.reread", "is %q: %s or %s", c.Legacy.Reread, untilConsumed, once)
	c.Audit.check(k)
	c.checkLinks(k)
	return k.Err()
}

func (c *CertificatesConfig) check(k *yamlfile.Checker) {
	k.Has("certificates.dir", c.Dir)
	if k.Has("certificates.ca", c.CA) {
		u, err := url.Parse(c.CA)
		k.Must(err == nil && u.Scheme == "https" && u.Host != "", "certificates.ca", "is %q: an https:// URL", c.CA)
	}
	if k.Has("certificates.root_fingerprint", c.RootFingerprint) {
		sum, err := hex.DecodeString(c.RootFingerprint)
		k.Must(err == nil && len(sum) == sha256.Size, "certificates.root_fingerprint", "is not a SHA-256 in hex, as kme-ca fingerprint prints it")
	}
	for _, role := range roles {
		k.Has("certificates.issuers."+string(role), c.Issuers[string(role)])
	}
	for _, role := range roles {
		at := "certificates.crls." + string(role)
		k.Must(len(c.CRLs[string(role)]) > 0, at, "is missing")
		for _, crl := range c.CRLs[string(role)] {
			u, err := url.Parse(crl)
			k.Must(err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "", at, "%q is not the http:// URL of a CRL", crl)
		}
	}
	k.Must(c.CRLAlarm >= minCRLAlarm, "certificates.crl_alarm", "is %v: at least %v, and more than the CAs let pass between two CRLs", c.CRLAlarm, minCRLAlarm)
	for _, role := range slices.Sorted(maps.Keys(c.CRLs)) {
		k.Must(slices.Contains(roles, identity.Role(role)), "certificates.crls."+role, "is no role: those are %v", roles)
	}
	for _, role := range slices.Sorted(maps.Keys(c.Issuers)) {
		k.Must(slices.Contains(roles, identity.Role(role)), "certificates.issuers."+role, "is no role: those are %v", roles)
	}
}

func (c *AuditConfig) check(k *yamlfile.Checker) {
	k.Must(c.Fork == forkStops || c.Fork == forkAlarm, "audit.fork", "is %q: %s or %s", c.Fork, forkStops, forkAlarm)
	for _, id := range slices.Sorted(maps.Keys(c.PeerKeys)) {
		_, err := identity.ParseKME(id)
		k.Must(err == nil, "audit.peer_keys."+id, "is not for a KME: %v", err)
		_, err = audit.ParseLogKey(c.PeerKeys[id])
		k.Must(err == nil, "audit.peer_keys."+id, "%v", err)
	}
	seen := make(map[string]bool)
	for i, s := range c.Sinks {
		at := fmt.Sprintf("audit.sinks[%d].", i)
		if k.Has(at+"name", s.Name) {
			k.Must(!seen[s.Name], at+"name", "%s is there twice", s.Name)
			seen[s.Name] = true
		}
		k.Must(siem.Formats[s.Format] != nil, at+"format", "is %q: %v", s.Format, slices.Sorted(maps.Keys(siem.Formats)))
		kind, place, _ := strings.Cut(s.To, ":")
		k.Must(slices.Contains([]string{"file", "tls", "tcp"}, kind) && place != "", at+"to", "is %q: file:PATH, tls:HOST:PORT or tcp:HOST:PORT", s.To)
		k.Must((kind == "tls") == (s.CA != ""), at+"ca", "goes with tls:, and only with it")
	}
	k.Must(c.Reader != "" || len(c.Sinks) == 0 && c.Keep == 0, "audit.reader", "is missing: sinks and keep need it")
	k.Must(c.Keep == 0 || c.Keep >= 7*24*time.Hour, "audit.keep", "is %v: at least 168h, or 0", c.Keep)
	k.Must((c.Keep > 0) == (c.Archive != ""), "audit.archive", "goes with keep, and only with it")
	for i, w := range c.Witnesses {
		at := fmt.Sprintf("audit.witnesses[%d].", i)
		u, err := url.Parse(w.URL)
		k.Must(err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != "", at+"url", "is %q: the URL of add-checkpoint", w.URL)
		k.Must(err != nil || u.Scheme != "http" || isLoopback(u.Hostname()), at+"url", "is %q: https, since what a witness refuses stops deliveries", w.URL)
		_, err = audit.NewWitness(w.Key)
		k.Must(err == nil, at+"key", "%v", err)
	}
}

// isLoopback says whether a host is this machine.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

func (c *Config) checkLinks(k *yamlfile.Checker) {
	seen, sockets := make(map[string]bool), make(map[string]bool)
	for i, l := range c.Links {
		at := fmt.Sprintf("links[%d].", i)
		if k.Has(at+"id", l.ID) {
			k.Must(!seen[l.ID], at+"id", "%s is there twice", l.ID)
			seen[l.ID] = true
		}
		if u := l.Upstream; len(u.URL) > 0 {
			u.check(k, at+"upstream.")
			k.Must(l.Filler == 0, at+"filler", "goes not with upstream")
		} else {
			if k.Has(at+"socket", l.Socket) {
				k.Must(!sockets[l.Socket], at+"socket", "is that of another link")
				sockets[l.Socket] = true
			}
			k.Has(at+"secret_file", l.SecretFile)
			k.Must(l.Filler != 0 || l.AuthFile != "" || l.AuthInHSM, at+"auth_file", "is missing: or auth_in_hsm, if the token has the link's secret")
			k.Must(u.TLS == "" && u.Peer == "" && u.Keys == 0, at+"upstream", "has no url")
		}
		k.Must(l.AuthFile == "" || !l.AuthInHSM, at+"auth_in_hsm", "is there beside auth_file: one of them")
		k.Must(l.Interval >= time.Millisecond, at+"interval", "is %v: at least 1ms", l.Interval)
		k.Must(l.KeyBits >= 1<<19 && l.KeyBits <= 1<<22 && l.KeyBits%(1<<18) == 0, at+"key_bits", "is %d: a multiple of 262144, from 524288 to 4194304", l.KeyBits)
		k.Must(l.InFlight >= 1 && l.InFlight <= qlink.MaxInFlight, at+"in_flight", "is %d: from 1 to %d", l.InFlight, qlink.MaxInFlight)
		k.Must(l.Filler >= 0, at+"filler", "is %d: at least 1, or 0 for none", l.Filler)
		k.Must(l.Filler <= 0 || !c.Production, at+"filler", "is for tests only: this node is set to production")
	}
}

func (u UpstreamConfig) check(k *yamlfile.Checker, at string) {
	for _, base := range u.URL {
		b, err := url.Parse(base)
		k.Must(err == nil && b.Scheme == "https" && b.Host != "", at+"url", "is %q: an https:// URL", base)
	}
	k.Has(at+"tls", u.TLS)
	if k.Has(at+"peer", u.Peer) {
		_, err := identity.ParseSAE(u.Peer)
		k.Must(err == nil, at+"peer", "is not the name of one: %v", err)
	}
	k.Must(u.Keys >= 1 && u.Keys <= qlink.MaxUpstream, at+"keys", "is %d: 1 to %d", u.Keys, qlink.MaxUpstream)
}
