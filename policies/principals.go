package policies

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
)

type principalsDoc struct {
	Version    version        `yaml:"version"`
	Require    requireDoc     `yaml:"require"`
	Rules      []ruleDoc      `yaml:"rules"`
	Principals []principalDoc `yaml:"principals"`

	TwoOfficers []word `yaml:"two_officers"`
}

// Acts of operators for which a site may want two officers.
const (
	ActCleanup   = "cleanup"         // end what is overdue
	ActEnableSAE = "enable-sae"      // let an SAE in again that was switched off
	ActReload    = "reload-policies" // over the operator door
)

// TwoOfficers says whether the site wants two officers for the act of that name.
func (s *Set) TwoOfficers(act string) bool { return slices.Contains(s.twoOfficers, act) }

func (doc principalsDoc) actsOfTwo(where document) ([]string, error) {
	var acts []string
	for i, w := range doc.TwoOfficers {
		if w.text != ActCleanup && w.text != ActEnableSAE && w.text != ActReload {
			return nil, where.entry("two_officers", i).errorf("two_officers: %q is none of %s, %s and %s", w.text, ActCleanup, ActEnableSAE, ActReload)
		}
		acts = append(acts, w.text)
	}
	return acts, nil
}

type requireDoc struct {
	Keys        []word   `yaml:"keys"`
	MaxLifetime lifetime `yaml:"max_lifetime"`
	Role        bool     `yaml:"role_extension"`
}

type ruleDoc struct {
	ID        word `yaml:"id"`
	Pool      word `yaml:"pool"`
	Role      word `yaml:"role"`
	URI       word `yaml:"uri"`
	Email     word `yaml:"email"`
	DN        word `yaml:"dn"`
	Principal word `yaml:"principal"`
}

type principalDoc struct {
	Role    word  `yaml:"role"`
	ID      word  `yaml:"id"`
	Enabled *bool `yaml:"enabled"`
	Reason  word  `yaml:"reason"`

	RequireHybrid bool   `yaml:"require_hybrid"` // with role sae
	GatewayFor    []word `yaml:"gateway_for"`    // with role sae: the SAEs that it may act for
	Duties        []word `yaml:"duties"`         // with role operator
}

// parsePrincipals reads principals.yaml against the network that it belongs to. Besides
// the map it returns the acts that take two officers.
func parsePrincipals(file string, text []byte, network Network) (_ *identity.Map, twoOfficers []string, err error) {
	var doc principalsDoc
	where, err := decode(file, text, &doc)
	if err != nil {
		return nil, nil, err
	}
	if twoOfficers, err = doc.actsOfTwo(where); err != nil {
		return nil, nil, err
	}
	if doc.Version != 1 {
		return nil, nil, place{file, 1, 1}.errorf("no version: 1")
	}
	req := identity.Requirements{MaxLifetime: time.Duration(doc.Require.MaxLifetime), Role: doc.Require.Role}
	for _, k := range doc.Require.Keys {
		req.Keys = append(req.Keys, identity.KeyKind(k.text))
	}
	principals := make(map[string]identity.Principal)
	for i, p := range doc.Principals {
		if err := addPrincipal(p, network, principals); err != nil {
			return nil, nil, where.entry("principals", i).or(p.ID).errorf("%w", err)
		}
	}
	rules := make([]identity.Rule, len(doc.Rules))
	for i, r := range doc.Rules {
		if err := checkHost(r, network.TrustDomain); err != nil {
			return nil, nil, where.entry("rules", i).or(r.URI).errorf("%w", err)
		}
		rules[i] = identity.Rule{
			ID: r.ID.text, Pool: r.Pool.text, Role: identity.Role(r.Role.text),
			URI: r.URI.text, Email: r.Email.text, DN: r.DN.text, Principal: r.Principal.text,
		}
	}
	m, err := identity.NewMap(rules, req, principals)
	if bad, ok := errors.AsType[*identity.RuleError](err); ok {
		return nil, nil, where.entry("rules", bad.Index).or(doc.Rules[bad.Index].ID).errorf("%w", bad.Err)
	}
	if err != nil {
		return nil, nil, place{file, 1, 1}.errorf("%w", err)
	}
	return m, twoOfficers, nil
}

