package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"strings"
	"testing"
)

// FuzzID: an ID that is accepted is what it was, fits a line of a log, and no other
// string becomes it.
func FuzzID(f *testing.F) {
	for _, s := range []string{"alice", "alice@qutemail.example", "Füchslein Nr. 1", " ", "a\x00b", "a\nb", "\xff", strings.Repeat("x", 513)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sae, err := ParseSAE(s)
		kme, errKME := ParseKME(s)
		if (err == nil) != (errKME == nil) {
			t.Fatalf("%q: as an SAE %v, as a KME %v", s, err, errKME)
		}
		if err != nil {
			return
		}
		if sae.String() != s || kme.String() != s || len(s) > maxIDBytes || strings.ContainsAny(s, "\x00\n\r\t\x7f") {
			t.Fatalf("%q became %q and %q", s, sae, kme)
		}
		text, err := sae.MarshalText()
		var again SAE
		if err != nil || again.UnmarshalText(text) != nil || again != sae {
			t.Fatalf("%q came back as %q (%v)", s, again, err)
		}
	})
}

// FuzzAltNames: whatever stands in a certificate's subjectAltName, at most its one
// URI, and that as it stands there, names a caller.
func FuzzAltNames(f *testing.F) {
	names := func(tags []int, values ...string) []byte {
		var all []asn1.RawValue
		for i, v := range values {
			all = append(all, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tags[i], Bytes: []byte(v)})
		}
		der, err := asn1.Marshal(all)
		if err != nil {
			f.Fatal(err)
		}
		return der
	}
	const prefix = "qkd://sae.lab.test/"
	f.Add(names([]int{tagURI}, prefix+"alice"), "alice")
	f.Add(names([]int{tagURI, tagURI}, prefix+"alice", prefix+"bob"), "alice")
	f.Add(names([]int{tagEmail, tagURI}, "a@b", prefix+"alice\x00bob"), "alice")
	f.Add(names([]int{tagURI}, prefix+"../alice"), "../alice")
	rule, err := compile(Rule{ID: "r", Pool: "sae", Role: RoleSAE, URI: prefix + Placeholder, Principal: Placeholder})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, der []byte, cn string) {
		got, err := rawAltNames(&x509.Certificate{Extensions: []pkix.Extension{{Id: oidSubjectAltName, Value: der}}})
		if err != nil {
			return
		}
		id, denial := rule.match(got, distinguishedName{{{attributeOIDs["CN"], cn}}})
		if denial != nil {
			return
		}
		if len(got.uris) != 1 || got.uris[0] != prefix+id || id != cn {
			t.Errorf("%q with CN %q became %q", got.uris, cn, id)
		}
		if _, err := ParseSAE(id); err != nil || strings.ContainsAny(id, "/\x00 ") {
			t.Errorf("%q is let in: %v", id, err)
		}
	})
}
