package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/policies"
)

// approvalsCommand asks, whenever somebody wants to know, who stood behind what takes two
// officers. What they signed is in the log, and needs no KME to hold.
type approvalsCommand struct {
	trusted
	Offline  string `type:"existingfile" placeholder:"FILE" help:"Read this bundle, and ask no KME."`
	Origin   int64  `help:"The log of this origin (the present one)."`
	Officers string `type:"existingfile" placeholder:"FILE" help:"The certificates (PEM) of the CAs of operators: one of them must have issued each officer's."`
}

// Run prints each act that two officers have approved. It fails if what they signed does
// not hold for one of them, or one that takes two is without.
func (c approvalsCommand) Run(ctx context.Context, s *session) error {
	var cas *pki.Issuers
	if c.Officers != "" {
		var err error
		if cas, err = pki.LoadIssuers(c.Officers); err != nil {
			return err
		}
	}
	f, err := s.fetch(ctx, c.Offline, "", c.Origin)
	if err != nil {
		return err
	}
	defer f.close()
	key, witnesses, err := c.keys(s, f.bundle.Key)
	if err != nil {
		return err
	}
	cp, names, err := audit.OpenCheckpoint(f.bundle.Signed, key, witnesses...)
	if err == nil {
		err = cosignedByAll(names, witnesses)
	}
	if err != nil {
		return err
	}
	acts, bad := 0, 0
	err = audit.Proved(ctx, cp, f.bundle.First, f.bundle.First+f.bundle.Leaves, f.bundle, func(row audit.Row) error {
		e, err := audit.ParseEvent(row.Body)
		if err != nil || !byTwo(e) {
			return err
		}
		acts++
		if err := s.printFound(admin.Found{Leaf: row.Leaf, Text: string(row.Body)}); err != nil {
			return err
		}
		said, err := approvedBy(e, cas)
		if err != nil {
			bad++
			said = "NOT APPROVED BY TWO: " + err.Error()
		}
		_, err = fmt.Fprintf(s.stderr, "         %s\n", printable(said))
		return err
	})
	switch {
	case err != nil:
		return err
	case bad > 0:
		return fmt.Errorf("%d of %d acts that take two officers are without what two have signed", bad, acts)
	}
	fmt.Fprintf(s.stderr, "kmectl: %d acts in leaves %d to %d of %s, each signed for by two\n", acts, f.bundle.First, f.bundle.First+f.bundle.Leaves-1, cp.Origin)
	if cas == nil {
		fmt.Fprintln(s.stderr, "kmectl: NOT CHECKED: whose the certificates are. Give --officers")
	}
	return nil
}

// byTwo says whether an event is of an act that was done by two officers, or must have been.
func byTwo(e audit.Event) bool {
	always := e.Action == audit.Compromise && e.Actor.Role == string(identity.RoleOperator)
	return e.Outcome == audit.Done && (always || len(e.Approvals) > 0)
}

// actions are what the events of acts say that take two officers.
var actions = map[string]audit.Action{
	admin.ActCompromise: audit.Compromise, policies.ActCleanup: audit.Cleanup, policies.ActEnableSAE: audit.Enable, policies.ActReload: audit.Policies,
}

// approvedBy says who has approved an event's act, and in which words.
func approvedBy(e audit.Event, cas *pki.Issuers) (string, error) {
	act, officers, err := approval.Recheck(e.Approvals, e.Site+"/"+e.Node, e.At)
	if err != nil {
		return "", err
	}
	if name, _, _ := strings.Cut(string(act), " "); actions[name] != e.Action {
		return "", fmt.Errorf("they approve %q, and this is %s", act, e.Action)
	}
	if !slices.ContainsFunc(officers, func(leaf *x509.Certificate) bool { return isActor(leaf, e.Actor) }) {
		return "", fmt.Errorf("neither is of %s, who had it done", e.Actor.ID)
	}
	for _, leaf := range officers {
		if cas != nil && !cas.Issued(leaf) {
			return "", fmt.Errorf("no CA of operators has issued the certificate of %s", leaf.Subject)
		}
	}
	return fmt.Sprintf("%q, approved by %s and %s", act, officers[0].Subject, officers[1].Subject), nil
}

// isActor says whether a certificate is that of the operator who acted: the one that the
// connection had shown, or another one of that name.
func isActor(leaf *x509.Certificate, a audit.Actor) bool {
	sum := sha256.Sum256(leaf.Raw)
	return hex.EncodeToString(sum[:]) == a.Fingerprint || leaf.Subject.CommonName == a.ID
}
