// Package identity holds who a party is: SAEs, KMEs and operators, and the one
// way in which a certificate becomes a Caller (Map.Judge). No header, path or
// body field names a caller anywhere in this project.
package identity

import (
	"fmt"
	"unicode"
	"unicode/utf8"
)

// maxIDBytes bounds identities of foreign PKIs; our own CAs issue at most 64.
const maxIDBytes = 512

// SAE is a Secure Application Entity's ID. The zero SAE is nobody.
type SAE struct{ id string }

// KME is a Key Management Entity's ID. The zero KME is nobody.
type KME struct{ id string }

// Operator is the ID of a person or program that runs a KME.
type Operator struct{ id string }

// ParseSAE reads an SAE ID: 1 to 512 bytes of printable UTF-8, compared byte by byte.
func ParseSAE(s string) (SAE, error) {
	if err := checkID(s); err != nil {
		return SAE{}, fmt.Errorf("SAE ID %w", err)
	}
	return SAE{s}, nil
}

// ParseKME reads a KME ID by the rules of ParseSAE.
func ParseKME(s string) (KME, error) {
	if err := checkID(s); err != nil {
		return KME{}, fmt.Errorf("KME ID %w", err)
	}
	return KME{s}, nil
}

func checkID(s string) error {
	if s == "" {
		return fmt.Errorf("is empty")
	}
	if len(s) > maxIDBytes {
		return fmt.Errorf("is longer than %d bytes", maxIDBytes)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("is not UTF-8")
	}
	blank := true
	for _, r := range s {
		if r != ' ' && !unicode.IsGraphic(r) {
			return fmt.Errorf("has a character that cannot be printed")
		}
		blank = blank && unicode.IsSpace(r)
	}
	if blank {
		return fmt.Errorf("is blank")
	}
	return nil
}

// String returns the ID.
func (s SAE) String() string { return s.id }

// String returns the ID.
func (k KME) String() string { return k.id }

// String returns the ID.
func (o Operator) String() string { return o.id }

// MarshalText implements encoding.TextMarshaler.
func (s SAE) MarshalText() ([]byte, error) { return []byte(s.id), nil }

// UnmarshalText implements encoding.TextUnmarshaler with the rules of ParseSAE.
func (s *SAE) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSAE(string(text))
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (k KME) MarshalText() ([]byte, error) { return []byte(k.id), nil }

// UnmarshalText implements encoding.TextUnmarshaler with the rules of ParseKME.
func (k *KME) UnmarshalText(text []byte) (err error) {
	*k, err = ParseKME(string(text))
	return err
}

// Role is the part that a caller plays. Each role has its own CA and its own door.
type Role string

// The roles.
const (
	RoleNone     Role = "" // a good chain that no rule, or more than one, names
	RoleSAE      Role = "sae"
	RoleKME      Role = "kme"
	RoleOperator Role = "operator"

	// RoleGateway is no role of a certificate: it is an SAE's, whose principal may act
	// for others and is no SAE itself.
	RoleGateway Role = "gateway"
)

// Duty is what an operator may do besides looking.
type Duty string

// The duties. Every operator may view.
const (
	Viewer          Duty = "viewer"
	Operating       Duty = "operator"         // what runs the site day by day, and shutting a caller out
	SecurityOfficer Duty = "security-officer" // letting a caller in again; with a second one, what destroys or exposes
	Auditor         Duty = "auditor"          // reading who did what with whom
)

// Duties are all of them.
var Duties = []Duty{Viewer, Operating, SecurityOfficer, Auditor}
