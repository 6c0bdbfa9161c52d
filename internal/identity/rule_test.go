package identity

import (
	"testing"
	"time"
)

func TestNewMapRefuses(t *testing.T) {
	base := Rule{ID: "x", Pool: "sae", Role: RoleSAE, URI: "qkd://sae.lab.test/{id}", Principal: Placeholder}
	rules := map[string]func(*Rule){
		"no ID":             func(r *Rule) { r.ID = "" },
		"taken ID":          func(r *Rule) { r.ID = "sae-uri" },
		"no pool":           func(r *Rule) { r.Pool = "" },
		"no role":           func(r *Rule) { r.Role = "" },
		"second role":       func(r *Rule) { r.Role, r.URI = RoleKME, "qkd://other/{id}" },
		"same as another":   func(*Rule) {},
		"no attribute":      func(r *Rule) { r.URI, r.Principal = "", "p" },
		"two attributes":    func(r *Rule) { r.Email = "a@b" },
		"no placeholder":    func(r *Rule) { r.URI = "qkd://sae.lab.test/" },
		"placeholder twice": func(r *Rule) { r.URI = "qkd://{id}/{id}" },
		"placeholder first": func(r *Rule) { r.URI = "qkd://{id}.lab.test/x" },
		"port":              func(r *Rule) { r.URI = "qkd://sae.lab.test:1/{id}" },
		"user":              func(r *Rule) { r.URI = "qkd://u@sae.lab.test/{id}" },
		"escape":            func(r *Rule) { r.URI = "qkd://sae.lab.test/%41/{id}" },
		"glob":              func(r *Rule) { r.URI = "qkd://*.lab.test/{id}" },
		"query":             func(r *Rule) { r.URI = "qkd://sae.lab.test/?/{id}" },
		"capitals":          func(r *Rule) { r.URI = "qkd://SAE.lab.test/{id}" },
		"opaque":            func(r *Rule) { r.URI = "qkd:sae/{id}" },
		"fixed principal":   func(r *Rule) { r.Principal = "root" },
		"empty principal":   func(r *Rule) { r.URI, r.Principal = "qkd://sae.lab.test/x", "" },
		"e-mail capitals":   func(r *Rule) { r.URI, r.Email, r.Principal = "", "A@b", "a" },
		"e-mail no @":       func(r *Rule) { r.URI, r.Email, r.Principal = "", "ab", "a" },
		"e-mail two @":      func(r *Rule) { r.URI, r.Email, r.Principal = "", "a@b@c", "a" },
		"DN unknown":        func(r *Rule) { r.URI, r.DN, r.Principal = "", "XX=a", "a" },
		"DN empty value":    func(r *Rule) { r.URI, r.DN, r.Principal = "", "CN=", "a" },
		"DN no equals":      func(r *Rule) { r.URI, r.DN, r.Principal = "", "CN", "a" },
		"DN hex":            func(r *Rule) { r.URI, r.DN, r.Principal = "", "CN=#0401", "a" },
		"DN bare quote":     func(r *Rule) { r.URI, r.DN, r.Principal = "", `CN="a"`, "a" },
		"DN bad escape":     func(r *Rule) { r.URI, r.DN, r.Principal = "", `CN=a\x`, "a" },
	}
	for name, edit := range rules {
		r := base
		edit(&r)
		if _, err := NewMap(append(testRules(), r), testRequirements(), nil); err == nil {
			t.Errorf("%s: rule %+v is accepted", name, r)
		}
	}
	for name, req := range map[string]Requirements{
		"no keys":     {MaxLifetime: time.Hour},
		"no lifetime": {Keys: []KeyKind{Ed25519}},
		"rsa":         {Keys: []KeyKind{"rsa"}, MaxLifetime: time.Hour},
	} {
		if _, err := NewMap(testRules(), req, nil); err == nil {
			t.Errorf("%s: %+v is accepted", name, req)
		}
	}
}
