package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Certificate is what the audit log keeps of a caller's certificate.
type Certificate struct {
	Serial      string // decimal
	Issuer      string // authority key identifier, hex; "" if the certificate has none
	Fingerprint string // SHA-256 of the DER, hex
	Subject     string // its subject and alternative names, of a Stranger's; "" of any other
	NotBefore   time.Time
	NotAfter    time.Time
}

// Caller is a party as its certificate names it. Only Map.Judge and Stranger make
// one, so a Caller with a role is a Caller that exactly one rule has named. The
// zero Caller is nobody.
type Caller struct {
	role    Role
	id      string
	rule    string
	gateway string     // who speaks for it, "" if it speaks for itself
	row     *Principal // of whoever the certificate names; nil for a stranger
	cert    Certificate
	session Session
	route   string
}

// Session is the connection that a caller uses.
type Session struct {
	Remote string    // address and port; "" if nobody knows
	Group  string    // the key exchange of its TLS, such as X25519MLKEM768; "" if nobody knows
	TLS    string    // version, cipher suite and key exchange, for the record; "" if nobody knows
	Since  time.Time // of its handshake
}

// Hybrid says whether the key exchange of s holds against a quantum computer, too.
func (s Session) Hybrid() bool { return strings.Contains(s.Group, "MLKEM") }

// Stranger is the Caller of a certificate that nothing names: its facts, for the
// record, and no role. leaf may be nil.
func Stranger(leaf *x509.Certificate) Caller {
	if leaf == nil {
		return Caller{}
	}
	fingerprint := sha256.Sum256(leaf.Raw)
	cert := Certificate{
		Issuer:      hex.EncodeToString(leaf.AuthorityKeyId),
		Fingerprint: hex.EncodeToString(fingerprint[:]),
		Subject:     named(leaf),
		NotBefore:   leaf.NotBefore,
		NotAfter:    leaf.NotAfter,
	}
	if leaf.SerialNumber != nil {
		cert.Serial = leaf.SerialNumber.String()
	}
	return Caller{cert: cert}
}

// longestSubject is the most that is kept of what a stranger calls itself, in bytes.
const longestSubject = 512

// named is what a certificate calls its owner: the record has no rule's word for it.
func named(leaf *x509.Certificate) string {
	names := []string{leaf.Subject.String()}
	for _, u := range leaf.URIs {
		names = append(names, "URI:"+u.String())
	}
	for _, e := range leaf.EmailAddresses {
		names = append(names, "email:"+e)
	}
	for _, d := range leaf.DNSNames {
		names = append(names, "DNS:"+d)
	}
	all := strings.Join(slices.DeleteFunc(names, func(n string) bool { return n == "" }), ", ")
	return strings.ToValidUTF8(all[:min(len(all), longestSubject)], "")
}

// Role is the part that c plays; RoleNone for a stranger.
func (c Caller) Role() Role { return c.role }

// ID is the name of c within its role; "" for a stranger.
func (c Caller) ID() string { return c.id }

// Rule is the ID of the rule that named c; "" for a stranger.
func (c Caller) Rule() string { return c.rule }

// Certificate is what the audit log keeps of c's certificate.
func (c Caller) Certificate() Certificate { return c.cert }

// Remote is the address and port that c called from; "" if nobody set it.
func (c Caller) Remote() string { return c.session.Remote }

// WithRemote returns c, calling from the given address and port.
func (c Caller) WithRemote(remote string) Caller {
	c.session.Remote = remote
	return c
}

// Session is the connection that c uses.
func (c Caller) Session() Session { return c.session }

// WithSession returns c, using the given connection.
func (c Caller) WithSession(s Session) Caller {
	c.session = s
	return c
}

// Route is the method and path pattern of the request that c makes; "" if nobody set it.
func (c Caller) Route() string { return c.route }

// OnRoute returns c, making a request of the given method and path pattern.
func (c Caller) OnRoute(route string) Caller {
	c.route = route
	return c
}

// NeedsHybrid says whether c's row asks for a key exchange that is Hybrid.
func (c Caller) NeedsHybrid() bool { return c.row != nil && c.row.RequireHybrid }

// Has says whether c is an operator with the duty. Every operator may view.
func (c Caller) Has(d Duty) bool {
	return c.role == RoleOperator && (d == Viewer || slices.Contains(c.row.Duties, d))
}

// Gateway is who speaks for c; "" if c speaks for itself.
func (c Caller) Gateway() string { return c.gateway }

// For is the SAE for which the gateway c acts. It is false if c is no gateway, or if
// its row does not list the SAE.
func (c Caller) For(sae SAE) (Caller, bool) {
	if c.role != RoleGateway || !slices.Contains(c.row.GatewayFor, sae) {
		return Caller{}, false
	}
	c.role, c.id, c.gateway = RoleSAE, sae.id, c.id
	return c, true
}

// SAE is c's ID if c is an SAE.
func (c Caller) SAE() (SAE, bool) {
	if c.role != RoleSAE {
		return SAE{}, false
	}
	return SAE{c.id}, true
}

// KME is c's ID if c is a KME.
func (c Caller) KME() (KME, bool) {
	if c.role != RoleKME {
		return KME{}, false
	}
	return KME{c.id}, true
}

// Operator is c's ID if c is an operator.
func (c Caller) Operator() (Operator, bool) {
	if c.role != RoleOperator {
		return Operator{}, false
	}
	return Operator{c.id}, true
}

// altNames are the names of a subjectAltName extension as they stand in the
// certificate. crypto/x509's own fields will not do: it lower-cases a URI's
// scheme and unescapes its path, so that two spellings look like one name.
type altNames struct {
	uris   []string
	emails []string
}

// Tags of GeneralName (RFC 5280, 4.2.1.6).
const (
	tagEmail = 1
	tagURI   = 6
)

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// rawAltNames reads the subjectAltName of leaf, if it has one. crypto/x509 has
// refused a certificate with two of them.
func rawAltNames(leaf *x509.Certificate) (altNames, error) {
	var names altNames
	for _, ext := range leaf.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var seq asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &seq); err != nil {
			return altNames{}, fmt.Errorf("reading subjectAltName: %w", err)
		} else if len(rest) > 0 {
			return altNames{}, errors.New("reading subjectAltName: trailing bytes")
		}
		for rest := seq.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			var err error
			if rest, err = asn1.Unmarshal(rest, &name); err != nil {
				return altNames{}, fmt.Errorf("reading subjectAltName: %w", err)
			}
			switch {
			case name.Class != asn1.ClassContextSpecific:
			case name.Tag == tagURI:
				names.uris = append(names.uris, string(name.Bytes))
			case name.Tag == tagEmail:
				names.emails = append(names.emails, string(name.Bytes))
			}
		}
	}
	return names, nil
}
