package identity

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// KeyKind is a kind of public key.
type KeyKind string

// The kinds of public key that a caller's certificate may have.
const (
	ECDSAP256 KeyKind = "ecdsa-p256"
	ECDSAP384 KeyKind = "ecdsa-p384"
	Ed25519   KeyKind = "ed25519"
)

// Requirements hold for every certificate, whatever rule names it. These hold
// besides, and are not for choice: no CA certificate, key usage exactly
// digitalSignature, extended key usage exactly clientAuth (serverAuth and
// clientAuth for a KME).
type Requirements struct {
	Keys        []KeyKind     // at least one
	MaxLifetime time.Duration // longest NotAfter - NotBefore; required
	Role        bool          // the certificate has the RoleExtension of its door's role
}

// Principal is the row of one caller.
type Principal struct {
	Enabled       bool
	Reason        string // why it is disabled, for the record
	RequireHybrid bool   // refused over a key exchange that a quantum computer could break
	GatewayFor    []SAE  // with role sae: it is no SAE, and may act for these
	Duties        []Duty // with role operator, besides Viewer
}

// PrincipalKey is the key of a caller in the principals of NewMap: callers of two
// roles may share a name.
func PrincipalKey(role Role, id string) string { return string(role) + "/" + id }

// Denial is the error of Judge: why a certificate names nobody. It is for the
// audit log and for operators; a caller never sees it.
type Denial struct {
	Reason string // one word, below
	Detail string
}

// The reasons of a Denial.
const (
	NoCertificate    = "no-certificate"
	NotLeaf          = "not-leaf"
	BadEKU           = "eku"
	BadKeyUsage      = "key-usage"
	BadKeyType       = "key-type"
	BadLifetime      = "lifetime"
	BadRole          = "role" // the role extension is another role's, or missing where it is required
	Expired          = "expired"
	NotYetValid      = "not-yet-valid"
	BadNames         = "names" // the SANs or the subject cannot be read
	NoRule           = "no-rule"
	Ambiguous        = "ambiguous" // two rules match, or the attribute of one occurs twice
	BadID            = "bad-id"
	CNMismatch       = "cn-mismatch"
	UnknownPrincipal = "unknown-principal"
	Disabled         = "disabled"
	Revoked          = "revoked"
	NoCRL            = "no-crl"     // none of its CA, or only one that has ended: it may be revoked
	NotHybrid        = "not-hybrid" // a key exchange that the caller's row does not allow
)

// Error is the reason and its detail.
func (d *Denial) Error() string {
	if d.Detail == "" {
		return d.Reason
	}
	return d.Reason + ": " + d.Detail
}

// Map is a set of rules that turns certificates into Callers. It does not change:
// a new set of rules is a new Map. It may be used by several goroutines.
type Map struct {
	pools      map[string]*pool
	req        Requirements
	principals map[string]Principal
}

// NewMap returns the Map of rules. principals are keyed by PrincipalKey; a caller
// that is not in it is refused. It is an error if a rule or a requirement could
// let in more than it says, or two rules of a pool are the same.
func NewMap(rules []Rule, req Requirements, principals map[string]Principal) (*Map, error) {
	if req.MaxLifetime <= 0 {
		return nil, errors.New("identity map: no longest lifetime of certificates")
	}
	if len(req.Keys) == 0 {
		return nil, errors.New("identity map: no kinds of keys")
	}
	for _, k := range req.Keys {
		if k != ECDSAP256 && k != ECDSAP384 && k != Ed25519 {
			return nil, fmt.Errorf("identity map: unknown kind of key %q", k)
		}
	}
	m := &Map{pools: make(map[string]*pool), req: req, principals: maps.Clone(principals)}
	seen := make(map[string]bool)
	for i, r := range rules {
		if err := m.add(r, seen); err != nil {
			return nil, &RuleError{Index: i, Err: fmt.Errorf("rule %q: %w", r.ID, err)}
		}
	}
	return m, nil
}

