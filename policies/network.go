package policies

import (
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

// Network is what network.yaml says.
type Network struct {
	TrustDomain string // the domain in URI SANs: qkd://sae.<trust domain>/<id>
	KMEs        map[identity.KME]KMEEntry
	Links       []Link
	SAEs        map[identity.SAE]SAEEntry
	Quotas      map[identity.SAE][]Quota // by master
}

// Quota is how many keys an SAE may ask for as a master, at all nodes of a site
// together.
type Quota struct {
	SAE       identity.SAE
	With      identity.SAE // with this slave; the zero SAE stands for all together
	PerSecond int64        // 0 for no limit
	PerDay    int64        // likewise; days are UTC's
}

// Subject is what q is on, in words.
func (q Quota) Subject() string {
	if q.With == (identity.SAE{}) {
		return q.SAE.String()
	}
	return q.SAE.String() + "\n" + q.With.String() // no SAE ID has a line break
}

// QuotasOf lists the quotas on what master asks for to share with slaves.
func (n *Network) QuotasOf(master identity.SAE, slaves []identity.SAE) []Quota {
	var on []Quota
	for _, q := range n.Quotas[master] {
		if q.With == (identity.SAE{}) || slices.Contains(slaves, q.With) {
			on = append(on, q)
		}
	}
	return on
}

// KMEEntry is what is known of a KME: its nodes, at least one. All of them have one
// database and one token, and serve alike; a client or peer may turn to any.
type KMEEntry struct {
	Nodes []NodeEntry
}

// Node is the KME's node of that name.
func (k KMEEntry) Node(name string) (NodeEntry, bool) {
	for _, n := range k.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return NodeEntry{}, false
}

// NodeEntry is a node of a KME and the addresses of its doors, host:port.
type NodeEntry struct {
	Name      string // unique within the KME; there is no node that is not listed
	SAE       string // for SAEs: 014 and the QuteMail routes
	Assign    string // for peers: key handover
	Classical string // for peers: the classical channel of the QKD link
	Operator  string // for operators
}

// Link is a QKD link.
type Link struct {
	ID         string
	Alice, Bob identity.KME // Alice's KME sends the light

	TTL     time.Duration // lifetime of an assigned key that nobody asked to be another; 0 for that of each node's kmed.yaml
	PoolTTL time.Duration // how long a key that nobody has asked for stays useful; likewise
}

// SAEEntry is what is known of an SAE.
type SAEEntry struct {
	Homes  []identity.KME // at least one; the order is the order of preference
	Groups []string       // for policies: in the default one, members of a group may share keys
}

type networkDoc struct {
	Version     version   `yaml:"version"`
	TrustDomain word      `yaml:"trust_domain"`
	KMEs        []kmeDoc  `yaml:"kmes"`
	Links       []linkDoc `yaml:"links"`
	SAEs        []saeDoc  `yaml:"saes"`

	Quotas []quotaDoc `yaml:"quotas"`
}

type quotaDoc struct {
	SAE       word  `yaml:"sae"`
	With      word  `yaml:"with"`
	PerSecond int64 `yaml:"keys_per_second"`
	PerDay    int64 `yaml:"keys_per_day"`
}

type kmeDoc struct {
	ID    word      `yaml:"id"`
	Nodes []nodeDoc `yaml:"nodes"`
}

type nodeDoc struct {
	Name      word `yaml:"name"`
	SAE       word `yaml:"sae"`
	Assign    word `yaml:"assign"`
	Classical word `yaml:"classical"`
	Operator  word `yaml:"operator"`
}

type linkDoc struct {
	ID    word `yaml:"id"`
	Alice word `yaml:"alice"`
	Bob   word `yaml:"bob"`

	TTL     word `yaml:"ttl"`
	PoolTTL word `yaml:"pool_ttl"`
}

type saeDoc struct {
	ID     word   `yaml:"id"`
	Homes  []word `yaml:"homes"`
	Groups []word `yaml:"groups"`
}

func parseNetwork(file string, text []byte) (Network, error) {
	var doc networkDoc
	where, err := decode(file, text, &doc)
	if err != nil {
		return Network{}, err
	}
	b := networkBuilder{here: place{file, 1, 1}, addresses: make(map[string]bool), net: Network{
		TrustDomain: doc.TrustDomain.text,
		KMEs:        make(map[identity.KME]KMEEntry),
		SAEs:        make(map[identity.SAE]SAEEntry),
		Quotas:      make(map[identity.SAE][]Quota),
	}}
	if doc.Version != 1 {
		return Network{}, b.here.errorf("no version: 1")
	}
	if d := doc.TrustDomain; !plainName(d.text) || strings.Contains(d.text, "@") {
		return Network{}, b.at(d).errorf("trust_domain %q is not a lower-case domain", d.text)
	}
	for i, k := range doc.KMEs {
		b.here = where.entry("kmes", i)
		if err := b.addKME(k); err != nil {
			return Network{}, err
		}
	}
	for i, l := range doc.Links {
		b.here = where.entry("links", i)
		if err := b.addLink(l); err != nil {
			return Network{}, err
		}
	}
	for i, s := range doc.SAEs {
		b.here = where.entry("saes", i)
		if err := b.addSAE(s); err != nil {
			return Network{}, err
		}
	}
	for i, q := range doc.Quotas {
		b.here = where.entry("quotas", i)
		if err := b.addQuota(q); err != nil {
			return Network{}, err
		}
	}
	return b.net, nil
}

// networkBuilder checks one entry at a time against those before it.
type networkBuilder struct {
	here      place // the entry
	net       Network
	addresses map[string]bool
}

// at is the place of w, or of the entry if w is missing in it.
func (b *networkBuilder) at(w word) place { return b.here.or(w) }

func (b *networkBuilder) addKME(k kmeDoc) error {
	id, err := identity.ParseKME(k.ID.text)
	if err != nil {
		return b.at(k.ID).errorf("%w", err)
	}
	if _, ok := b.net.KMEs[id]; ok {
		return b.at(k.ID).errorf("KME %q is there twice", id)
	}
	var entry KMEEntry
	for _, n := range k.Nodes {
		if !plainName(n.Name.text) {
			return b.at(n.Name).errorf("KME %s: node name %q is not [a-z0-9._@-]{1,64}", id, n.Name.text)
		}
		if _, ok := entry.Node(n.Name.text); ok {
			return b.at(n.Name).errorf("KME %s: node %s is there twice", id, n.Name.text)
		}
		if err := b.addDoors(n); err != nil {
			return err
		}
		entry.Nodes = append(entry.Nodes, NodeEntry{n.Name.text, n.SAE.text, n.Assign.text, n.Classical.text, n.Operator.text})
	}
	if len(entry.Nodes) == 0 {
		return b.at(k.ID).errorf("KME %s has no nodes", id)
	}
	b.net.KMEs[id] = entry
	return nil
}

// addDoors checks the addresses of a node.
func (b *networkBuilder) addDoors(n nodeDoc) error {
	for _, door := range []word{n.SAE, n.Assign, n.Classical, n.Operator} {
		if !address(door.text) {
			return b.at(n.Name).or(door).errorf("node %s: %q is not host:port; it needs sae, assign, classical and operator", n.Name.text, door.text)
		}
		if b.addresses[door.text] {
			return b.at(door).errorf("the address %s is used twice", door.text)
		}
		b.addresses[door.text] = true
	}
	return nil
}

func (b *networkBuilder) addLink(l linkDoc) error {
	if !plainName(l.ID.text) {
		return b.at(l.ID).errorf("link id %q is not [a-z0-9._@-]{1,64}", l.ID.text)
	}
	link := Link{ID: l.ID.text}
	var err error
	if link.Alice, err = b.knownKME(l.Alice); err != nil {
		return err
	}
	if link.Bob, err = b.knownKME(l.Bob); err != nil {
		return err
	}
	if link.Alice == link.Bob {
		return b.at(l.Bob).errorf("link %s joins %s to itself", link.ID, link.Bob)
	}
	if link.TTL, err = b.lifetime(l.TTL); err != nil {
		return err
	}
	if link.PoolTTL, err = b.lifetime(l.PoolTTL); err != nil {
		return err
	}
	for _, other := range b.net.Links {
		if other.ID == link.ID {
			return b.at(l.ID).errorf("link %s is there twice", link.ID)
		}
	}
	b.net.Links = append(b.net.Links, link)
	return nil
}

// lifetime reads a duration of at least a second; 0 if it is left out.
func (b *networkBuilder) lifetime(w word) (time.Duration, error) {
	if w.text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(w.text)
	if err != nil || d < time.Second {
		return 0, b.at(w).errorf("%q is no lifetime: a duration such as 30m, of at least 1s", w.text)
	}
	return d, nil
}

func (b *networkBuilder) addSAE(s saeDoc) error {
	id, err := identity.ParseSAE(s.ID.text)
	if err != nil {
		return b.at(s.ID).errorf("%w", err)
	}
	if _, ok := b.net.SAEs[id]; ok {
		return b.at(s.ID).errorf("SAE %q is there twice", id)
	}
	var entry SAEEntry
	seen := make(map[string]bool)
	for _, h := range s.Homes {
		home, err := b.knownKME(h)
		if err != nil {
			return err
		}
		if seen[h.text] {
			return b.at(h).errorf("home %s is there twice", home)
		}
		seen[h.text] = true
		entry.Homes = append(entry.Homes, home)
	}
	if len(entry.Homes) == 0 {
		return b.at(s.ID).errorf("SAE %q has no homes", id)
	}
	clear(seen)
	for _, g := range s.Groups {
		if !plainName(g.text) || seen[g.text] {
			return b.at(g).errorf("group %q is there twice or is not [a-z0-9._@-]{1,64}", g.text)
		}
		seen[g.text] = true
		entry.Groups = append(entry.Groups, g.text)
	}
	b.net.SAEs[id] = entry
	return nil
}

func (b *networkBuilder) addQuota(d quotaDoc) error {
	q := Quota{PerSecond: d.PerSecond, PerDay: d.PerDay}
	var err error
	if q.SAE, err = b.knownSAE(d.SAE); err != nil {
		return err
	}
	if d.With.text != "" {
		if q.With, err = b.knownSAE(d.With); err != nil {
			return err
		}
	}
	switch {
	case q.PerSecond < 0 || q.PerDay < 0 || q.PerSecond == 0 && q.PerDay == 0:
		return b.at(d.SAE).errorf("a quota sets keys_per_second or keys_per_day, each at least 1")
	case q.SAE == q.With:
		return b.at(d.With).errorf("a quota on %q with itself", q.SAE)
	}
	for _, other := range b.net.Quotas[q.SAE] {
		if other.With == q.With {
			return b.at(d.SAE).errorf("a second quota on the same")
		}
	}
	b.net.Quotas[q.SAE] = append(b.net.Quotas[q.SAE], q)
	return nil
}

func (b *networkBuilder) knownSAE(w word) (identity.SAE, error) {
	id, err := identity.ParseSAE(w.text)
	if err != nil {
		return identity.SAE{}, b.at(w).errorf("%w", err)
	}
	if _, ok := b.net.SAEs[id]; !ok {
		return identity.SAE{}, b.at(w).errorf("SAE %q is not among saes", id)
	}
	return id, nil
}

func (b *networkBuilder) knownKME(w word) (identity.KME, error) {
	id, err := identity.ParseKME(w.text)
	if err != nil {
		return identity.KME{}, b.at(w).errorf("%w", err)
	}
	if _, ok := b.net.KMEs[id]; !ok {
		return identity.KME{}, b.at(w).errorf("KME %q is not among kmes", id)
	}
	return id, nil
}

// plainName says whether s is [a-z0-9._@-]{1,64}.
func plainName(s string) bool {
	foreign := func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789._@-", r)
	}
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, foreign)
}

// address says whether s is a host and a port from 1 to 65535.
func address(s string) bool {
	host, port, err := net.SplitHostPort(s)
	n, err2 := strconv.ParseUint(port, 10, 16)
	return err == nil && err2 == nil && n > 0 && host != "" && !strings.ContainsAny(host, " /@")
}
