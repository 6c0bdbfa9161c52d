package identity

import (
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// distinguishedName is a subject: its RDNs from the least specific (country) to
// the most (common name), as in DER. It is compared RDN by RDN and never as a
// string, of which Go, OpenSSL and step each write another for one subject.
type distinguishedName []rdn

// rdn is a set of attributes, sorted.
type rdn []attribute

type attribute struct {
	oid   string // dotted
	value string
}

// attributeOIDs are the short names of RFC 4514, section 3, and two more in use.
var attributeOIDs = map[string]string{
	"CN": "2.5.4.3", "SERIALNUMBER": "2.5.4.5", "C": "2.5.4.6", "L": "2.5.4.7", "ST": "2.5.4.8",
	"STREET": "2.5.4.9", "O": "2.5.4.10", "OU": "2.5.4.11", "DC": "0.9.2342.19200300.100.1.25",
	"UID": "0.9.2342.19200300.100.1.1", "EMAILADDRESS": "1.2.840.113549.1.9.1",
}

func (d distinguishedName) equal(other distinguishedName) bool {
	return slices.EqualFunc(d, other, func(a, b rdn) bool { return slices.Equal(a, b) })
}

func (r rdn) sort() {
	slices.SortFunc(r, func(a, b attribute) int {
		return strings.Compare(a.oid+"="+a.value, b.oid+"="+b.value)
	})
}

// parseDN reads the string form of RFC 4514: the most specific RDN first, commas
// between RDNs, + within one. Values in #hex are refused.
func parseDN(s string) (distinguishedName, error) {
	var name distinguishedName
	var current rdn
	for rest := s; ; {
		kind, tail, ok := strings.Cut(rest, "=")
		if !ok {
			return nil, fmt.Errorf("DN %q: no = after %q", s, rest)
		}
		oid, err := attributeOID(strings.TrimSpace(kind))
		if err != nil {
			return nil, fmt.Errorf("DN %q: %w", s, err)
		}
		value, end, after, err := cutValue(tail)
		if err != nil {
			return nil, fmt.Errorf("DN %q: %w", s, err)
		}
		current = append(current, attribute{oid, value})
		if end == '+' {
			rest = after
			continue
		}
		current.sort()
		name = append(name, current)
		if end == 0 {
			slices.Reverse(name)
			return name, nil
		}
		current, rest = nil, after
	}
}

func attributeOID(kind string) (string, error) {
	if oid, ok := attributeOIDs[strings.ToUpper(kind)]; ok {
		return oid, nil
	}
	arcs := strings.Split(kind, ".")
	for _, arc := range arcs {
		if n, err := strconv.ParseUint(arc, 10, 31); err != nil || strconv.FormatUint(n, 10) != arc {
			return "", fmt.Errorf("unknown attribute %q", kind)
		}
	}
	if len(arcs) < 2 {
		return "", fmt.Errorf("unknown attribute %q", kind)
	}
	return kind, nil
}

// cutValue reads one attribute value up to an unescaped comma or plus, and says
// which of them ended it (0 for the end of s).
func cutValue(s string) (value string, end byte, rest string, err error) {
	s = strings.TrimLeft(s, " ")
	if strings.HasPrefix(s, "#") {
		return "", 0, "", errors.New("a value in #hex is not supported")
	}
	var b strings.Builder
	kept := 0 // length of the value without its unescaped trailing blanks
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case ',', '+':
			return finishValue(b.String()[:kept], c, s[i+1:])
		case '\\':
			c, size, err := unescape(s[i+1:])
			if err != nil {
				return "", 0, "", err
			}
			b.WriteByte(c)
			kept, i = b.Len(), i+size
		case '"', ';', '<', '>', 0:
			return "", 0, "", fmt.Errorf("%q must be escaped", c)
		default:
			b.WriteByte(c)
			if c != ' ' {
				kept = b.Len()
			}
		}
	}
	return finishValue(b.String()[:kept], 0, "")
}

func finishValue(value string, end byte, rest string) (string, byte, string, error) {
	if value == "" {
		return "", 0, "", errors.New("a value is empty")
	}
	return value, end, rest, nil
}

// unescape reads what stands after a backslash: one special character, or two hex
// digits. size is how many bytes of s it took.
func unescape(s string) (c byte, size int, err error) {
	if s != "" && strings.IndexByte(` "#+,;<=>\`, s[0]) >= 0 {
		return s[0], 1, nil
	}
	if len(s) >= 2 {
		if b, err := hex.DecodeString(s[:2]); err == nil {
			return b[0], 2, nil
		}
	}
	return 0, 0, errors.New("a backslash escapes nothing")
}

// Tags of the string types that a DN rule accepts in a certificate.
var textTags = []int{asn1.TagUTF8String, asn1.TagPrintableString, asn1.TagIA5String}

// subjectOf reads a certificate's RawSubject. It is read from the DER because
// pkix.Name drops attributes that it does not know and keeps one CN of several.
func subjectOf(raw []byte) (distinguishedName, error) {
	type typeAndValue struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	type attributeSET []typeAndValue // the suffix SET tells encoding/asn1 that it is a SET OF
	var seq []attributeSET
	if rest, err := asn1.Unmarshal(raw, &seq); err != nil {
		return nil, fmt.Errorf("reading the subject: %w", err)
	} else if len(rest) > 0 {
		return nil, errors.New("reading the subject: trailing bytes")
	}
	name := make(distinguishedName, 0, len(seq))
	for _, set := range seq {
		var r rdn
		for _, a := range set {
			if a.Value.Class != asn1.ClassUniversal || !slices.Contains(textTags, a.Value.Tag) {
				return nil, fmt.Errorf("reading the subject: %s is not text", a.Type)
			}
			r = append(r, attribute{a.Type.String(), string(a.Value.Bytes)})
		}
		r.sort()
		name = append(name, r)
	}
	return name, nil
}

// commonName is the value of the one CN of d; "" if there is none, or more than one.
func (d distinguishedName) commonName() string {
	found, value := 0, ""
	for _, r := range d {
		for _, a := range r {
			if a.oid == attributeOIDs["CN"] {
				found, value = found+1, a.value
			}
		}
	}
	if found != 1 {
		return ""
	}
	return value
}
