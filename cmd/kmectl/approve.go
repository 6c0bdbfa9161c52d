package main

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/policies"
)

// approveCommand is for the second officer. It asks no KME, unless it leaves the approval there.
type approveCommand struct {
	Act  string        `arg:"" help:"What is approved, in the words of the KME: 'cleanup', for example."`
	Node string        `required:"" placeholder:"KME/NODE" help:"The node at which it may be done, such as km1/km1-a."`
	For  time.Duration `default:"10m" help:"For how long, at most an hour (${default})."`

	Leave bool `help:"Leave it at the node, where the other officer's console shows it, rather than print it."`
}

// Run prints an approval, signed with the key of the officer's certificate.
func (c approveCommand) Run(ctx context.Context, s *session) error {
	act, err := approval.ReadAct(c.Act)
	if err != nil {
		return err
	}
	if c.For <= 0 || c.For > approval.MaxLife {
		return fmt.Errorf("an approval is good for %v at the most", approval.MaxLife)
	}
	a, err := s.sign(act, c.Node, time.Now().Add(c.For))
	if err != nil {
		return err
	}
	if c.Leave {
		p, client, err := s.operator()
		if err != nil {
			return err
		}
		if err := client.LeaveApproval(ctx, a); err != nil {
			return p.explain(err, p.unlisted())
		}
		return s.say(a, "it waits at %s for another officer, until %s\n", c.Node, clock(a.Expires))
	}
	text, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.stdout, "%s\n", text)
	return err
}

// sign approves with the certificate of the operator who calls.
func (s *session) sign(act approval.Act, node string, until time.Time) (approval.Approval, error) {
	p, err := s.party(operatorProfiles)
	if err != nil {
		return approval.Approval{}, err
	}
	config, err := p.tls(time.Now())
	if err != nil {
		return approval.Approval{}, err
	}
	cert := config.Certificates[0]
	key, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return approval.Approval{}, fmt.Errorf("the key of %s signs nothing", p.cert)
	}
	return approval.Sign(act, node, until, cert.Leaf, key)
}

// approving is what a command has that may take two officers.
type approving struct {
	Approval string `type:"existingfile" placeholder:"FILE" help:"The other officer's word for it: kmectl approve."`
}

// approvals are the other officer's, if there is one, and then the caller's own. What the
// caller signs is the act of this command at the node that it calls, and never what
// somebody's file says instead.
func (a approving) approvals(ctx context.Context, s *session, client *admin.Client, name string, on ...string) ([]approval.Approval, error) {
	if a.Approval == "" {
		return nil, nil
	}
	text, err := os.ReadFile(a.Approval)
	if err != nil {
		return nil, err
	}
	var other approval.Approval
	if err := json.Unmarshal(text, &other); err != nil {
		return nil, fmt.Errorf("reading %s: %w", a.Approval, err)
	}
	act, err := approval.NewAct(name, on...)
	if err != nil {
		return nil, err
	}
	n, err := client.Node(ctx)
	if err != nil {
		return nil, err
	}
	node := n.KME + "/" + n.Node
	if _, err := other.Verify(act, node, time.Now()); err != nil {
		return nil, advise(fmt.Errorf("%s is no approval of this: %w", a.Approval, err), "nothing was signed or done; the other officer says kmectl approve --node %s '%s'", node, act)
	}
	own, err := s.sign(act, node, other.Expires)
	if err != nil {
		return nil, err
	}
	return []approval.Approval{other, own}, nil
}

// cleanupCommand may take two officers.
type cleanupCommand struct {
	approving `embed:""`
}

// Run has overdue keys ended.
func (c cleanupCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	given, err := c.approvals(ctx, s, client, policies.ActCleanup)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	n, err := client.Cleanup(ctx, given...)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	return s.say(map[string]int{"removed_count": n}, "%d expired keys removed\n", n)
}
