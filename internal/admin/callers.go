package admin

import (
	"context"
	"time"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// SAE is how an SAE stands at a site.
type SAE struct {
	ID      string    `json:"id"`
	Homes   []string  `json:"homes"`
	Enabled bool      `json:"enabled"`
	Reason  string    `json:"reason,omitzero"` // why not
	By      string    `json:"by,omitzero"`     // the operator who switched it off; "" if a file did
	Since   time.Time `json:"since,omitzero"`  // likewise
}

// Certificate is one with which an SAE has come to a node.
type Certificate struct {
	SAE    string
	Serial string // decimal
	Ends   time.Time
	Last   time.Time // when a connection of it was open last
	Open   int       // connections that are open
}

// Policies are policies that are, or were, or may be in force.
type Policies struct {
	Digest string `json:"policies_digest,omitzero"` // of the files: SHA-256, hex
}

// reloadObject is the body of a reload.
type reloadObject struct {
	Policies // that the caller has looked at; may be missing
	approved
}

// Callers is the part of a Backend that says who is let in.
type Callers interface {
	SAEs(ctx context.Context, c identity.Caller, rid string) ([]SAE, error)
	// DisableSAE shuts an SAE out at this site, whatever certificates it has, from the
	// moment at which it returns at this node, and within a second at the others.
	DisableSAE(ctx context.Context, c identity.Caller, rid string, sae identity.SAE, reason string) error
	// EnableSAE takes that back. What a file disables stays disabled.
	EnableSAE(ctx context.Context, c identity.Caller, rid string, given []approval.Approval, sae identity.SAE) error
	// PolicyFiles is what ReloadPolicies would put in force now.
	PolicyFiles(ctx context.Context, c identity.Caller, rid string) (Policies, error)
	// ReloadPolicies puts the files of policies in force at this node as they are now,
	// or, if anything is wrong with them, none of them. If looked is not zero they must be
	// those; officers sign for those that they have looked at.
	ReloadPolicies(ctx context.Context, c identity.Caller, rid string, given []approval.Approval, looked Policies) (Policies, error)
}

// maxReason bounds the reason for which an SAE is disabled, in bytes.
const maxReason = 200

// switchObject is the body of disable and enable.
type switchObject struct {
	ID     string `json:"id"`
	Reason string `json:"reason,omitzero"` // of disable
	approved
}

// approved is the part of a body in which two officers stand behind an act: the one
// who calls, and another one. Without it, one does.
type approved struct {
	Approvals []approval.Approval `json:"approvals,omitzero"`
}

// saesObject is the body of the list.
type saesObject struct {
	SAEs []SAE `json:"saes"`
}

// doneObject answers an act that has nothing to tell.
type doneObject struct {
	Status string `json:"status"`
}

func (c Config) saes(ctx context.Context, caller identity.Caller, rid string) (saesObject, error) {
	saes, err := c.Backend.SAEs(ctx, caller, rid)
	return saesObject{saes}, err
}

func (c Config) disableSAE(ctx context.Context, caller identity.Caller, rid string, q switchObject) (doneObject, error) {
	sae, err := identity.ParseSAE(q.ID)
	switch {
	case err != nil:
		return doneObject{}, refusal{problem.New(problem.Invalid, "id: %v", err)}
	case q.Reason == "" || len(q.Reason) > maxReason:
		return doneObject{}, refusal{problem.New(problem.Invalid, "a reason of 1 to %d bytes is wanted", maxReason)}
	}
	return doneObject{"disabled"}, c.Backend.DisableSAE(ctx, caller, rid, sae, q.Reason)
}

func (c Config) enableSAE(ctx context.Context, caller identity.Caller, rid string, q switchObject) (doneObject, error) {
	sae, err := identity.ParseSAE(q.ID)
	if err != nil {
		return doneObject{}, refusal{problem.New(problem.Invalid, "id: %v", err)}
	}
	return doneObject{"enabled"}, c.Backend.EnableSAE(ctx, caller, rid, q.Approvals, sae)
}

func (c Config) reloadPolicies(ctx context.Context, caller identity.Caller, rid string, q reloadObject) (Policies, error) {
	return c.Backend.ReloadPolicies(ctx, caller, rid, q.Approvals, q.Policies)
}

// The paths of what acts.
const (
	pathDisable = "/api/v1/saes/disable"
	pathEnable  = "/api/v1/saes/enable"
	pathReload  = "/api/v1/policies/reload"
)

// SAEs lists the SAEs of the network, as they stand at the node's site.
func (c *Client) SAEs(ctx context.Context) ([]SAE, error) {
	var o saesObject
	err := c.get(ctx, "/api/v1/saes", &o)
	return o.SAEs, err
}

// DisableSAE shuts an SAE out at the node's site.
func (c *Client) DisableSAE(ctx context.Context, id, reason string) error {
	return c.post(ctx, pathDisable, switchObject{ID: id, Reason: reason}, new(doneObject))
}

// EnableSAE takes DisableSAE back.
func (c *Client) EnableSAE(ctx context.Context, id string, given ...approval.Approval) error {
	return c.post(ctx, pathEnable, switchObject{ID: id, approved: approved{given}}, new(doneObject))
}

// ReloadPolicies has the node read its files of policies again. With a digest they must be
// those that have it.
func (c *Client) ReloadPolicies(ctx context.Context, digest string, given ...approval.Approval) (Policies, error) {
	var p Policies
	err := c.post(ctx, pathReload, reloadObject{Policies{digest}, approved{given}}, &p)
	return p, err
}
