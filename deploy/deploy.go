// Package deploy holds what an installation needs beside the programs, and lets them
// print what they can.
package deploy

import _ "embed"

// The configuration of each daemon with every member there is, commented.
var (
	//go:embed kmed.yaml
	KmedYAML string

	//go:embed kme-ca.yaml
	KMECAYAML string

	//go:embed qlink.yaml
	QlinkYAML string
)
