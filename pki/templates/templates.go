// Package templates holds the certificate profiles of the three roles as step
// templates, the form that the stock step CLI and step-ca read too. A profile
// takes nothing from the request but its key; see pki/authority for the check
// that follows it.
package templates

import _ "embed"

// The profiles. Beside what step gives every template they need the variables TrustDomain
// ("lab.test"), CRL (the URL of the CRL) and Role (the value of identity.RoleExtension,
// base64).
var (
	//go:embed sae.tpl
	SAE string
	//go:embed kme.tpl
	KME string
	//go:embed operator.tpl
	Operator string
	//go:embed server.tpl
	Server string // without TrustDomain and Role: it names nobody
)
