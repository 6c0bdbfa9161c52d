package admin

import (
	"context"
	"fmt"

	"github.com/qutemail/kme/internal/identity"
)

// Finding is what a node has found out about one thing that it depends on.
type Finding struct {
	About string `json:"about"`       // hsm, database, peer km2 ...
	OK    bool   `json:"ok"`          //
	Says  string `json:"says"`        // how it stands
	Do    string `json:"do,omitzero"` // what to do about it, if it is not ok
}

// Good is a finding that something is well.
func Good(about, says string, args ...any) Finding {
	return Finding{About: about, OK: true, Says: fmt.Sprintf(says, args...)}
}

// Bad is a finding that something is not, and what to do.
func Bad(about, do, says string, args ...any) Finding {
	return Finding{About: about, Says: fmt.Sprintf(says, args...), Do: do}
}

// findingsObject is the body of the list.
type findingsObject struct {
	Findings []Finding `json:"findings"`
}

// pathDoctor is posted to: a key of each link may be burned for it.
const pathDoctor = "/api/v1/doctor"

func (c Config) doctor(ctx context.Context, caller identity.Caller, rid string, _ struct{}) (findingsObject, error) {
	found, err := c.Backend.Doctor(ctx, caller, rid)
	return findingsObject{found}, err
}

// Doctor has the node look at everything that it depends on, now. If the caller may act,
// a key of each link is compared with the other end's, and burned.
func (c *Client) Doctor(ctx context.Context) ([]Finding, error) {
	var o findingsObject
	err := c.post(ctx, pathDoctor, struct{}{}, &o)
	return o.Findings, err
}
