package identity

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Placeholder stands in a Rule's URI for the caller's ID.
const Placeholder = "{id}"

// Rule says how a certificate that came through one pool of CAs names a caller.
// Exactly one of URI, Email and DN is set.
type Rule struct {
	ID   string // unique; goes to the audit log
	Pool string // the pool of client CAs, which is also the door
	Role Role   // one role in each pool

	// URI is what the certificate's only URI SAN must be, byte for byte. It may end
	// in "/{id}", which stands for [a-z0-9._@-]{1,64}. The subject's only CN must be
	// the ID.
	URI string
	// Email is what the certificate's only e-mail SAN must be, byte for byte.
	Email string
	// DN is the whole subject in the form of RFC 4514, compared RDN by RDN: for
	// certificates of a foreign PKI.
	DN string

	// Principal is the caller's ID: "{id}" in a rule whose URI has it, a name of its
	// own in any other.
	Principal string
}

// compiled is a Rule made ready for matching.
type compiled struct {
	Rule
	prefix string // of a URI with Placeholder: what stands before it
	dn     distinguishedName
}

func compile(r Rule) (compiled, error) {
	c := compiled{Rule: r}
	if r.ID == "" || r.Pool == "" {
		return c, errors.New("needs an ID and a pool")
	}
	if r.Role != RoleSAE && r.Role != RoleKME && r.Role != RoleOperator {
		return c, fmt.Errorf("unknown role %q", r.Role)
	}
	var set []string
	for _, v := range []string{r.URI, r.Email, r.DN} {
		if v != "" {
			set = append(set, v)
		}
	}
	if len(set) != 1 {
		return c, errors.New("needs exactly one of uri, email and dn")
	}
	prefix, templated := strings.CutSuffix(r.URI, "/"+Placeholder)
	if templated {
		c.prefix = prefix + "/"
	}
	if templated != (r.Principal == Placeholder) {
		return c, fmt.Errorf("uri ends in /%s if, and only if, principal is %s", Placeholder, Placeholder)
	}
	if !templated {
		if err := checkID(r.Principal); err != nil {
			return c, fmt.Errorf("principal %w", err)
		}
	}
	switch {
	case r.URI != "":
		return c, checkURI(strings.Replace(r.URI, Placeholder, "x", 1))
	case r.Email != "":
		return c, checkEmail(r.Email)
	}
	dn, err := parseDN(r.DN)
	c.dn = dn
	return c, err
}

// checkURI accepts a URI that has one spelling only: scheme, host and path, no
// user, port, query, fragment or escape.
func checkURI(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("uri: %w", err)
	}
	canonical := url.URL{Scheme: u.Scheme, Host: u.Hostname(), Path: u.Path}
	switch {
	case u.Scheme == "" || u.Host == "" || len(u.Path) < 2:
		return fmt.Errorf("uri %q needs a scheme, a host and a path", s)
	case canonical.String() != s, strings.ContainsAny(s, "%{}*"), u.Host != strings.ToLower(u.Host):
		return fmt.Errorf("uri %q is more than lower-case scheme, host and path", s)
	}
	return nil
}

// checkEmail accepts lower-case ASCII with one @: one spelling only.
func checkEmail(s string) error {
	local, domain, ok := strings.Cut(s, "@")
	if !ok || !validID(s) || local == "" || domain == "" || strings.Contains(domain, "@") {
		return fmt.Errorf("email %q is not name@domain in lower-case ASCII of at most 64 characters", s)
	}
	return nil
}

// validID says whether s is an ID that our own CAs issue: [a-z0-9._@-]{1,64}. Dots
// alone are not, since they would vanish from a URL's path.
func validID(s string) bool {
	if s == "" || len(s) > 64 || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || strings.IndexByte("._@-", c) >= 0) {
			return false
		}
	}
	return true
}

func (c *compiled) match(names altNames, subject distinguishedName) (string, *Denial) {
	noRule := &Denial{Reason: NoRule}
	switch {
	case c.URI != "":
		return c.matchURI(names.uris, subject)
	case c.Email != "":
		switch {
		case !slices.Contains(names.emails, c.Email):
			return "", noRule
		case len(names.emails) != 1:
			return "", &Denial{Ambiguous, fmt.Sprintf("%d e-mail SANs", len(names.emails))}
		}
	case !subject.equal(c.dn):
		return "", noRule
	}
	return c.Principal, nil
}

func (c *compiled) matchURI(uris []string, subject distinguishedName) (string, *Denial) {
	switch {
	case len(uris) == 0:
		return "", &Denial{NoRule, "no URI SAN"}
	case len(uris) > 1:
		return "", &Denial{Ambiguous, fmt.Sprintf("%d URI SANs", len(uris))}
	}
	id := c.Principal
	if c.prefix == "" {
		if uris[0] != c.URI {
			return "", &Denial{NoRule, fmt.Sprintf("URI SAN %.100q", uris[0])}
		}
	} else {
		rest, ok := strings.CutPrefix(uris[0], c.prefix)
		if !ok {
			return "", &Denial{NoRule, fmt.Sprintf("URI SAN %.100q", uris[0])}
		}
		if !validID(rest) {
			return "", &Denial{BadID, fmt.Sprintf("%.100q", rest)}
		}
		id = rest
	}
	if cn := subject.commonName(); cn != id {
		return "", &Denial{CNMismatch, fmt.Sprintf("URI SAN names %q, the CN is %.100q", id, cn)}
	}
	return id, nil
}
