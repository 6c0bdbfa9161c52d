package identity

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
)

// Our CAs write the role of what they issue into the subjectDirectoryAttributes (RFC 5280,
// 4.2.1.8), as the attribute role of X.520 whose roleName is a URI (RFC 5755, 4.4.5):
// qkd:sae, qkd:kme or qkd:operator. Like the OU it says what the host of the URI SAN says
// already; it is there so that a CA that is made to sign a URI it should not still has not
// made a caller.
//
// The OIDs are the standards'. One of our own would have to be registered, and one made from
// a UUID (2.25...) has an arc that is too large for some who read these certificates:
// crypto/x509 takes no extension of such a name, and step certificate inspect no policy.
var (
	oidSubjectDirectoryAttributes = asn1.ObjectIdentifier{2, 5, 29, 9}
	oidRole                       = asn1.ObjectIdentifier{2, 5, 4, 72}
)

// RoleExtension is the extension that certificates of a role have.
func RoleExtension(r Role) pkix.Extension {
	oid := []byte{0x55, 4, 72}
	attribute := tlv(asn1.TagSequence|compound, tlv(asn1.TagOID, oid), tlv(asn1.TagSet|compound, roleSyntax(r)))
	return pkix.Extension{Id: oidSubjectDirectoryAttributes, Value: tlv(asn1.TagSequence|compound, attribute)}
}

// roleSyntax is the value of the attribute: SEQUENCE { roleName [1] GeneralName }.
func roleSyntax(r Role) []byte {
	return tlv(asn1.TagSequence|compound, tlv(1|compound|contextSpecific, tlv(tagURI|contextSpecific, []byte("qkd:"+r))))
}

// Bits of a DER tag.
const (
	compound        = 0x20
	contextSpecific = 0x80
)

// tlv is a DER value of less than 128 bytes.
func tlv(tag byte, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return append([]byte{tag, byte(len(body))}, body...)
}

// rolesIn are the values of the attribute role in the subjectDirectoryAttributes, as they
// stand there. A foreign PKI may write other attributes.
func rolesIn(x pkix.Extension) (values [][]byte, err error) {
	var attributes []struct {
		Type   asn1.ObjectIdentifier
		Values []asn1.RawValue `asn1:"set"`
	}
	rest, err := asn1.Unmarshal(x.Value, &attributes)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes follow", len(rest))
	}
	for _, a := range attributes {
		if a.Type.Equal(oidRole) {
			for _, v := range a.Values {
				values = append(values, v.FullBytes)
			}
		}
	}
	return values, err
}

// judgeRole says what is wrong with the role in a certificate that came to the door of one.
// What is there must be right, whether or not it is required.
func judgeRole(leaf *x509.Certificate, role Role, required bool) *Denial {
	var values [][]byte
	for _, x := range leaf.Extensions { // crypto/x509 has refused two of a kind
		if x.Id.Equal(oidSubjectDirectoryAttributes) {
			var err error
			if values, err = rolesIn(x); err != nil {
				return &Denial{BadRole, fmt.Sprintf("reading the subjectDirectoryAttributes: %v", err)}
			}
		}
	}
	switch {
	case len(values) == 0 && required:
		return &Denial{BadRole, "it says no role"}
	case len(values) > 1:
		return &Denial{BadRole, fmt.Sprintf("it says %d roles", len(values))}
	case len(values) == 1 && !bytes.Equal(values[0], roleSyntax(role)):
		return &Denial{BadRole, fmt.Sprintf("the role that it says is %x, not %s", values[0][:min(len(values[0]), 64)], role)}
	}
	return nil
}