// Without is m with callers switched off besides, by PrincipalKey and with the reason.
// It switches nobody on.
func (m *Map) Without(off map[string]string) *Map {
	less := &Map{pools: make(map[string]*pool, len(m.pools)), req: m.req, principals: maps.Clone(m.principals)}
	for key, reason := range off {
		if p, known := less.principals[key]; known && p.Enabled {
			p.Enabled, p.Reason = false, reason
			less.principals[key] = p
		}
	}
	for name, p := range m.pools { // what was said of certificates is forgotten
		less.pools[name] = &pool{role: p.role, rules: p.rules, verdicts: make(map[string]verdict)}
	}
	return less
}

// Principals lists the callers that there are rows for, by PrincipalKey.
func (m *Map) Principals() map[string]Principal { return maps.Clone(m.principals) }

// RuleError is the error of NewMap about one rule.
type RuleError struct {
	Index int // among the rules given, from 0
	Err   error
}

// Error says what is wrong with the rule.
func (e *RuleError) Error() string { return "identity map: " + e.Err.Error() }

// Unwrap returns the cause.
func (e *RuleError) Unwrap() error { return e.Err }

// add compiles r. seen holds the IDs, and what they match, of the rules before it.
func (m *Map) add(r Rule, seen map[string]bool) error {
	c, err := compile(r)
	if err != nil {
		return err
	}
	p := m.pools[r.Pool]
	if p == nil {
		p = &pool{role: r.Role, verdicts: make(map[string]verdict)}
		m.pools[r.Pool] = p
	}
	if p.role != r.Role {
		return fmt.Errorf("pool %s serves the role %s already", r.Pool, p.role)
	}
	id, matches := "id "+r.ID, fmt.Sprintf("%q %q %q %q", r.Pool, r.URI, r.Email, c.dn)
	if seen[id] {
		return errors.New("another rule has the same ID")
	}
	if seen[matches] {
		return errors.New("another rule matches the same")
	}
	seen[id], seen[matches] = true, true
	p.rules = append(p.rules, c)
	return nil
}

// pool is the rules of one pool of CAs and what they said of certificates seen.
type pool struct {
	role  Role
	rules []compiled

	mu       sync.RWMutex
	verdicts map[string]verdict // by DER: what does not depend on the time
}

// maxVerdicts bounds a pool's verdicts. Only certificates that our CAs signed get
// here, about 1 kB each, so the whole is simply forgotten when it is full.
const maxVerdicts = 4096

// verdict is what the rules say of a certificate at any time within its validity.
type verdict struct {
	caller Caller
	denial *Denial
}

// Judge turns a certificate that came in through the named pool into a Caller. The
// chain must have been verified already, against that pool's CAs only. Every rule
// of the pool is evaluated and exactly one must match. Judge is called again for
// every request, so what depends on the time is not remembered.
//
// The error is a *Denial. The Caller then is a Stranger with the certificate's
// facts.
func (m *Map) Judge(poolName string, leaf *x509.Certificate, now time.Time) (Caller, error) {
	if leaf == nil {
		return Stranger(nil), &Denial{Reason: NoCertificate}
	}
	p := m.pools[poolName]
	if p == nil {
		return Stranger(leaf), &Denial{NoRule, fmt.Sprintf("pool %q has no rules", poolName)}
	}
	v := p.verdict(leaf, m)
	denial := v.denial
	if denial == nil {
		denial = judgeTime(leaf, now)
	}
	if denial != nil {
		return Caller{cert: v.caller.cert}, denial
	}
	c := v.caller
	c.cert.Subject = "" // the rule's word for it is the ID
	return c, nil
}

func judgeTime(leaf *x509.Certificate, now time.Time) *Denial {
	switch {
	case now.After(leaf.NotAfter):
		return &Denial{Expired, leaf.NotAfter.UTC().Format(time.RFC3339)}
	case now.Before(leaf.NotBefore):
		return &Denial{NotYetValid, leaf.NotBefore.UTC().Format(time.RFC3339)}
	}
	return nil
}

