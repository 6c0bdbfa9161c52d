package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
)

// oidRole names the extension in which our CAs write the role of what they issue, as a
// UTF8String. Like the OU it says what the host of the URI SAN says already; it is there
// so that a CA that is made to sign a URI it should not still has not made a caller.
var oidRole = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 55555, 1, 1}

// RoleExtension is the extension that certificates of a role have.
func RoleExtension(r Role) pkix.Extension {
	return pkix.Extension{Id: oidRole, Value: append([]byte{asn1.TagUTF8String, byte(len(r))}, r...)}
}

// judgeRole says what is wrong with the role extension of a certificate that came to the
// door of a role. One that is there must be right, whether or not it is required.
func judgeRole(leaf *x509.Certificate, role Role, required bool) *Denial {
	for _, x := range leaf.Extensions { // crypto/x509 has refused two of a kind
		if !x.Id.Equal(oidRole) {
			continue
		}
		if want := RoleExtension(role); string(x.Value) != string(want.Value) {
			return &Denial{BadRole, fmt.Sprintf("the role extension is %x, not that of role %s", x.Value[:min(len(x.Value), 32)], role)}
		}
		return nil
	}
	if required {
		return &Denial{BadRole, "there is no role extension"}
	}
	return nil
}
