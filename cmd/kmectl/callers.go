package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/policies"
)

type saeCommand struct {
	List    saeListCommand    `cmd:"" default:"1" help:"See the SAEs of the network and whether they are let in."`
	Disable saeDisableCommand `cmd:"" help:"Shut an SAE out at the node's site, at once and whatever certificates it has."`
	Enable  saeEnableCommand  `cmd:"" help:"Let it in again, if no file shuts it out (security officers)."`
}

type saeListCommand struct{}

// Run prints the SAEs.
func (saeListCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	saes, err := client.SAEs(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(struct {
			SAEs []admin.SAE `json:"saes"`
		}{saes})
	}
	var b bytes.Buffer
	for _, sae := range saes {
		fmt.Fprintf(&b, "%-8s %s at %s%s\n", state(sae.Enabled), printable(sae.ID), strings.Join(sae.Homes, ", "), why(sae))
	}
	_, err = s.stdout.Write(b.Bytes())
	return err
}

func state(enabled bool) string {
	if enabled {
		return "enabled"
	}
	return "DISABLED"
}

// why says who disabled an SAE and for what reason.
func why(s admin.SAE) string {
	switch {
	case s.Enabled:
		return ""
	case s.By == "":
		return ": " + printable(s.Reason) + " (principals.yaml)"
	}
	return fmt.Sprintf(": %s (%s, %s)", printable(s.Reason), s.By, clock(s.Since))
}

type saeDisableCommand struct {
	Name   string `arg:"" help:"The SAE."`
	Reason string `required:"" help:"Why, for the record."`
}

// Run shuts an SAE out.
func (c saeDisableCommand) Run(ctx context.Context, s *session) error {
	return s.turn(ctx, func(client *admin.Client) error { return client.DisableSAE(ctx, c.Name, c.Reason) },
		"%s is disabled at this site. At another site it is another operator's to do, or principals.yaml's.\n", c.Name)
}

type saeEnableCommand struct {
	Name      string `arg:"" help:"The SAE."`
	approving `embed:""`
}

// Run lets an SAE in again.
func (c saeEnableCommand) Run(ctx context.Context, s *session) error {
	return s.turn(ctx, func(client *admin.Client) error {
		given, err := c.approvals(ctx, s, client, policies.ActEnableSAE, c.Name)
		if err != nil {
			return err
		}
		return client.EnableSAE(ctx, c.Name, given...)
	},
		"%s is enabled at this site, as far as principals.yaml lets it.\n", c.Name)
}

// turn has the KME do something and says what that was.
func (s *session) turn(ctx context.Context, do func(*admin.Client) error, done string, args ...any) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	if err := do(client); err != nil {
		return p.explain(err, p.unlisted())
	}
	return s.say(map[string]string{"status": "done"}, done, args...)
}

type policyReloadCommand struct {
	Digest    string `help:"Of the policies that you have looked at, as kmectl policy check says it: others are not put in force. With --approval it must be said."`
	approving `embed:""`
}

// Run has a node read its files of policies again.
func (c policyReloadCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	if c.Approval != "" && c.Digest == "" {
		return advise(errors.New("--approval without --digest: which policies have you looked at?"), "nothing was signed or done; kmectl policy check says the digest of a folder")
	}
	given, err := c.approvals(ctx, s, client, policies.ActReload, c.Digest)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	got, err := client.ReloadPolicies(ctx, c.Digest, given...)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	return s.say(got, "policies %s are in force at this node\n", got.Digest)
}