func (p *pool) verdict(leaf *x509.Certificate, m *Map) verdict {
	p.mu.RLock()
	v, ok := p.verdicts[string(leaf.Raw)]
	p.mu.RUnlock()
	if ok {
		return v
	}
	v.caller, v.denial = p.judge(leaf, m)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.verdicts) >= maxVerdicts {
		clear(p.verdicts)
	}
	p.verdicts[string(leaf.Raw)] = v
	return v
}

func (p *pool) judge(leaf *x509.Certificate, m *Map) (Caller, *Denial) {
	c := Stranger(leaf)
	if d := m.req.judge(leaf, p.role); d != nil {
		return c, d
	}
	names, err := rawAltNames(leaf)
	if err != nil {
		return c, &Denial{BadNames, err.Error()}
	}
	subject, err := subjectOf(leaf.RawSubject)
	if err != nil {
		return c, &Denial{BadNames, err.Error()}
	}
	id, rule, denial := p.match(names, subject)
	if denial != nil {
		return c, denial
	}
	principal, known := m.principals[PrincipalKey(p.role, id)]
	switch {
	case !known:
		return c, &Denial{UnknownPrincipal, PrincipalKey(p.role, id)}
	case !principal.Enabled:
		return c, &Denial{Disabled, fmt.Sprintf("%s: %s", PrincipalKey(p.role, id), principal.Reason)}
	}
	c.role, c.id, c.rule, c.row = p.role, id, rule, &principal
	if len(principal.GatewayFor) > 0 {
		c.role = RoleGateway
	}
	return c, nil
}

// match evaluates every rule. If none matches, the denial is of the rule that came
// closest: one that failed for another reason than being about someone else.
func (p *pool) match(names altNames, subject distinguishedName) (id, rule string, denial *Denial) {
	var matched []string
	for i := range p.rules {
		got, d := p.rules[i].match(names, subject)
		switch {
		case d == nil:
			id, rule = got, p.rules[i].ID
			matched = append(matched, rule)
		case denial == nil || denial.Reason == NoRule:
			denial = d
		}
	}
	switch len(matched) {
	case 0:
		return "", "", denial
	case 1:
		return id, rule, nil
	}
	return "", "", &Denial{Ambiguous, "rules " + strings.Join(matched, " and ") + " match"}
}

// judge says what is wrong with a certificate for a role, whoever it names. Go's
// own verifier lets all of this pass in a client's leaf.
func (req Requirements) judge(leaf *x509.Certificate, role Role) *Denial {
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if role == RoleKME {
		usages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	got := slices.Sorted(slices.Values(leaf.ExtKeyUsage))
	switch {
	case leaf.IsCA, leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return &Denial{Reason: NotLeaf}
	case leaf.KeyUsage != x509.KeyUsageDigitalSignature:
		return &Denial{BadKeyUsage, "must be exactly digitalSignature"}
	case !slices.Equal(got, usages) || len(leaf.UnknownExtKeyUsage) > 0:
		return &Denial{BadEKU, fmt.Sprintf("must be exactly that of a %s", role)}
	case !slices.Contains(req.Keys, kindOf(leaf.PublicKey)):
		return &Denial{BadKeyType, fmt.Sprintf("%s %T", kindOf(leaf.PublicKey), leaf.PublicKey)}
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life > req.MaxLifetime {
		return &Denial{BadLifetime, fmt.Sprintf("%v is longer than %v", life, req.MaxLifetime)}
	}
	return judgeRole(leaf, role, req.Role)
}

func kindOf(public any) KeyKind {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return ECDSAP256
		case elliptic.P384():
			return ECDSAP384
		}
	case ed25519.PublicKey:
		return Ed25519
	}
	return ""
}
