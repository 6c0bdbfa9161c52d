// Package deploy holds what an installation needs beside the programs, and lets them
// print what they can.
package deploy

import _ "embed"

// KmedYAML is the configuration of kmed with every member there is, commented.
//
//go:embed kmed.yaml
var KmedYAML string