// checkHost refuses a URI rule whose host is not that of its role in our trust
// domain: X.509 name constraints see the host only, so the host is what keeps one
// role's CA from naming another role.
func checkHost(r ruleDoc, trustDomain string) error {
	if r.URI.text == "" {
		return nil
	}
	want := "qkd://" + r.Role.text + "." + trustDomain + "/"
	if !strings.HasPrefix(r.URI.text, want) {
		return fmt.Errorf("the uri of a rule for the role %q must start with %s", r.Role.text, want)
	}
	return nil
}

func addPrincipal(p principalDoc, network Network, principals map[string]identity.Principal) error {
	row := identity.Principal{Reason: p.Reason.text, RequireHybrid: p.RequireHybrid}
	var err error
	if row.GatewayFor, err = gatewayFor(p, network); err != nil {
		return err
	}
	if row.Duties, err = dutiesOf(p); err != nil {
		return err
	}
	if len(row.GatewayFor) == 0 {
		if err := checkKnown(p, network); err != nil {
			return err
		}
	}
	key := identity.PrincipalKey(identity.Role(p.Role.text), p.ID.text)
	if _, ok := principals[key]; ok {
		return fmt.Errorf("principal %s is there twice", key)
	}
	if p.Enabled == nil {
		return fmt.Errorf("principal %s: enabled must be true or false", key)
	}
	if !*p.Enabled && p.Reason.text == "" {
		return fmt.Errorf("principal %s is disabled without a reason", key)
	}
	row.Enabled = *p.Enabled
	principals[key] = row
	return nil
}

// gatewayFor is whom a row lets act for others. A gateway is a name of its own: one
// that is an SAE as well would be two callers with one certificate.
func gatewayFor(p principalDoc, network Network) ([]identity.SAE, error) {
	if p.GatewayFor == nil {
		return nil, nil
	}
	self, err := identity.ParseSAE(p.ID.text)
	if err != nil {
		return nil, err
	}
	_, known := network.SAEs[self]
	switch {
	case identity.Role(p.Role.text) != identity.RoleSAE:
		return nil, fmt.Errorf("gateway_for is for the role sae, not %q", p.Role.text)
	case known:
		return nil, fmt.Errorf("the gateway %q is an SAE of network.yaml: give it a name of its own", self)
	case len(p.GatewayFor) == 0:
		return nil, fmt.Errorf("gateway_for of %q lists nobody", self)
	}
	var list []identity.SAE
	for _, w := range p.GatewayFor {
		sae, err := identity.ParseSAE(w.text)
		if err != nil {
			return nil, err
		}
		if _, ok := network.SAEs[sae]; !ok {
			return nil, fmt.Errorf("gateway_for of %q: SAE %q is not in network.yaml", self, sae)
		}
		if slices.Contains(list, sae) {
			return nil, fmt.Errorf("gateway_for of %q lists %q twice", self, sae)
		}
		list = append(list, sae)
	}
	return list, nil
}

func dutiesOf(p principalDoc) ([]identity.Duty, error) {
	var duties []identity.Duty
	for _, w := range p.Duties {
		d := identity.Duty(w.text)
		switch {
		case identity.Role(p.Role.text) != identity.RoleOperator:
			return nil, fmt.Errorf("duties are for the role operator, not %q", p.Role.text)
		case !slices.Contains(identity.Duties, d):
			return nil, fmt.Errorf("duty %q is none of %v", d, identity.Duties)
		case slices.Contains(duties, d):
			return nil, fmt.Errorf("duty %s is there twice", d)
		}
		duties = append(duties, d)
	}
	return duties, nil
}

// checkKnown refuses an SAE or KME that network.yaml does not have: a name that is
// in one file only is most often a name mistyped.
func checkKnown(p principalDoc, network Network) error {
	switch identity.Role(p.Role.text) {
	case identity.RoleSAE:
		sae, err := identity.ParseSAE(p.ID.text)
		if err != nil {
			return err
		}
		if _, ok := network.SAEs[sae]; !ok {
			return fmt.Errorf("SAE %q is not in network.yaml", sae)
		}
	case identity.RoleKME:
		kme, err := identity.ParseKME(p.ID.text)
		if err != nil {
			return err
		}
		if _, ok := network.KMEs[kme]; !ok {
			return fmt.Errorf("KME %q is not in network.yaml", kme)
		}
	case identity.RoleOperator:
		if !plainName(p.ID.text) {
			return fmt.Errorf("operator %q is not [a-z0-9._@-]{1,64}", p.ID.text)
		}
	default:
		return fmt.Errorf("role %q is not sae, kme or operator", p.Role.text)
	}
	return nil
}
