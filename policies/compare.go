package policies

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Where is q as it would be asked at a KME at which the caller is at home: over which
// link the keys come, if over any; of several, over the first on which it is allowed.
// provenance is that of the links. It is false if no way leads from one SAE to the other.
func (s *Set) Where(q Question, provenance key.Provenance) (Question, bool) {
	for _, mine := range s.SAEs[q.Caller].Homes {
		for _, theirs := range s.SAEs[q.Other].Homes {
			links := s.LinksBetween(mine, theirs)
			if len(links) == 0 {
				continue
			}
			q.Provenance, q.SameKME = provenance, false
			for _, l := range links {
				if q.Link = l.ID; s.Decide(q).Allow {
					return q, true
				}
			}
			q.Link = links[0].ID
			return q, true
		}
	}
	for _, mine := range s.SAEs[q.Caller].Homes {
		if s.Homed(q.Other, mine) {
			q.Link, q.Provenance, q.SameKME = "", key.LocalRNG, true
			return q, true
		}
	}
	return q, false
}

// Everybody lists the SAEs of the network, sorted.
func (s *Set) Everybody() []identity.SAE {
	return slices.SortedFunc(maps.Keys(s.SAEs), func(a, b identity.SAE) int { return strings.Compare(a.String(), b.String()) })
}

// Change is a question to which two Sets have different answers.
type Change struct {
	Question
	Before, After Decision
}

// CompareDecisions asks both Sets q with every action, for every pair of SAEs that one
// of them knows, and lists where they differ. provenance is that of the links.
func CompareDecisions(before, after *Set, q Question, provenance key.Provenance) []Change {
	everybody := slices.Concat(before.Everybody(), after.Everybody())
	slices.SortFunc(everybody, func(a, b identity.SAE) int { return strings.Compare(a.String(), b.String()) })
	everybody = slices.Compact(everybody)
	var changes []Change
	for _, caller := range everybody {
		for _, other := range everybody {
			for _, action := range actions {
				q.Action, q.Caller, q.Other = action, caller, other
				old, _ := before.Where(q, provenance)
				now, _ := after.Where(q, provenance)
				c := Change{now, before.Decide(old), after.Decide(now)}
				if c.Before.Allow != c.After.Allow {
					changes = append(changes, c)
				}
			}
		}
	}
	return changes
}

// VerdictChange is a certificate of which two Sets make different callers.
type VerdictChange struct {
	Pool   string `json:"pool"`   // the door
	Name   string `json:"name"`   // what of the certificate names its holder
	Before string `json:"before"` // the principal, or "refused: " and why
	After  string `json:"after"`
}

// CompareVerdicts tries certificates as the rules and rows of both Sets name them, and
// lists of whom they make different callers.
func CompareVerdicts(before, after *Set, now time.Time) ([]VerdictChange, error) {
	var changes []VerdictChange
	tried := make(map[string]bool)
	for _, s := range []*Set{before, after} {
		for _, r := range s.specimens() {
			name := strings.Join(append(slices.Concat(r.URIs, r.Emails), r.DN), " ")
			if tried[r.Pool+" "+name] {
				continue
			}
			tried[r.Pool+" "+name] = true
			c := VerdictChange{Pool: r.Pool, Name: name}
			for set, word := range map[*Set]*string{before: &c.Before, after: &c.After} {
				principal, refused, err := set.Verdict(r, now)
				if err != nil {
					return nil, fmt.Errorf("trying %s: %w", name, err)
				}
				*word = verdictWord(principal, refused)
			}
			if c.Before != c.After {
				changes = append(changes, c)
			}
		}
	}
	return changes, nil
}

// specimens are certificates that the rules name, of every caller that has a row.
func (s *Set) specimens() []Recipe {
	var list []Recipe
	rows := slices.Sorted(maps.Keys(s.Principals.Principals()))
	for _, r := range s.Principals.Rules() {
		switch {
		case r.Email != "":
			list = append(list, Recipe{Pool: r.Pool, Emails: []string{r.Email}})
		case r.DN != "":
			list = append(list, Recipe{Pool: r.Pool, DN: r.DN})
		case r.Principal != identity.Placeholder:
			list = append(list, Recipe{Pool: r.Pool, URIs: []string{r.URI}, DN: "CN=" + escapeDN(r.Principal)})
		}
		for _, row := range rows {
			if id, ok := strings.CutPrefix(row, string(r.Role)+"/"); ok && r.Principal == identity.Placeholder {
				uri := strings.Replace(r.URI, identity.Placeholder, id, 1)
				list = append(list, Recipe{Pool: r.Pool, URIs: []string{uri}, DN: "CN=" + escapeDN(id)})
			}
		}
	}
	return list
}

// escapeDN is a value as RFC 4514 writes it.
func escapeDN(value string) string {
	var b strings.Builder
	for i := range len(value) {
		if strings.IndexByte(` "#+,;<=>\`, value[i]) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(value[i])
	}
	return b.String()
}

// Lint lists what is lawful in the files and yet most often a mistake.
func (s *Set) Lint() []string {
	var found []string
	rows := s.Principals.Principals()
	acted := make(map[identity.SAE]bool)
	officers := 0
	reached := make(map[string]bool)
	for _, r := range s.Principals.Rules() {
		reached[identity.PrincipalKey(r.Role, r.Principal)] = true
	}
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		row := rows[name]
		role, _, _ := strings.Cut(name, "/")
		for _, sae := range row.GatewayFor {
			acted[sae] = true
		}
		if slices.Contains(row.Duties, identity.SecurityOfficer) && row.Enabled {
			officers++
		}
		if !reached[name] && !reached[role+"/"+identity.Placeholder] {
			found = append(found, name+": no rule leads to this row")
		}
		if !row.Enabled {
			found = append(found, fmt.Sprintf("%s: disabled (%s)", name, row.Reason))
		}
	}
	for _, r := range s.Principals.Rules() {
		if _, ok := rows[identity.PrincipalKey(r.Role, r.Principal)]; !ok && r.Principal != identity.Placeholder {
			found = append(found, fmt.Sprintf("rule %s: its principal %s has no row: it is refused", r.ID, r.Principal))
		}
	}
	for _, sae := range s.Everybody() {
		if _, ok := rows[identity.PrincipalKey(identity.RoleSAE, sae.String())]; !ok && !acted[sae] {
			found = append(found, fmt.Sprintf("sae/%s: in network.yaml, and has neither a row nor a gateway", sae))
		}
	}
	if officers < 2 {
		found = append(found, fmt.Sprintf("%d enabled security officers: what takes two of them cannot be done", officers))
	}
	return found
}
