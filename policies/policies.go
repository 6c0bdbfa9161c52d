// Package policies reads the files that say who is who and who may share keys:
// network.yaml (KMEs, links, SAEs and their homes), principals.yaml (which
// certificate names which caller) and *.cedar with their schema. It answers two
// questions: where is an SAE at home, and may this SAE do this with that one.
//
// It promises that a folder is loaded whole or not at all: an unknown field, a
// name used twice, a wrong type, a name that nothing defines or a policy that does
// not fit the schema is an error that says file:line:column. What no policy
// permits is refused; a policy that forbids wins; a policy that cannot be
// evaluated forbids.
//
// It must never ask the network, the clock or a certificate, and a Set never
// changes: new files are a new Set.
package policies

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/qutemail/kme/internal/identity"
)

// Shipped is the example that comes with the product: a network of two sites on
// one machine. A lab copies it as it is.
//
//go:embed network.yaml principals.yaml default.cedar schema.cedarschema
var Shipped embed.FS

// The names of the files that a folder must have, besides at least one *.cedar.
const (
	NetworkFile    = "network.yaml"
	PrincipalsFile = "principals.yaml"
	SchemaFile     = "schema.cedarschema"
)

// maxFileBytes bounds each file: ten thousand SAEs need about 1 MB.
const maxFileBytes = 8 << 20

// Set is one folder of policies, read and checked. It may be used by several
// goroutines.
type Set struct {
	Network
	Principals *identity.Map
	Digest     string // SHA-256 over all files' names and contents, hex

	rules       ruleSet
	decided     *decisions
	twoOfficers []string

	off map[identity.SAE]string // SAEs that are switched off, by a row or since, and why
}

// Without is s with callers switched off besides, by identity.PrincipalKey and with
// the reason. Nobody is switched on: what the files switch off stays off.
func (s *Set) Without(off map[string]string) *Set {
	less := *s
	less.Principals = s.Principals.Without(off)
	less.off = maps.Clone(s.off)
	for sae := range s.SAEs { // one may have no row: a gateway acts for it
		reason, switched := off[identity.PrincipalKey(identity.RoleSAE, sae.String())]
		if _, already := less.off[sae]; switched && !already {
			less.off[sae] = reason
		}
	}
	return &less
}

// disabledIn are the SAEs that a row of m switches off.
func disabledIn(m *identity.Map, saes map[identity.SAE]SAEEntry) map[identity.SAE]string {
	off, rows := make(map[identity.SAE]string), m.Principals()
	for sae := range saes {
		if row, ok := rows[identity.PrincipalKey(identity.RoleSAE, sae.String())]; ok && !row.Enabled {
			off[sae] = row.Reason
		}
	}
	return off
}

// Disabled says whether sae is switched off, and why.
func (s *Set) Disabled(sae identity.SAE) (reason string, off bool) {
	reason, off = s.off[sae]
	return reason, off
}

// Load reads the policies in dir.
func Load(dir string) (*Set, error) {
	s, err := load(os.DirFS(dir))
	if err != nil {
		return nil, fmt.Errorf("loading policies from %s: %w", dir, err)
	}
	return s, nil
}

func load(dir fs.FS) (*Set, error) {
	names, err := fs.Glob(dir, "*.cedar")
	if err != nil {
		return nil, err
	}
	files := make(map[string][]byte)
	digest := sha256.New()
	for _, name := range append([]string{NetworkFile, PrincipalsFile, SchemaFile}, names...) {
		text, err := readFile(dir, name)
		if err != nil {
			return nil, err
		}
		files[name] = text
		fmt.Fprintf(digest, "%s %d\n%s", name, len(text), text)
	}
	s := &Set{decided: new(decisions), Digest: hex.EncodeToString(digest.Sum(nil))}
	if s.Network, err = parseNetwork(NetworkFile, files[NetworkFile]); err != nil {
		return nil, err
	}
	if s.Principals, s.twoOfficers, err = parsePrincipals(PrincipalsFile, files[PrincipalsFile], s.Network); err != nil {
		return nil, err
	}
	if s.rules, err = parseRules(files, names, s.Network); err != nil {
		return nil, err
	}
	s.off = disabledIn(s.Principals, s.SAEs)
	return s, nil
}

func readFile(dir fs.FS, name string) ([]byte, error) {
	info, err := fs.Stat(dir, name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFileBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxFileBytes)
	}
	return fs.ReadFile(dir, name)
}

// Homed says whether sae is at home at kme.
func (s *Set) Homed(sae identity.SAE, kme identity.KME) bool {
	return slices.Contains(s.SAEs[sae].Homes, kme)
}

// LinksBetween are the links that join two KMEs, whichever of them is Alice's, in the order
// of network.yaml.
func (s *Set) LinksBetween(a, b identity.KME) []Link {
	var links []Link
	for _, l := range s.Links {
		if l.Alice == a && l.Bob == b || l.Alice == b && l.Bob == a {
			links = append(links, l)
		}
	}
	return links
}
