package identity

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"strings"
	"testing"
)

func TestParseDN(t *testing.T) {
	got, err := parseDN(`cn=  A\2c \"b\" \C3\A9\  , 1.2.3=x+OU=y,DC=z `)
	want := distinguishedName{
		{{attributeOIDs["DC"], "z"}},
		{{"1.2.3", "x"}, {attributeOIDs["OU"], "y"}},
		{{attributeOIDs["CN"], `A, "b" é `}},
	}
	if err != nil || !got.equal(want) {
		t.Errorf("parseDN: got %q, %v, want %q", got, err, want)
	}
}

// FuzzSubject: what crypto/x509 would print of a subject that a DN rule can name,
// read back as a rule, is the same subject.
func FuzzSubject(f *testing.F) {
	f.Add("alice", "QKD Lab")
	f.Add(`a,b+c="\<>;#`, " x ")
	f.Fuzz(func(t *testing.T, name, org string) {
		raw, err := asn1.Marshal(pkix.RDNSequence{rdnOf(oidO, org), rdnOf(oidCN, name)})
		if err != nil {
			return
		}
		subject, err := subjectOf(raw)
		if err != nil || name == "" || org == "" || strings.Contains(name+org, "\x00") {
			return
		}
		spelt := pkix.RDNSequence{rdnOf(oidO, org), rdnOf(oidCN, name)}.String()
		if strings.Contains(spelt, "=#") {
			return
		}
		parsed, err := parseDN(spelt)
		if err != nil || !parsed.equal(subject) {
			t.Errorf("parseDN(%q): got %q, %v, want %q", spelt, parsed, err, subject)
		}
	})
}

func FuzzParseDN(f *testing.F) {
	f.Add(`CN=Alice\, Ltd,OU=SAE+O=Foreign,C=AT`)
	f.Fuzz(func(t *testing.T, s string) {
		if dn, err := parseDN(s); err == nil && len(dn) == 0 {
			t.Errorf("parseDN(%q) is empty and no error", s)
		}
	})
}
