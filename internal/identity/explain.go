package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"
	"strings"
	"time"
)

// Step is what one rule made of a certificate.
type Step struct {
	Rule string
	ID   string // whom it names; "" if it does not match
	Why  string // why it does not match; "" if it does
}

// Explain is Judge with what every rule of the pool said, in the order of the file. It
// has no rules to tell of where the certificate cannot be read. Nothing is remembered.
func (m *Map) Explain(poolName string, leaf *x509.Certificate, now time.Time) ([]Step, Caller, error) {
	var steps []Step
	names, err := rawAltNames(leaf)
	subject, err2 := subjectOf(leaf.RawSubject)
	if p := m.pools[poolName]; p != nil && err == nil && err2 == nil {
		for i := range p.rules {
			id, denial := p.rules[i].match(names, subject)
			s := Step{Rule: p.rules[i].ID, ID: id}
			if denial != nil {
				s.Why = denial.Error()
			}
			steps = append(steps, s)
		}
	}
	c, err := m.Judge(poolName, leaf, now)
	return steps, c, err
}

// Rules are the rules of m, pool by pool, in the order of the file within a pool.
func (m *Map) Rules() []Rule {
	var rules []Rule
	for _, p := range m.pools {
		for i := range p.rules {
			rules = append(rules, p.rules[i].Rule)
		}
	}
	slices.SortStableFunc(rules, func(a, b Rule) int { return strings.Compare(a.Pool, b.Pool) })
	return rules
}

// SubjectDER is a subject in the form of RFC 4514 as it stands in a certificate.
func SubjectDER(dn string) ([]byte, error) {
	name, err := parseDN(dn)
	if err != nil {
		return nil, err
	}
	var seq pkix.RDNSequence
	for _, r := range name {
		var set pkix.RelativeDistinguishedNameSET
		for _, a := range r {
			set = append(set, pkix.AttributeTypeAndValue{Type: dotted(a.oid), Value: a.value})
		}
		seq = append(seq, set)
	}
	return asn1.Marshal(seq)
}

// dotted reads an OID that attributeOID has checked.
func dotted(oid string) asn1.ObjectIdentifier {
	var o asn1.ObjectIdentifier
	for arc := range strings.SplitSeq(oid, ".") {
		n := 0
		for _, c := range arc {
			n = 10*n + int(c-'0')
		}
		o = append(o, n)
	}
	return o
}
